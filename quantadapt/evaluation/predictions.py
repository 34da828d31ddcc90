"""What a model predicts for held-out tokens, batch by batch, without ever holding all logits.

Where the head is a plain linear layer (`model.head.Head`), the model gives what that gets, and
logits are made of it in chunks.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.batches import encoder_decoder_batch, padded
from ..data.pixels import joined, pixels, types_of
from ..distributed.world import World, world
from ..errors import ModelError, NumbersError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from ..model.head import Head

    Examples: TypeAlias = Dataset | Sequence[Mapping[str, Any]]
    _Row: TypeAlias = tuple[list[int], list[int], Mapping[str, Any]]

CHUNK_ELEMENTS = 2**24
"""Logits turned into float32 at a time: 64 MiB."""


class NoTokens(ValueError):
    """The data hold no token to predict. `FIX` says what to do."""

    FIX = (
        "pass data that hold answers, or text, of more than one token; quantadapt data FILE tells"
        " which columns are read"
    )

    def __init__(self) -> None:
        super().__init__("the data hold no token to predict")


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for n completion tokens.

    Attributes:
        rows: what `head` makes logits of, [n, hidden_size]; without one, logits [n, vocabulary].
        targets: the tokens that really follow, int64 [n].
        counts: how many of them are of each example, int64 [batch].
        examples: the places of those examples in the data set.
    """

    rows: Tensor
    targets: Tensor
    counts: Tensor
    head: Head | None
    examples: Sequence[int] = ()

    def losses(self) -> Tensor:
        """Return the negative log-likelihood of each token, float32 [n], in nats."""
        import torch

        if self.head is not None:
            return self.head.losses(self.rows, self.targets)
        found = [_losses(*chunk) for chunk in self.chunks()]
        return torch.cat([self.rows.new_zeros(0, dtype=torch.float32), *found])

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of the logits in float32 with their targets."""
        project = None if self.head is None else self.head.projection()
        width = self.rows.shape[-1] if self.head is None else self.head.linear.out_features
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, len(self.targets), step):
            part = self.rows[start : start + step]
            logits = part if project is None else project(part)
            yield logits.float(), self.targets[start : start + step]


def predicted(
    model: nn.Module, dataset: Examples, batch_size: int, pad: int | None, *, split: bool = False
) -> Iterator[Predictions]:
    """Yield what `model` predicts for the completion tokens, batch by batch.

    Args:
        split: whether each process of a run takes its part of the examples; all of them have to
            call this.
    """
    import torch

    causal, pad = not is_encoder_decoder(model), pad or 0  # padding is masked: any token will do
    predict = _causal if causal else _encoder_decoder
    device = device_of(model)
    mine = world() if split else World()
    with evaluating(model):
        for batch in _batches(dataset, batch_size, mine, filled=causal):
            examples, rows = zip(*batch, strict=True)
            with torch.no_grad(), without_head(model) as head:
                output, labels = predict(model, rows, pad, device)
                kept = labels != -100
                found = Predictions(output[kept], labels[kept], kept.sum(1), head, examples)
                del output
            yield found


def _batches(
    dataset: Examples, size: int, mine: World, *, filled: bool
) -> list[list[tuple[int, _Row]]]:
    """Return the batches of one process, of examples of similar length with their places, the
    longest first.

    Args:
        filled: whether all processes get as many batches, the last perhaps of an example that does
            not count: the parts of a sharded model only work together.
    """
    rows = [
        (place, (list(row["input_ids"]), list(row["completion_mask"]), row))
        for place, row in enumerate(dataset)
    ]
    rows.sort(key=lambda row: -len(row[1][0]))
    own = rows[mine.rank :: mine.size]
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    if filled and len(batches) * size * mine.size < len(rows):
        place, (ids, mask, row) = rows[-1]
        batches.append([(place, (ids, [0] * len(mask), row))])
    return batches


@contextmanager
def without_head(model: Any) -> Iterator[Head | None]:
    """Let `model` give what its head gets in place of logits, where that can be; yield the head.

    A forward that somebody has patched stays in use.
    """
    import torch
    from transformers import PreTrainedModel

    from ..model.head import Head

    base = getattr(model, "get_base_model", lambda: model)()
    patched = "forward" in vars(base) or not isinstance(base, PreTrainedModel)
    head = None if patched or is_encoder_decoder(base) else Head.of(base)
    if head is not None and torch.is_grad_enabled() and head.linear.weight.requires_grad:
        head = None  # its losses have no gradient for the head itself
    if head is not None:
        base.forward = types.MethodType(_decode, base)
    try:
        yield head
    finally:
        if head is not None:
            del base.forward


def _decode(base: Any, *args: Any, labels: None = None, **kwargs: Any) -> Any:
    """Run the decoder alone; its last hidden states go by the name of logits."""
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(logits=base.base_model(*args, **kwargs).last_hidden_state)


def _causal(model: nn.Module, batch: Sequence[Any], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return (logits or hidden states [b, t - 1, ...], labels [b, t - 1]), -100 where no loss
    counts."""
    labels = padded([_labels(ids, mask) for ids, mask, _ in batch], -100).to(device)
    examples = [example for _, _, example in batch]
    seen = types_of(examples, labels.shape[1]) | joined([pixels(one) for one in examples])
    output = model(
        input_ids=padded([ids for ids, _, _ in batch], pad).to(device),
        attention_mask=padded([[1] * len(ids) for ids, _, _ in batch], 0).to(device),
        use_cache=False,
        **{name: value.to(device) for name, value in seen.items()},
    )
    if output.logits.dim() != 3:
        what = "it answers an example as a whole, as a classifier does, and predicts no tokens"
        raise ModelError(what, fix="measure it with your own code, or with transformers' Trainer")
    # models with virtual prompt tokens return more logits than they were given tokens
    return output.logits[:, -labels.shape[1] : -1], labels[:, 1:]


