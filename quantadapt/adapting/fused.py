"""PEFT's LoRA layers over facades, computed by fused functions.

PEFT makes these layers in place of its own, so saving, merging, `disable_adapter` and several
adapters are PEFT's. A single plain LoRA goes to `fused_lora`, a DoRA to `fused_dora`; whatever is
neither takes PEFT's own forward.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..facade import QuantLinear, QuantWeight, kept
from ..facade.lending import lends
from .expert_dora import ParamWrapper
from .fused_dora import fused_dora
from .fused_lora import LoraTerm, Magnitude, fused_lora
from .merge_aware import rounded_output

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


class FusedLoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer with a forward of its own where a single plain LoRA or DoRA is active."""

    merge_aware: bool = False
    """Whether it computes with the weight that a merge keeps; see `merge_aware`."""

    _lent: _Lent | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base and adapter: [..., in_features] -> [..., out_features]."""
        # torch.compile sees through PEFT's forward, and fuses it itself.
        plain = bool(args or kwargs) or torch.compiler.is_compiling()
        lora = None if plain else self.single_lora()
        if lora is None or not self.fuses(*lora):
            output: Tensor = super().forward(x, *args, **kwargs)
            return rounded_output(self, x, output) if self.merge_aware else output
        term, dropout = lora
        dropped = x if dropout is None else dropout(x)
        if term.magnitude is not None:
            return fused_dora(x, None if dropped is x else dropped, term)
        # An x without a graph is saved by each layer for itself: joined, a recomputation would save
        # fewer tensors than the pass it repeats.
        if self._lent is not None and dropped is x and x.requires_grad:
            return self._lent.siblings.forward(self, term, x)
        (output,) = fused_lora(x, None if dropped is x else dropped, [term])
        return output

    def fuses(self, term: LoraTerm, dropout: nn.Module | None) -> bool:
        """Say whether base and adapter are one function: what is rounded adds B A, no more."""
        plain = term.magnitude is None and (dropout is None or not dropout.training)
        return plain or not term.rounds

    def single_lora(self) -> tuple[LoraTerm, nn.Module | None] | None:
        """Return what a single plain LoRA or DoRA adds to the base, and its dropout if it has any;
        None where something else is active."""
        lent = self._lent
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
        magnitude, rounds = self._magnitude(adapter), self.merge_aware
        term = LoraTerm(facade, a, b, self.scaling[adapter], *casts, magnitude, rounds)
        return term, None if isinstance(dropout, nn.Identity) else dropout

    def _magnitude(self, adapter: str) -> Magnitude | None:
        if adapter not in self.lora_variant:
            return None
        return Magnitude(self.lora_magnitude_vector[adapter].weight)

    def _only_plain_adapter(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        (adapter,) = active
        variant, base = self.lora_variant.get(adapter), self.base_layer
        if type(base) is not QuantLinear or (base.bias is not None and base.bias.requires_grad):
            return None
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or b.bias is not None:
            return None  # BD-LoRA's are something else
        # accelerate's hooks bring what is offloaded when a module's own forward is called.
        if any("_hf_hook" in part.__dict__ for part in (base, a, b)):
            return None
        if self._has_unknown_part(adapter):
            return None
        # Where activations are quantized, a sum that is rounded another way makes other codes.
        dora = type(variant) is DoraLinearVariant and not base.rounds_activations
        return adapter if variant is None or dora else None

    def _has_unknown_part(self, adapter: str) -> bool:
        """Say whether PEFT keeps something for the adapter in this layer that is not known here, so
        that its own forward may do more than ours."""
        parts = {*self.adapter_layer_names, *self.other_param_names} - _KNOWN_PARTS
        kept = [getattr(self, name, None) for name in parts]
        return any(
            part is not None and adapter in part and _matters(part[adapter]) for part in kept
        )


_KNOWN_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
                "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora",
                "lora_bias"}  # fmt: skip
_KNOWN_OPTIONS = {
    # what is adapted, how it begins and what else is trained: nothing of it is in the forward
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform",
    "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "layer_replication",
    "runtime_config", "target_parameters", "ensure_weight_tying",
    # what becomes a variant, or layers of another type, and is seen there
    "use_dora", "velora_config", "alora_invocation_tokens", "use_qalora", "qalora_group_size",
    "monteclora_config", "lora_bias", "use_bdlora", "arrow_config", "kasa_config",
    # of every PeftConfig
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip
"""The options of LoRA up to PEFT 0.21.2. What a later one adds may change the forward."""


def _matters(value: Any) -> bool:
    return value is not None and value is not False


def unknown_options(config: LoraConfig) -> list[str]:
    """Return the options of `config` that are set and that no PEFT had when this was written."""
    later = [field for field in fields(config) if field.name not in _KNOWN_OPTIONS]
    used = [field for field in later if not _is_default(config, field)]
    return [field.name for field in used if _matters(getattr(config, field.name))]


def _is_default(config: LoraConfig, field: Field[Any]) -> bool:
    if field.default_factory is not MISSING:
        return bool(getattr(config, field.name) == field.default_factory())
    return bool(getattr(config, field.name) == field.default)


def use_fused_layers(config: PeftConfig) -> None:
    """Have PEFT make fused layers over facades when it attaches or loads `config`, if that is of
    LoRA; with an option that is not known here it makes its own, which are right and slower."""
    lora: Any = config
    if lora.peft_type == "LORA" and not unknown_options(lora):
        lora._register_custom_module({QuantLinear: _fused_layer, nn.Module: _layer_of_experts})


def _fused_layer(*args: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
    """Return a fused layer, or None where PEFT is to make the one that it has for parameters."""
    return FusedLoraLinear(*args, **kwargs) if parameter_name is None else None


def _layer_of_experts(
    target: Any, adapter: str, parameter_name: str | None = None, **options: Any
) -> Any:
    """Return a layer of stacks of experts that has DoRA, too, or None where PEFT is to make one."""
    kind = target.get_base_layer() if isinstance(target, ParamWrapper) else target
    if parameter_name is None or not hasattr(kind, "num_experts"):
        return None
    if getattr(kind, parameter_name).ndim != 3:  # a router's
        return None
    return ParamWrapper(target, adapter, parameter_name=parameter_name, **options)


class _Siblings:
    """The fused layers of one module. Which of them get the same x shows when they are called: the
    first pass computes them one by one, later ones all of them when the first is called.

    Attributes:
        learnt: whether that has shown something new since this was set to False.
    """

    def __init__(self) -> None:
        self.learnt = False
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
                kept(x)  # a recomputation has to save as many tensors as the pass it repeats
                return self._ready.pop(layer)
            partners = self._partners.setdefault(self._leader, [])
            if layer not in partners:
                partners.append(layer)
                self.learnt = True
            (output,) = fused_lora(x, None, [term])
            return output
        for unused in self._ready:  # computed in vain: do so no more
            for partners in self._partners.values():
                if unused in partners:
                    partners.remove(unused)
                    self.learnt = True
        self._leader, self._x = layer, weakref.ref(x)
        together, terms = [layer], [term]
        for partner in self._partners.get(layer, ()):
            lora = partner.single_lora()
            if lora is not None and (lora[1] is None or not partner.training):
                together.append(partner)
                terms.append(lora[0])
        outputs = fused_lora(x, None, terms)
        self._ready = dict(zip(together[1:], outputs[1:], strict=True))
        return outputs[0]


class _Lent(NamedTuple):
    """What a fused layer is lent while its model trains or answers."""

    active: Any
    term: LoraTerm
    dropout: nn.Module | None
    siblings: _Siblings


class FusedLayers:
    """The fused layers of a model that trains, or answers: what they are is looked up once, A and B
    are cast once a step, and layers that get the same x are computed together. Layers that are lent
    this already are left alone.

    Args:
        model: whose layers.
        keep_casts: keep A and B in the compute dtype, too, which takes half as much memory again.
    """

    def __init__(self, model: nn.Module, keep_casts: bool = True) -> None:
        self.keep_casts = keep_casts
        self._layers: list[tuple[FusedLoraLinear, _Lent]] = []
        self._siblings: list[_Siblings] = []
        self._masters: list[Tensor] = []
        self._casts: list[Tensor] = []
        for module in model.modules():
            siblings = _Siblings()
            self._siblings.append(siblings)
            for child in module.children():
                if not isinstance(child, FusedLoraLinear) or child._lent is not None:
                    continue
                if (lora := child.single_lora()) is not None:
                    self._take(child, *lora, siblings)

    @contextmanager
    def lent(self) -> Iterator[FusedLayers]:
        """Inside, the layers have it."""
        for layer, lent in self._layers:
            layer.__dict__["_lent"] = lent
        try:
            yield self
        finally:
            for layer, _ in self._layers:
                layer.__dict__.pop("_lent", None)

    def _take(
        self,
        layer: FusedLoraLinear,
        term: LoraTerm,
        dropout: nn.Module | None,
        siblings: _Siblings,
    ) -> None:
        if not self.keep_casts:
            term = term._replace(a_cast=term.a.detach(), b_cast=term.b.detach())
        if term.a_cast.dtype != term.a.dtype:
            self._masters += [term.a.detach(), term.b.detach()]
            self._casts += [term.a_cast, term.b_cast]
        active = copy.copy(layer._active_adapter)
        self._layers.append((layer, _Lent(active, term, dropout, siblings)))

    def refresh(self) -> None:
        """Cast A and B of all layers again; to be called whenever an optimizer has changed them."""
        if self._masters:
            torch._foreach_copy_(self._casts, self._masters)

    def has_learnt(self) -> bool:
        """Say whether a pass has shown which layers get the same x, since this was asked last. It
        computed them one by one, and rounded otherwise than passes that know."""
        learnt = [siblings for siblings in self._siblings if siblings.learnt]
        for siblings in learnt:
            siblings.learnt = False
        return bool(learnt)


lends(FusedLayers)


@contextmanager
def without_casts(model: nn.Module) -> Iterator[None]:
    """Inside, fused layers of `model` compute with their weights as they are, and not with what
    they were lent: casts of what had been there."""
    lent = [
        (module, module.__dict__.pop("_lent"))
        for module in model.modules()
        if isinstance(module, FusedLoraLinear) and module._lent is not None
    ]
    try:
        yield
    finally:
        for layer, was in lent:
            layer.__dict__["_lent"] = was


def forget_unfinished(model: nn.Module) -> None:
    """Drop what a pass that did not end has left behind in the layers of `model`."""
    for module in model.modules():
        if isinstance(module, QuantWeight):
            module.forget()
        elif isinstance(module, FusedLoraLinear) and module._lent is not None:
            module._lent.siblings.restart()


def not_fused(model: nn.Module) -> int:
    """Count the LoRA layers over facades that PEFT computes itself, in more time and memory."""
    return sum(type(m) is Linear and type(m.base_layer) is QuantLinear for m in model.modules())


def free(model: Any) -> None:
    """Let go of what a pass that did not end has left behind."""
    forget_unfinished(model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
