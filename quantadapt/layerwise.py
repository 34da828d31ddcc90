"""Quantize while loading, and load and save what was quantized, for layer-by-layer backends.

transformers does the reading (shards, renamed keys, tied weights, buffers); it meets one quantizer
of ours that turns each `nn.Linear` into a vendor module the moment its weight arrives. So the peak
is the quantized model, one layer, and the weights that `read_ahead` has read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ModelError
from .loading import reading
from .loading.blocks import Blocks
from .loading.mxfp4 import conversions, is_mxfp4
from .loading.packed import PackedLayer, packed_layers
from .loading.read_ahead import reading_ahead
from .loading.writing import being_written
from .model.dense import skipped_modules
from .model.experts import Stack, expert_stacks, set_stack
from .model.linears import as_linear
from .model.modules import linear_layers, set_submodule, wanted_dtype
from .model.numbers import refuse_not_numbers

METHOD = "quantadapt"


class SaysHow(Protocol):
    """What is written in config.json of how a model is quantized, as
    `protocols.LayerwiseQuantizer` says it."""

    def quantization_config(self) -> dict[str, Any]:
        """Return what goes into config.json."""
        ...

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        """Return what config.json says of the layers that stay dense."""
        ...


class LinearQuantizer(SaysHow, Protocol):
    """What is wanted of a quantizer here, as `protocols.LayerwiseQuantizer` says it."""

    @property
    def target(self) -> Any:
        """The view of the layers that this quantizer makes."""
        ...

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor module for a dense layer."""
        ...

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the vendor module for the tensors that were saved for it."""
        ...

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Return one vendor module with the rows of all `layers`."""
        ...


def quantize_layerwise(
    quantizer: LinearQuantizer,
    source: str | nn.Module,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None = None,
) -> nn.Module:
    """Quantize a checkpoint while loading it, or a live module in place, see `Quantizer`."""
    if isinstance(source, nn.Module):
        return _quantize_module(quantizer, source, device=device, dtype=dtype, skip=skip)
    loader = _loader_config()(quantizer=quantizer, skip=skip)
    if is_mxfp4(reading.read_config(source)):
        loader.conversions = conversions()
    try:
        with reading_ahead(device):
            model = reading.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": device},
                quantization_config=loader,
                mismatched=loader.mismatched,
            )
    except ModelError:
        if loader.failure is not None:  # transformers tells only that some conversion failed
            raise loader.failure from None
        raise
    return reading.unmarked(model)


def _quantize_module(
    quantizer: LinearQuantizer,
    model: nn.Module,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None,
) -> nn.Module:
    vendors: set[nn.Module] = set()
    skip = skipped_modules(model, skip)
    linears = dict(linear_layers(model, skip))
    stacks = list(expert_stacks(model, skip))
    blocks = Blocks(model, [*linears, *(stack.name for stack in stacks)])
    for name in list(linears):
        linear = linears.pop(name)
        own = model.get_submodule(name).requires_grad_(False)
        if linear is own:
            linear.to(device=device, dtype=dtype)
        else:
            linear = as_linear(own.to(device=device, dtype=dtype))
        refuse_not_numbers((f"{name}.{key}", p.data) for key, p in own.named_parameters())
        vendor = _own_if_dense(quantizer.quantize_linear(linear), linear, own)
        vendors.update(vendor.modules())
        set_submodule(model, name, vendor.train(linear.training))
        blocks.add(model, name, vendor)
    for stack in stacks:
        stored = model.get_parameter(stack.name).data
        refuse_not_numbers([(stack.name, stored)])
        made = _quantized_stack(quantizer, stack, stored.to(device=device, dtype=dtype))
        if made is not None:
            vendors.update(made.modules())
            set_stack(model, stack, made)
        blocks.add(model, stack.name, made)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    wanted = wanted_dtype(model, dtype)
    for name, module in model.named_modules():
        if module not in vendors:
            _move_own(module, f"{name}.", device, wanted, moved)
    return model


def _own_if_dense(vendor: nn.Module, linear: nn.Linear, own: nn.Module) -> nn.Module:
    """Return what a backend made of `linear`; where it handed that back, unquantized, the layer
    that the model itself has there."""
    same = vendor is linear and type(linear.weight) is nn.Parameter
    return own if same else vendor


def _quantized_stack(quantizer: LinearQuantizer, stack: Stack, stored: Tensor) -> nn.Module | None:
    """Return what a backend makes of a stack of experts, kept as `stored`: the tall layer,
    quantized; None where it stays dense."""
    linear = stack.as_linear(stored)
    vendor = quantizer.quantize_linear(linear)
    return None if vendor is linear and type(linear.weight) is nn.Parameter else vendor.eval()


