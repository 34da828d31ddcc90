"""LoRA over a facade as one autograd function: y = x Wᵀ + s (x Aᵀ) Bᵀ.

Backward needs x and nothing else: the weight is dequantized again instead of being kept, x Aᵀ is
computed again. A and B stay in their own precision (float32 masters) and are cast inside. PEFT
makes these layers in place of its own, so saving, merging, `disable_adapter` and several adapters
are PEFT's; whatever is not plain LoRA takes PEFT's own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable

from .facade import QuantLinear

if TYPE_CHECKING:
    from peft import LoraConfig


class FusedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer with a forward of its own where a single plain LoRA is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base and adapter: [..., in_features] -> [..., out_features]."""
        adapter = None if args or kwargs else self._only_plain_adapter()
        if adapter is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        dropped = self.lora_dropout[adapter](x)
        return fused_lora(
            x,
            None if dropped is x else dropped,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.base_layer,
            self.scaling[adapter],
        )

    def _only_plain_adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (adapter,) = active
        plain = adapter not in self.lora_variant and self.lora_B[adapter].bias is None
        return adapter if plain and type(self.base_layer) is QuantLinear else None


def use_fused_layers(config: LoraConfig) -> None:
    """Have PEFT make fused layers over facades when it attaches or loads a LoRA of `config`."""
    config._register_custom_module({QuantLinear: FusedLoraLinear})


def fused_lora(
    x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, facade: QuantLinear, scaling: float
) -> Tensor:
    """Return x Wᵀ + bias + scaling (dropped Aᵀ) Bᵀ.

    Args:
        x: [..., in_features].
        dropped: x after dropout, which only the adapter sees; None if there is none.
        a, b: [r, in_features] and [out_features, r].
        facade: the base layer; its weight is not trained.
        scaling: factor of the adapter's term.
    """
    keeper = None
    if x.requires_grad and torch.is_grad_enabled():
        x = _Keep.apply(x)  # type: ignore[no-untyped-call]
        keeper = x.grad_fn
    output: Tensor = _FusedLora.apply(x, dropped, a, b, facade, scaling, keeper)  # type: ignore[no-untyped-call]
    return output


class _Keep(torch.autograd.Function):
    """Saves x in front of the layer, for its backward.

    Gradient checkpointing recomputes a block until the last tensor that was saved in it is there
    again. x is saved before the matrix products, and they save nothing, so those of the block's
    last layer (down_proj, mostly) are never computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        facade: QuantLinear,
        scaling: float,
        keeper: Any,
    ) -> Tensor:
        y = facade.vendor_forward(x)
        ctx.facade, ctx.scaling, ctx.keeper = facade, scaling, keeper
        ctx.a, ctx.b = a, b  # leaves: saved as they are
        ctx.dtypes = x.dtype, y.dtype
        ctx.save_for_backward(
            *(t for t in (x if keeper is None else None, dropped) if t is not None)
        )
        ctx.has_dropped = dropped is not None
        with torch.autocast(x.device.type, enabled=False):
            h = _flat(x if dropped is None else dropped, y.dtype) @ a.to(y.dtype).T
            y = y if y.is_contiguous() else y.contiguous()
            y.view(-1, y.shape[-1]).addmm_(h, b.to(y.dtype).T, alpha=scaling)
        # Autograd forbids in-place changes of a view that was made in here.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        saved = list(ctx.saved_tensors)
        dropped = saved.pop() if ctx.has_dropped else None
        x = saved.pop() if ctx.keeper is None else ctx.keeper.saved_tensors[0]
        dtype, scaling = ctx.dtypes[1], ctx.scaling
        with torch.autocast(dy.device.type, enabled=False):
            a, b = ctx.a.to(dtype), ctx.b.to(dtype)
            seen = _flat(x if dropped is None else dropped, dtype)
            flat = _flat(dy, dtype)
            g = (flat @ b).mul_(scaling)
            da = (g.T @ seen).to(ctx.a.dtype) if ctx.needs_input_grad[2] else None
            db = (flat.T @ (seen @ a.T)).mul_(scaling).to(ctx.b.dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = flat @ ctx.facade.dequantize().to(dtype)
                if dropped is None:
                    dx.addmm_(g, a)
                dx = dx.view(x.shape).to(ctx.dtypes[0])
            d_dropped = None if dropped is None else (g @ a).view(x.shape).to(dropped.dtype)
        return dx, d_dropped, da, db if ctx.needs_input_grad[3] else None, None, None, None


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
