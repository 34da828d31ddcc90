"""The quantizer of ours that transformers meets while it loads a model.

Each weight becomes a vendor module the moment it arrives; packed layers are left out, and made
afterwards. Imported where models are loaded, as it imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ModelError
from ..model.dense import skipped_modules
from ..model.experts import Stack, expert_stacks, set_stack
from ..model.linears import as_linear
from ..model.modules import linear_layers, set_submodule
from ..model.numbers import refuse_not_numbers
from .blocks import Blocks
from .packed import PackedLayer, packed_layers
from .vendor_modules import own_if_dense, quantized_stack

METHOD = "quantadapt"


class _Placeholder(nn.Module):
    """Stands for a packed layer while transformers loads everything else."""

    def __init__(self) -> None:
        super().__init__()
        self._is_hf_initialized = True  # type: ignore[assignment]


@register_quantization_config(METHOD)
class LoaderConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a load is told, and what it tells.

    Args:
        quantizer: a `LinearQuantizer`.
        skip: names left dense; None: the default.
        packed: the folder of a checkpoint whose layers are quantized already; None: of a dense one.
        device: where packed layers go.

    Attributes:
        failure: the first error of a backend's; transformers tells only that there was one.
        consumed: names of the tensors that packed layers are made of.
        conversions: of transformers', for names and layouts of the checkpoint.
        mismatched: (name, shape in the checkpoint, shape in the model).
    """

    def __init__(
        self,
        quantizer: Any = None,
        skip: Any = None,
        packed: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.quant_method = METHOD
        self.quantizer, self.skip = quantizer, skip
        self.packed, self.device = packed, device
        self.failure: Exception | None = None
        self.consumed: set[str] = set()
        self.conversions: list[Any] = []
        self.mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: the name alone."""
        return {"quant_method": METHOD}


class QuantizeLinear(ConversionOps):  # type: ignore[misc]
    """Receives one weight; leaves the vendor module in the model and hands nothing on."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def convert(
        self, input_dict: Any, model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Quantize the weights in `input_dict`; return those that stay dense."""
        dense = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if (stack := self.loader.stacks.get(key)) is not None:
                if not self.takes_stack(model, stack, tensor, missing_keys):
                    dense[key] = tensor
                continue
            name = key.rpartition(".")[0]
            own = model.get_submodule(name)
            missing_keys.discard(key)
            if tensor.shape != own.weight.shape:
                shapes = tuple(tensor.shape), tuple(own.weight.shape)
                self.loader.quantization_config.mismatched.append((key, *shapes))
                continue
            own.weight = nn.Parameter(tensor.to(self.loader.dtype), requires_grad=False)
            vendor = self.quantized(own, key)
            bias = vars(vendor).get("bias")
            if isinstance(bias, Tensor):  # or transformers does not find it while it is missing
                vendor.bias = nn.Parameter(bias, requires_grad=False)
            set_submodule(model, name, vendor.train(own.training))
            self.loader.blocks.add(model, name, vendor)
        return dense

    def takes_stack(self, model: Any, stack: Stack, tensor: Tensor, missing: Any) -> bool:
        """Put the quantized stack into the model; False where it is to stay dense."""
        config, wanted = self.loader.quantization_config, self.loader.shapes[stack.name]
        if tensor.shape != wanted:
            missing.discard(stack.name)
            config.mismatched.append((stack.name, tuple(tensor.shape), tuple(wanted)))
            return True
        try:
            refuse_not_numbers([(stack.name, tensor)])
            stored = tensor.to(self.loader.dtype)
            vendor = quantized_stack(config.quantizer, stack, stored)
        except Exception as error:
            config.failure = config.failure or error
            raise
        if vendor is not None:
            missing.discard(stack.name)
            set_stack(model, stack, vendor)
        self.loader.blocks.add(model, stack.name, vendor)
        return vendor is not None

    def quantized(self, own: nn.Module, key: str) -> Any:
        """Return the vendor module for a layer that has its weight."""
        config, linear = self.loader.quantization_config, as_linear(own)
        try:
            refuse_not_numbers([(key, linear.weight.data)])
            return own_if_dense(config.quantizer.quantize_linear(linear), linear, own)
        except Exception as error:
            config.failure = config.failure or error
            raise


@register_quantizer(METHOD)
class Loader(HfQuantizer):  # type: ignore[misc]
    """Tells transformers which weights are for us, and puts modules where they belong."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.names: set[str] = set()
        self.stacks: dict[str, Stack] = {}
        self.packed: dict[str, PackedLayer] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.blocks = Blocks(nn.Module(), ())
        self.dtype = torch.float32

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype that weights are cast to before they are quantized."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        self.shapes = {name: weight.shape for name, weight in model.named_parameters()}
        if config.packed is None:
            skip = skipped_modules(model, config.skip)
            names = [name for name, _ in linear_layers(model, skip)]
            self.stacks = {stack.name: stack for stack in expert_stacks(model, skip)}
            self.names = {*(f"{name}.weight" for name in names), *self.stacks}
            self.blocks = Blocks(model, [*names, *self.stacks])
            return
        self.packed = packed_layers(config.packed, model)
        if not self.packed:  # or layers would be left as they happen to start
            what = "none of this model's layers is quantized in the checkpoint"
            fix = "check that config.json and the weights belong together"
            raise ModelError(what, fix=fix, where=config.packed)
        self.blocks = Blocks(model, self.packed)
        for name, layer in self.packed.items():
            self.put(model, name, _Placeholder())
            config.consumed.update(layer.names())

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Say whether a weight goes to `QuantizeLinear`."""
        return param_name in self.names

    def get_quantize_ops(self) -> Any:
        """Return what such weights go to."""
        return QuantizeLinear(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return conversions beside those of the model."""
        return self.quantization_config.conversions  # type: ignore[no-any-return]

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Return the bytes of a number: transformers reserves memory on the device before it loads,
        which it need not for what is quantized."""
        return 0 if param_name in self.names else param.element_size()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        # Older transformers puts a tensor of another size into a model that has a quantizer.
        for name, weight in model.named_parameters():
            shape = self.shapes.get(name, weight.shape)
            if name not in self.names and weight.shape != shape:
                config.mismatched.append((name, tuple(weight.shape), tuple(shape)))
        for name, module in list(model.named_modules()):
            if isinstance(module, _Placeholder):
                layer = self.packed[name]
                vendor = layer.made(config.quantizer, config.packed, config.device)
                self.put(model, name, vendor.train(model.training))
                self.blocks.add(model, name, vendor)
        return model

    def put(self, model: Any, name: str, module: nn.Module) -> None:
        """Put the module of a packed layer, or of a packed stack, into the model."""
        if (stack := self.packed[name].stack) is not None:
            set_stack(model, stack, module)
        else:
            set_submodule(model, name, module)

    def is_serializable(self) -> bool:
        """Say that what was loaded can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters can be trained on it."""
        return True
