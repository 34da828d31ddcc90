"""What a model says of its data before it is trained, for tasks that ask: kept in checkpoints, for
a resumed run begins with other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.reference import load_reference, refer_to_now, save_reference
from ..memory.cards import size_words
from ..quantizing.state import ModelState, state_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from ..protocols import Task
    from .trainer import Setup

FILE = "prepared.safetensors"
_PARTS = ("train", "held_out")


@dataclass
class Prepared:
    """Data with the columns that `task.prepared` added.

    Attributes:
        task: what they are learnt by.
        columns: those, float64, by part and name, e.g. "train.reference".
    """

    task: Task
    setup: Setup
    held_out: Dataset | None
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def by(
        cls,
        task: Task,
        setup: Setup,
        held_out: Dataset | None,
        checkpoint: Path | None,
        tell: Callable[[str], None],
    ) -> Prepared:
        """Ask the task, or take what it said when the run of a checkpoint began. So it is with the
        model that it compares with."""
        if task.compares:
            _refer(setup.model, checkpoint, tell)
        before = (setup.dataset, held_out)
        stored = _stored(checkpoint, before) if checkpoint is not None else {}
        if stored:
            after = (_with(before[0], "train", stored), _with(before[1], "held_out", stored))
        else:
            after = task.prepared(setup, held_out, tell)
        columns = stored or _added(before, after)
        return cls(task, replace(setup, dataset=after[0]), after[1], columns)

    def save(self, folder: Path) -> None:
        """Write the columns, and the model that is compared with, into a checkpoint."""
        from safetensors.torch import save_file

        if self.columns:
            save_file(self.columns, folder / FILE)
        if self.task.compares:
            save_reference(self.setup.model, folder)


def _refer(model: Any, checkpoint: Path | None, tell: Callable[[str], None]) -> None:
    """Compare with the model as it is now, or as the run of a checkpoint began."""
    if not isinstance(getattr(model, "quantadapt", None), ModelState):
        return  # a model of somebody else, of which nothing is noted
    if state_of(model).adapter is None:
        return
    if checkpoint is not None:
        load_reference(model, checkpoint)
    elif size := refer_to_now(model):
        text = "the reference is the adapter as it is now: CPU memory keeps a copy of it"
        tell(f"{text}, {size_words(size)}")


def _stored(checkpoint: Path, parts: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the columns in a checkpoint; none where its data were others, which is refused later,
    or there are others to measure on."""
    from safetensors.torch import load_file

    if not (checkpoint / FILE).is_file():
        return {}
    found = load_file(checkpoint / FILE)
    counts = {name: len(part or ()) for name, part in zip(_PARTS, parts, strict=True)}
    of = {name: name.partition(".")[0] for name in found}
    fits = all(len(column) == counts[of[name]] for name, column in found.items())
    return found if fits and set(of.values()) == {n for n, count in counts.items() if count} else {}


def _with(part: Any, name: str, columns: dict[str, Tensor]) -> Any:
    for key, column in columns.items():
        if part is not None and key.startswith(f"{name}."):
            part = part.add_column(key.removeprefix(f"{name}."), column.tolist())
    return part


def _added(before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[str, Tensor]:
    import torch

    return {
        f"{name}.{column}": torch.tensor(new[column], dtype=torch.float64)
        for name, old, new in zip(_PARTS, before, after, strict=True)
        if new is not None
        for column in new.column_names
        if column not in old.column_names
    }
