"""`orpo`, odds ratio preference optimization: learn the chosen answers, and make them the likelier.

It needs no reference (https://arxiv.org/abs/2403.07691).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from .answers import token_log_probs
from .pairs import PairTask, logged, rewards

if TYPE_CHECKING:
    from torch import Tensor


class ORPO(PairTask):
    """The options of `orpo`. The loss is TRL's."""

    adds_up: ClassVar[bool] = False  # its first part is a mean over all tokens of a batch
    meets: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0, description="how much the odds ratio weighs")

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all pairs of a step: the loss of chosen answers with their prompts,
        in nats per token, and that of the odds ratio. A batch that is learnt from is that of all
        processes."""
        from torch.nn.functional import logsigmoid

        from ..model.gathered import mean_of_processes

        answers = batch["labels"][:, 1:] != -100
        whole = batch["labels"].clone()  # of the chosen ones, with their prompts
        seen = batch["attention_mask"][0::2] == 1
        whole[0::2] = batch["input_ids"][0::2].masked_fill(~seen, -100)
        log_p = token_log_probs(model, {**batch, "labels": whole, "counted": None})
        tokens = (whole[0::2, 1:] != -100).sum()
        learnt = -log_p[0::2].sum() / (mean_of_processes(tokens) if model.training else tokens)
        means = (log_p * answers).sum(1) / answers.sum(1)
        chosen, rejected = means.view(-1, 2).unbind(1)
        ratios = logsigmoid(log_odds(chosen) - log_odds(rejected))
        total = learnt * len(ratios) - self.beta * ratios.sum()
        return total / count, rewards(means.view(-1, 2), self.beta) | logged(means)


def log_odds(log_p: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of a probability, given its logarithm."""
    # log(1 - e^x), precise on both ends (https://cran.r-project.org/package=Rmpfr, log1mexp)
    near = log_p > -0.6931
    rest = (-log_p.expm1()).log().where(near, (-log_p.exp()).log1p())
    return log_p - rest


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "learn chosen answers, and prefer them to rejected ones, without a reference"
    return [Objective("orpo", summary, ORPO, evaluations=("preferences",))]
