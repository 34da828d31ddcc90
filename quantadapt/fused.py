"""LoRA over facades as one autograd function: y = x Wᵀ + s (x Aᵀ) Bᵀ.

Backward needs x and nothing else: the weight is dequantized again instead of being kept, x Aᵀ is
computed again. A and B stay in their own precision (float32 masters) and are cast inside. Layers
that get the same x (query, key and value; gate and up) are one function, which reads x once. PEFT
makes these layers in place of its own, so saving, merging, `disable_adapter` and several adapters
are PEFT's; whatever is neither plain LoRA nor DoRA takes PEFT's own forward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .facade import QuantLinear

if TYPE_CHECKING:
    from peft import LoraConfig

    from .fused_dora import Magnitude


class LoraTerm(NamedTuple):
    """One layer: its frozen base, A [r, in_features], B [out_features, r] and the factor.

    `a_cast` and `b_cast` are A and B in the dtype of the computation, or as they are. With a
    magnitude it is DoRA.
    """

    facade: QuantLinear
    a: Tensor
    b: Tensor
    scaling: float
    a_cast: Tensor
    b_cast: Tensor
    magnitude: Magnitude | None = None


class FusedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer with a forward of its own where a single plain LoRA or DoRA is active."""

    _in_training: _InTraining | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base and adapter: [..., in_features] -> [..., out_features]."""
        if args or kwargs or (plain := self.plain()) is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        term, dropout = plain
        dropped = x if dropout is None else dropout(x)
        if term.magnitude is not None:
            from .fused_dora import fused_dora  # it takes helpers from here

            return fused_dora(x, None if dropped is x else dropped, term)
        # An x without a graph is saved by each layer for itself: joined, a recomputation would save
        # fewer tensors than the pass it repeats.
        if self._in_training is not None and dropped is x and x.requires_grad:
            return self._in_training.siblings.forward(self, term, x)
        (output,) = fused_lora(x, None if dropped is x else dropped, [term])
        return output

    def plain(self) -> tuple[LoraTerm, nn.Module | None] | None:
        """Return what a single plain LoRA or DoRA adds to the base, and its dropout if it has any;
        None where something else is active."""
        lent = self._in_training
        if lent is not None and lent.active == self._active_adapter:
            switched_off = self._disable_adapters or self.merged_adapters
            return None if switched_off else (lent.term, lent.dropout)
        adapter = self._only_plain_adapter()
        if adapter is None:
            return None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        facade, dropout = self.base_layer, self.lora_dropout[adapter]
        dtype = facade.compute_dtype_for(a.device.type)
        casts = (a.detach().to(dtype), b.detach().to(dtype))
        term = LoraTerm(facade, a, b, self.scaling[adapter], *casts, self._magnitude(adapter))
        return term, None if isinstance(dropout, nn.Identity) else dropout

    def _magnitude(self, adapter: str) -> Magnitude | None:
        if adapter not in self.lora_variant:
            return None
        from .fused_dora import Magnitude

        return Magnitude(self.lora_magnitude_vector[adapter].weight)

    def _only_plain_adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (adapter,) = active
        variant, base = self.lora_variant.get(adapter), self.base_layer
        if self.lora_B[adapter].bias is not None or type(base) is not QuantLinear:
            return None
        # Where activations are quantized, a sum that is rounded another way makes other codes.
        dora = type(variant) is DoraLinearVariant and not base.target.quantizes_activations
        return adapter if variant is None or dora else None


def use_fused_layers(config: LoraConfig) -> None:
    """Have PEFT make fused layers over facades when it attaches or loads a LoRA of `config`."""
    config._register_custom_module({QuantLinear: FusedLoraLinear})


class _Siblings:
    """The fused layers of one module. Which of them get the same x shows when they are called: the
    first pass computes them one by one, later ones all of them when the first is called."""

    def __init__(self) -> None:
        self._partners: dict[FusedLoraLinear, list[FusedLoraLinear]] = {}
        self.restart()

    def restart(self) -> None:
        """Forget a pass that did not end."""
        self._ready: dict[FusedLoraLinear, Tensor] = {}
        self._leader: FusedLoraLinear | None = None
        self._x: Any = lambda: None

    def forward(self, layer: FusedLoraLinear, term: LoraTerm, x: Tensor) -> Tensor:
        if self._leader is not None and self._x() is x and layer is not self._leader:
            if layer in self._ready:
                _kept(x)  # a recomputation has to save as many tensors as the pass it repeats
                return self._ready.pop(layer)
            partners = self._partners.setdefault(self._leader, [])
            if layer not in partners:
                partners.append(layer)
            (output,) = fused_lora(x, None, [term])
            return output
        for unused in self._ready:  # computed in vain: do so no more
            for partners in self._partners.values():
                if unused in partners:
                    partners.remove(unused)
        self._leader, self._x = layer, weakref.ref(x)
        together, terms = [layer], [term]
        for partner in self._partners.get(layer, ()):
            plain = partner.plain()
            if plain is not None and (plain[1] is None or not partner.training):
                together.append(partner)
                terms.append(plain[0])
        outputs = fused_lora(x, None, terms)
        self._ready = dict(zip(together[1:], outputs[1:], strict=True))
        return outputs[0]


class _InTraining(NamedTuple):
    """What a fused layer is lent while its model trains."""

    active: Any
    term: LoraTerm
    dropout: nn.Module | None
    siblings: _Siblings


class FusedTraining:
    """The fused layers of a model that trains: what they are is looked up once, A and B are cast
    once a step, and layers that get the same x are computed together.

    Args:
        model: whose layers.
        keep_casts: keep A and B in the compute dtype, too, which takes half as much memory again.
    """

    def __init__(self, model: nn.Module, keep_casts: bool = True) -> None:
        self.keep_casts = keep_casts
        self.layers: list[FusedLoraLinear] = []
        self._masters: list[Tensor] = []
        self._casts: list[Tensor] = []
        for module in model.modules():
            siblings = _Siblings()
            for child in module.children():
                if isinstance(child, FusedLoraLinear) and (plain := child.plain()) is not None:
                    self._lend(child, *plain, siblings)

    def _lend(
        self,
        layer: FusedLoraLinear,
        term: LoraTerm,
        dropout: nn.Module | None,
        siblings: _Siblings,
    ) -> None:
        self.layers.append(layer)
        if not self.keep_casts:
            term = term._replace(a_cast=term.a.detach(), b_cast=term.b.detach())
        if term.a_cast.dtype != term.a.dtype:
            self._masters += [term.a.detach(), term.b.detach()]
            self._casts += [term.a_cast, term.b_cast]
        active = copy.copy(layer._active_adapter)
        layer.__dict__["_in_training"] = _InTraining(active, term, dropout, siblings)

    def refresh(self) -> None:
        """Cast A and B of all layers again; to be called whenever an optimizer has changed them."""
        if self._masters:
            torch._foreach_copy_(self._casts, self._masters)

    def end(self) -> None:
        """Take back what was lent."""
        for layer in self.layers:
            layer.__dict__.pop("_in_training", None)


def forget_unfinished(model: nn.Module) -> None:
    """Drop what a pass that did not end has left behind in the layers of `model`."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.forget()
        elif isinstance(module, FusedLoraLinear) and module._in_training is not None:
            module._in_training.siblings.restart()


