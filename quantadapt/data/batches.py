"""Batches: examples padded, or laid end to end, with labels where the loss counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .pixels import PICTURES, PIXELS, pixels, types_of
from .tokens import prompt_and_completion

if TYPE_CHECKING:
    from torch import Tensor

SEQUENCES = "seq_lengths"
"""The column that says how long the examples in a row are, one after the other."""


@dataclass
class CausalCollator:
    """Pads a batch; the loss counts where the mask says so.

    Attributes:
        multiple: batches are padded to a multiple of so many tokens.
    """

    pad_token_id: int
    multiple: int | None = None
    _trl: Any = field(default=None, init=False)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of [batch, length], and the number of labels that count, `counted`. Where
        there are pictures, `pixels`: what the model gets of those of each example."""
        if self._trl is None:
            from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

            self._trl = DataCollatorForLanguageModeling(
                pad_token_id=self.pad_token_id, pad_to_multiple_of=self.multiple
            )
        rows = [
            {"input_ids": ids, "labels": labels} for ids, labels in map(_ids_and_labels, examples)
        ]
        batch: dict[str, Any] = self._trl(rows)
        if any(PICTURES in example for example in examples):
            # Of each example by itself: a batch may go through the model in parts.
            batch[PIXELS] = [pixels(example) for example in examples]
            batch |= types_of(examples, batch["input_ids"].shape[1])
        # Known here, it needs no waiting for a GPU.
        batch["counted"] = int((batch["labels"][:, 1:] != -100).sum())
        return batch


@dataclass
class PackedCollator:
    """Lays rows of several examples end to end in one, and says where each example begins, in the
    names of transformers and TRL.

    Attributes:
        multiple: the row is filled up to a multiple of so many tokens, with an example of which
            nothing is learnt.
        few_shapes: whether the number of examples is rounded up, by empty ones at the end, and the
            length of the longest, each to a power of two: passes of one shape can be recorded.
    """

    pad_token_id: int
    multiple: int = 1
    few_shapes: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels`, `position_ids` and `seq_idx`, the number of its example for
        each token, [1, tokens]; `cu_seq_lens_q` and `_k`, int32 [examples + 1], where they begin
        and end; `max_length_q` and `_k`, no less than the longest; how many labels count,
        `counted`, and how many tokens are no padding, `tokens`."""
        import numpy as np
        import torch

        pairs = [_ids_and_labels(example) for example in examples]
        lengths = [length for example in examples for length in example[SEQUENCES]]
        tokens = sum(lengths)
        if fill := -tokens % self.multiple:
            pairs.append((np.full(fill, self.pad_token_id), np.full(fill, -100)))
            lengths.append(fill)
        ids, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        labels[starts[:-1]] = -100  # no example says how the next one begins
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        counted, longest = int((labels != -100).sum()), max(lengths)
        if self.few_shapes:
            empty = _power_of_two(len(lengths)) - len(lengths)
            starts = np.concatenate([starts, np.full(empty, starts[-1])])
            longest = _power_of_two(longest)
        row = {"input_ids": ids, "labels": labels, "position_ids": np.arange(len(ids))}
        row["position_ids"] -= starts[numbers]
        ends = torch.from_numpy(starts.astype(np.int32))
        return {
            **{name: torch.from_numpy(value.astype(np.int64))[None] for name, value in row.items()},
            "seq_idx": torch.from_numpy(numbers.astype(np.int32))[None],
            **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
            **{"max_length_q": longest, "max_length_k": longest},
            **{"counted": counted, "tokens": tokens},
        }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ids_and_labels(example: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the tokens of an example, and what is learnt of them, as arrays."""
    import numpy as np

    ids = np.asarray(example["input_ids"])
    return ids, np.where(example["completion_mask"], ids, -100)


@dataclass
class EncoderDecoderCollator:
    """Prompts go to the encoder, completions become the labels."""

    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the model takes, padded, and the number of labels that count, `counted`."""
        pairs = [(e["input_ids"], e["completion_mask"]) for e in examples]
        batch = encoder_decoder_batch(pairs, self.pad_token_id, self.eos_token_id)
        return {**batch, "counted": int((batch["labels"] != -100).sum())}


@dataclass
class WithColumns:
    """Takes numbers along, beside what `inner` makes of the examples."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    names: Sequence[str]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of `inner`, and a float32 tensor [batch] for each name."""
        batch = self.inner(examples)
        if self.names:
            import torch

            columns = {name: [float(e[name]) for e in examples] for name in self.names}
            batch |= {name: torch.tensor(values) for name, values in columns.items()}
        return batch


def encoder_decoder_batch(
    batch: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, eos: int | None
) -> dict[str, Tensor]:
    """Turn (input_ids, completion_mask) pairs into what encoder-decoder models take.

    Returns `input_ids` and `attention_mask` [b, source length] of the prompts, each ended by
    `eos` if there is one, and `labels` [b, target length], padded with -100.
    """
    sources, targets = [], []
    for ids, mask in batch:
        source, target = prompt_and_completion(ids, mask)
        sources.append(source if eos is None else [*source, eos])
        targets.append(target)
    return {
        "input_ids": padded(sources, pad),
        "attention_mask": padded([[1] * len(source) for source in sources], 0),
        "labels": padded(targets, -100),
    }


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Return an int64 tensor [rows, longest], padded with `value`."""
    import torch

    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in pairs])
