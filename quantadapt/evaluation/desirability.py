"""The evaluation `desirability`: are desirable answers likelier than undesirable ones?

Answers belong to different prompts, so what is compared is the log-likelihood per token; and for a
model with an adapter by how much each answer has become likelier, in nats, as `preferences` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..data.desirable import ANSWER, DESIRABLE
from ..errors import DataError
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .preferences import NATS, given_log_probs
from .reference import is_compared, reference

if TYPE_CHECKING:
    from torch import Tensor, nn

WHERE = "evaluation 'desirability'"


class Desirability(Evaluator):
    """How well likelihoods tell desirable answers from others; it has no options."""

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out answers. Raises DataError where they have no labels, or one."""
        import torch

        if DESIRABLE not in given.examples.column_names:
            what = "the held-out data do not say which answers are desirable"
            fix = "pass data with the columns prompt, completion and label, or leave it out"
            raise DataError(what, fix=fix, where=WHERE)
        good = torch.tensor(given.examples[DESIRABLE]).bool()
        if good.all() or not good.any():
            what = f"all held-out answers are {'' if good.all() else 'un'}desirable"
            raise DataError(what, fix="hold out some of both kinds", where=WHERE)
        policy = _measured(model, given)
        counts = torch.tensor([sum(mask[1:]) for mask in given.examples[ANSWER[1]]])
        found = {"auc": Figure(area(policy / counts, good), "share", "higher")}
        if is_compared(model, "desirability"):
            with reference(model):
                rewards = policy - _measured(model, given)
            means = [float(rewards[which].mean()) for which in (good, ~good)]
            found |= {
                "reward-auc": Figure(area(rewards, good), "share", "higher"),
                "reward-margin": Figure(means[0] - means[1], NATS, "higher"),
                "reward-desirable": Figure(means[0], NATS),
                "reward-undesirable": Figure(means[1], NATS),
            }
        return found | {"answers": Figure(len(policy))}


def area(scores: Tensor, good: Tensor) -> float:
    """Return the area under the ROC curve: how often a good one has the higher score of two, a good
    and a bad one. Both [answers]; `good` is bool."""
    differences = scores[good][:, None] - scores[~good]
    return float((differences.sign().double() + 1).mean() / 2)


def _measured(model: nn.Module, given: Given) -> Tensor:
    """Return the log-likelihood of each answer in nats, float64 [answers]."""
    return given_log_probs(model, given, [ANSWER], WHERE)[:, 0]


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "how well likelihoods tell desirable answers from undesirable ones"
    return [Evaluation("desirability", summary, Desirability)]
