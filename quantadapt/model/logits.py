"""The loss of the next tokens, of logits that a model has made whole.

Most heads need no whole logits (`head`). Of the others many models of transformers have a loss of
their own, and not all of them that of the next token: those that are decoders of encoder-decoder
models (BART, Marian, Whisper), and XLNet, XLM and CPM-Ant, take labels that are shifted already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head import chunks, counting, to_gradient


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    divisor: Any = None,
    after: Tensor | None = None,
    counted: int | None = None,
) -> Tensor:
    """Return the cross-entropy of the next tokens, float32, in nats: the mean, or the sum over
    `divisor`.

    Beside the logits it holds their gradient, in their dtype, and a chunk of both in float32.

    Args:
        logits: [batch, length, vocabulary].
        labels: int64 [batch, length], of the tokens there; -100 where one does not count.
        after: int64 [batch, length], of the token after each, where rows go on elsewhere.
        counted: the number of labels that count, without which the device is waited for.
    """
    if after is None:
        after = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    flat = after.flatten().to(logits.device)
    where = counting(flat, counted)
    given = (logits.flatten(0, 1), flat[where], where)
    losses: Tensor = _Losses.apply(*given)  # type: ignore[no-untyped-call]
    return losses.sum() / (max(len(where), 1) if divisor is None else divisor)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
        """Return the losses, float32 [labels], of the rows `where` of logits [tokens, columns]."""
        losses = logits.new_empty(len(labels), dtype=torch.float32)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(labels), logits.shape[1] * logits.element_size()):
            chunk = logits[where[rows]]  # a copy, which becomes its gradient
            losses[rows] = to_gradient(chunk, labels[rows], None)
            if gradient is not None:
                gradient[where[rows]] = chunk
            del chunk  # or two would be there at a time
        ctx.gradient = gradient
        ctx.save_for_backward(where)
        return losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (where,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:  # each loss depends on its own row alone
            each = gradient.new_zeros(len(gradient)).index_copy_(
                0, where, grads[0].to(gradient.dtype)
            )
            gradient = gradient.mul_(each[:, None])
        return gradient, None, None
