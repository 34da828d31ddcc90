"""How far what a student predicts is from what its teacher does, without ever holding all logits.

As in `model.head`, the gradient of the student's hidden states is made in the forward pass, while a
chunk of logits is there. The divergences are those of TRL's `GKDTrainer.generalized_jsd_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory.passes import DIVERGENCE_CHUNK
from .head import Head


@dataclass(frozen=True)
class Mix:
    """What is summed up of a token.

    Attributes:
        beta: 0 is KL(teacher || student), 1 KL(student || teacher), between them the generalized
            Jensen-Shannon divergence (https://arxiv.org/abs/2306.13649).
        temperature: what logits are divided by before they are compared.
        alpha: the share of the cross-entropy with the token itself, 0 to 1.
    """

    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.0


@dataclass(frozen=True)
class Predicted:
    """What a model says of some tokens.

    Attributes:
        rows: what `head` makes logits of, [tokens, hidden_size]; without one, logits [tokens,
            vocabulary].
    """

    rows: Tensor
    head: Head | None

    @property
    def width(self) -> int:
        """The size of the vocabulary."""
        return self.rows.shape[-1] if self.head is None else self.head.linear.out_features

    def project(self) -> Callable[[Tensor], Tensor]:
        """Return what makes logits of rows."""
        return _as_they_are if self.head is None else self.head.projection()


def divergences(student: Predicted, teacher: Predicted, labels: Tensor, mix: Mix) -> Tensor:
    """Return how far both are apart at each token, float32 [tokens] in nats.

    Only `student.rows` get a gradient. Of vocabularies of different sizes, which a family pads to
    different multiples, the tokens that both have are compared.

    Args:
        labels: int64 [tokens], the tokens that follow.
    """
    found: Tensor = _Divergences.apply(student.rows, student, teacher, labels, mix)  # type: ignore[no-untyped-call]
    return found


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, student: Predicted, teacher: Predicted, labels: Tensor, mix: Mix
    ) -> Tensor:
        size = min(student.width, teacher.width)
        losses = rows.new_empty(len(labels), dtype=torch.float32)
        dx = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        ours, theirs, head = student.project(), teacher.project(), student.head
        back = None if dx is None or head is None else head.gradient(size)
        step = max(1, DIVERGENCE_CHUNK // (4 * size))
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(labels), step):
                part = slice(start, start + step)
                made = ours(rows[part].detach())[:, :size].float()
                wanted = theirs(teacher.rows[part])[:, :size].float()
                losses[part], gradient = _of_logits(made, wanted, labels[part], mix)
                if dx is not None and back is not None:
                    dx[part] = back(gradient, made)
                elif dx is not None:
                    dx[part, :size] = gradient.to(dx.dtype)
        ctx.dx = dx
        return losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, ctx.dx = ctx.dx, None
        if dx is not None:  # each loss depends on its own row alone
            dx = dx.mul_(grads[0].to(dx.dtype)[:, None])
        return dx, None, None, None, None


def _of_logits(student: Tensor, teacher: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Return losses, float32 [tokens], and the gradient of the student's logits."""
    log_s = (student / mix.temperature).log_softmax(-1)
    log_t = (teacher / mix.temperature).log_softmax(-1)
    losses, gradient = _divergence(log_s, log_t, mix.beta)
    del log_t
    gradient /= mix.temperature
    if not mix.alpha:
        return losses, gradient
    log_p = log_s if mix.temperature == 1 else student.log_softmax(-1)
    losses = (1 - mix.alpha) * losses - mix.alpha * log_p.gather(-1, labels[:, None])[:, 0]
    gradient *= 1 - mix.alpha
    gradient.add_(log_p.exp(), alpha=mix.alpha)
    gradient.scatter_add_(-1, labels[:, None], torch.full_like(losses, -mix.alpha)[:, None])
    return losses, gradient


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row of log-probabilities and the gradient of the student's
    logits, temperature aside."""
    s = log_s.exp()
    if beta == 0:
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(-1), s.sub_(t)
    if beta == 1:
        apart = log_s - log_t
        losses = (s * apart).sum(-1)
        return losses, s.mul_(apart.sub_(losses[:, None]))
    mixed = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    apart = log_s - mixed
    of_student = (s * apart).sum(-1)
    of_teacher = (log_t.exp() * (log_t - mixed)).sum(-1)
    gradient = s.mul_(apart.sub_(of_student[:, None])).mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student, gradient
