"""The evaluation `rewards`: does a reward model score chosen answers higher?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data.batches import padded
from ..data.preferences import CHOSEN, REJECTED
from ..errors import DataError
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .predictions import device_of, evaluating, refuse_no_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn

WHERE = "evaluation 'rewards'"


class Rewards(Evaluator):
    """How often the chosen answer has the higher score, and by how much; it has no options."""

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out pairs. Raises DataError where the data hold none, or the model
        gives no single score; NumbersError where that is NaN or infinite."""
        scores = _scores(model, given)
        margins = scores[:, 0] - scores[:, 1]
        return {
            "accuracy": Figure(float((margins > 0).double().mean()), "share", "higher"),
            "margin": Figure(float(margins.mean()), "", "higher"),
            "chosen": Figure(float(scores[:, 0].mean())),
            "rejected": Figure(float(scores[:, 1].mean())),
            "pairs": Figure(len(scores)),
        }


def _scores(model: nn.Module, given: Given) -> Tensor:
    """Return the scores of the answers, float64 [pairs, 2]: chosen, rejected."""
    import torch

    if REJECTED[0] not in given.examples.column_names:
        what = "the held-out data hold no pairs of a chosen and a rejected answer"
        fix = "pass data with the columns chosen and rejected, or leave the evaluation out"
        raise DataError(what, fix=fix, where=WHERE)
    config: Any = getattr(model, "config", None)
    pad, device, found = getattr(config, "pad_token_id", None) or 0, device_of(model), []
    with evaluating(model), torch.no_grad():
        for rows in given.examples.iter(given.batch_size):
            both = zip(rows[CHOSEN[0]], rows[REJECTED[0]], strict=True)
            ids = [answer for pair in both for answer in pair]
            logits = model(
                input_ids=padded(ids, pad).to(device),
                attention_mask=padded([[1] * len(row) for row in ids], 0).to(device),
            ).logits
            if logits.shape != (len(ids), 1):
                what = "the model gives no single score for an answer"
                fix = "train one with objective: reward, or leave the evaluation out"
                raise DataError(what, fix=fix, where=WHERE)
            found.append(logits.double().cpu().view(-1, 2))
    scores = torch.cat(found)
    refuse_no_numbers(scores)
    return scores


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "how often a reward model scores the chosen answer higher, and by how much"
    return [Evaluation("rewards", summary, Rewards)]
