"""The checkpoints of a run: which are whole, and what each says of the run that wrote it.

A checkpoint is a folder with a list of its files and their checksums (`written`). One that differs
from its list is damaged, and the one before it is taken. It imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, Problem
from ..inputs.documents import parsed
from .atomic import put_in_place, sync_tree
from .written import damage, write_list

if TYPE_CHECKING:
    from ..spec import TrainSpec

CHECKPOINTS = "checkpoints"
PREFIX = "checkpoint-"
STATE = "trainer_state.json"
FACTS = "quantadapt-checkpoint.json"
PARTIAL = ".checkpoint.00000000.tmp"
"""What is being written: one name, which all processes know."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Attributes:
        path: its folder.
        step: optimizer steps that were done.
        epoch: how often the data had been gone through by then.
        facts: what `seal` was given.
        skipped: in words, the later ones that are damaged.
    """

    path: Path
    step: int
    epoch: float
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def seal(made: Path, final: Path, facts: dict[str, Any]) -> None:
    """Put a checkpoint that was written to `made` into its place, once all of it is on disk."""
    (made / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_list(made, checksums=True)
    sync_tree(made)
    put_in_place(made, final)


def steps_of(output: Path) -> list[int]:
    """Return the steps of all checkpoints of a run, whole or not, the last one first."""
    return sorted(map(_step, (output / CHECKPOINTS).glob(f"{PREFIX}*[0-9]")), reverse=True)


def last_whole(output: Path) -> Checkpoint | None:
    """Return the last checkpoint of a run that is whole; None where there is no checkpoint.

    Raises:
        OutputError: all are damaged.
    """
    folder, skipped = output / CHECKPOINTS, list[str]()
    for step in steps_of(output):
        path = folder / f"{PREFIX}{step}"
        if wrong := damage(path) or _not_readable(path):
            skipped.append(f"{path.name} is damaged: {wrong}")
            continue
        state, facts = _read(path / STATE), _read(path / FACTS)
        return Checkpoint(path, step, float(state.get("epoch") or 0), facts, tuple(skipped))
    if skipped:
        what = f"no checkpoint can be used: {'; '.join(skipped)}"
        fix = f"put back what is missing, or delete {folder} to begin at step 0"
        raise OutputError(what, fix=fix, where=str(folder))
    return None


def finished(checkpoint: Checkpoint, spec: TrainSpec) -> bool:
    """Say whether a run is over at its last checkpoint."""
    if spec.max_steps > 0:
        return checkpoint.step >= spec.max_steps
    return checkpoint.epoch >= spec.num_train_epochs


def too_few_steps(checkpoint: Checkpoint, spec: TrainSpec) -> Problem | None:
    """Return what is wrong where the spec asks for less than was done."""
    wanted, done, key = spec.num_train_epochs, checkpoint.epoch, "num_train_epochs"
    if spec.max_steps > 0:
        wanted, done, key = spec.max_steps, checkpoint.step, "max_steps"
    if done - wanted < done / checkpoint.step:  # not by a whole step
        return None
    what = f"{wanted:g} is less than what {checkpoint.path.name} has done: {done:g}"
    fix = f"set it to {done:g} or more, or delete later checkpoints to go back"
    return Problem(what, fix, where=f"train.{key}")


def _not_readable(path: Path) -> str:
    for name in (STATE, FACTS):
        try:
            _read(path / name)
        except (OSError, ValueError):
            return f"{name} cannot be read"
    state, count = _read(path / STATE), (int, float)
    counts: dict[str, Any] = {"global_step": int, "train_batch_size": int}
    counts |= {"epoch": count, "log_history": list}
    wrong = [key for key, kind in counts.items() if not isinstance(state.get(key), kind)]
    return f"{STATE} has no {wrong[0]}" if wrong else ""


def _read(file: Path) -> dict[str, Any]:
    values = parsed(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(file)
    return values


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else 0
