"""What a backend implements: a `Quantizer`, and the `AdapterTarget` that it produces.

Most backends subclass `LayerwiseQuantizer`, implement `quantize_linear` and `load_linear`, and get
quantize-on-load, saving, loading and re-quantization from the core.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import ModelError, PluginError
from .options import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .byte_codes import ByteCodes
    from .grids import Grid
    from .word_codes import WordCodes


@runtime_checkable
class AdapterTarget(Protocol):
    """How the core sees one quantized linear layer of a vendor."""

    quantizes_activations: bool = False
    """True where the vendor's forward also quantizes activations (int8, fp8): it is then run as
    it is, and only the backward pass (straight-through) uses the dequantized weight."""

    straight_through: bool = True
    """False where training, unlike evaluation, leaves such a forward out and multiplies with the
    dequantized weight as elsewhere: adapters need not learn to live with a rounding so small."""

    activation_error: float = 0.01
    """Where activations are quantized: the relative error of a layer's output by that. int8 0.008,
    e4m3 0.027, e2m1 0.1. Dense merges, which do not quantize them, may be as much further off."""

    reads_rows: bool = False
    """Whether `dequantize_rows` makes no other rows: stacks of experts are then dequantized a few
    experts at a time where memory is short."""

    def matches(self, module: nn.Module) -> bool:
        """Say whether `module` is a quantized linear layer of this backend."""
        ...

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Return (in_features, out_features); packed weights cannot tell."""
        vendor: Any = module
        return int(vendor.in_features), int(vendor.out_features)

    def dequantize(self, module: nn.Module) -> Tensor:
        """Return the weight as a float tensor of shape [out_features, in_features]."""
        ...

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        """Return the rows from `first` to before `last` of what `dequantize` returns, to the bit.
        Called only where `reads_rows`."""
        return self.dequantize(module)[first:last]

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the vendor's forward with bias: [..., in_features] -> [..., out_features]."""
        output: Tensor = module(x)
        return output

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether `forward`, the vendor's kernel, is faster for `x` than dequantizing and a
        matrix product; it has to give the same but for rounding."""
        return False

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        """Return the codes of `module` where they lie in bytes: single tokens are then multiplied
        with them on CUDA, whatever they mean, by a kernel of the core. None (the default):
        otherwise, or the vendor's `forward` is as fast."""
        return None

    def word_codes(self, module: nn.Module) -> WordCodes | None:
        """Likewise where they lie in 32-bit words, as in GPTQ's and AWQ's formats, for up to four
        tokens."""
        return None

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the codes of `byte_codes` or `word_codes` are multiplied with for `x`
        [..., in_features]: `x` itself (the default); rounded, where the vendor's forward rounds and
        training has to (`straight_through`); or in the order that the codes are in."""
        return x

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Return a new vendor module holding `weight` [out_features, in_features], quantized as
        `module` was. Called only where the backend declares `Merge.REQUANTIZE`."""
        name = type(self).__name__
        raise PluginError(f"{name} has no requantize", fix="declare Merge.DENSE, or implement it")

    def grid(self, module: nn.Module) -> Grid | None:
        """Return the values that the weights of `module` can take with the scales that it has; None
        (the default) where that is not known. A backend that has it has `repack` as well."""
        return None

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Return a new vendor module with the scales of `module` and, of the values of its grid,
        those nearest to `weight` [out_features, in_features]."""
        name = type(self).__name__
        raise PluginError(f"{name} has no repack", fix="implement it beside grid")

    def restore(self, module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """Return a new vendor module, of the size of `module`, that holds `state`: what another's
        `state_dict` gave, without prefix and bias. Called by `load_state_dict` where the vendor's
        own leaves some of it unread, e.g. scales."""
        name = type(module).__name__
        raise ModelError(f"{name} does not load all of them", fix="load the whole model anew")


def rows_of_units(first: int, last: int, unit: int, read: Callable[[int, int], Tensor]) -> Tensor:
    """Return the rows from `first` to before `last` where some are packed together: what
    `dequantize_rows` is made of then.

    Args:
        unit: how many rows are packed together.
        read: returns the rows from its first argument to before its second, multiples of `unit`.
    """
    start, end = first // unit * unit, -(-last // unit) * unit
    return read(start, end)[first - start : last - start]


def twin(module: nn.Module, **others: Tensor) -> nn.Module:
    """Return a module that holds the very tensors of `module`, but for `others` by their names:
    what `repack` returns."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(made, name, dict(getattr(module, name)))
    for name, tensor in others.items():
        setattr(made, name, tensor)
    return made


