"""Data to learn which texts belong together: pairs with negatives, pairs with a score, and passages
that answer a query or do not.

The columns are those of sentence-transformers: `anchor`, `positive` and `negative`; `sentence1`,
`sentence2` and `score`; `query`, `passage` and `label`. Texts are tokenized as the tokenizer does
by itself, so that vectors are those of sentence-transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, repeat
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..spec import DataSpec
from .files import Row, kind_of
from .formats import checked_text, from_json, listed, named, telling_unused, text_in
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .report import DataReport, FileReport
from .sets import Data, HeldOut, none_left, read_both, warn_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FIRST = "input_ids"
"""The column of anchors, and of queries with their passages."""
SCORE, GROUP, POOLING = "score", "group", "pooling"
"""Columns: how alike two texts are, or whether a passage answers; of which query it is a passage;
and how vectors are made of tokens."""
_ANCHOR = ("anchor", "query", "question", "instruction")
_POSITIVE = ("positive", "passage", "document", "answer", "output")
_SCORED = ("sentence1", "sentence2", "score")
_OWN = (("anchor", "positive"), _SCORED, ("query", "passage", "label"))
_TITLES = ("anchor", "positive", "negative")
_SEEN = "attention_mask"
_NEGATIVE = re.compile(r"negative(_\d+)?")


@dataclass(frozen=True)
class Texts:
    """An anchor, what belongs to it, and what does not; or two texts and how alike they are."""

    texts: tuple[str, ...]
    where: str
    score: float | None = None

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.where.rpartition(":")[0]


Make = Callable[[Iterable[Row], DataSpec, DataReport], Iterator[Texts]]


def load_embedding(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int, pooling: str
) -> Data:
    """Read, split and tokenize groups of texts.

    Returns:
        Data sets with `FIRST` and a column for each further text, `text_1_ids` and so on, with
        `SCORE` where the data have it.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    report = DataReport(spec.max_length)
    train, held_out = read_both(spec, report, groups, seed)
    _refuse_uneven([*train, *held_out], spec.path or "data")
    sets = each_done(
        partial(_grouped, part, tokenizer, report, pooling, held_out=held)
        for part, held in ((train, False), (held_out, True))
    )
    what = "scores" if train[0].score is not None else "positives"
    alike = {one.score if what == "scores" else one.texts[1] for one in train}
    if len(alike) == 1 and len(train[0].texts) == 2:
        fix = "add examples that differ: there is nothing to tell apart"
        raise DataError(f"all {what} are equal", fix=fix, where=spec.path or "data")
    warn_of(report, "embed")
    return Data(sets[0], sets[1], [], report.files[0].format, report)


def _refuse_uneven(found: Sequence[Texts], where: str) -> None:
    """Raise DataError where not all examples have as many texts, or a score."""
    sizes = {(len(one.texts), one.score is None) for one in found}
    if len(sizes) > 1:
        counts = sorted(size for size, _ in sizes)
        what = f"some examples have {counts[0]} texts and some {counts[-1]}, or a score"
        fix = "give each as many negatives, and a score to all or none"
        raise DataError(what, fix=fix, where=where)


