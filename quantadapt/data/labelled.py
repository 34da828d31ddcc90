"""Labelled data: texts with a label each, or lists of words with a label for each word.

Labels are text or whole numbers, and stay what they are until a batch is made: the model's config
says which output each of them is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError
from ..spec import DataSpec
from .files import Row, kind_of
from .formats import checked_text, from_json, listed, named, telling_unused, text_in
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .report import DataReport
from .sets import Data, HeldOut, none_left, read_both, warn_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sequence", "token"]
LABEL, LABELS = "label", "labels"
"""The column of a data set with the label of each text, or those of its tokens."""
_LOOKED_AT: Mapping[Kind, str] = {"sequence": "classify", "token": "classify-tokens"}
"""Objectives that read them."""
NONE = ""
"""The label of a token that has none: special tokens, and all of a word but its first."""
_COLUMNS: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "sequence": (("text",), ("label",)),
    "token": (("tokens", "words"), ("labels", "tags", "ner_tags")),
}
"""The columns that are recognized, the first of each kind that is there."""


@dataclass(frozen=True)
class Labelled:
    """A text with its label, or words with theirs."""

    text: str | list[str]
    labels: list[str]
    where: str

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.where.rpartition(":")[0]


def load_labelled(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, kind: Kind, seed: int
) -> Data:
    """Read, split and tokenize what `spec` names, the bundled examples if it names nothing.

    Returns:
        Data with `labels`, in the order of their numbers or the alphabet, and data sets with the
        columns `input_ids`, `completion_mask` (all 1), and `LABEL` or `LABELS`.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    spec, report = with_bundled(spec, kind), DataReport(spec.max_length)
    train, held_out = read_both(spec, report, partial(labelled, kind=kind), seed)
    labels = _in_order({label for one in train for label in one.labels})
    if len(labels) < 2:
        what = f"all training examples have the label {labels[0]!r}" if labels else "there is none"
        fix = "add examples with others: there is nothing to tell apart"
        raise DataError(what, fix=fix, where=spec.path or "data")
    made = partial(_dataset, tokenizer=tokenizer, report=report, kind=kind)
    known = partial(_known, held_out, labels, report)
    train_set, eval_set = each_done([lambda: made(train), lambda: made(known(), held_out=True)])
    warn_of(report, _LOOKED_AT[kind])
    return Data(train_set, eval_set, [], kind, report, tuple(labels))


def look_at_labelled(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int, *, kind: Kind
) -> tuple[list[Shown], DataReport]:
    """Return the first examples that are used, with their labels, and the report. Raises
    DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(labelled(rows, spec, report, kind=kind), spec.max_examples)
        made = _tokenized(found, tokenizer, report, kind=kind, held_out=held_out)
        for one, ids, tags, cut in made:
            note = f"label {', '.join(one.labels)}"
            mask = [int(tag != NONE) for tag in tags] if kind == "token" else [0] * len(ids)
            if kind == "token":
                words = (f"{word} = {tag}" for word, tag in zip(one.text, one.labels, strict=True))
                note = f"labels {', '.join(words)}"
            yield [Shown(one.where, ids, mask, cut, note=note)]

    return first_shown(with_bundled(spec, kind), limit, show)


def with_bundled(spec: DataSpec, kind: Kind) -> DataSpec:
    """Return `spec` with the bundled examples as its data where it names none."""
    from ..demo import LABELLED

    return spec if spec.path else spec.model_copy(update={"path": str(LABELLED / kind)})


def holds_labels(rows: Sequence[Row]) -> Kind | None:
    """Return what is labelled in rows with the columns of labelled data; None where none is."""
    there = rows[0].values if rows else {}
    for kind, columns in _COLUMNS.items():
        if all(any(name in there for name in names) for names in columns):
            return kind
    return None


def held_out_labelled(
    rows: Sequence[Row], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, kind: Kind
) -> HeldOut:
    """Return all examples in rows, to measure on. Raises DataError."""
    report = DataReport(spec.max_length)

    def made(some: Iterable[Row], counts: DataReport) -> Iterator[Labelled]:
        return labelled(some, spec, counts, kind=kind)

    found = [*all_told(rows, made, report)]
    examples = _dataset(found, tokenizer, report, kind=kind, held_out=True)
    warn_of(report, _LOOKED_AT[kind])
    return HeldOut(examples)


# From rows to examples ----------------------------------------------------------------------------


def labelled(
    rows: Iterable[Row], spec: DataSpec, report: DataReport, *, kind: Kind
) -> Iterator[Labelled]:
    """Yield the examples in rows, file by file, and count rows in `report`.

    Raises:
        DataError: columns are missing, or hold something else.
    """
    if spec.format != "auto":
        what = f"{spec.format!r} is no format of labelled data"
        raise DataError(what, fix="leave it out: they have one", where="data.format")
    for file, group in groupby(rows, key=lambda row: row.file):
        found, columns = report.of(file), {str(k): v for k, v in spec.columns.items()}
        ours = named(group, columns, found)
        first = next(ours)
        text, label = (_column(first, names) for names in _COLUMNS[kind])
        found.format = f"{text} + {label}"
        make = _of_text if kind == "sequence" else _of_words
        told = telling_unused(chain([first], ours), (text, label), found)
        yield from (make(row, text, label) for row in told)


def _column(row: Row, names: Sequence[str]) -> str:
    there = next((name for name in names if name in row.values), None)
    if there is None:
        what = f"no column {' or '.join(map(repr, names))}, found {listed(row.values)}"
        fix = f"name yours in data.columns, e.g. {{{names[0]}: ...}}"
        raise DataError(what, fix=fix, where=row.where)
    return there


def _of_text(row: Row, text: str, label: str) -> Labelled:
    if label not in row.values:
        what = f"the column {label!r} is missing, found {listed(row.values)}"
        raise DataError(what, fix="label every example, or leave it out", where=row.where)
    name = _label(row.values[label], repr(label), row.where)
    return Labelled(text_in(row, text), [name], row.where)


def _of_words(row: Row, words: str, labels: str) -> Labelled:
    found = [from_json(row.values.get(name), repr(name), row.where) for name in (words, labels)]
    for name, value in zip((words, labels), found, strict=True):
        if not isinstance(value, list):
            what = f"{name!r} is {kind_of(value)}, expected a list of words or labels"
            raise DataError(what, fix="write one for each word", where=row.where)
    if len(found[0]) != len(found[1]):
        what = f"{len(found[0])} words and {len(found[1])} labels"
        raise DataError(what, fix="write a label for each word", where=row.where)
    texts = [checked_text(word, f"a word of {words!r}", row.where) for word in found[0]]
    return Labelled(
        texts, [_label(one, f"a label of {labels!r}", row.where) for one in found[1]], row.where
    )


def _label(value: Any, name: str, where: str) -> str:
    """Return a label as text. Raises DataError where it is none."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, str) and value.strip():
        return checked_text(value, name, where).strip()
    if whole and not isinstance(value, str):
        return str(value) if isinstance(value, bool) else str(int(value))
    what = f"{name} is {'an empty text' if isinstance(value, str) else kind_of(value)}"
    if isinstance(value, float) and value == value:
        what = f"{name} is {value:g}, no whole number"
    fix = "write a name or a whole number, or leave the example out"
    raise DataError(f"{what}, expected a label", fix=fix, where=where)