class Quantizer(Options, ABC):
    """The options of a backend, e.g. `HQQ(bits=4, group_size=64)`."""

    @property
    @abstractmethod
    def target(self) -> AdapterTarget:
        """The view of the layers that this quantizer makes."""
        ...

    @property
    def needs_data(self) -> bool:
        """False where these very options need no data, of a backend that calibrates with others."""
        return True

    @abstractmethod
    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        """Load and quantize `source`, a checkpoint folder or hub id, or quantize a live module.

        Args:
            source: path, hub id, or a module, which is changed in place.
            device: where the quantized model goes: "cpu", "cuda", "cuda:1", ...
            dtype: dtype of everything that is not quantized, and of the computation.
            calibration: tokenized examples (`input_ids` int64 [1, length], on the CPU). Never None
                or empty where the backend's record says that it calibrates.
            skip_modules: names left dense; None means the output head and what is tied to it.
        """
        ...

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Say why a layer of this size cannot be quantized ("128 does not divide its 320
        inputs"), or return None. Asked before any weight is loaded."""
        return None

    def stays_dense(self, model: nn.Module, skip_modules: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of linear layers of `model`, beside those of `skip_modules`, that have
        to stay dense whatever their size; users are told. Where transformers loads your
        checkpoints and goes by names, that is `loading.not_converted(model, skip_modules)`."""
        return ()

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float | None:
        """Return how many bits a weight of a layer of this size takes in memory, scales, zero
        points and the like included; None (the default) if it is not known. Plans predict memory
        from it.

        Args:
            device: where the layer will be: "cpu", "cuda", ...
            dtype: torch's name of the compute dtype, e.g. "bfloat16".
        """
        return None

    @property
    def quantizes_experts(self) -> bool:
        """Whether stacks of experts are quantized as well as linear layers."""
        return False

    def notes(self, device: str) -> tuple[str, ...]:
        """Return what a plan for `device` should tell, e.g. which kernel will run."""
        return ()

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        """Load a checkpoint that is already quantized with this backend. By default transformers
        does it, from the checkpoint's own `quantization_config`."""
        from ..loading.reading import load_native

        return load_native(path, device=device, dtype=dtype)

    @abstractmethod
    def save(self, model: nn.Module, path: Path) -> None:
        """Write the quantized base in the vendor's or transformers' own format into `path`."""
        ...

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Quantizer | None:
        """Return the quantizer that made a checkpoint with this `quantization_config` (the dict in
        its config.json), or None if it is not one of this backend's."""
        return None

    @classmethod
    def from_model(cls, model: nn.Module) -> Quantizer | None:
        """Return the quantizer for a live module that is already quantized, or None."""
        return None


class LayerwiseTarget(AdapterTarget):
    """A target whose layers can be quantized again by the quantizer that made them."""

    def __init__(self, quantizer: LayerwiseQuantizer) -> None:
        self.quantizer = quantizer

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from ..model.linears import linear_of

        linear = linear_of(weight, module.bias)  # type: ignore[arg-type]
        return self.quantizer.quantize_linear(linear).train(module.training)

    def restore(self, module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        from torch import nn

        inputs, outputs = self.shape(module)
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        return self.quantizer.load_linear(linear, state)


class LayerwiseQuantizer(Quantizer):
    """A quantizer that needs one linear layer at a time and no calibration data.

    Implement `target`, `quantize_linear` and `quantization_config`; and `load_linear`, unless
    transformers itself loads your checkpoints: then override `load` with `Quantizer.load`.
    """

    @property
    def quantizes_experts(self) -> bool:
        return type(self).quantize is LayerwiseQuantizer.quantize

    @abstractmethod
    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor module for `linear`, whose weight is on the target device and in the
        compute dtype. The caller drops `linear` afterwards; take its bias over."""
        ...

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the vendor module for `linear` (on the meta device: only its sizes, dtype and
        whether it has a bias count) from the tensors that were saved for it, without prefix."""
        name = type(self).__name__
        fix = "implement load_linear, or override load with Quantizer.load"
        raise PluginError(f"{name} has no load_linear", fix=fix)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Return one vendor module that holds the rows of all `layers`, vendor modules without
        bias and of one size, in their order: what is the same to the bit for each. Experts that
        were quantized one by one become a stack with it."""
        name = type(self).__name__
        fix = "implement join_rows, or use a checkpoint whose experts are not quantized"
        raise PluginError(f"{name} cannot join layers to a stack of experts", fix=fix)

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """What goes into the checkpoint's config.json under `quantization_config`; it must hold
        `quant_method`, and `from_checkpoint` must be able to read it back."""
        ...

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        """Return what `quantization_config` says where the linear layers `names` stay dense, for
        loaders that cannot tell from the tensors.

        Args:
            names: all of them, in order.
            head: the name of the output head if that is one of them; formats may imply it.
        """
        return {}

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        from ..layerwise import quantize_layerwise

        return quantize_layerwise(self, source, device=device, dtype=dtype, skip=skip_modules)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from ..layerwise import load_layerwise

        return load_layerwise(self, path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        from ..layerwise import save_layerwise

        save_layerwise(self, model, path)
