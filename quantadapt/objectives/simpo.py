"""`simpo`, simple preference optimization: a margin between log-likelihoods per token.

It needs no reference (https://arxiv.org/abs/2405.14734).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from .answers import log_likelihoods
from .pairs import PairTask, logged, rewards

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(PairTask):
    """The options of `simpo`. The loss is that of TRL's CPO with loss_type simpo."""

    beta: float = Field(2.0, gt=0, description="the scale of log-likelihoods per token")
    gamma: float = Field(1.0, ge=0, description="the margin that is aimed at, after that scale")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="the share of pairs that are labelled the wrong way round"
    )

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all pairs of a step, and rewards."""
        from torch.nn.functional import logsigmoid

        likelihoods, lengths = log_likelihoods(model, batch)
        means = likelihoods / lengths
        chosen, rejected = means.view(-1, 2).unbind(1)
        margins, wrong = self.beta * (chosen - rejected) - self.gamma, self.label_smoothing
        losses = -(1 - wrong) * logsigmoid(margins) - wrong * logsigmoid(-margins)
        return losses.sum() / count, rewards(means.view(-1, 2), self.beta) | logged(means)


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "prefer chosen to rejected answers by a margin per token, without a reference"
    return [Objective("simpo", summary, SimPO, evaluations=("preferences",))]
