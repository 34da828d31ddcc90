"""The evaluation `perplexity`: how surprised a model is by held-out completions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distributed.talking import reduced
from ..errors import DataError, NumbersError
from ..folders.metrics import NATS
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .fewer import at_once
from .predictions import NoTokens, device_of, predicted, to_perplexity

if TYPE_CHECKING:
    from torch import nn

    from .predictions import Examples

WHERE = "evaluation 'perplexity'"


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over completion tokens.

    Attributes:
        value: exp(loss); inf where that overflows.
        loss: mean negative log-likelihood in nats, every token weighing the same.
        tokens: how many tokens it is the mean of.
        seconds: wall-clock time.
    """

    value: float
    loss: float
    tokens: int
    seconds: float


def perplexity(
    model: nn.Module,
    dataset: Examples,
    *,
    batch_size: int = 8,
    pad_token_id: int | None = 0,
    split: bool = False,
) -> Perplexity:
    """Measure the perplexity of `model` over the completion tokens of `dataset`.

    Args:
        model: a causal or encoder-decoder model; left in the mode that it was in.
        dataset: columns `input_ids` and `completion_mask`, as `load_data` makes them.
        split: whether each process of a run takes its part of the examples; all of them have to
            call this, and all get the whole result.

    Raises:
        NoTokens: the data hold no token to predict. NumbersError: the loss is none.
    """
    start = time.perf_counter()
    total, tokens = 0.0, 0
    for batch in predicted(model, dataset, batch_size, pad_token_id, split=split):
        total += float(batch.losses().double().sum())
        tokens += len(batch.targets)
    if split:
        device = device_of(model)
        total, tokens = reduced(total, device, "sum"), int(reduced(tokens, device, "sum"))
    if not tokens:
        raise NoTokens
    loss = total / tokens
    if math.isnan(loss):
        fix = "look at what it was made from: a weight, an overflow in float16, or the training"
        raise NumbersError("what the model predicts is no number any more (NaN)", fix=fix)
    return Perplexity(to_perplexity(loss), loss, tokens, time.perf_counter() - start)


class PerplexityEvaluator(Evaluator):
    """Perplexity, the loss that it is made of, and the number of tokens; it has no options."""

    def measure(self, model: nn.Module, given: Given) -> dict[str, Figure]:
        """Measure it on the completion tokens of the examples. Raises DataError where there are
        none, NumbersError where the loss is none."""
        pad = getattr(given.tokenizer, "pad_token_id", None)

        def measured(most: int) -> Perplexity:
            return perplexity(
                model, given.examples, batch_size=most, pad_token_id=pad, split=given.split
            )

        try:
            found = at_once(model, measured, given.batch_size, WHERE)
        except NoTokens as error:
            raise DataError(str(error), fix=error.FIX, where=WHERE) from None
        return {
            "perplexity": Figure(found.value, "", "lower"),
            "loss": Figure(found.loss, NATS, "lower"),
            "tokens": Figure(found.tokens),
        }


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "exp of the mean loss per held-out token; 1 would be a perfect guess every time"
    return [Evaluation("perplexity", summary, PerplexityEvaluator)]
