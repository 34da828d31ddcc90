"""`dpo`, direct preference optimization: chosen answers become likelier than rejected ones.

Both are compared with the model before training (https://arxiv.org/abs/2305.18290).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..hookspecs import hookimpl
from ..records import Objective
from .answers import log_likelihoods, with_reference
from .pairs import REFERENCE, PairTask, logged, rewards

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from ..training.trainer import Setup


class DPO(PairTask):
    """The options of `dpo`. Losses and names are TRL's."""

    beta: float = Field(
        0.1, gt=0, description="how much leaving the reference costs; of ipo its parameter tau"
    )
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = Field(
        "sigmoid",
        description="sigmoid: DPO's own; robust: with labels that are sometimes wrong; hinge: of a "
        "margin of 1; ipo: towards a margin of 1 / (2 beta), of means per token",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="the share of pairs that are labelled the wrong way round, for sigmoid and "
        "robust",
    )

    @model_validator(mode="after")
    def _fits(self) -> DPO:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f"loss_type {self.loss_type} has no label_smoothing")
        return self

    @property
    def compares(self) -> bool:
        """Leaving the model before training costs something."""
        return True

    def prepared(
        self, setup: Setup, held_out: Dataset | None, tell: Callable[[str], None]
    ) -> tuple[Dataset, Dataset | None]:
        """Return data with the log-likelihoods of the reference."""
        from ..data.preferences import CHOSEN, REJECTED

        answers = dict(zip(REFERENCE, (CHOSEN, REJECTED), strict=True))
        return with_reference(setup, held_out, tell, answers=answers, kind="pairs")

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all pairs of a step, and rewards."""
        likelihoods, lengths = log_likelihoods(model, batch)
        ratios = likelihoods - batch["reference"]
        told = rewards(ratios.view(-1, 2), self.beta) | logged(likelihoods)
        if self.loss_type == "ipo":
            ratios = ratios / lengths
        chosen, rejected = ratios.view(-1, 2).unbind(1)
        return self.losses(chosen - rejected).sum() / count, told

    def losses(self, margins: Tensor) -> Tensor:
        """Return the loss of each pair, of how much more its chosen answer gained, in nats."""
        from torch.nn.functional import logsigmoid, relu

        scaled, wrong = self.beta * margins, self.label_smoothing
        if self.loss_type == "hinge":
            return relu(1 - scaled)
        if self.loss_type == "ipo":
            return (margins - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "robust":
            flipped = (1 - wrong) * logsigmoid(scaled) - wrong * logsigmoid(-scaled)
            return -flipped / (1 - 2 * wrong)
        return -(1 - wrong) * logsigmoid(scaled) - wrong * logsigmoid(-scaled)


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "prefer chosen to rejected answers, compared with the model before training"
    return [Objective("dpo", summary, DPO, evaluations=("preferences",))]
