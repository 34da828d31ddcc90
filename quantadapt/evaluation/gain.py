"""What an adapter gained on held-out data, in nats, how surely, and what a merge keeps of it.

Models are compared token by token: of the same data all give losses in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError
from .predictions import NoTokens, first_tokens, predicted
from .verdict import NO_GAIN

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .predictions import Examples

MAX_TOKENS = 2**14
"""Held-out tokens that a gain is measured on, at most."""
_BATCH = 8
"""Examples per forward pass."""
SURE = 2.0
"""Standard errors that a gain has to be above 0 to be told from chance."""


@dataclass(frozen=True)
class TokenLosses:
    """The loss of a model at each held-out token.

    Attributes:
        nats: negative log-likelihoods, float64 on the CPU, [tokens].
        examples: of which example each token is, int64, [tokens].
    """

    nats: Tensor
    examples: Tensor

    @property
    def mean(self) -> float:
        """In nats per token; nan or inf where the model gives no numbers."""
        return float(self.nats.mean())


@dataclass(frozen=True)
class Gain:
    """What an adapter gained: loss(base) - loss(base with adapter).

    Attributes:
        value: nats per token; below 0 where the adapter made the base worse.
        error: its standard error on these data, in nats per token: that of the mean over tokens,
            or over examples if that is larger, as tokens of an example are not independent.
    """

    value: float
    error: float

    @property
    def is_sure(self) -> bool:
        """Whether the data can tell it from chance. NaN, of either, is not."""
        return self.value >= NO_GAIN and self.value > SURE * self.error

    @classmethod
    def between(cls, base: TokenLosses, tuned: TokenLosses) -> Gain:
        """Return the gain from `base` to `tuned`, both of the same data."""
        import torch

        each = base.nats - tuned.nats
        count, value = len(each), float(each.mean())
        if not math.isfinite(value):
            return cls(value, 0.0)
        error = float(each.std(correction=1)) / math.sqrt(count) if count > 1 else math.inf
        rest = torch.zeros(int(base.examples.max()) + 1, dtype=torch.float64)
        rest.index_add_(0, base.examples, each - value)  # of each example, by how much it differs
        if (many := int(base.examples.bincount().count_nonzero())) > 1:
            scale = math.sqrt(many / (many - 1)) / count
            error = max(error, float(rest.norm()) * scale)
        return cls(value, error)


def token_losses(model: nn.Module, dataset: Examples) -> TokenLosses:
    """Return the losses of `model` at the completion tokens of the first examples that hold
    `MAX_TOKENS` of them. Raises DataError where there are none."""
    import torch
    from torch.nn.functional import cross_entropy

    nats, counts = [], []
    for batch in predicted(model, first_tokens(dataset, MAX_TOKENS), _BATCH, 0):
        for logits, targets in batch.chunks():
            nats.append(cross_entropy(logits, targets, reduction="none").double().cpu())
        counts.append(batch.counts.cpu())
    if not nats:
        raise DataError("the held-out data hold no token to predict", fix=NoTokens.FIX)
    lengths = torch.cat(counts)
    return TokenLosses(torch.cat(nats), torch.arange(len(lengths)).repeat_interleave(lengths))


def gain_kept(base: float, tuned: float, merged: float) -> float | None:
    """Return the share of an adapter's gain that a merged model keeps.

    Args:
        base, tuned, merged: mean negative log-likelihoods in nats of the base without adapter, of
            base and adapter, and of the merged model, on the same tokens; the logarithms of
            perplexities, not perplexities.

    Returns:
        (base - merged) / (base - tuned): 1.0 keeps all, 0.0 is as bad as the base; it may be
        above 1 or below 0. None where there is no gain to keep: the adapter gained less than
        `NO_GAIN`, made the base worse, or has a loss that is no finite number. A merged model
        whose loss is none keeps nothing: 0.0.
    """
    gain = base - tuned
    if not math.isfinite(tuned) or not gain >= NO_GAIN:
        return None
    if not math.isfinite(merged):
        return 0.0
    return (base - merged) / gain if math.isfinite(gain) else 1.0