def _in_order(labels: Iterable[str]) -> list[str]:
    """Return labels by the alphabet, numbers by size."""
    found = sorted(labels)
    numbers = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(found, key=int) if numbers else found


def _known(
    found: Iterable[Labelled], labels: Sequence[str], report: DataReport
) -> Iterator[Labelled]:
    """Yield the examples whose labels are all known, and count the others as dropped."""
    for one in found:
        if unseen := sorted(set(one.labels) - set(labels)):
            what = f"with the label {unseen[0]!r}, which no training example has"
            report.of(one.file).dropped[what] += 1
        else:
            yield one


# From examples to tokens --------------------------------------------------------------------------


def _dataset(
    found: Iterable[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    kind: Kind,
    held_out: bool = False,
) -> Dataset:
    """Tokenize examples as the tokenizer does by itself. Raises DataError where none is left."""
    import datasets

    ids, labels = list[list[int]](), list[Any]()
    for _, given, tags, _ in _tokenized(found, tokenizer, report, kind=kind, held_out=held_out):
        ids.append(given)
        labels.append(tags if kind == "token" else tags[0])
    if not ids:
        fix = "fill the texts, or use held-out data with the labels of the training data"
        raise none_left("example", fix, report, held_out=held_out)
    name = LABELS if kind == "token" else LABEL
    masks = [[1] * len(row) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks, name: labels})


def _tokenized(
    found: Iterable[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    kind: Kind,
    held_out: bool = False,
) -> Iterator[tuple[Labelled, list[int], list[str], int]]:
    """Yield each example that is used with its token ids, its labels, one for each token or for
    the text, and how many tokens were cut; count them."""
    for one in found:
        counts, words = report.of(one.file), kind == "token"
        if not one.text:
            counts.dropped["with an empty text"] += 1
            continue
        whole = tokenizer(one.text, is_split_into_words=words, verbose=False)
        given = tokenizer(
            one.text,
            is_split_into_words=words,
            truncation=True,
            max_length=report.max_length,
            verbose=False,
        )
        ids = list(given["input_ids"])
        tags = _first_tokens(given.word_ids(), one.labels) if words else one.labels
        if not any(tags) or not ids:
            counts.dropped["with an empty text"] += 1
            continue
        learnt = [int(tag != NONE) for tag in tags] if words else [0] * len(ids)
        counts.keep(learnt, max_length=report.max_length, held_out=held_out)
        cut = len(whole["input_ids"]) - len(ids)
        counts.cut += cut > 0
        yield one, ids, tags, cut


def _first_tokens(words: Sequence[int | None], labels: Sequence[str]) -> list[str]:
    """Return the label of each token: that of its word, where it is the first of it."""
    before = (None, *words[:-1])
    pairs = zip(words, before, strict=True)
    return [labels[word] if word is not None and word != last else NONE for word, last in pairs]
