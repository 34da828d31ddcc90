"""`pretrain`: every token of raw text is learnt, as when a model was first trained.

Text is read as it is needed, from one source or several with weights, and packed: documents stand
one behind the other in rows of one length and do not see each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import DataError, Problem
from ..folders.metrics import many
from ..hookspecs import hookimpl
from ..memory.cards import size_words
from ..paths import is_local_path
from ..records import Objective
from .answers import causal_problems
from .sft import SFT

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec, Spec, TrainSpec

_KNOWN_ROWS = 4


class Pretrain(SFT):
    """The options of `pretrain`: none."""

    logits: ClassVar[Literal["model", "chunks", "whole"]] = "model"
    packs_by_default: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse models that are not causal."""
        return causal_problems(type(self).__name__, "pretrain", config, "objective: sft")

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return all of the text in rows, as `load_stream` makes them."""
        from ..data.streams import load_stream

        return load_stream(spec, tokenizer, seed=seed)

    def read_for(
        self, spec: Spec, tokenizer: PreTrainedTokenizerBase, *, processes: int = 1
    ) -> Data:
        """Return as many rows as the steps of a run take."""
        from ..data.streams import load_stream

        packed, rows = spec.train.packing is not False, rows_of_steps(spec, processes)
        return load_stream(spec.data, tokenizer, seed=spec.seed, rows=rows, packed=packed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the format of the first row of each source; None where a hub id is among them."""
        from ..data.streams import survey_stream

        return None if any(map(_of_hub, spec.named)) else survey_stream(spec)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the first documents."""
        from ..data.streams import look_at_stream

        return look_at_stream(spec, tokenizer, limit)

    def known_by(self, dataset: Dataset) -> list[int]:
        """Return the tokens of the first rows: how many there are depends on the steps."""
        first = dataset[: min(_KNOWN_ROWS, len(dataset))]["input_ids"]
        return [token for row in first for token in row]

    def conflicts(self, spec: Spec) -> list[Problem]:
        """Refuse sources that have no end where no step is the last, and such as contradict."""
        data, found = spec.data, list[Problem]()
        weighted = [source.weight is not None for source in data.sources]
        if any(weighted) and not all(weighted):
            what = "some sources have a weight and some have none"
            fix = "give each a weight, or none to read all of them once"
            found.append(Problem(what, fix, "data.sources", "pretrain-weights"))
        if data.sources and data.path:
            what = "data.path and data.sources both say what is read"
            found.append(Problem(what, "leave one of them out", "data.sources", "pretrain-sources"))
        if (endless := _endless(data)) and spec.train.max_steps <= 0:
            what = f"{endless}, so the length of an epoch is not known"
            found.append(Problem(what, "set train.max_steps", "train.max_steps", "pretrain-length"))
        return found

    def misfits(self, train: TrainSpec) -> list[Problem]:
        """Refuse a length of rows beside that of the data."""
        if train.row_length is None:
            return []
        what = "pretrain lays text in rows of data.max_length"
        fix = f"set data.max_length to {train.row_length}, and train.packing to true"
        return [Problem(what, fix, "train.packing", "pretrain-rows")]

    def remarks(self, spec: Spec) -> list[str]:
        """Tell how much is read, and what is not known before it is."""
        from ..data.sources import rows_of

        try:
            local = [path for path in spec.data.named or (None,) if not _of_hub(path)]
            files = [file for path in local for file in rows_of(path).files]
        except DataError:
            return []  # told where paths are looked at
        size = sum(file.stat().st_size for file in files)
        text = f"{many(len(files), 'file')} of {size_words(size)}" if files else "data of the hub"
        length, rows = spec.data.max_length, rows_of_steps(spec, 1)
        if rows is None:
            hold = "holds" if len(files) == 1 else "hold"
            told = f"how many tokens {text} {hold} is known once they are read"
            return [f"{told}, all of them first"]
        count = spec.train.max_steps
        steps = f"{many(count, 'step')} {'reads' if count == 1 else 'read'}"
        told = f"{steps} {many(rows, 'row')} of {length:,} tokens of {text}"
        return [f"{told} in each process; how many there are is known once they are read"]


def rows_of_steps(spec: Spec, processes: int) -> int | None:
    """Return how many rows the steps of a run take; None where an epoch ends it."""
    train = spec.train
    if train.max_steps <= 0:
        return None
    each = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return train.max_steps * each * processes // train.context_parallel_size


def _endless(data: DataSpec) -> str:
    """Return why nobody can say how much data there is; empty where files tell."""
    if any(source.weight is not None for source in data.sources):
        return "sources with weights are begun again and again"
    return "a data set of the hub is streamed" if any(map(_of_hub, data.named)) else ""


def _of_hub(path: str | None) -> bool:
    """Say whether a source can only be a hub id."""
    if path is None or is_local_path(path) or has_magic(path):
        return False
    return not Path(path).expanduser().exists()


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    return [Objective("pretrain", "learn every token of raw text, streamed and packed", Pretrain)]
