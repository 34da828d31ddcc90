"""`rloo`, REINFORCE leave-one-out: answers that got more than others to their prompt.

That is what an answer as a whole is worth (https://arxiv.org/abs/2402.14740).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from ..rewarding.values import gathered, nanstd
from .reward_batch import ADVANTAGE, OLD, REFERENCE
from .rewarded import RewardTask

if TYPE_CHECKING:
    from torch import Tensor


class RLOO(RewardTask):
    """The options of `rloo`. Loss and names are TRL's."""

    beta: float = Field(
        0.05, ge=0, description="how much leaving the model as training began costs, as a reward"
    )
    reward_clip_range: tuple[float, float] | None = Field(
        None, description="rewards below or above are taken for these"
    )
    normalize_advantages: bool = Field(
        False, description="divide by the standard deviation of all answers of a step"
    )

    def valued(self, rewards: Tensor, batches: list[dict[str, Any]]) -> Tensor:
        """Return rewards less what leaving the reference costs."""
        import torch

        if self.reward_clip_range is not None:
            rewards = rewards.clamp(*self.reward_clip_range)
        if not self.beta:
            return rewards
        kl = torch.cat([(batch[OLD] - batch[REFERENCE]).sum(1) for batch in batches])
        return rewards - self.beta * kl.double().to(rewards.device)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return rewards less the mean of the others of the group."""
        groups = rewards.view(-1, self.num_generations)
        others = (~groups.isnan()).sum(1, keepdim=True) - 1
        found = (groups - (groups.nansum(1, keepdim=True) - groups) / others).flatten()
        if self.normalize_advantages:
            whole = gathered(found)
            found = (found - whole.nanmean()) / (nanstd(whole[None]) + 1e-4)
        return found

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all answers of a step, and what is told of those."""
        log_p = self.log_probs(model, batch)
        whole = log_p.sum(1)
        old = batch[OLD].sum(1) if self.num_iterations > 1 else whole.detach()
        losses, clipped = self.clipped((whole - old).exp(), batch[ADVANTAGE])
        told = self.told(batch) | clipped
        if self.beta:
            answers = batch["labels"][:, 1:] != -100
            told["kl"] = (batch[OLD] - batch[REFERENCE])[answers]
        return losses.sum() / count, told


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "learn from rewards for answers of its own, less the mean of others to its prompt"
    return [Objective("rloo", summary, RLOO, evaluations=("rewarded",))]