def load_reranking(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
    """Read, split and tokenize queries with a passage each.

    Returns:
        Data sets with `FIRST`, `SCORE` (0 to 1) and `GROUP`.

    Raises:
        DataError: as `load_embedding`.
    """
    report = DataReport(spec.max_length)
    train, held_out = read_both(spec, report, passages, seed, of=lambda one: one.texts[0])
    if len({one.score for one in train}) < 2:
        what = "all passages have one label"
        fix = "add passages that do not answer: there is nothing to tell apart"
        raise DataError(what, fix=fix, where=spec.path or "data")
    sets = each_done(
        partial(_paired, part, tokenizer, report, held_out=held)
        for part, held in ((train, False), (held_out, True))
    )
    warn_of(report, "rerank")
    return Data(sets[0], sets[1], [], "query + passage", report, labels=("relevance",))


def holds_texts(rows: Sequence[Row], columns: Collection[str]) -> bool:
    """Say whether the first row holds texts that belong together, under sentence-transformers'
    own names."""
    there = {*columns, *(rows[0].values if rows else ())}
    return any(there.issuperset(names) for names in _OWN)


def held_out_texts(
    rows: Sequence[Row], spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Return all texts in rows, to measure on: queries with their passages where these have labels.
    Raises DataError."""
    report = DataReport(spec.max_length)
    asked = {*_OWN[-1]} <= {*spec.columns, *rows[0].values}
    make = passages if asked else groups
    found = [*all_told(rows, lambda some, counts: make(some, spec, counts), report)]
    if asked:
        made = _paired(found, tokenizer, report, held_out=True)
    else:
        _refuse_uneven(found, rows[0].file)
        made = _grouped(found, tokenizer, report, "", held_out=True)
    warn_of(report, "rerank" if asked else "embed")
    return HeldOut(made)


def look_at_groups(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return each text of the first groups that are used, and the report. Raises DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(groups(rows, spec, report), spec.max_examples)
        for one, given in _each(found, tokenizer, report, held_out=held_out):
            titles = chain(_TITLES, repeat(_TITLES[-1]))
            if one.score is not None:
                titles = chain(_SCORED)
            yield [
                Shown(one.where, ids := made[FIRST], [0] * len(ids), cut, title, note=_said(one))
                for title, (made, cut) in zip(titles, given, strict=False)
            ]

    return first_shown(spec, limit, show)


def look_at_passages(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return the first queries with their passages that are used, and the report. Raises
    DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(passages(rows, spec, report), spec.max_examples)
        for one, [(made, cut)] in _each(found, tokenizer, report, held_out=held_out, together=True):
            yield [Shown(one.where, ids := made[FIRST], [0] * len(ids), cut, note=_said(one))]

    return first_shown(spec, limit, show)


def _said(one: Texts) -> str:
    return "" if one.score is None else f"score {one.score:g}"


# From rows to texts -------------------------------------------------------------------------------


def groups(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[Texts]:
    """Yield anchors with what belongs to them, file by file, and count rows in `report`.

    Raises:
        DataError: columns are missing, or hold something else.
    """
    for first, ours, found in _by_file(rows, spec, report):
        yield from _groups(first, ours, found)


def _groups(first: Row, rows: Iterable[Row], found: FileReport) -> Iterator[Texts]:
    used: list[str] = []
    rows = telling_unused(map(partial(_with_no_more, first), rows), used, found)
    if all(name in first.values for name in _SCORED):
        used += _SCORED
        made = (
            Texts(_texts(row, _SCORED[:2]), row.where, _number(row, "score", -1)) for row in rows
        )
    else:
        pair = [_column(first, names) for names in (_ANCHOR, _POSITIVE)]
        pair += [str(name) for name in first.values if _NEGATIVE.fullmatch(str(name))]
        several = [name for name in ("negatives",) if name in first.values]
        used += [*pair, *several]
        made = (
            Texts((*_texts(row, pair), *(t for n in several for t in _listed(row, n))), row.where)
            for row in rows
        )
    found.format = " + ".join(used)
    yield from made


def _with_no_more(first: Row, row: Row) -> Row:
    """Return the row. Raises DataError where it has negatives that the first row has not."""
    others = (str(name) for name in row.values if name not in first.values)
    if more := [name for name in others if _NEGATIVE.fullmatch(name) or name == "negatives"]:
        what = f"{listed(more)} stands here, and not in the first row"
        raise DataError(what, fix="give each row as many negatives", where=row.where)
    return row


def passages(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[Texts]:
    """Yield queries with a passage each and whether that answers, 0 to 1. Of an anchor with a
    positive and negatives each is a passage; where there are no negatives, the positive of the row
    before is one.

    Raises:
        DataError: as `groups`.
    """
    for first, ours, found in _by_file(rows, spec, report):
        if "label" not in first.values:
            yield from _of_groups(_groups(first, ours, found))
            continue
        query = _column(first, ("query", "anchor"))
        passage = _column(first, ("passage", "document", "answer"))
        found.format = f"{query} + {passage} + label"
        for row in telling_unused(ours, (query, passage, "label"), found):
            yield Texts(_texts(row, (query, passage)), row.where, _number(row, "label", 0))


def _of_groups(found: Iterable[Texts]) -> Iterator[Texts]:
    before: Texts | None = None
    for one in found:
        if one.score is not None:
            yield one
            continue
        query, positive, *negatives = one.texts
        if not negatives and before is not None and before.texts[1] != positive:
            negatives = [before.texts[1]]
        yield Texts((query, positive), one.where, 1.0)
        yield from (Texts((query, negative), one.where, 0.0) for negative in negatives)
        before = one


def _by_file(
    rows: Iterable[Row], spec: DataSpec, report: DataReport
) -> Iterator[tuple[Row, Iterator[Row], FileReport]]:
    """Yield the first row, all rows and the report of each file."""
    if spec.format != "auto":
        what = f"{spec.format!r} is no format of texts that belong together"
        raise DataError(what, fix="leave it out: their columns say", where="data.format")
    for file, group in groupby(rows, key=lambda row: row.file):
        found, columns = report.of(file), {str(k): v for k, v in spec.columns.items()}
        ours = named(group, columns, found)
        first = next(ours)
        yield first, chain([first], ours), found


def _column(row: Row, names: Sequence[str]) -> str:
    there = next((name for name in names if name in row.values), None)
    if there is None:
        what = f"no column {' or '.join(map(repr, names))}, found {listed(row.values)}"
        fix = f"name yours in data.columns, e.g. {{{names[0]}: ...}}; known are anchor + positive"
        fix += " (+ negative), sentence1 + sentence2 + score, query + passage + label"
        raise DataError(what, fix=fix, where=row.where)
    return there


def _texts(row: Row, columns: Iterable[str]) -> tuple[str, ...]:
    return tuple(text_in(row, column) for column in columns)


def _listed(row: Row, column: str) -> list[str]:
    found = from_json(row.values.get(column), repr(column), row.where)
    if not isinstance(found, list):
        what = f"{column!r} is {kind_of(found)}, expected a list of texts"
        raise DataError(what, fix="write texts in brackets", where=row.where)
    return [checked_text(one, f"a text of {column!r}", row.where) for one in found]


def _number(row: Row, column: str, least: int) -> float:
    value = row.values.get(column)
    try:
        number = float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        number = None
    if number is None or not least <= number <= 1:
        what = f"{column!r} is {value!r}"
        raise DataError(what, fix=f"write a number from {least} to 1", where=row.where)
    return number


# From texts to tokens -----------------------------------------------------------------------------


def _grouped(
    found: Iterable[Texts],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    pooling: str,
    *,
    held_out: bool,
) -> Dataset:
    columns: dict[str, list[Any]] = {}
    for one, given in _each(found, tokenizer, report, held_out=held_out):
        ids = [made[FIRST] for made, _ in given]
        row: dict[str, Any] = {column_of(place): tokens for place, tokens in enumerate(ids)}
        row |= {"completion_mask": [1] * len(ids[0]), POOLING: pooling}
        row |= {} if one.score is None else {SCORE: one.score}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return _set(columns, report, held_out=held_out)


def column_of(place: int) -> str:
    """Return the column of a text in its group."""
    return FIRST if place == 0 else f"text_{place}_ids"


def _paired(
    found: Iterable[Texts],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool,
) -> Dataset:
    columns: dict[str, list[Any]] = {}
    queries: dict[str, int] = {}
    for one, [(made, _)] in _each(found, tokenizer, report, held_out=held_out, together=True):
        row: dict[str, Any] = {**made, "completion_mask": [1] * len(made[FIRST])}
        row |= {SCORE: one.score, GROUP: queries.setdefault(one.texts[0], len(queries))}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return _set(columns, report, held_out=held_out)


_Given = tuple[dict[str, list[int]], int]


def _each(
    found: Iterable[Texts],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool,
    together: bool = False,
) -> Iterator[tuple[Texts, list[_Given]]]:
    """Yield each group that is used with what the tokenizer makes of its texts, of each or of all
    together, and how many tokens were cut off; count it."""
    for one in found:
        read = [one.texts] if together else [(text,) for text in one.texts]
        given = [_given(tokenizer, report.max_length, *texts) for texts in read]
        if _kept(one, given, report.of(one.file), held_out=held_out):
            yield one, given


def _given(tokenizer: PreTrainedTokenizerBase, limit: int, *texts: str) -> _Given:
    """Return what the tokenizer makes of a text, or of two that are read together, and how many
    tokens were cut off."""
    given = tokenizer(*texts, verbose=False)
    whole = len(given[FIRST])
    if whole > limit:
        given = tokenizer(*texts, truncation=True, max_length=limit, verbose=False)
    kept = {name: list(values) for name, values in given.items() if name != _SEEN}
    return kept, whole - len(kept[FIRST])


def _kept(
    one: Texts,
    given: Sequence[_Given],
    counts: FileReport,
    *,
    held_out: bool,
) -> bool:
    """Count a group, and say whether it is used: none of its texts is empty."""
    if not all(made[FIRST] for made, _ in given) or not all(text.strip() for text in one.texts):
        counts.dropped["with an empty text"] += 1
        return False
    if one.score is None and one.texts[1] in one.texts[2:]:
        counts.dropped["with a negative that is the positive"] += 1
        return False
    masks = ([0] * len(made[FIRST]) for made, _ in given)
    counts.keep(*masks, max_length=max(len(made[FIRST]) for made, _ in given), held_out=held_out)
    counts.cut += any(cut > 0 for _, cut in given)
    return True


def _set(columns: dict[str, list[Any]], report: DataReport, *, held_out: bool) -> Dataset:
    import datasets

    if columns:
        return datasets.Dataset.from_dict(columns)
    fix = "fill the texts, and let negatives differ from what they stand against"
    raise none_left("example", fix, report, held_out=held_out)