def _encoder_decoder(
    model: nn.Module, batch: Sequence[Any], pad: int, device: Any
) -> tuple[Tensor, Tensor]:
    """Return (logits [b, t, v], labels [b, t]), -100 where no loss counts."""
    pairs = [(ids, mask) for ids, mask, _ in batch]
    inputs = encoder_decoder_batch(pairs, pad, _encoder_eos(model))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return model(**inputs, use_cache=False).logits, inputs["labels"]


def _labels(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]


def first_tokens(dataset: Examples, max_tokens: int) -> list[Mapping[str, Any]]:
    """Return as many examples, from the first on, as hold `max_tokens` completion tokens."""
    chosen, tokens = [], 0
    for row in dataset:
        if tokens >= max_tokens:
            break
        chosen.append(row)
        tokens += sum(row["completion_mask"][1:])
    return chosen


def refuse_no_numbers(answers: Tensor) -> None:
    """Raise NumbersError where what a model answers is NaN or infinite. Whatever is compared with
    that is false, so that shares and ranks of it look like those of a model."""
    if not bool(answers.isfinite().all()):
        what = "what the model answers is no number (NaN or infinity)"
        fix = "look at its weights: NaN, infinity, or what overflows in float16"
        raise NumbersError(what, fix=fix)


def to_perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats; inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, targets, reduction="none")


def predicts_tokens(model: nn.Module) -> bool:
    """Say whether a model gives logits for each token; a classifier of transformers does not."""
    base = getattr(model, "get_base_model", lambda: model)()
    return bool(getattr(base, "can_generate", lambda: True)())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Say whether the model has an encoder for the prompt."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _encoder_eos(model: nn.Module) -> int | None:
    eos = getattr(getattr(model, "config", None), "eos_token_id", None)
    return eos if isinstance(eos, int) else None


def device_of(model: nn.Module) -> Any:
    """Return where the model wants its input: the device of the embedding."""
    import torch

    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    tensors = [*(embedding.parameters() if embedding is not None else ()), *model.parameters()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, module by module, and put everything back."""
    from ..model.sinks import fused_sinks

    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with fused_sinks(model):
            yield
    finally:
        for module in training:
            module.training = True
