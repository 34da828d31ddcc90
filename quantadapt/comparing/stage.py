"""`compare`: plan the grid, run what is not there yet, and write the table after each run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FolderInUse, OutputError, PlanRefused, Problem, SpecError
from ..machine import this_machine
from ..memory.cards import GIB, card_for
from ..showing.python import somebody_looks
from ..spec import Spec
from .bases import disk_of
from .folder import check, opened
from .grid import Comparison, comparison
from .planned import PlannedCell, plan_cells
from .processes import Start, obeying_signals, slots
from .results import Table
from .rungs import Rungs
from .verdict import Verdict, verdict
from .work import Listener, Work


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """What a comparison found.

    Attributes:
        folder: where it lies; `compare.html` in it is the page.
        table: a row for each cell.
        verdict: what to take, and what that is based on.
    """

    folder: Path
    table: Table
    verdict: Verdict

    def __repr__(self) -> str:
        return f"<ComparisonResult {str(self.folder)!r}; {self.verdict.words}>"


def compare(
    spec: Spec | Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    output: str | Path,
    seeds: int | None = None,
    overwrite: bool = False,
    retry: bool = False,
    listener: Listener | None = None,
    verbose: bool | None = None,
    **options: Any,
) -> ComparisonResult:
    """Train each cell of a grid, each run in a process of its own, and compare them.

    Called again with the same output, it goes on: what has ended is not run again, what was
    interrupted goes on from its checkpoint.

    Args:
        spec: what all runs have in common: a `Spec`, or what it takes; the model by path or hub id.
        grid: a dotted key of the spec -> the values to try, e.g. {"backend": ["hqq", "bnb-nf4"],
            "adapter": ["lora", "dora"], "train.learning_rate": [1e-4, 3e-4]}.
        output: the folder of the comparison; runs are in `output/runs`.
        seeds: so many runs of each cell.
        overwrite: replace an earlier comparison there.
        retry: run again what failed.
        listener: told what happens.
        verbose: whether to show progress; by default on a terminal and in a notebook, where there
            is no `listener`.
        options: `budget` in hours, `reference`, `by`, `within`, `prefer`, `keep_merged`, `gpus` and
            `at_once`, see `comparing.grid.Options`.

    Raises:
        SpecError, PlanRefused: something is wrong with the grid, or no cell of it can be run.
        OutputError: the folder cannot be used. FolderInUse: somebody else is at work there.
        QuantadaptError: the budget does not suffice for one round of all cells.
    """
    if isinstance(spec, Spec):
        spec = spec.model_dump(mode="json", exclude_unset=True)
    made = comparison(spec or {}, grid or {}, seeds=seeds, **options)
    trusted = (spec or {}).get("trust_remote_code") is True
    with _display(False if listener is not None and verbose is None else verbose) as shown:

        def tell(event: str, facts: Mapping[str, Any]) -> None:
            shown(event, facts)
            if listener is not None:
                listener(event, facts)

        return run_comparison(
            made, output, overwrite=overwrite, retry=retry, trusted=trusted, listener=tell
        )


@contextmanager
def _display(verbose: bool | None) -> Iterator[Listener]:
    """Yield a listener that shows progress, where somebody looks."""
    if not (somebody_looks() if verbose is None else verbose):
        yield lambda event, facts: None
        return
    from ..showing.comparing import CompareDisplay
    from ..showing.screen import Screen

    with CompareDisplay(Screen(sys.stderr, force_jupyter=False)) as shown:
        yield shown


def run_comparison(
    made: Comparison,
    output: str | Path,
    *,
    overwrite: bool = False,
    retry: bool = False,
    trusted: bool = False,
    listener: Listener,
    command: str = "",
    start: Start | None = None,
) -> ComparisonResult:
    """Do what `compare` does, with a comparison that is made already.

    Args:
        trusted: code that comes with the model may run.
        command: the command line that led here, for the page.
        start: starts a process; for tests.
    """
    cells, path = look_at(made, output, overwrite=overwrite), Path(output).expanduser()
    with obeying_signals(), opened(path, made, overwrite=overwrite) as folder:
        work = Work(made, folder, {each.cell.label: each for each in cells}, listener, trusted)
        work.command = command
        work.prepare(retry)
        states = [folder.record(run.name).state for run in work.runs]
        over, failed = len(states) - len(work.todo), states.count("failed")
        listener("planned", {"todo": work.todo, "over": over, "failed": failed})
        state = "interrupted"
        try:
            work.go(start, _plan)
            state = "interrupted" if work.todo else "finished"  # a budget may be spent before
        finally:
            folder.journal.state = state  # type: ignore[assignment]
            work.write()
        return ComparisonResult(folder.path, work.table, verdict(work.table, made.options))


def _plan(work: Work) -> None:
    """Run what is to be run."""
    budget = work.comparison.options.budget
    if budget is None:
        work.batch(work.todo, None)
    else:
        Rungs(work).go(budget)


def look_at(made: Comparison, output: str | Path, *, overwrite: bool = False) -> list[PlannedCell]:
    """Return what the cells come to. Raises what `run_comparison` would raise before anything is
    run; touches nothing."""
    _check_options(made)
    try:
        check(Path(output), made, overwrite=overwrite)
    except FolderInUse:
        raise
    except OutputError as error:
        raise PlanRefused([replace(p, where=f"output {p.where}") for p in error.problems]) from None
    cells = plan_cells(made, Path(output).expanduser())
    _check_figure(made, cells)
    _check_room(made, cells)
    if problem := disk_of(made, cells, Path(output).expanduser()).problem:
        raise PlanRefused([problem])
    return cells


def _check_options(made: Comparison) -> None:
    check_budget(made)
    gpus, there = made.options.gpus, len(slots(made.spec.device, this_machine()))
    if gpus is not None and gpus > there:
        what = f"{gpus} runs at a time need {gpus} GPUs, and there are {there}"
        if not this_machine().cuda:
            what = "there is no GPU here"
        fix = "leave it out; --at-once has several runs share one GPU, or this machine"
        raise SpecError([Problem(what, fix, "compare.gpus")])


def _check_room(made: Comparison, cells: Sequence[PlannedCell]) -> None:
    """Raise SpecError where the runs that share a GPU are predicted to want more than it has, each
    with a context of CUDA of its own."""
    at_once, has = made.options.at_once, min(this_machine().memory, default=0) / GIB
    seeds = len(made.grid["seed"])
    each = [int(cell.memory_gib * GIB) for cell in cells if cell.memory_gib]
    wanted = sorted((card_for(size) / GIB for size in each for _ in range(seeds)), reverse=True)
    if at_once > 1 and has and (needed := sum(wanted[:at_once])) > has:
        most = next(n for n in range(at_once, -1, -1) if sum(wanted[:n]) <= has)
        what = f"the largest {at_once} runs at once need {needed:.3g} GiB, the GPU has {has:.3g}"
        raise SpecError([Problem(what, f"use {max(most, 1)}", "compare.at_once")])


def _check_figure(made: Comparison, cells: Sequence[PlannedCell]) -> None:
    """Raise SpecError where no evaluation has what quality is to be judged by."""
    by = made.options.by
    known = [name for cell in cells if cell.plan for name in cell.plan.evaluators]
    if by and not any(by == name or by.startswith(f"{name} ") for name in known):
        names = " or ".join(dict.fromkeys(known))
        what = f"no evaluation of these runs has {by!r}"
        fix = f"name {names}, or a figure of it, as 'perplexity loss'"
        raise SpecError([Problem(what, fix, "compare.by")])


def check_budget(made: Comparison) -> None:
    """Raise SpecError where a budget cannot be shared, as it is not known how long a run is."""
    if made.options.budget is None:
        return
    problems = []
    if made.options.at_once > 1:
        what = "a budget is of whole GPUs, and what a run takes of a shared one is not known"
        problems.append(Problem(what, "leave one of the two out", "compare.at_once"))
    if "train.max_steps" in made.grid:
        what = "with a budget, rungs are parts of train.max_steps, which all cells share"
        problems.append(Problem(what, "say one number beside the grid", "grid.train.max_steps"))
    demo_run = made.spec.model is None and not made.spec.data.named
    if made.spec.train.max_steps < 1 and not demo_run:
        what = "with a budget, runs have to be so many steps long, of which rungs are parts"
        problems.append(Problem(what, "set it, e.g. --max-steps 300", "train.max_steps"))
    if problems:
        raise SpecError(problems)
