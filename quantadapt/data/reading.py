"""Reading data: files, folders and hub data sets become token ids with a loss mask.

Five steps, each a module: find the sources (`sources`), read rows with their line numbers
(`files`), make examples of the rows of any format (`formats`), turn every example into text, some
of it trained (`segments`, `chats`), and tokenize it (`tokens`). Training and evaluation data take
the same way. What was cut, dropped or not used is counted on the way (`report`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..spec import DataSpec
from .desirable import held_out_desirable, holds_desirable
from .files import Row
from .formats import Example, examples
from .labelled import held_out_labelled, holds_labels
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .pixels import columns_of, tokenized
from .preferences import held_out_pairs, holds_pairs
from .prompts import held_out_prompts, holds_prompts
from .report import DataReport
from .retrieval import held_out_texts, holds_texts
from .segments import segments
from .sets import MAX_LENGTH, Data, HeldOut, none_left, prompts_of, read_both, warn_of
from .sources import local_files, read, read_source
from .tokens import Prompt, encode_prompt, prompt_and_completion, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MAX_LENGTH",
    "Data",
    "HeldOut",
    "Prompt",
    "encode_prompt",
    "held_out_examples",
    "load_data",
    "load_everything",
    "load_held_out",
    "prompt_and_completion",
    "read_held_out",
    "survey",
]

SURVEYED_BYTES = 2**25
_BATCH = 1000


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
    share of `eval_fraction`, at least one example, is split off, drawn by `split_seed`, or else by
    `seed`. Warns with DataWarning where more than 5% of a file's examples are cut or dropped.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    report = DataReport(spec.max_length)
    train, held_out = read_both(spec, report, examples, seed)
    train_set, eval_set = each_done(
        [
            lambda: _dataset(train, tokenizer, report, columns=columns),
            lambda: _dataset(held_out, tokenizer, report, held_out=True),
        ]
    )
    warn_of(report)
    return Data(
        train_set, eval_set, prompts_of(held_out, tokenizer), report.files[0].format, report
    )


def held_out_examples(spec: DataSpec, *, seed: int) -> list[Example]:
    """Return what `load_data` holds out, before it is written for a tokenizer.

    Raises:
        DataError: as `load_data`.
    """
    return read_both(spec, DataReport(spec.max_length), examples, seed)[1]


def load_held_out(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = MAX_LENGTH,
    like: DataSpec | None = None,
) -> Dataset:
    """Return the examples of `read_held_out`."""
    return read_held_out(source, tokenizer, max_length=max_length, like=like).examples


def read_held_out(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = MAX_LENGTH,
    like: DataSpec | None = None,
) -> HeldOut:
    """Read data that is for measuring only.

    That is all of a file, the held-out part of a folder or hub id that has one, or the bundled
    demo's held-out data if `source` is None. Of pairs of a chosen and a rejected answer, the first
    are what perplexity is measured on.

    Args:
        like: how a run reads its data: its `max_length` holds here, too, and its `columns` where
            all of them are there.

    Raises:
        DataError: as `load_data`.
    """
    max_length = like.max_length if like else max_length
    if source is None:
        return load_data(DataSpec(max_length=max_length), tokenizer, seed=0).held_out
    rows, own_held_out = read_source(source)
    rows = own_held_out or rows
    spec = _like(like, rows, max_length)
    if holds_pairs(rows, spec.columns):
        return held_out_pairs(rows, spec, tokenizer)
    if holds_desirable(rows, spec.columns):
        return held_out_desirable(rows, spec, tokenizer)
    if holds_texts(rows, spec.columns):
        return held_out_texts(rows, spec, tokenizer)
    if holds_prompts(rows, spec.columns):
        return held_out_prompts(rows, spec, tokenizer)
    if (kind := holds_labels(rows)) and not spec.columns:
        return held_out_labelled(rows, spec, tokenizer, kind)
    found, made = _read(rows, spec, tokenizer, held_out=True)
    return HeldOut(made, prompts_of(found, tokenizer))


def load_everything(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = MAX_LENGTH,
    like: DataSpec | None = None,
) -> Dataset:
    """Read all of a file, or the training part of a folder or hub id, unsplit.

    Args:
        like: as for `read_held_out`.

    Raises:
        DataError: as `load_data`.
    """
    rows, _ = read_source(source)
    return _read(rows, _like(like, rows, max_length), tokenizer)[1]


def look(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return the first `limit` examples of text that are used, and the report on all. Raises
    DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(examples(rows, spec, report), spec.max_examples)
        for example, ids, mask, _ in _tokenized(found, report, tokenizer, held_out=held_out):
            yield [Shown.up_to(spec.max_length, example.where, ids, mask)]

    return first_shown(spec, limit, show)


def survey(
    spec: DataSpec,
    make: Callable[[Iterable[Row], DataSpec, DataReport], Iterable[Any]] = examples,
) -> DataReport | None:
    """Return the format and the rows of each file that `spec` names, without a tokenizer.

    None where that is not to be had at once: for a hub id, and above 32 MiB.

    Args:
        make: makes examples, or pairs, of rows, and counts in the report.

    Raises:
        DataError: the data cannot be read, or not as the spec has it.
    """
    files = local_files(spec)
    if files is None or sum(file.stat().st_size for file in files) > SURVEYED_BYTES:
        return None
    report = DataReport(spec.max_length)

    def survey_of(rows: list[Row]) -> None:
        for _ in all_told(rows, lambda some, counts: make(some, spec, counts), report):
            pass

    each_done(partial(survey_of, rows) for rows in read(spec))
    return report


def _like(like: DataSpec | None, rows: Sequence[Row], max_length: int) -> DataSpec:
    """Return how to read rows of another source than that of the run."""
    if like is None:
        return DataSpec(max_length=max_length)
    fits = all(name in rows[0].values for name in like.columns.values())
    return DataSpec(max_length=like.max_length, columns=like.columns if fits else {})


def _read(
    rows: Sequence[Row],
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool = False,
) -> tuple[list[Example], Dataset]:
    report = DataReport(spec.max_length)
    found = [*all_told(rows, lambda some, counts: examples(some, spec, counts), report)]
    made = _dataset(found, tokenizer, report, held_out=held_out)
    warn_of(report)
    return found, made


def _tokenized(
    found: Iterable[Example],
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool,
) -> Iterator[tuple[Example, list[int], list[int], dict[str, Any]]]:
    """Yield each example that is used with all its token ids and mask, and what a data set keeps of
    its pictures; count what is kept, cut and dropped."""
    found, limit = iter(found), report.max_length
    while batch := [*islice(found, _BATCH)]:
        texts = []
        for example in batch:
            read, counts = segments(example, tokenizer), report.of(example.file)
            counts.remarks.update(read.remarks)
            counts.dropped.update([read.dropped] if read.dropped else ())
            texts += [(example, pieces) for pieces in read.texts]
        encoded = tokenize([p for _, p in texts if not p.pictures], tokenizer)
        for example, pieces in texts:
            seen = tokenized(pieces, tokenizer, example.where) if pieces.pictures else None
            ids, mask = (seen.ids, seen.mask) if seen else next(encoded)
            counts = report.of(example.file)
            if seen and any(seen.standing[limit:]):
                counts.dropped[f"with pictures that do not fit into {limit} tokens"] += 1
            elif any(mask[1:limit]):
                counts.keep(mask, max_length=limit, held_out=held_out)
                if seen:
                    counts.pictures += len(pieces.pictures)
                    counts.standing += sum(seen.standing)
                kept = columns_of(pieces, seen, tokenizer, limit) if seen else {}
                yield example, ids, mask, kept
            elif any(mask[1:]):
                counts.dropped[f"with nothing to learn within {limit} tokens"] += 1
            else:
                what = "text" if example.shape == "text" else "answer"
                counts.dropped[f"with an empty {what}"] += 1


def _dataset(
    found: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool = False,
    columns: Columns = lambda _: {},
) -> Dataset:
    """Tokenize examples. Raises DataError where none is left."""
    import datasets
    import numpy

    all_ids, masks, more, pictures = [], [], [], []
    read = partial(_tokenized, tokenizer=tokenizer, held_out=held_out)
    for example, ids, mask, seen in all_told(found, read, report):
        all_ids.append(numpy.asarray(ids[: report.max_length], dtype=numpy.int32))
        masks.append(numpy.asarray(mask[: report.max_length], dtype=numpy.int8))
        more.append(columns(example))
        pictures.append(seen)
    if not all_ids:
        fix = "raise data.max_length, shorten the prompts, or fill the empty completions"
        where = found[0].where if found else ""
        raise none_left("example", fix, report, where, held_out=held_out)
    extra = {name: [values[name] for values in more] for name in more[0]}
    for name in dict.fromkeys(name for values in pictures for name in values):
        extra[name] = [values.get(name) for values in pictures]
    return datasets.Dataset.from_dict({"input_ids": all_ids, "completion_mask": masks, **extra})
