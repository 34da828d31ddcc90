"""`reward`, a model that scores answers: the chosen one of a pair higher than the rejected one.

The score is the output of a head of its own, at the last token (Bradley and Terry's model, as in
https://arxiv.org/abs/2203.02155).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..hookspecs import hookimpl
from ..records import Objective
from .classify import pad_of
from .pairs import PairCollator, PairTask, rewards

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.reading import Data
    from ..spec import DataSpec
    from ..training.trainer import Setup


class Reward(PairTask):
    """The options of `reward`. Loss and name are TRL's."""

    wants_lm: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    head: ClassVar[Literal["", "sequence", "token"]] = "sequence"

    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="how much a pair costs whose scores are not 0 on the mean"
    )

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return pairs, and nothing to be answered; the head has one output."""
        found = super().read(spec, tokenizer, seed=seed)
        return replace(found, labels=("reward",), prompts=[])

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads the answers of pairs."""
        return PairCollator(pad_of(setup), setup.length_multiple)

    def loss(
        self, model: Any, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean over all pairs of a step, and scores."""
        from torch.nn.functional import logsigmoid

        names = ("input_ids", "attention_mask")
        scores = model(**{name: batch[name] for name in names}).logits.float().view(-1, 2)
        losses = -logsigmoid(scores[:, 0] - scores[:, 1])
        losses = losses + self.center_rewards_coefficient * scores.sum(1) ** 2
        return losses.sum() / count, rewards(scores, 1.0)


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "score chosen answers higher than rejected ones"
    return [Objective("reward", summary, Reward, evaluations=("rewards",))]
