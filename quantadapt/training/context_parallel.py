"""One row of a batch on several GPUs: each process has a part of its tokens.

What a batch is stays what it is, but for the group of processes that shares it: each process of a
group reads the same rows, keeps its part of the tokens, and counts the labels in it. So the mean
over all processes' tokens, and gradients that are averaged, are those of data parallelism. The
processes meet in attention (`model.ulysses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..distributed.talking import PATIENCE, reduced
from ..distributed.world import world
from ..errors import TrainingError
from .figures import adapter_device, compute_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..spec import TrainSpec

WHERE = "train.context_parallel_size"
_EACH = 8
"""Tokens for each process in the row that is tried out."""
_ROUNDING = {True: 1e-3, False: 0.02}
"""What of the logits may change by rounding alone, in float32 and in 16 bits."""
_IGNORED = -100


@dataclass(frozen=True)
class Part:
    """Which part of each row is this process's.

    Attributes:
        size: so many processes share a row. rank: which of them this is.
    """

    size: int
    rank: int

    @classmethod
    def of(cls, spec: TrainSpec) -> Part:
        """Return what `spec` comes to in this process."""
        return cls(spec.context_parallel_size, world().rank % spec.context_parallel_size)

    def of_rows(self, length: int) -> slice:
        """Return the places of its tokens in rows of so many. Raises TrainingError."""
        each, rest = divmod(length, self.size)
        if rest:
            what = f"rows of {length} tokens cannot be shared out among {self.size} GPUs"
            fix = "have the objective's collator pad to a multiple of `setup.length_multiple`"
            raise TrainingError(what, fix=fix, where=WHERE)
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass
class PartCollator:
    """Makes a batch of whole rows, and keeps this process's part of the tokens."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    part: Part

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `inner` does, of the tokens here; `shift_labels`, the token after each, which
        of the last one another process has; their `position_ids`; and how many labels count."""
        import torch

        batch = self.inner(examples)
        shape = batch["input_ids"].shape
        here = self.part.of_rows(shape[1])
        if "labels" in batch:
            after = batch["labels"].roll(-1, dims=1)
            after[:, -1] = _IGNORED
            batch["shift_labels"] = after
        if "position_ids" not in batch:  # packed rows have them, from each example's begin
            batch["position_ids"] = torch.arange(shape[1]).repeat(shape[0], 1)
        for name, value in batch.items():
            if getattr(value, "shape", ())[:2] == shape:
                batch[name] = value[:, here].contiguous()
        if "counted" in batch:
            batch["counted"] = int((batch["shift_labels"] != _IGNORED).sum())
        if "tokens" in batch:  # of a packed row, whose padding stands at its end
            there = batch["tokens"] - here.start
            batch["tokens"] = min(max(there, 0), here.stop - here.start)
        return batch


def in_parts(collator: Callable[..., Any], spec: TrainSpec) -> Callable[..., Any]:
    """Return what makes batches of this process's part of rows; `collator` where rows are whole."""
    return collator if spec.context_parallel_size == 1 else PartCollator(collator, Part.of(spec))


@contextmanager
def rows_in_parts(model: nn.Module, spec: TrainSpec) -> Iterator[None]:
    """Let the processes of a group exchange what attention needs of their parts of rows. Raises
    TrainingError where the model then predicts something else than of the whole row."""
    from ..model.ulysses import exchanging

    if spec.context_parallel_size == 1:
        yield
        return
    part = Part.of(spec)
    with exchanging(model, lambda: _group(part.size, _world_group())):
        _refuse_others(model, part, packed=bool(spec.packing))
        yield


def _begins(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Return where the examples of a packed row begin, as `PackedCollator` tells a model."""
    import torch

    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    names = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
    return dict.fromkeys(names[0], ends) | dict.fromkeys(names[1], max(lengths))


def _world_group() -> Any:
    from torch import distributed

    return distributed.group.WORLD


@cache
def _group(size: int, _world: Any) -> Any:
    """Return the processes that share rows with this one; all processes have to call it."""
    from torch import distributed

    mine, _ = distributed.new_subgroups(size, timeout=PATIENCE)  # type: ignore[no-untyped-call]
    return mine


def _refuse_others(model: Any, part: Part, *, packed: bool) -> None:
    """Raise TrainingError where parts of a row are not what they are in the whole row.

    Not every architecture lets itself be told where tokens stand, or lets them meet in attention
    alone, and none says so. So it is tried out, by all processes alike.

    Args:
        packed: whether rows hold several examples; then the row that is tried holds two.
    """
    import torch

    from ..evaluation.predictions import evaluating
    from ..model.ulysses import alone

    ids = torch.arange(_EACH * part.size, device=adapter_device(model))[None]
    here, places, begins = part.of_rows(ids.shape[1]), ids.clone(), {}
    if packed:
        second = ids.shape[1] // 2 + 1
        places[:, second:] -= second
        begins = _begins([second, ids.shape[1] - second], ids.device)
    with evaluating(model), torch.no_grad():
        with alone(model):
            row = model(input_ids=ids, position_ids=places, use_cache=False)
            whole: Tensor = row.logits[:, here].float()
        mine = {"input_ids": ids[:, here], "position_ids": places[:, here], **begins}
        apart = model(**mine, use_cache=False).logits.float() - whole
    found = float(torch.linalg.vector_norm(apart) / torch.linalg.vector_norm(whole))
    exact = compute_dtype(model) == torch.float32
    if not reduced(found, ids.device, "max") <= _ROUNDING[exact]:
        what = f"{type(model.get_base_model()).__name__} predicts otherwise from parts of a row"
        raise TrainingError(what, fix=f"leave {WHERE} out", where=WHERE)
