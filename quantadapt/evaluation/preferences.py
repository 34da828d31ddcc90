"""The evaluation `preferences`: does a model prefer the answers that people chose?

Answers are compared by their log-likelihood. A model with an adapter is also compared with its
reference, itself as it was before: by how much more it likes an answer is what DPO calls a reward,
here in nats, without beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..data.preferences import CHOSEN, REJECTED
from ..distributed.talking import summed
from ..errors import DataError
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .fewer import at_once
from .predictions import device_of, predicted, refuse_no_numbers
from .reference import is_compared, reference

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

NATS = "nats"


def answer_log_probs(
    model: nn.Module,
    examples: Dataset,
    columns: Sequence[tuple[str, str]] = (CHOSEN, REJECTED),
    *,
    batch_size: int = 8,
    pad_token_id: int | None = 0,
    split: bool = False,
) -> Tensor:
    """Return the log-likelihoods of answers in nats, float64 [examples, columns].

    Args:
        columns: of token ids and of masks, 1 where they are of the answer.
        batch_size: answers that go through the model at a time.
        split: whether each process of a run takes its part; all of them have to call this, and all
            get the whole result.

    Raises:
        NumbersError: one is NaN or infinite.
    """
    import torch

    answers = [
        {"input_ids": row[ids], "completion_mask": row[mask]}
        for row in examples
        for ids, mask in columns
    ]
    found = torch.zeros(len(answers), dtype=torch.float64)
    for batch in predicted(model, answers, batch_size, pad_token_id, split=split):
        losses, counts = batch.losses().double().cpu(), batch.counts.cpu()
        whose = torch.tensor(batch.examples).repeat_interleave(counts)
        found.index_add_(0, whose, -losses)
    found = summed(found, device_of(model)) if split else found
    refuse_no_numbers(found)
    return found.view(-1, len(columns))


class Preferences(Evaluator):
    """How often, and by how much, the chosen answer is the likelier one; it has no options."""

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out pairs. Raises DataError where the data hold none."""
        if REJECTED[0] not in given.examples.column_names:
            what = "the held-out data hold no pairs of a chosen and a rejected answer"
            fix = "pass data with the columns chosen and rejected, or leave the evaluation out"
            raise DataError(what, fix=fix, where="evaluation 'preferences'")
        policy = _measured(model, given)
        margins = policy[:, 0] - policy[:, 1]
        found = {
            "accuracy": Figure(float((margins > 0).double().mean()), "share", "higher"),
            "margin": Figure(float(margins.mean()), NATS, "higher"),
        }
        if is_compared(model, "preferences"):
            with reference(model):
                rewards = policy - _measured(model, given)
            gained = rewards[:, 0] - rewards[:, 1]
            found |= {
                "reward-accuracy": Figure(float((gained > 0).double().mean()), "share", "higher"),
                "reward-margin": Figure(float(gained.mean()), NATS, "higher"),
                "reward-chosen": Figure(float(rewards[:, 0].mean()), NATS),
                "reward-rejected": Figure(float(rewards[:, 1].mean()), NATS),
            }
        return found | {"pairs": Figure(len(policy))}


def _measured(model: nn.Module, given: Given) -> Tensor:
    return given_log_probs(model, given, (CHOSEN, REJECTED), "evaluation 'preferences'")


def given_log_probs(
    model: nn.Module, given: Given, columns: Sequence[tuple[str, str]], what: str
) -> Tensor:
    """Return the log-likelihoods of given answers, see `answer_log_probs`, of as many at a time as
    memory holds. `what` says in words what is done."""
    pad = getattr(given.tokenizer, "pad_token_id", None)

    def measured(most: int) -> Tensor:
        return answer_log_probs(
            *(model, given.examples, columns),
            batch_size=most,
            pad_token_id=pad,
            split=given.split,
        )

    return at_once(model, measured, given.batch_size, what)


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "how often the chosen answer of a pair is the likelier one, and by how much"
    return [Evaluation("preferences", summary, Preferences)]