def _move_own(
    module: nn.Module,
    prefix: str,
    device: str,
    wanted: Callable[[str], torch.dtype],
    moved: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Move what stays dense; floating point parameters also get the dtype that is wanted for their
    name. Tied ones stay tied: `moved` remembers what became of each."""
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is nn.Parameter:
            if parameter not in moved:
                floats = parameter.is_floating_point()
                target = wanted(prefix + name) if floats else parameter.dtype
                data = parameter.data.to(device=device, dtype=target)
                moved[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[parameter]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def load_layerwise(
    quantizer: LinearQuantizer, path: str, *, device: str, dtype: torch.dtype
) -> nn.Module:
    """Load a checkpoint that `save_layerwise` wrote. See `Quantizer.load`."""
    config = copy.deepcopy(reading.read_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = _loader_config()(quantizer=quantizer, packed=path, device=device)
    model = reading.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=loader,
        consumed=loader.consumed,
        mismatched=loader.mismatched,
    )
    reading.remember_stacks(model)
    return reading.unmarked(model)


def save_layerwise(
    quantizer: SaysHow, model: nn.Module, path: Path, *, hf_quantizer: Any = None
) -> None:
    """Write config.json (with `quantization_config`) and model.safetensors into `path`.

    Args:
        quantizer: says what goes into config.json.
        model: with or without facades; not changed.
        path: an existing, empty folder.
        hf_quantizer: transformers' quantizer, where its format needs help to fit into safetensors.
    """
    config: Any = model.config
    config.quantization_config = quantizer.quantization_config() | _left_dense(quantizer, model)
    if hf_quantizer is not None:
        model.hf_quantizer = hf_quantizer
    try:
        with reading.stacks_as_they_are(model), being_written(model):
            model.save_pretrained(path)  # type: ignore[operator]
    finally:
        reading.unmarked(model)


def _left_dense(quantizer: SaysHow, model: nn.Module) -> dict[str, Any]:
    """Return what the checkpoint has to say about layers that stay dense."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    dense = dict(linear_layers(model, ()))
    head = next((name for name, layer in dense.items() if layer is output), None)
    return quantizer.left_dense([*dense], head)


class _Placeholder(nn.Module):
    """Stands for a packed layer while transformers loads everything else."""

    def __init__(self) -> None:
        super().__init__()
        self._is_hf_initialized = True  # type: ignore[assignment]


@cache
def _loader_config() -> Any:
    """Register our quantizer with transformers, once, and return its config class."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class LoaderConfig(QuantizationConfigMixin):  # type: ignore[misc]
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
            return {"quant_method": METHOD}

    class QuantizeLinear(ConversionOps):  # type: ignore[misc]
        """Receives one weight; leaves the vendor module in the model and hands nothing on."""

        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def convert(
            self, input_dict: Any, model: Any = None, missing_keys: Any = None, **_: Any
        ) -> dict[str, Any]:
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
                vendor = _quantized_stack(config.quantizer, stack, stored)
            except Exception as error:
                config.failure = config.failure or error
                raise
            if vendor is not None:
                missing.discard(stack.name)
                set_stack(model, stack, vendor)
            self.loader.blocks.add(model, stack.name, vendor)
            return vendor is not None

        def quantized(self, own: nn.Module, key: str) -> Any:
            config, linear = self.loader.quantization_config, as_linear(own)
            try:
                refuse_not_numbers([(key, linear.weight.data)])
                return _own_if_dense(config.quantizer.quantize_linear(linear), linear, own)
            except Exception as error:
                config.failure = config.failure or error
                raise

    @register_quantizer(METHOD)
    class Loader(HfQuantizer):  # type: ignore[misc]
        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.names: set[str] = set()
            self.stacks: dict[str, Stack] = {}
            self.packed: dict[str, PackedLayer] = {}
            self.shapes: dict[str, torch.Size] = {}
            self.blocks = Blocks(nn.Module(), ())
            self.dtype = torch.float32

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
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
            return param_name in self.names

        def get_quantize_ops(self) -> Any:
            return QuantizeLinear(self)

        def get_weight_conversions(self) -> list[Any]:
            return self.quantization_config.conversions  # type: ignore[no-any-return]

        def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
            # transformers reserves memory on the device before it loads: not for these
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
            if (stack := self.packed[name].stack) is not None:
                set_stack(model, stack, module)
            else:
                set_submodule(model, name, module)

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return LoaderConfig
