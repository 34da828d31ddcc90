"""The evaluate stage: an evaluation measures a model; two models are compared.

Two models are compared through snapshots, so they never need to be in memory together:
`compare(snapshot(a, data), snapshot(b, data))`. All sums are made in float32 or better.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import NumbersError, PluginError, QuantadaptError
from ..protocols import Evaluator, Figure, Given
from .predictions import (
    CHUNK_ELEMENTS,
    NoTokens,
    device_of,
    evaluating,
    first_tokens,
    predicted,
    to_perplexity,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .predictions import Examples


@dataclass(frozen=True)
class Snapshot:
    """What a model predicts for a bounded number of held-out tokens.

    Attributes:
        log_probs: float32 on the CPU, shape [tokens, vocabulary].
        targets: the tokens that really follow, int64, shape [tokens].
    """

    log_probs: Tensor
    targets: Tensor

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the targets, in nats."""
        chosen = self.log_probs.gather(1, self.targets[:, None])
        return -float(chosen.double().mean())


@dataclass(frozen=True)
class Agreement:
    """How far a candidate model agrees with a reference model.

    Attributes:
        kl: mean KL(reference || candidate) in nats per token.
        top1: share of tokens for which both rank the same token first, 0 to 1.
        perplexity_reference, perplexity_candidate: on the compared tokens.
        tokens: how many tokens were compared.
    """

    kl: float
    top1: float
    perplexity_reference: float
    perplexity_candidate: float
    tokens: int


def measure(name: str, evaluator: Evaluator, model: nn.Module, given: Given) -> dict[str, Figure]:
    """Let the evaluation called `name` measure `model`.

    Raises:
        PluginError: it failed, or what it returned are no figures.
    """
    where = f"evaluation {name!r}"
    try:
        found = evaluator.measure(model, given)
    except QuantadaptError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "leave it out, or mend it"
        if isinstance(error, ImportError):
            fix = "install what is missing, or leave it out"
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            fix = "lower the batch size (evaluate.batch_size), or measure fewer examples"
        raise PluginError(f"it failed with {reason}", fix=fix, where=where) from error
    if not isinstance(found, Mapping) or not found:
        raise PluginError(f"it returned {found!r}, not figures by name", where=where)
    return {str(key): _checked(figure, f"{where}, figure {key!r}") for key, figure in found.items()}


def _checked(figure: Figure, where: str) -> Figure:
    """Return the figure with a number of Python's as its value. Raises PluginError."""
    if not isinstance(figure, Figure):
        raise PluginError(f"it is {figure!r}, no Figure", where=where)
    if figure.better not in ("lower", "higher", ""):
        what = f"better is {figure.better!r}, not 'lower', 'higher' or empty"
        raise PluginError(what, where=where)
    given: Any = figure.value
    try:
        return replace(figure, value=operator.index(given))  # a count, be it numpy's
    except (TypeError, ValueError):
        pass
    try:
        value = float(given)  # of a tensor with one element, too
    except (TypeError, ValueError):
        raise PluginError(f"its value is {figure.value!r}, no number", where=where) from None
    if math.isnan(value):
        raise PluginError("its value is NaN, which is no number", where=where)
    return replace(figure, value=value)


def snapshot(
    model: nn.Module,
    dataset: Examples,
    *,
    max_tokens: int = 1024,
    batch_size: int = 8,
    pad_token_id: int | None = 0,
) -> Snapshot:
    """Keep the log-probabilities of `model` for the first `max_tokens` completion tokens.

    Takes max_tokens x vocabulary x 4 bytes of CPU memory. The same data and arguments give the
    same tokens for every model with the same tokenizer. Raises NoTokens where there are none,
    NumbersError where a prediction is NaN.
    """
    import torch

    log_probs, targets = [], []
    examples = first_tokens(dataset, max_tokens)
    for batch in predicted(model, examples, batch_size, pad_token_id):
        log_probs += [logits.log_softmax(-1).cpu() for logits, _ in batch.chunks()]
        targets.append(batch.targets.cpu())
    if not log_probs:
        raise NoTokens
    found = Snapshot(torch.cat(log_probs)[:max_tokens], torch.cat(targets)[:max_tokens])
    if bool(found.log_probs.isnan().any()):
        fix = "look at its weights: NaN, infinity, or what overflows in float16"
        raise NumbersError("what the model predicts is no number (NaN)", fix=fix)
    return found


def compare(reference: Snapshot, candidate: Snapshot) -> Agreement:
    """Compare two snapshots of the same data. Raises ValueError where the data differ."""
    same_tokens = reference.targets.equal(candidate.targets)
    if not same_tokens or reference.log_probs.shape != candidate.log_probs.shape:
        raise ValueError("the snapshots are not of the same tokens and vocabulary")
    kl, agreeing, tokens = 0.0, 0, len(reference.targets)
    step = max(1, CHUNK_ELEMENTS // reference.log_probs.shape[1])
    for start in range(0, tokens, step):
        one = reference.log_probs[start : start + step]
        other = candidate.log_probs[start : start + step]
        terms = one.exp() * (one - other)  # 0 * (-inf - -inf) means: both rule the token out
        kl += float(terms.masked_fill(one == -math.inf, 0.0).double().sum())
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
    return Agreement(
        kl=max(kl / tokens, 0.0),  # rounding can push it just below
        top1=agreeing / tokens,
        perplexity_reference=to_perplexity(reference.loss),
        perplexity_candidate=to_perplexity(candidate.loss),
        tokens=tokens,
    )


def answers_apart(reference: nn.Module, candidate: nn.Module, dataset: Examples) -> float:
    """Return how far two models that predict no tokens are apart: the relative error of what the
    candidate answers to `dataset`, whatever that is, such as logits of classes."""
    expected, found = _answers(reference, dataset), _answers(candidate, dataset)
    return float((found - expected).norm() / expected.norm())


def _answers(model: nn.Module, dataset: Examples) -> Tensor:
    import torch

    examples = [list(row["input_ids"]) for row in first_tokens(dataset, 1024)]
    with evaluating(model), torch.no_grad():
        inputs = [torch.tensor([ids], device=device_of(model)) for ids in examples]
        return torch.cat([model(input_ids=ids)[0].double().cpu().flatten() for ids in inputs])


def agreement(
    reference: nn.Module, candidate: nn.Module, dataset: Examples, **options: Any
) -> Agreement:
    """Compare two models that are both at hand. `options` are those of `snapshot`."""
    return compare(snapshot(reference, dataset, **options), snapshot(candidate, dataset, **options))