@contextmanager
def fused_training(model: nn.Module, keep_casts: bool = True) -> Iterator[FusedTraining]:
    """Make the fused layers of `model` ready for training, for the duration of the block."""
    training = FusedTraining(model, keep_casts)
    try:
        yield training
    finally:
        training.end()


def fused_lora(x: Tensor, dropped: Tensor | None, terms: Sequence[LoraTerm]) -> tuple[Tensor, ...]:
    """Return x Wᵀ + bias + scaling (dropped Aᵀ) Bᵀ of each term.

    Args:
        x: [..., in_features].
        dropped: x after dropout, which only the adapters see; None if there is none.
        terms: the layers; all get the same x.
    """
    x, keeper = _kept(x)
    weights = [weight for term in terms for weight in (term.a, term.b)]
    outputs: tuple[Tensor, ...] = _FusedLora.apply(x, dropped, terms, keeper, *weights)  # type: ignore[no-untyped-call]
    return outputs


def _kept(x: Tensor) -> tuple[Tensor, Any]:
    """Return x, saved for backward, and the node that has it; without a graph, x and None."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    x = _Keep.apply(x)  # type: ignore[no-untyped-call]
    return x, x.grad_fn


class _Keep(torch.autograd.Function):
    """Saves x in front of the layers, for their backward.

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
        terms: Sequence[LoraTerm],
        keeper: Any,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = [term.facade.vendor_forward(x) for term in terms]
        dtype = outputs[0].dtype
        ctx.terms, ctx.keeper, ctx.dtypes = terms, keeper, (x.dtype, dtype)
        ctx.set_materialize_grads(False)
        ctx.has_dropped = dropped is not None
        ctx.save_for_backward(
            *(t for t in (x if keeper is None else None, dropped) if t is not None)
        )
        with _no_autocast(x.device.type):
            h = _flat(x if dropped is None else dropped, dtype) @ _stacked_a(terms, dtype).T
            parts = torch.split(h, [term.a.shape[0] for term in terms], dim=1)  # type: ignore[no-untyped-call]
            return tuple(
                _add(y, part, term) for y, part, term in zip(outputs, parts, terms, strict=True)
            )

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        dropped = saved.pop() if ctx.has_dropped else None
        x = saved.pop() if ctx.keeper is None else ctx.keeper.saved_tensors[0]
        shape, (x_dtype, dtype) = x.shape, ctx.dtypes
        used = [i for i, grad in enumerate(grads) if grad is not None]
        terms = [ctx.terms[i] for i in used]
        dys = [_flat(grads[i], dtype) for i in used]  # type: ignore[arg-type]
        with _no_autocast(x.device.type):
            seen = _flat(x if dropped is None else dropped, dtype)
            a = _stacked_a(terms, dtype)
            g = torch.cat([_through_b(dy, term) for dy, term in zip(dys, terms, strict=True)], 1)
            of_weights: list[Tensor | None] = [None] * (2 * len(ctx.terms))
            for i, da, db in zip(used, *_weight_gradients(terms, dys, seen, a, g), strict=True):
                of_weights[2 * i : 2 * i + 2] = da, db
            d_dropped = None if dropped is None else (g @ a).view(shape).to(dropped.dtype)
            del x, seen, saved, dropped  # before dx, which is as large, needs memory
            dx = _base_gradient(terms, dys) if ctx.needs_input_grad[0] else None
            if dx is not None and d_dropped is None:
                dx.addmm_(g, a)
        dx = None if dx is None else dx.view(shape).to(x_dtype)
        return dx, d_dropped, None, None, *of_weights


