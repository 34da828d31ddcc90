"""`kto`, Kahneman-Tversky optimization: answers with a label, desirable or not, without pairs.

Each is compared with the model before training, and with how far the model has moved from that on
answers that do not fit (https://arxiv.org/abs/2402.01306).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from .answers import AnswerTask, answer_batch, log_likelihoods, rows_at_once, with_reference

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup

REFERENCE, REFERENCE_MISMATCHED = "reference", "reference_mismatched"
"""Columns with log-likelihoods by the reference model, in nats: of an answer, and of one that
belongs to another prompt."""
KL = "kl"


class KTO(AnswerTask):
    """The options of `kto`. Losses and names are TRL's."""

    beta: float = Field(0.1, gt=0, description="how much leaving the reference costs")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="kto: KTO's own; apo_zero_unpaired: without the part of mismatched answers, "
        "for answers that are better than the model's own",
    )
    desirable_weight: float = Field(1.0, gt=0, description="how much a desirable answer weighs")
    undesirable_weight: float = Field(1.0, gt=0, description="how much an undesirable one weighs")

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return answers, as `load_desirable` makes them."""
        from ..data.desirable import load_desirable

        return load_desirable(spec, tokenizer, seed=seed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.desirable import judged
        from ..data.preferences import with_bundled
        from ..data.reading import survey

        return survey(with_bundled(spec), judged)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the first answers."""
        from ..data.desirable import look_at_answers

        return look_at_answers(spec, tokenizer, limit)

    @property
    def compares(self) -> bool:
        """Leaving the model before training costs something."""
        return True

    def prepared(
        self, setup: Setup, held_out: Dataset | None, tell: Callable[[str], None]
    ) -> tuple[Dataset, Dataset | None]:
        """Return data with the log-likelihoods of the reference."""
        from ..data.desirable import ANSWER, DESIRABLE, MISMATCHED

        if words := self._unbalanced(setup.dataset[DESIRABLE]):
            tell(words)
        answers = {REFERENCE: ANSWER}
        answers |= {REFERENCE_MISMATCHED: MISMATCHED} if self._compares else {}
        return with_reference(setup, held_out, tell, answers=answers, kind="answers")

    @property
    def _compares(self) -> bool:
        """Whether the loss looks at mismatched answers."""
        return self.loss_type == "kto"

    def _unbalanced(self, desirable: list[int]) -> str:
        """Return what to weigh otherwise, by equation 8 of KTO's paper; empty if nothing."""
        good = sum(desirable)
        bad = len(desirable) - good
        ratio = self.desirable_weight * good / (self.undesirable_weight * bad) if bad else 1.0
        if good == bad or not good or 0.99 <= ratio <= 1.34:
            return ""
        weight = self.undesirable_weight * bad / good
        return (
            f"{good:,} answers are desirable and {bad:,} are not; KTO's authors advise a"
            f" desirable_weight of {weight:.2g} to {weight * 4 / 3:.2g} then"
        )

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads answers."""
        return AnswerCollator(setup.pad_token_id, setup.length_multiple)

    def before_step(self, setup: Setup, batches: list[dict[str, Any]], step: int) -> None:
        """Measure how much likelier mismatched answers have become, a mean over the whole step, so
        that it does not depend on how that is divided."""
        import torch

        from ..distributed.talking import summed
        from ..evaluation.predictions import evaluating

        if not self._compares:
            return
        model = setup.model

        def likelihoods(most: int) -> Tensor:
            with evaluating(model), torch.no_grad():
                parts = [p for b in batches for p in rows_at_once(b["mismatched"], most)]
                return torch.cat([log_likelihoods(model, part)[0] for part in parts])

        size, what = setup.spec.per_device_train_batch_size, f"what comes before step {step}"
        found = setup.at_once(likelihoods, size, "mismatched", what)
        whole = found.double() - torch.cat([batch["mismatched"][REFERENCE] for batch in batches])
        total, count = summed(
            torch.stack([whole.sum(), whole.new_tensor(len(whole))]), whole.device
        )
        for batch in batches:
            batch[KL].fill_(float((total / count).clamp(min=0)))

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all answers of a step, and rewards."""
        likelihoods, _ = log_likelihoods(model, batch)
        ratios, good = likelihoods - batch[REFERENCE], batch["desirable"]
        losses = self.losses(ratios, good, batch[KL])
        told = {KL: batch[KL]} if self._compares else {}
        for name, which in (("chosen", good), ("rejected", ~good)):
            told[f"rewards/{name}"] = self.beta * ratios.detach()[which]
            told[f"logps/{name}"] = likelihoods.detach()[which]
        return losses.sum() / count, told

    def losses(self, ratios: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
        """Return the loss of each answer, [answers], of how much likelier it has become and
        mismatched ones have, in nats."""
        sign = desirable.to(ratios.dtype) * 2 - 1
        gained = (self.beta * sign * (ratios - kl)).sigmoid()
        weight = gained.new_full((), self.desirable_weight)
        return (1 - gained) * weight.where(desirable, gained.new_tensor(self.undesirable_weight))


@dataclass
class AnswerCollator:
    """Pads answers, and mismatched ones, on the right.

    Attributes:
        multiple: batches are padded to a multiple of so many tokens.
    """

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of answers with `desirable`, `reference` and `kl` [answers], which is 0
        until a step begins; and where the data have a reference for it, one of mismatched answers,
        `mismatched`."""
        import torch

        from ..data.desirable import ANSWER, DESIRABLE, MISMATCHED

        batch = self._batch(examples, *ANSWER, REFERENCE)
        batch["desirable"] = torch.tensor([bool(e[DESIRABLE]) for e in examples])
        batch[KL] = torch.zeros(len(examples))
        if REFERENCE_MISMATCHED in examples[0]:
            batch["mismatched"] = self._batch(examples, *MISMATCHED, REFERENCE_MISMATCHED)
        return batch

    def _batch(
        self, examples: list[dict[str, Any]], ids: str, mask: str, reference: str
    ) -> dict[str, Any]:
        import torch

        rows = [(e[ids], e[mask]) for e in examples]
        batch = answer_batch(rows, self.pad_token_id, self.multiple)
        return batch | {REFERENCE: torch.tensor([float(e[reference]) for e in examples])}


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "learn from answers that are labelled as desirable or not, compared with the model"
    summary += " before training"
    return [Objective("kto", summary, KTO, evaluations=("desirability",))]
