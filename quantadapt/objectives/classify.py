"""`classify` and `classify-tokens`: a label for each text, or for each word of it.

A language model gets a new head, which is trained and saved with the adapter, as PEFT does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import DataError, Problem
from ..hookspecs import hookimpl
from ..protocols import Task
from ..records import Objective

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup


class HeadTask(Task):
    """Learns with a head that classifies."""

    wants_lm: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "chunks"  # few, not of a vocabulary

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse encoder-decoder models."""
        if not config.get("is_encoder_decoder"):
            return []
        what = f"{type(self).__name__} learns with a decoder or an encoder, and the model has both"
        return [Problem(what, "use a model with one of them", "objective", "head-encoder-decoder")]


class Classify(HeadTask):
    """The options of `classify`: none."""

    head: ClassVar[Literal["", "sequence", "token"]] = "sequence"
    unit: ClassVar[str] = "nats per example"

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return texts and labels, as `load_labelled` makes them."""
        from ..data.labelled import load_labelled

        return load_labelled(spec, tokenizer, kind=self._kind, seed=seed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from functools import partial

        from ..data.labelled import labelled, with_bundled
        from ..data.reading import survey

        return survey(with_bundled(spec, self._kind), partial(labelled, kind=self._kind))

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the first texts, with their labels."""
        from ..data.labelled import look_at_labelled

        return look_at_labelled(spec, tokenizer, limit, kind=self._kind)

    @property
    def _kind(self) -> Literal["sequence", "token"]:
        return "token" if self.head == "token" else "sequence"

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads texts, and turns labels into the numbers of outputs. Raises DataError
        where the model has no output for a label."""
        from ..loading.heads import label_ids

        known = label_ids(setup.model.config)
        check_labels(setup.dataset, known)
        return LabelCollator(pad_of(setup), known)

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the mean cross-entropy over all labels of a step, in nats."""
        from torch.nn.functional import cross_entropy

        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        total = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        mean: Tensor = total / count
        return mean

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of labels."""
        return int((batch["labels"] != -100).sum())


class ClassifyTokens(Classify):
    """The options of `classify-tokens`: none."""

    head: ClassVar[Literal["", "sequence", "token"]] = "token"
    unit: ClassVar[str] = "nats per word"


def pad_of(setup: Setup) -> int:
    """Return the token to pad with: the one by which the model finds the end of a text."""
    pad = getattr(setup.model.config, "pad_token_id", None)
    return setup.pad_token_id if pad is None else int(pad)


def check_labels(dataset: Any, known: Mapping[str, int]) -> None:
    """Raise DataError where examples have labels that the model has no output for."""
    from ..data.labelled import LABEL, LABELS, NONE

    if LABEL in dataset.column_names:
        there = set(dataset[LABEL])
    else:
        there = {label for row in dataset[LABELS] for label in row} - {NONE}
    if unknown := sorted(there - known.keys()):
        names = sorted(known, key=lambda name: known[name])
        what = f"the model has no output for the label {unknown[0]!r}, only for {names[:8]}"
        fix = f"quantize it with labels={sorted(there)[:8]}, or rename those in the data"
        raise DataError(what, fix=fix, where="labels")


@dataclass
class LabelCollator:
    """Pads texts on the right; labels become numbers, -100 where there is none."""

    pad_token_id: int
    known: Mapping[str, int]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` [batch, length], and `labels` [batch] or [batch,
        length]."""
        import torch

        from ..data.batches import padded
        from ..data.labelled import LABEL, LABELS

        batch: dict[str, Any] = {
            "input_ids": padded([e["input_ids"] for e in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(e["input_ids"]) for e in examples], 0),
        }
        if LABEL in examples[0]:
            batch["labels"] = torch.tensor([self.known[e[LABEL]] for e in examples])
        else:
            rows = [[self.known.get(label, -100) for label in e[LABELS]] for e in examples]
            batch["labels"] = padded(rows, -100)
        return batch


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objectives of this file."""
    measured = ("classification",)
    return [
        Objective("classify", "a label for each text", Classify, evaluations=measured),
        Objective("classify-tokens", "a label for each word", ClassifyTokens, evaluations=measured),
    ]
