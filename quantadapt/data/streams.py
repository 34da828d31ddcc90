"""Text of any length, from several sources: read as it is needed, never whole in memory.

Documents are shuffled among their neighbours, tokenized, and laid end to end in rows of one
length, which say where a document begins. Rows are written to disk as they are made, as many as a
run takes, and read from there.
"""

from __future__ import annotations

import random
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..spec import DataSpec, SourceSpec
from .batches import SEQUENCES
from .formats import Example, examples
from .looking import Shown
from .pieces import Pieces, Segment
from .report import DataReport
from .segments import segments
from .sets import Data, prompts_of
from .sources import Rows, rows_of
from .tokens import tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 100
"""Documents of the first that are held out, where nothing else is said."""
SHUFFLED = 1000
"""Documents among which the next one is drawn."""
_BATCH = 64
_WRITTEN = 256

_Ids = list[int]


def load_stream(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    rows: int | None = None,
    packed: bool = True,
) -> Data:
    """Read what `spec` names as text of which every token is learnt.

    Held out is `eval_path`, what a folder or hub id holds out itself, or else the first
    `eval_examples` documents of all sources together, at most half of them; by default 100, at most
    one in 20.

    Args:
        rows: read no further than so many.
        packed: lay documents end to end; else a row holds one, or a part of one.

    Returns:
        Data whose `train` has rows of up to `max_length` tokens, on disk, in the order in which
        they are to be learnt: `input_ids`, `completion_mask` (all 1) and `SEQUENCES`.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    report = DataReport(spec.max_length)
    mixed = _mixed(spec, seed, report)
    held_out, given = _held_out(spec, mixed, report)
    for source in mixed:
        source.tokenizer = tokenizer
    documents = islice(_drawn(mixed), spec.max_examples)
    made = _in_rows(documents, spec.max_length) if packed else _apart(documents, spec.max_length)
    train = _on_disk(islice(made, rows))
    if not len(train):
        what = "no text is left to train on"
        fix = "add documents, or hold out fewer (data.eval_examples)"
        raise DataError(what, fix=fix, where=_name(spec))
    for source in mixed:
        source.tell(report)
    evaluated = _examples(held_out, tokenizer, report)
    if not len(evaluated):
        fix = "name held-out data with data.eval_path"
        raise DataError("the held-out documents are empty", fix=fix, where=given)
    return Data(train, evaluated, prompts_of(held_out, tokenizer), report.files[0].format, report)


def look_at_stream(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return the first documents of each source as rows of their own, and a report on those; the
    others are not read. Raises DataError."""
    report, shown = DataReport(spec.max_length), list[Shown]()
    for source in _mixed(spec, 0, report):
        for one in islice(source.documents(), limit):
            for ids in _tokenized([one], tokenizer, report):
                here, later = ids[: spec.max_length], len(ids) - spec.max_length
                note = f"{later:,} more in further rows" if later > 0 else ""
                shown.append(Shown(one.where, here, [1] * len(here), 0, note=note))
    return shown, report


def survey_stream(spec: DataSpec) -> DataReport:
    """Return the format of each source, of its first row. Raises DataError."""
    report = DataReport(spec.max_length)
    for source in _mixed(spec, 0, report):
        next(source.documents(), None)
    for file in report.files:
        file.rows = 0  # one of them says nothing of how many there are
    return report