def _stacked_a(terms: Sequence[LoraTerm], dtype: torch.dtype) -> Tensor:
    """Return the A of all terms, one below the other: [sum of the ranks, in_features]."""
    if len(terms) == 1:
        return terms[0].a_cast.to(dtype)
    return torch.cat([term.a_cast for term in terms]).to(dtype)


def _add(y: Tensor, h: Tensor, term: LoraTerm) -> Tensor:
    """Add the adapter's part to the base's output, in place."""
    y = y if y.is_contiguous() else y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(h, term.b_cast.to(y.dtype).T, alpha=term.scaling)
    # Autograd forbids in-place changes of a view that was made in here.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _through_b(dy: Tensor, term: LoraTerm) -> Tensor:
    return _scaled(dy @ term.b_cast.to(dy.dtype), term.scaling)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)


def _weight_gradients(
    terms: Sequence[LoraTerm], dys: Sequence[Tensor], seen: Tensor, a: Tensor, g: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each A and of each B."""
    ranks = [term.a.shape[0] for term in terms]
    da: Sequence[Tensor] = torch.split(g.T @ seen, ranks)  # type: ignore[no-untyped-call]
    h: Sequence[Tensor] = torch.split(seen @ a.T, ranks, dim=1)  # type: ignore[no-untyped-call]
    db = [
        _scaled(dy.T @ part, term.scaling).to(term.b.dtype)
        for dy, part, term in zip(dys, h, terms, strict=True)
    ]
    return [part.to(term.a.dtype) for part, term in zip(da, terms, strict=True)], db


def _base_gradient(terms: Sequence[LoraTerm], dys: Sequence[Tensor]) -> Tensor:
    """Return Σ dy W, the gradient through the frozen bases: [tokens, in_features]."""
    dx: Tensor | None = None
    for term, dy in zip(terms, dys, strict=True):
        weight = term.facade.weight_for_backward().to(dy.dtype)
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        del weight  # or two would be there at a time
    assert dx is not None
    return dx


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
