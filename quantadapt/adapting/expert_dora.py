"""DoRA on stacks of experts, which PEFT does not have: each expert's layer has its own magnitudes.

Files hold `lora_magnitude_vector` of [experts, out_features] for each stack, under the names that
PEFT gives to DoRA's. PEFT without quantadapt refuses to load them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import layer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..facade import row_norms

if TYPE_CHECKING:
    from peft import LoraConfig


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's layer around a module with stacks of experts, for adapters with and without DoRA.
    PEFT knows such layers by the name of their class."""

    merged_adapters: list[str]

    def __init__(self, base_layer: Any, adapter_name: str, *, config: LoraConfig, **options: Any):
        self._begins_with_dora = bool(config.use_dora)
        self._merged_with: dict[str, Tensor] = {}
        super().__init__(base_layer, adapter_name, config=_plain(config), **options)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any
    ) -> None:
        """Add an adapter, or make it anew."""
        dora, self._begins_with_dora = bool(config.use_dora) or self._begins_with_dora, False
        super().update_layer(adapter_name, r, lora_alpha, config=_plain(config), **options)
        self.use_dora[adapter_name] = dora
        if adapter_name in self.lora_magnitude_vector:
            del self.lora_magnitude_vector[adapter_name]
        if dora:
            self.lora_magnitude_vector[adapter_name] = self._magnitude(adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _magnitude(self, adapter: str) -> nn.Module:
        """Return DoRA's magnitudes at their start, with which the update changes nothing."""
        made = nn.Module()
        a = self.lora_A[adapter].weight
        if a.is_meta:  # values come from a file
            start = a.new_empty(self.num_experts, self.out_features)
        else:
            start = self._norms(adapter, self._weight()).to(a.dtype)
        made.weight = nn.Parameter(start)
        return made

    def _by_expert(self, stored: Tensor) -> Tensor:
        """Return [experts, out_features, in_features] of what the model keeps, or the reverse."""
        return stored if self._did_swap_in_out_features else stored.transpose(1, 2)

    def _norms(self, adapter: str, stored: Tensor) -> Tensor:
        """Return the norm of each row of W + s B A: [experts, out_features]."""
        a, b = self.lora_A[adapter].weight.detach(), self.lora_B[adapter].weight.detach()
        a = a.reshape(self.num_experts, -1, a.shape[1]).to(stored.device)
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1).to(stored.device)
        return row_norms(self._by_expert(stored), a, b, self.scaling[adapter])

    def _factors(self, adapter: str, stored: Tensor) -> Tensor:
        """Return what the rows of W + s B A are multiplied with, as the model keeps them."""
        c = self.lora_magnitude_vector[adapter].weight / self._norms(adapter, stored)
        return self._by_expert(c.unsqueeze(2))

    def _weight(self) -> Tensor:
        """Return the parameter, dequantized, without its graph."""
        weight: Tensor = self.get_param().detach() + 0
        return weight

    def get_delta_weight(self, adapter_name: str, *args: Any, **options: Any) -> Tensor:
        """Return what the adapter adds to the parameter: with DoRA, (c - 1) W + c s B A."""
        delta: Tensor = super().get_delta_weight(adapter_name, *args, **options)
        if adapter_name not in self.lora_magnitude_vector:
            return delta
        return self._changed(adapter_name, self._weight(), delta).to(delta.dtype)

    def _changed(self, adapter: str, stored: Tensor, delta: Tensor) -> Tensor:
        if adapter not in self.lora_magnitude_vector:
            return delta
        c = self._factors(adapter, stored)
        changed: Tensor = (c - 1) * stored + c * delta
        return changed

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Inside, the experts compute with the adapters."""
        experts, name = self.get_base_layer(), self.parameter_name
        dora = any(adapter in self.lora_magnitude_vector for adapter in active_adapters)
        if not dora or name in getattr(experts, "quantized_stacks", {}):
            with super()._activate_lora(active_adapters):
                yield
            return
        active = [adapter for adapter in active_adapters if adapter in self.lora_A]
        plain = super().get_delta_weight
        deltas = {adapter: plain(adapter) for adapter in active}
        needs_grad = getattr(experts, name).requires_grad
        parametrize.register_parametrization(experts, name, _Update(self._changed, deltas))
        experts.parametrizations[name].original.requires_grad_(needs_grad)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the parameter."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if adapter in self.lora_magnitude_vector:
                self._merged_with[adapter] = self._factors(adapter, self._weight()).detach()
            super().merge(safe_merge=safe_merge, adapter_names=[adapter])

    def unmerge(self) -> None:
        """Take the adapters out of the parameter again, the last one first."""
        if not self._merged_with:
            super().unmerge()
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            delta = super().get_delta_weight(adapter)
            factors, parameter = self._merged_with.pop(adapter, 1), self.get_param()
            parameter.data = (parameter.data / factors - delta).to(parameter.dtype)


def has_dora_on_experts(model: nn.Module) -> bool:
    """Say whether an adapter of `model` is a DoRA on stacks of experts."""
    return any(isinstance(m, ParamWrapper) and m.lora_magnitude_vector for m in model.modules())


class _Update(layer._LoraParameterProxy):  # type: ignore[misc]
    """Adds the updates of adapters to a parameter; PEFT finds it by the class that it is of.

    Args:
        changed: gives the update of an adapter, of the parameter and s B A.
        deltas: s B A of each.
    """

    def __init__(self, changed: Callable[..., Tensor], deltas: dict[str, Tensor]) -> None:
        super().__init__(None)
        self.changed, self.deltas = changed, deltas

    def forward(self, stored: Tensor) -> Tensor:
        """Return the parameter with all of them."""
        updates = [self.changed(name, stored.detach(), d) for name, d in self.deltas.items()]
        for update in updates:
            stored = stored + update
        return stored


def _plain(config: LoraConfig) -> LoraConfig:
    """Return the config as one of plain LoRA, which PEFT's own layer takes."""
    if not config.use_dora:
        return config
    config = copy.copy(config)
    config.use_dora = False
    return config
