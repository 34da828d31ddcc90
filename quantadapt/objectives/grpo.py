"""`grpo`, group relative policy optimization: answers that got more than others to their prompt.

How much more, in standard deviations, is what each of its tokens is worth
(https://arxiv.org/abs/2402.03300).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from ..rewarding.values import gathered, nanstd
from .reward_batch import ADVANTAGE, OLD, REFERENCE, WEIGHT
from .rewarded import RewardTask

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-4
"""Is added to standard deviations, as TRL has it."""


class GRPO(RewardTask):
    """The options of `grpo`. Losses and names are TRL's."""

    beta: float = Field(
        0.0, ge=0, description="how much leaving the model as training began costs, per token"
    )
    use_bias_correction_kl: bool = Field(
        True, description="weigh that by the ratio of probabilities, so that its gradient is right"
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field(
        "dapo",
        description="what tokens weigh: grpo: as one of their answer, answers alike; dapo: all of "
        "a step alike; dr_grpo: as one of the longest answer; bnpo: all of a batch alike",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="whose standard deviation rewards are divided by"
    )

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return rewards less the mean of the group, in standard deviations."""
        groups = rewards.view(-1, self.num_generations)
        found = groups - groups.nanmean(1, keepdim=True)
        if self.scale_rewards == "group":
            found = found / (nanstd(groups)[:, None] + _SMALL)
        if self.scale_rewards == "batch":
            found = found / (nanstd(gathered(rewards)[None]) + _SMALL)
        return found.flatten()

    def weights(self, lengths: Tensor) -> Tensor:
        """Return how much each token of an answer weighs, float32 [answers]."""
        if self.loss_type == "grpo":
            return 1 / lengths.clamp(min=1)
        if self.loss_type == "dr_grpo":
            return lengths.new_full((len(lengths),), 1 / self.max_completion_length)
        if self.loss_type == "bnpo":
            return (len(lengths) / lengths.sum().clamp(min=1)).expand(len(lengths))
        return lengths.new_ones(len(lengths))

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return what weights are divided by: the number of answers, or of all their tokens."""
        if self.loss_type != "dapo":
            return super().count(batch)
        return int((batch["labels"][:, 1:] != -100).sum())

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the weighted sum over the tokens of answers, and what is told of those."""
        log_p = self.log_probs(model, batch)
        answers = batch["labels"][:, 1:] != -100
        old = batch.get(OLD) if self.num_iterations > 1 else None
        ratios = (log_p - (log_p.detach() if old is None else old)).exp()
        losses, clipped = self.clipped(ratios, batch[ADVANTAGE][:, None])
        told = self.told(batch)
        if self.beta:
            further = batch[REFERENCE] - log_p
            kl = further.exp() - further - 1
            kl = kl * ratios if self.use_bias_correction_kl else kl
            losses = losses + self.beta * kl
            told["kl"] = kl.detach()[answers]
        told |= {name: where[answers] for name, where in clipped.items()}
        each = (losses * answers).sum(1) * batch[WEIGHT]
        return each.sum() / count.clamp(min=1), told


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "learn from rewards for answers of its own, each compared with others to its prompt"
    return [Objective("grpo", summary, GRPO, evaluations=("rewarded",))]
