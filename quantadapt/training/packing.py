"""Packing: several examples in one row, for models that keep them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.batches import SEQUENCES, PackedCollator
from ..errors import TrainingError
from ..folders.metrics import many

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from .trainer import Setup

WHERE = "train.packing"
_LENGTH = 8
_ROUNDING = {True: 1e-3, False: 0.02}
"""What may change of logits with tokens elsewhere in the row by rounding alone: in float32, and
in 16 bits or where activations are quantized. Of tiny random models as little as 0.005 may leak."""
_SIZES = 16
"""A batch is filled up to one of so many lengths, so that few shapes come up."""
_AT_A_TIME = 100_000
"""Examples among which the best fit is looked for."""


# Rows ---------------------------------------------------------------------------------------------


class Filling(NamedTuple):
    """How packed rows are filled.

    Attributes:
        examples: how many sequences there are in them: examples, or pieces of documents.
        length: tokens of the fullest row.
        empty: the share of all rows of that length that no example takes.
        of: what the sequences are, in words.
    """

    examples: int
    rows: int
    length: int
    empty: float
    of: str = "examples"

    @property
    def words(self) -> str:
        """It in words."""
        rows = f"{many(self.rows, 'row')} of up to {self.length:,} tokens"
        return f"{self.examples:,} {self.of} in {rows}, {self.empty:.1%} of them empty"


def packed(dataset: Dataset, length: int | None = None, usual: int = 0) -> Dataset:
    """Put several examples into one row: the longest first, each where it leaves the least room.

    Args:
        length: tokens of a row; by default `usual`, or as many as the longest example has.

    Raises:
        TrainingError: an example is longer than `length`.
    """
    import pyarrow.compute as pc
    from trl import pack_dataset

    longest = pc.max(pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"])).as_py()
    length = length or max(longest, usual)
    if longest > length:
        what = f"the longest example has {longest:,} tokens, and a row has room for {length:,}"
        fix = f"set {WHERE} to {longest} or more, or lower data.max_length"
        raise TrainingError(what, fix=fix, where=WHERE)
    at_a_time = {"batch_size": _AT_A_TIME}
    rows: Dataset = pack_dataset(dataset, seq_length=length, strategy="bfd", map_kwargs=at_a_time)
    return rows


def filling(rows: Dataset, *, in_rows: bool = False) -> Filling | None:
    """Return how rows are filled; None of those that a task has packed in a way of its own.

    Args:
        in_rows: whether the task read them in rows, where a document that goes on in the next
            row is two sequences.
    """
    if SEQUENCES not in rows.column_names:
        return None
    parts = rows[SEQUENCES]
    lengths = [sum(part) for part in parts]
    longest = max(lengths)
    empty = 1 - sum(lengths) / (len(lengths) * longest)
    of = "pieces of documents" if in_rows else "examples"
    return Filling(sum(map(len, parts)), len(lengths), longest, empty, of)


def packed_collator(setup: Setup) -> PackedCollator:
    """Return what lays rows end to end. On CUDA, batches get one of few lengths; where routers are
    balanced over all tokens, none is added."""
    from ..model.packed_attention import is_lent

    text = setup.model.config.get_text_config()
    multiple = setup.length_multiple
    if multiple is None or getattr(text, "output_router_logits", False):
        return PackedCollator(setup.pad_token_id)
    row = max(map(sum, setup.dataset[SEQUENCES])) if SEQUENCES in setup.dataset.features else 0
    step = row * setup.spec.per_device_train_batch_size // _SIZES
    multiple *= max(1, min(step, row) // multiple)
    # Layers that are no attention may know no empty examples.
    shapes = is_lent(text) and "linear_attention" not in (getattr(text, "layer_types", None) or ())
    return PackedCollator(setup.pad_token_id, multiple, few_shapes=shapes)


# Examples apart -----------------------------------------------------------------------------------


@contextmanager
def kept_apart(model: Any, on_note: Callable[[str], None]) -> Iterator[None]:
    """Let attention of packed rows be computed without a mask of all pairs of tokens, where the
    model hands on where examples begin; say which way it is."""
    from ..model.packed_attention import in_one_call, packed_attention

    with ExitStack() as stack:
        here = stack.enter_context(packed_attention(model)) and _hands_on(model)
        if here:
            embedding = model.get_input_embeddings().weight
            fast = in_one_call(model, embedding.device, embedding.dtype)
            way = "torch's varlen_attn" if fast else "example by example"
            on_note(f"attention of packed rows: {way}")
        else:
            stack.close()
            on_note(
                "attention of packed rows: as transformers computes it for this model, whose masks"
                " of all pairs of tokens may take time and memory"
            )
        yield


def _hands_on(model: Any) -> bool:
    """Say whether the model tells attention all that masks would show."""
    from ..model.packed_attention import watching

    with watching() as told_all:
        _logits(model, PackedCollator(0), 3)
        return told_all()


def refuse_leaks(model: Any, collator: PackedCollator) -> None:
    """Raise TrainingError where examples of one row see each other, or are counted otherwise.

    Not every architecture heeds where examples begin (BLOOM, OPT, MPT and state spaces do not), and
    none says so. So it is tried out: the second of two examples must not change with the first.
    Nor may an example change where it is said that it begins at position 0, as it does for those
    that are made like RoBERTa, whose first position is another.
    """
    one, other = (_logits(model, collator, token)[:, _LENGTH:] for token in (3, 4))
    if differ(model, one, other):
        raise _leaks(model)
    if differ(model, *_alone(model)):
        raise _leaks(model, ": it counts positions from another number than 0")


def differ(model: Any, one: Tensor, other: Tensor) -> bool:
    """Say if what a model gave twice, float32 of one shape, differs by more than rounding."""
    import torch

    from ..facade import linear_facades

    norm, dtype = torch.linalg.vector_norm, model.get_input_embeddings().weight.dtype
    rounds = any(layer.target.quantizes_activations for _, layer in linear_facades(model))
    allowed = _ROUNDING[dtype == torch.float32 and not rounds]
    return bool(norm(one - other) > allowed * norm(one))


def _alone(model: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of an example as the model counts its positions, and from 0 on."""
    import torch

    from ..evaluation.predictions import evaluating

    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_LENGTH, device=device)[None]
    with evaluating(model), torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        told = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    return own.float(), told.float()


def _leaks(model: Any, why: str = "") -> TrainingError:
    base = getattr(model, "get_base_model", lambda: model)()
    what = f"{type(base).__name__} does not keep the examples of a row apart{why}"
    return TrainingError(what, fix="leave train.packing out", where=WHERE)


def _logits(model: Any, collator: PackedCollator, token: int) -> Tensor:
    """Return the logits of two examples in a row, float32 [1, tokens, vocabulary]; the first is of
    nothing but `token`."""
    import torch

    from ..evaluation.predictions import evaluating

    row = {
        "input_ids": [token] * _LENGTH + list(range(_LENGTH)),
        "completion_mask": [1] * 2 * _LENGTH,
        SEQUENCES: [_LENGTH, _LENGTH],
    }
    device = model.get_input_embeddings().weight.device
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in collator([row]).items()
        if name not in ("labels", "counted", "tokens")
    }
    try:
        with evaluating(model), torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits
    except (TypeError, ValueError, NotImplementedError) as error:
        # Of what takes no such arguments, or of short convolutions without their library.
        raise _leaks(model, f": {error}") from error
    return logits[:, : 2 * _LENGTH].float()