# Sources ------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """One of those that are mixed.

    Attributes:
        weight: its share of the tokens; None where all of it is read, once.
        skipped: its first documents, which are held out.
        passes: how often it was begun.
    """

    name: str
    rows: Rows
    weight: float | None
    spec: DataSpec
    seed: int
    report: DataReport
    tokenizer: Any = None
    skipped: int = 0
    passes: int = 0
    tokens: int = field(default=0)

    def documents(self) -> Iterator[Example]:
        """Yield its documents in their order."""
        return examples(self.rows.train(), self.spec, self.report)

    def ids(self) -> Iterator[_Ids]:
        """Yield the token ids of its documents, shuffled among neighbours; for ever, where it has a
        weight."""
        while True:
            self.passes += 1
            rest = islice(self.documents(), self.skipped, None)
            drawn = _shuffled(rest, random.Random(f"{self.seed} {self.name} {self.passes}"))
            found = False
            for ids in _tokenized(drawn, self.tokenizer, self.report):
                found = True
                self.tokens += len(ids)
                yield ids
            if self.weight is None or not found:
                return

    def tell(self, report: DataReport) -> None:
        """Say in the report how often it was read."""
        if self.passes > 1:
            for file in report.files:
                if file.file.startswith(self.name):
                    file.remarks["begun again"] += self.passes - 1
                    return


def _mixed(spec: DataSpec, seed: int, report: DataReport) -> list[_Source]:
    named = spec.sources or [SourceSpec(path=spec.path)]
    return [
        _Source(one.path or "the demo", rows_of(one.path), one.weight, spec, seed, report)
        for one in named
    ]


def _drawn(sources: Sequence[_Source]) -> Iterator[_Ids]:
    """Yield documents of all sources: one after the other, or as their weights have it, from that
    which is furthest behind its share of the tokens."""
    if any(source.weight is None for source in sources):
        yield from chain.from_iterable(source.ids() for source in sources)
        return
    streams = [(source, source.ids()) for source in sources]
    given = {source.name: 0 for source in sources}
    while True:
        source, ids = min(streams, key=lambda one: given[one[0].name] / (one[0].weight or 1))
        document = next(ids, None)
        if document is None:
            what = "it holds no text beside what is held out"
            raise DataError(what, fix="leave it out, or name data.eval_path", where=source.name)
        given[source.name] += len(document)
        yield document


def _shuffled(documents: Iterable[Example], draws: random.Random) -> Iterator[Example]:
    """Yield documents, each drawn from the next `SHUFFLED`."""
    waiting: list[Example] = []
    for document in documents:
        if len(waiting) < SHUFFLED:
            waiting.append(document)
            continue
        place = draws.randrange(SHUFFLED)
        drawn, waiting[place] = waiting[place], document
        yield drawn
    draws.shuffle(waiting)
    yield from waiting


# Held out -----------------------------------------------------------------------------------------


def _held_out(
    spec: DataSpec, sources: Sequence[_Source], report: DataReport
) -> tuple[list[Example], str]:
    """Return the documents to measure on and where they are from; sources skip their own."""
    count, most = spec.eval_examples or HELD_OUT, 2 if spec.eval_examples else 20
    if spec.eval_path is not None:
        rows = rows_of(spec.eval_path)
        return [*islice(examples(rows.held_out_or_all(), spec, report), count)], spec.eval_path
    own = [partial(examples, source.rows.held_out(), spec, report) for source in sources
           if source.rows.holds_out]  # fmt: skip
    if own:
        return [*islice(chain.from_iterable(make() for make in own), count)], sources[0].name
    each = -(-count // len(sources))
    found, seen = list[Example](), 0
    for source in sources:
        first = [*islice(source.documents(), most * each)]
        seen += len(first)
        source.skipped = min(each, max(1, len(first) // most), max(len(first) - 1, 0))
        found += first[: source.skipped]
    for file in report.files:  # they are read again
        file.rows = 0
    if not found:
        only = "only one document" if seen else "no document"
        what = f"there is {only}, so none can be held out for evaluation"
        fix = "add documents, or name held-out data with data.eval_path"
        raise DataError(what, fix=fix, where=_name(spec))
    return found[:count] if len(sources) == 1 else found, sources[0].name


def _name(spec: DataSpec) -> str:
    return spec.path or (spec.sources[0].path if spec.sources else "data") or "data"


def _examples(
    found: Iterable[Example], tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> Dataset:
    import datasets

    limit = report.max_length
    ids = [ids[:limit] for ids in _tokenized(found, tokenizer, report, held_out=True)]
    masks = [[1] * len(row) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


# Tokens and rows ----------------------------------------------------------------------------------


def _tokenized(
    documents: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool = False,
) -> Iterator[_Ids]:
    """Yield the tokens of each document that has a second one, and count them."""
    documents, limit = iter(documents), report.max_length
    while batch := [*islice(documents, _BATCH)]:
        texts = [(one, text) for one in batch for text in segments(one, tokenizer).texts]
        whole = [Pieces([Segment(_text(text), True)], text.templated) for _, text in texts]
        for (one, _), (ids, _) in zip(texts, tokenize(whole, tokenizer), strict=True):
            counts = report.of(one.file)
            if len(ids) < 2:
                counts.dropped["with an empty text"] += 1
                continue
            longest = limit if held_out else len(ids)
            counts.keep([1] * len(ids), max_length=longest, held_out=held_out)
            yield ids


def _text(pieces: Pieces) -> str:
    return "".join(segment.text for segment in pieces.segments)


def _in_rows(documents: Iterable[_Ids], length: int) -> Iterator[dict[str, Any]]:
    """Lay documents end to end in rows of `length` tokens; the last may be shorter. A document goes
    on in the next row, of which its part is a document of its own."""
    row, lengths = list[int](), list[int]()
    for ids in documents:
        start = 0
        while start < len(ids):
            part = ids[start : start + length - len(row)]
            row += part
            lengths.append(len(part))
            start += len(part)
            if len(row) == length:
                yield _row(row, lengths)
                row, lengths = [], []
    if len(row) > 1:
        yield _row(row, lengths)


def _apart(documents: Iterable[_Ids], length: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each document, or several for one that is longer than `length` tokens."""
    for ids in documents:
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) > 1:
                yield _row(part, [len(part)])


def _row(ids: _Ids, lengths: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": ids, "completion_mask": [1] * len(ids), SEQUENCES: list(lengths)}


def _on_disk(rows: Iterable[dict[str, Any]]) -> Dataset:
    """Return a data set of rows in a file, which goes when nobody holds it any more."""
    import datasets
    import pyarrow as pa

    kept = tempfile.TemporaryDirectory(prefix="quantadapt-stream-")
    file, rows = Path(kept.name) / "rows.arrow", iter(rows)
    types = {"input_ids": pa.int32(), "completion_mask": pa.int8(), SEQUENCES: pa.int32()}
    schema = pa.schema({name: pa.list_(type_) for name, type_ in types.items()})
    try:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := [*islice(rows, _WRITTEN)]:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        made = datasets.Dataset.from_file(str(file))
    except BaseException:
        kept.cleanup()
        raise
    weakref.finalize(made.data, kept.cleanup)  # views of it hold the same table
    return made
