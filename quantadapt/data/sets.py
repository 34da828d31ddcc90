"""What reading gives: examples to train on, others held out, prompts among those, and a report."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..errors import DataError, DataWarning, NoneLeft, warn
from ..spec import DataSpec
from .files import Row
from .formats import Example
from .mistakes import all_told, each_done
from .pieces import Pieces
from .report import DataReport, source_of
from .segments import segments
from .sources import read
from .tokens import Prompt, token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
MAX_PROMPTS = 1000
TEXT_PROMPT_TOKENS = 16


class _FromRow(Protocol):
    @property
    def where(self) -> str:
        """Its file and line."""
        ...


Found = TypeVar("Found", bound=_FromRow)
"""What a row was made into."""


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
        format: the format that was read, one of `FORMATS`; that of the first file of several.
        report: what was cut, dropped or not used, file by file.
        labels: what is to be told apart, where that is learnt, in the order of a head's outputs.
    """

    train: Dataset
    eval: Dataset
    prompts: list[Prompt]
    format: str
    report: DataReport = field(default_factory=lambda: DataReport(MAX_LENGTH))
    labels: tuple[str, ...] = ()

    @property
    def held_out(self) -> HeldOut:
        """What a model is measured on."""
        return HeldOut(self.eval, self.prompts)

    @property
    def cut(self) -> int:
        """Examples shortened to `max_length` and kept, in both data sets together."""
        return sum(file.cut for file in self.report.files)

    @property
    def dropped(self) -> int:
        """Examples left out, for reasons that the report names."""
        return sum(file.dropped.total() for file in self.report.files)


def read_both(
    spec: DataSpec,
    report: DataReport,
    make: Callable[[Iterable[Row], DataSpec, DataReport], Iterable[Found]],
    seed: int,
    *,
    of: Callable[[Found], str] = lambda example: example.where,
) -> tuple[list[Found], list[Found]]:
    """Read what `spec` names; return what `make` makes of rows: (training, held-out) examples.
    Without held-out data of its own a part is split off. Raises DataError.

    Args:
        of: says what an example belongs to, of which all goes to one side; by default its row.
    """
    train_rows, held_out_rows = read(spec)

    def made(rows: Iterable[Row], counts: DataReport) -> Iterable[Found]:
        return make(rows, spec, counts)

    train, held_out = each_done(
        [
            lambda: [*islice(all_told(train_rows, made, report), spec.max_examples)],
            lambda: [*all_told(held_out_rows, made, report)],
        ]
    )
    return (train, held_out) if held_out else _split(train, spec, seed, of)


def none_left(
    kind: str, fix: str, report: DataReport, where: str = "", *, held_out: bool = False
) -> NoneLeft:
    """Return an error that says why all examples of a kind were dropped; by default where: in the
    first file of which none is used."""
    reasons = "; ".join(text for f in report.files for text in f.losses(report.max_length))
    what = f"no {kind} is left: {reasons or 'there is none'}"
    if held_out and (used := sum(file.examples for file in report.files)):
        what = f"no {kind} is left of what is held out, and {used:,} to learn from: {reasons}"
        fix += "; or raise data.eval_fraction, or name other held-out data in data.eval_path"
    unused = (file.file for file in report.files if not file.examples)
    return NoneLeft(what, fix=fix, where=where or next(unused, report.files[0].file))


def _split(
    found: list[Found], spec: DataSpec, seed: int, of: Callable[[Found], str]
) -> tuple[list[Found], list[Found]]:
    """Return (training, held-out) examples, each in the order in which they were read, drawn by
    `spec.split_seed`, or else by `seed`.

    Examples of one row (the paths of a tree, the instances of an instruction) stay together.
    """
    rows = list(dict.fromkeys(map(of, found)))
    if len(rows) < 2:
        fix = "add examples, or name held-out data with data.eval_path"
        what = "there is only one example, so none can be held out for evaluation"
        what = what if rows else "there is no example"
        raise DataError(what, fix=fix, where=spec.path or "demo data")
    count = min(max(1, round(len(rows) * spec.eval_fraction)), len(rows) - 1)
    draws = random.Random(seed if spec.split_seed is None else spec.split_seed)
    chosen = {rows[index] for index in draws.sample(range(len(rows)), count)}
    train = [example for example in found if of(example) not in chosen]
    return train, [example for example in found if of(example) in chosen]


def prompts_of(found: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the prompts of the first examples that have something to learn."""
    texts = (segments(example, tokenizer).texts[:1] for example in found)
    learnt = (pieces for first in texts for pieces in first if pieces.learns)
    return [_prompt(pieces, tokenizer) for pieces in islice(learnt, MAX_PROMPTS)]


def _prompt(pieces: Pieces, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the text before the last trained segment, and that segment."""
    found = pieces.segments
    if all(segment.trained for segment in found) and not pieces.templated:
        ids = token_ids(tokenizer, [found[0].text])[0]
        first = str(tokenizer.decode(ids[:TEXT_PROMPT_TOKENS]))
        return Prompt(first, str(tokenizer.decode(ids[TEXT_PROMPT_TOKENS:])))
    last = max(index for index, segment in enumerate(found) if segment.trained)
    reference = found[last].text.removesuffix(str(tokenizer.eos_token or ""))
    before = "".join(segment.text for segment in found[:last])
    return Prompt(before, reference, pieces.templated, pieces.pictures)


def warn_of(report: DataReport, objective: str = "sft") -> None:
    """Warn of each file that lost much, with DataWarning; for the caller of who reads.

    Args:
        objective: one that reads such data.
    """
    reads_it = "" if objective == "sft" else f" --objective {objective}"
    for file, text in report.warnings():
        fix = f"See them with `quantadapt data {shlex.quote(source_of(file))}{reads_it}`"
        length = f"data.max_length is {report.max_length}"
        warn(f"{text}. {fix}; {length}", DataWarning, stacklevel=4)
