"""The language model's losses from hidden states, without ever holding all logits.

The head is frozen, so the gradient of the hidden states is all that backward needs. It is made in
the forward pass, while a chunk of logits is there: two matrix products with the head instead of the
three of a loss that makes the logits again. As in Liger (https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..compiling import has_triton
from ..memory.passes import HEAD_CHUNK
from ..memory.shape import SCALED_LOGITS


def is_its_weight(head: Any) -> bool:
    """Say if a head, or the copy of it that is trained whole, is no more than a weight and a bias,
    as one with a LoRA or with tokens of its own is not."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    plain = isinstance(head, nn.Linear | ModulesToSaveWrapper)
    return plain and not isinstance(head, BaseTunerLayer)


def is_alone(base: Any, head: Any) -> bool:
    """Say if nothing else with weights makes logits of the decoder's last hidden states: BERT's and
    its like put more layers in front of the head."""
    rest = [child for child in base.children() if child is not base.base_model]
    return [child for child in rest if any(True for _ in child.parameters())] == [head]


@dataclass(frozen=True)
class Head:
    """A plain linear layer that makes logits of the decoder's last hidden states.

    Attributes:
        linear: its weight may be sharded over several processes.
        softcap: logits are cap * tanh(logits / cap), as in Gemma 2.
    """

    linear: nn.Linear
    softcap: float | None = None

    @classmethod
    def of(cls, base: Any) -> Head | None:
        """Return the head of a transformers model; None where its logits are made otherwise."""
        config, linear = base.config.get_text_config(), base.get_output_embeddings()
        # FSDP2 makes a subclass of a head that it shards, accelerate patches one that it moves.
        plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
        if not plain or "forward" in vars(linear) or base.base_model is base:
            return None
        if not is_alone(base, linear):
            return None
        if any(getattr(config, name, None) is not None for name in SCALED_LOGITS):
            return None
        return cls(linear, getattr(config, "final_logit_softcapping", None))

    def losses(self, hidden: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
        """As `head_losses`."""
        return head_losses(
            hidden, labels, self.linear, softcap=self.softcap, temperature=temperature
        )

    def projection(self) -> Callable[[Tensor], Tensor]:
        """Return what makes logits [tokens, vocabulary] of hidden states [tokens, hidden_size].
        A sharded weight is gathered here, once, so all processes have to call this."""
        weight = _whole(self.linear.weight)
        bias = None if self.linear.bias is None else _whole(self.linear.bias)

        def logits(hidden: Tensor) -> Tensor:
            made = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
            cap = self.softcap
            return made if cap is None else cap * torch.tanh(made / cap)

        return logits

    def gradient(self, size: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes the gradient of hidden states [tokens, hidden_size] of that of their
        first `size` logits and those logits. As `projection`, it gathers a sharded weight."""
        weight, cap = _whole(self.linear.weight)[:size], self.softcap

        def hidden(gradient: Tensor, logits: Tensor) -> Tensor:
            if cap is not None:
                gradient = gradient * (1 - (logits / cap) ** 2)
            return gradient.to(weight.dtype) @ weight

        return hidden


def head_losses(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Linear,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the cross-entropy of each token, float32 [tokens] in nats.

    Args:
        hidden: [tokens, hidden_size], what the head gets.
        labels: int64 [tokens]; all of them count.
        head: frozen. Its logits are computed in the dtype of its weight.
        softcap: logits are cap * tanh(logits / cap), as in Gemma 2.
        temperature: logits are divided by it, after that.
    """
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    given = (hidden, labels, weight, bias, softcap, temperature)
    found: Tensor = _HeadLosses.apply(*given)  # type: ignore[no-untyped-call]
    return found


def aligned(hidden: Tensor, labels: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return hidden states [tokens, hidden_size] and what is to be predicted from each, [tokens].

    Args:
        hidden: [batch, length, hidden_size]. labels: int64 [batch, length], of the tokens there.
        after: int64 [batch, length], of the token after each, where the rows go on elsewhere.
    """
    if after is None:
        hidden, after = hidden[:, :-1], labels[:, 1:]
    return hidden.flatten(0, 1), after.flatten()


def counting(labels: Tensor, count: int | None) -> Tensor:
    """Return the indices of the labels that count, which are not -100; without their `count` the
    device is waited for."""
    counts = labels != -100
    if count is None:
        return counts.nonzero()[:, 0]
    return counts.nonzero_static(size=count)[:, 0]


def _whole(parameter: Any) -> Tensor:
    """Return the parameter; one that is sharded over several processes is gathered."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach()


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> Tensor:
        # cap * tanh(z / cap) / t is that of logits z / t with a cap / t
        softcap = None if softcap is None else softcap / temperature
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(labels), weight.shape[0] * weight.element_size()):
                logits = hidden[rows].to(weight.dtype) @ weight.T
                if bias is not None:
                    logits += bias
                if temperature != 1:
                    logits /= temperature
                losses[rows] = to_gradient(logits, labels[rows], softcap)
                if dx is not None:
                    dx[rows] = logits @ weight
                del logits  # or two chunks would be there at a time
        if dx is not None and temperature != 1:
            dx /= temperature
        ctx.dx = dx
        return losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, ctx.dx = ctx.dx, None
        if dx is not None:  # each loss depends on its own hidden state alone
            dx = dx.mul_(grads[0].to(dx.dtype)[:, None])
        return dx, None, None, None, None, None


def chunks(tokens: int, row_bytes: int) -> list[slice]:
    """Return slices of so many tokens, whose logits of `row_bytes` each make about a HEAD_CHUNK."""
    rows = max(HEAD_CHUNK // row_bytes // 128 * 128, 128)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def to_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Return the losses, float32 [tokens], and turn the logits into their gradient in place."""
    if logits.is_cuda and has_triton():
        from . import triton_head

        return triton_head.to_gradient(logits, labels, softcap)
    z = logits.float()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = capped.log_softmax(-1)
    gradient = log_p.exp()
    losses = -log_p.gather(-1, labels[:, None])[:, 0]
    gradient.scatter_add_(-1, labels[:, None], torch.full_like(losses, -1.0)[:, None])
    if softcap is not None:
        gradient *= 1 - (capped / softcap) ** 2
    logits.copy_(gradient)
    return losses
