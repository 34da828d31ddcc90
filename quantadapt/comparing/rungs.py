"""Successive halving, carried out: the rungs are chosen by what the first run takes, and what is
dropped is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import QuantadaptError
from . import halving
from .grid import Run
from .results import badness
from .verdict import stat_words
from .work import Work


@dataclass(frozen=True)
class Rungs:
    """A comparison that has a budget."""

    work: Work

    def go(self, hours: float) -> None:
        """Train all cells a little, and the better ones longer, in so many hours."""
        labels = list(dict.fromkeys(run.cell.label for run in self.work.runs))
        steps = self._steps(labels)
        rungs = self._rungs(labels, steps, 3600 * hours)
        for index, rung in enumerate(rungs):
            last = index == len(rungs) - 1
            alive = [run for run in self.work.todo if run.cell.label in labels]
            self.work.batch(alive, None if last else rung)
            if not last:
                labels = self._survivors(labels, rung, rungs[index + 1 :])

    def _steps(self, labels: Sequence[str]) -> int:
        made = self.work.cells[labels[0]].plan
        assert made is not None
        return made.spec.train.max_steps

    def _rungs(self, labels: Sequence[str], steps: int, budget: float) -> list[int]:
        """Return the rungs, which are decided once, by what the first run takes."""
        journal = self.work.folder.journal
        if journal.rungs or not self.work.todo:
            return journal.rungs
        (cost, each), seeds = self._cost(len(labels), steps), len(self.work.comparison.grid["seed"])
        bases = each * self.work.bases.count(self.work.runs)
        rungs = halving.choose(len(labels), steps, cost, seeds, budget - bases)
        runs = len(labels) * seeds
        if (needed := runs * cost.of(rungs[0]) + bases) > budget:
            raise self._too_small(runs, rungs[0], needed)
        journal.rungs = rungs
        self.work.folder.save()
        guess = halving.seconds(len(labels), rungs, cost, seeds) + bases
        self.work.tell("rungs", {"rungs": rungs, "cells": len(labels), "seconds": guess})
        return rungs

    def _cost(self, cells: int, steps: int) -> tuple[halving.Cost, float]:
        """Return what a run takes, and the seconds for a base that is calibrated, which is done
        once; going by the first run, to the lowest rung that there may be."""
        lowest = halving.ladder(steps, halving.most_rungs(cells, steps))[0]
        first = min(self.work.todo, key=lambda run: run.cell.reference)
        self.work.batch([first], lowest)
        record = self.work.folder.record(first.name)
        if (result := record.results.get(str(lowest))) is None:
            what = f"there is nothing to plan by, as the first run has failed: {record.reason}"
            raise QuantadaptError(what, fix=f"see {self.work.folder.log(first.name)}")
        train = float(result.get("train_seconds") or 0.0)
        base = _base_seconds(result)
        return halving.Cost(max(record.seconds - train - base, 0.0), train / lowest), base

    def _too_small(self, runs: int, steps: int, needed: float) -> QuantadaptError:
        hours = self.work.comparison.options.budget
        what = f"the budget of {hours:g} hours is too small: {runs} runs of {steps} steps alone"
        what += f" take about {needed / 3600:.2g} hours, going by the first"
        fix = "raise --budget, or take fewer cells, seeds or held-out examples"
        return QuantadaptError(what, fix=fix, where="compare.budget")

    def _survivors(self, labels: Sequence[str], rung: int, ahead: Sequence[int]) -> list[str]:
        """Return the cells that go on, and note why the others do not."""
        found: dict[str, float] = {}
        for label in labels:
            values = [self._badness(run, rung) for run in self.work.runs if run.cell.label == label]
            known = [value for value in values if value is not None]
            if known:
                found[label] = sum(known) / len(known)
        if not found:
            raise QuantadaptError(f"no run has come to {rung} steps", fix="see the table for why")
        before = self._dropped_after(rung)
        if before:  # it was decided when this was begun
            return [label for label in found if label not in before]
        references = [label for label in found if self.work.cells[label].cell.reference]
        kept = halving.survivors(found, references, self._affordable(rung, ahead))
        for run in self.work.runs:
            record = self.work.folder.record(run.name)
            if run.cell.label in found and run.cell.label not in kept:
                record.state, record.reason = "dropped", _after(rung)
        self.work.write()
        told = {label: self._words(label) for label in found if label not in kept}
        self.work.tell("dropped", {"steps": rung, "kept": kept, "dropped": told})
        return kept

    def _dropped_after(self, rung: int) -> set[str]:
        records = {run.cell.label: self.work.folder.record(run.name) for run in self.work.runs}
        return {
            label
            for label, record in records.items()
            if record.state == "dropped" and record.reason == _after(rung)
        }

    def _words(self, label: str) -> str:
        """Return the figure that a cell is judged by."""
        quality = self.work.table.quality
        row = next((row for row in self.work.table.rows if row.label == label), None)
        if quality is None or row is None or quality.name not in row.after:
            return "not measured"
        return f"{quality.name} {stat_words(quality, row.after[quality.name])}"

    def _badness(self, run: Run, rung: int) -> float | None:
        result = self.work.folder.record(run.name).results.get(str(rung))
        return badness(result, self.work.comparison.options.by) if result else None

    def _affordable(self, rung: int, ahead: Sequence[int]) -> int | None:
        """Return how many cells the rest of the budget takes to the next rung, by what they have
        taken so far."""
        left, seeds = self.work.processes.left, len(self.work.comparison.grid["seed"])
        spent = [self._spent(run, rung) for run in self.work.runs]
        trained = [
            float(result.get("train_seconds") or 0.0)
            for run in self.work.runs
            if (result := self.work.folder.record(run.name).results.get(str(rung)))
        ]
        if left is None or not trained:
            return None
        step = sum(trained) / len(trained) / rung
        fixed = max(sum(spent) / len(spent) - step * rung, 0.0)
        each = seeds * halving.Cost(fixed, step).of(ahead[0] - rung)
        return max(1, int(left // each)) if each > 0 else None

    def _spent(self, run: Run, rung: int) -> float:
        """Return the seconds that a run has taken, without those for a base, which is there."""
        record = self.work.folder.record(run.name)
        return max(record.seconds - _base_seconds(record.results.get(str(rung), {})), 0.0)


def _base_seconds(result: Mapping[str, Any]) -> float:
    """Return the seconds that a run took to calibrate its base; 0 where it was taken."""
    return 0.0 if result.get("base_from") else float(result.get("quantize_seconds") or 0.0)


def _after(rung: int) -> str:
    return f"after {rung} steps"
