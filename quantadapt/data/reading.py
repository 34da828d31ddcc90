"""Reading data: files, folders and hub data sets become token ids with a loss mask.

Four steps, each a module: find the sources (`sources`), read rows with their line numbers
(`files`), turn every row into segments, trained or not (`segments`), and tokenize
them (`tokens`). Training and evaluation data take the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..spec import DataSpec
from .files import Row
from .segments import Segment, format_of, segments
from .sources import read, read_source
from .tokens import encode_prompt, prompt_and_completion, token_ids, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Data",
    "HeldOut",
    "Prompt",
    "encode_prompt",
    "load_data",
    "load_everything",
    "load_held_out",
    "prompt_and_completion",
    "read_held_out",
]

MAX_PROMPTS = 1000
TEXT_PROMPT_TOKENS = 16
_BATCH = 1000


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, and what the data says after it."""

    text: str
    reference: str


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on.

    Attributes:
        examples: columns `input_ids` and `completion_mask`, as in `Data`.
        prompts: up to 1000 prompts; none where the data came tokenized.
    """

    examples: Dataset
    prompts: Sequence[Prompt] = ()


@dataclass(frozen=True)
class Data:
    """Tokenized data.

    Attributes:
        train, eval: columns `input_ids` (token ids) and `completion_mask` (1 where the loss
            counts); those that a task reads for itself may hold others. The first token is never
            predicted, whatever its mask.
        prompts: up to 1000 held-out prompts.
        format: the format that was read, one of `FORMATS`.
        cut: examples shortened to `max_length` and kept, in both data sets together.
        dropped: examples left out because nothing to learn was left of them.
    """

    train: Dataset
    eval: Dataset
    prompts: list[Prompt]
    format: str
    cut: int = 0
    dropped: int = 0

    @property
    def held_out(self) -> HeldOut:
        """What a model is measured on."""
        return HeldOut(self.eval, self.prompts)


@dataclass
class _Counts:
    cut: int = 0
    dropped: int = 0


Columns = Callable[[Row], dict[str, Any]]
"""What else of a row goes into the data set, by name."""


def load_data(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    columns: Columns = lambda _: {},
) -> Data:
    """Read, split and tokenize what `spec` names; the bundled demo data if it names nothing.

    Without held-out data of its own (`eval_path`, a file or split called validation or test) a
    share of `eval_fraction`, at least one example, is split off, shuffled by `seed`.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    train, held_out = read(spec)
    train = train[: spec.max_examples]
    if not held_out:
        train, held_out = _split(train, spec, seed)
    name = format_of(spec, train)
    counts = _Counts()
    train_set = _dataset(train, name, tokenizer, spec.max_length, counts, columns)
    eval_set = _dataset(held_out, name, tokenizer, spec.max_length, counts)
    prompts = _prompts(held_out, name, tokenizer)
    return Data(train_set, eval_set, prompts, name, counts.cut, counts.dropped)


def load_held_out(
    source: str | None, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> Dataset:
    """Return the examples of `read_held_out`."""
    return read_held_out(source, tokenizer, max_length=max_length).examples


def read_held_out(
    source: str | None, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> HeldOut:
    """Read data that is for measuring only.

    That is all of a file, the held-out part of a folder or hub id that has one, or the bundled
    demo's held-out data if `source` is None.

    Raises:
        DataError: as `load_data`.
    """
    if source is None:
        return load_data(DataSpec(), tokenizer, seed=0).held_out
    rows, own_held_out = read_source(source)
    rows = own_held_out or rows
    name = format_of(DataSpec(path=source, max_length=max_length), rows)
    examples = _dataset(rows, name, tokenizer, max_length, _Counts())
    return HeldOut(examples, _prompts(rows, name, tokenizer))


def load_everything(
    source: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> Dataset:
    """Read all of a file, or the training part of a folder or hub id, unsplit.

    Raises:
        DataError: as `load_data`.
    """
    rows, _ = read_source(source)
    spec = DataSpec(path=source, max_length=max_length)
    return _dataset(rows, format_of(spec, rows), tokenizer, max_length, _Counts())


def _split(rows: list[Row], spec: DataSpec, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training, held-out) rows, each in the order in which they were read."""
    if len(rows) < 2:
        fix = "add examples, or name held-out data with data.eval_path"
        what = "there is only one example, so none can be held out for evaluation"
        raise DataError(what, fix=fix, where=spec.path or "demo data")
    count = min(max(1, round(len(rows) * spec.eval_fraction)), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def _prompts(rows: Sequence[Row], name: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the prompts of the first rows that have something to learn."""
    found = (segments(row, name, tokenizer) for row in rows)
    learnt = (pieces for pieces in found if any(p.trained and p.text for p in pieces))
    return [_prompt(pieces, name, tokenizer) for pieces in islice(learnt, MAX_PROMPTS)]


def _prompt(pieces: Sequence[Segment], name: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the text before the last trained segment, and that segment."""
    if name == "text":
        ids = token_ids(tokenizer, [pieces[0].text])[0]
        first = str(tokenizer.decode(ids[:TEXT_PROMPT_TOKENS]))
        return Prompt(first, str(tokenizer.decode(ids[TEXT_PROMPT_TOKENS:])))
    last = max(index for index, piece in enumerate(pieces) if piece.trained)
    reference = pieces[last].text.removesuffix(str(tokenizer.eos_token or ""))
    return Prompt("".join(piece.text for piece in pieces[:last]), reference)


def _dataset(
    rows: Sequence[Row],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: _Counts,
    columns: Columns = lambda _: {},
) -> Dataset:
    """Tokenize rows. Raises DataError where no example is left."""
    import datasets
    import numpy

    ids, masks, kept = [], [], []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        batch = [segments(row, name, tokenizer) for row in part]
        for row, (tokens, mask) in zip(part, tokenize(batch, tokenizer), strict=True):
            if not any(mask[1:max_length]):
                counts.dropped += 1
                continue
            counts.cut += len(tokens) > max_length
            ids.append(numpy.asarray(tokens[:max_length], dtype=numpy.int32))
            masks.append(numpy.asarray(mask[:max_length], dtype=numpy.int8))
            kept.append(columns(row))
    if not ids:
        what = f"no example is left: within {max_length} tokens there is nothing to learn"
        fix = "raise data.max_length, shorten the prompts, or fill the empty completions"
        raise DataError(what, fix=fix, where=rows[0].where)
    more = {name: [values[name] for values in kept] for name in kept[0]}
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks, **more})
