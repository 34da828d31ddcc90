"""Quantize while loading, and load and save what was quantized, for layer-by-layer backends.

transformers does the reading (shards, renamed keys, tied weights, buffers); it meets one quantizer
of ours that turns each `nn.Linear` into a vendor module the moment its weight arrives. So the peak
is the quantized model plus one layer. Weights are read from safetensors only, never from pickles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .facade import is_skipped

if TYPE_CHECKING:
    from .protocols import LayerwiseQuantizer

METHOD = "quantadapt"

BlockDone = Callable[[nn.Module, list[nn.Module]], None]
_block_done: BlockDone | None = None


@contextmanager
def watching_blocks(done: BlockDone) -> Iterator[None]:
    """Inside, `done` gets each decoder block and its quantized layers as soon as all of them are
    made, while the model is still being loaded or quantized."""
    global _block_done
    before, _block_done = _block_done, done
    try:
        yield
    finally:
        _block_done = before


class _Blocks:
    """Collects the quantized layers of each decoder block, for `watching_blocks`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        from .calibration import decoder_blocks

        blocks = (decoder_blocks(model) or {}) if _block_done else {}
        self.waiting = {
            block: {name for name in names if name.startswith(f"{block}.")} for block in blocks
        }
        self.made: dict[str, list[nn.Module]] = {block: [] for block in blocks}

    def add(self, model: nn.Module, name: str, vendor: nn.Module) -> None:
        """Note that the layer `name` has become `vendor`."""
        block = next((block for block, names in self.waiting.items() if name in names), None)
        if block is None or _block_done is None:
            return
        self.waiting[block].discard(name)
        self.made[block].append(vendor)
        if not self.waiting[block]:
            _block_done(model.get_submodule(block), self.made.pop(block))


def auto_class(config: Any) -> Any:
    """Return transformers' auto class: seq2seq for encoder-decoders, else causal LM."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def read_config(source: str) -> Any:
    """Return transformers' config of a checkpoint. Raises ModelError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        fix = "pass a folder with config.json and *.safetensors, or the id of a model on the hub"
        reason = str(error).splitlines()[0]
        raise ModelError(f"no model can be read here: {reason}", fix=fix, where=source) from None


def architecture(source: str, device: str = "meta") -> nn.Module:
    """Return the model of a checkpoint without its weights, by default names and shapes only."""
    config = read_config(source)
    with torch.device(device):
        model: nn.Module = auto_class(config).from_config(config)
    return model


def from_pretrained(source: str, **kwargs: Any) -> nn.Module:
    """`AutoModel.from_pretrained`, safetensors only; what goes wrong becomes a ModelError."""
    config = kwargs.pop("config", None) or read_config(source)
    try:
        model: nn.Module = auto_class(config).from_pretrained(
            source, config=config, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _load_error(source, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        fix = "download the checkpoint again; a file of it is damaged or cut short"
        raise ModelError(f"the weights cannot be read: {error}", fix=fix, where=source) from error
    return model


def _load_error(source: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    folder = Path(source)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles and not list(folder.glob("*.safetensors")):
        what = f"its weights are pickles ({', '.join(pickles)}), which can run code when read"
        fix = "load it with transformers where you trust it, and save_pretrained it again"
        return ModelError(what, fix=fix, where=source)
    return ModelError(f"the model cannot be loaded: {first}", fix="check the files", where=source)


def skipped_modules(model: nn.Module, skip: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that stay dense: `skip`, or the output head and what is tied to it."""
    if skip is not None:
        return skip
    if not hasattr(model, "get_output_embeddings"):
        return ()  # no transformers model
    from transformers.quantizers.base import get_keys_to_not_convert

    return tuple(get_keys_to_not_convert(model))


def linear_layers(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the plain linear layers that are to be quantized."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not is_skipped(name, skip):
            yield name, module


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name` and tell transformers that it needs no initialization."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    if not parent._parameters:  # some (T5) initialize the weights of their children
        parent._is_hf_initialized = True  # type: ignore[assignment]


def quantize_layerwise(
    quantizer: LayerwiseQuantizer,
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
    try:
        model = from_pretrained(
            source, dtype=dtype, device_map={"": device}, quantization_config=loader
        )
    except ModelError:
        if loader.failure is not None:  # transformers tells only that some conversion failed
            raise loader.failure from None
        raise
    return _plain(model)


def _quantize_module(
    quantizer: LayerwiseQuantizer,
    model: nn.Module,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None,
) -> nn.Module:
    vendors: set[nn.Module] = set()
    linears = dict(linear_layers(model, skipped_modules(model, skip)))
    blocks = _Blocks(model, linears)
    for name in list(linears):
        linear = linears.pop(name)
        linear.requires_grad_(False)
        vendor = quantizer.quantize_linear(linear.to(device=device, dtype=dtype))
        vendors.update(vendor.modules())
        set_submodule(model, name, vendor.train(linear.training))
        blocks.add(model, name, vendor)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if module not in vendors:
            _move_own(module, device, dtype, moved)
    return model


def _move_own(
    module: nn.Module, device: str, dtype: torch.dtype, moved: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Move what stays dense; floating point parameters also get the compute dtype. Tied ones stay
    tied: `moved` remembers what became of each."""
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is nn.Parameter:
            if parameter not in moved:
                target = dtype if parameter.is_floating_point() else parameter.dtype
                data = parameter.data.to(device=device, dtype=target)
                moved[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[parameter]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def load_layerwise(
    quantizer: LayerwiseQuantizer, path: str, *, device: str, dtype: torch.dtype
) -> nn.Module:
    """Load a checkpoint that `save_layerwise` wrote. See `Quantizer.load`."""
    config = copy.deepcopy(read_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = _loader_config()(quantizer=quantizer, packed=path, device=device)
    model = from_pretrained(
        path, config=config, dtype=dtype, device_map={"": device}, quantization_config=loader
    )
    return _plain(model)


def load_native(path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a quantized checkpoint whose format transformers knows. See `Quantizer.load`."""
    return _plain(from_pretrained(path, dtype=dtype, device_map={"": device}))


def save_layerwise(
    quantizer: LayerwiseQuantizer, model: nn.Module, path: Path, *, hf_quantizer: Any = None
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
        model.save_pretrained(path)  # type: ignore[operator]
    finally:
        _plain(model)


def _left_dense(quantizer: LayerwiseQuantizer, model: nn.Module) -> dict[str, Any]:
    """Return what the checkpoint has to say where layers other than the head stay dense."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    dense = [n for n, m in linear_layers(model, ()) if m is not head]
    return quantizer.left_dense(dense) if dense else {}


def _plain(model: nn.Module) -> nn.Module:
    """Take transformers' marks of a quantized model off again: the facades make it an ordinary one,
    and its Trainer refuses marked models that it has no entry for."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]
    config: Any = model.config
    for name in ("quantization_config", "_is_quantized"):
        if name in vars(config):
            delattr(config, name)
    if conversions := vars(model).get("_weight_conversions"):
        # Saving runs them backwards, which those that unpacked a quantized checkpoint cannot.
        kept = [conversion for conversion in conversions if _is_reversible(conversion)]
        model._weight_conversions = kept  # type: ignore[assignment]
    return model


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


class _Placeholder(nn.Module):
    """Stands for a packed layer while transformers loads everything else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)
        self._is_hf_initialized = True  # type: ignore[assignment]


def local_folder(path: str) -> Path:
    """Return the folder of a checkpoint; that of a hub id is downloaded if it has to be."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def _packed_state(path: str, layers: Container[str]) -> dict[str, dict[str, Tensor]]:
    """Return layer name -> the tensors saved for it, for those of `layers` that are packed: they
    hold more than a weight and a bias."""
    from safetensors import safe_open

    state: dict[str, dict[str, Tensor]] = {}
    for file in sorted(local_folder(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                parents = accumulate(key.split("."), lambda parent, part: f"{parent}.{part}")
                if layer := next((name for name in parents if name in layers), None):
                    tensors = state.setdefault(layer, {})
                    tensors[key.removeprefix(f"{layer}.")] = opened.get_tensor(key)
    return {layer: t for layer, t in state.items() if t.keys() - {"weight", "bias"}}


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

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    class QuantizeLinear(ConversionOps):  # type: ignore[misc]
        """Receives one weight; leaves the vendor module in the model and hands nothing on."""

        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def convert(
            self, input_dict: Any, model: Any = None, missing_keys: Any = None, **_: Any
        ) -> dict[str, Any]:
            for key, value in input_dict.items():
                tensor = value[0] if isinstance(value, list) else value
                name = key.rpartition(".")[0]
                linear = model.get_submodule(name)
                linear.weight = nn.Parameter(tensor.to(self.loader.dtype), requires_grad=False)
                vendor = self.quantized(linear)
                set_submodule(model, name, vendor.train(linear.training))
                missing_keys.discard(key)
                self.loader.blocks.add(model, name, vendor)
            return {}

        def quantized(self, linear: nn.Linear) -> Any:
            config = self.loader.quantization_config
            try:
                return config.quantizer.quantize_linear(linear)
            except Exception as error:
                config.failure = config.failure or error
                raise

    @register_quantizer(METHOD)
    class Loader(HfQuantizer):  # type: ignore[misc]
        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.names: set[str] = set()
            self.blocks = _Blocks(nn.Module(), ())
            self.dtype = torch.float32

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            self.dtype = dtype
            return dtype

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            config = self.quantization_config
            if config.packed is None:
                skip = skipped_modules(model, config.skip)
                names = [name for name, _ in linear_layers(model, skip)]
                self.names = {f"{name}.weight" for name in names}
                self.blocks = _Blocks(model, names)
                return
            layers = dict(linear_layers(model, ()))
            self.state = _packed_state(config.packed, layers)
            self.blocks = _Blocks(model, self.state)
            for name in self.state:
                set_submodule(model, name, _Placeholder(layers[name]))
            patterns = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = patterns | {".*"}

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name in self.names

        def get_quantize_ops(self) -> Any:
            return QuantizeLinear(self)

        def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
            # transformers reserves memory on the device before it loads: not for these
            return 0 if param_name in self.names else param.element_size()

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            config = self.quantization_config
            for name, module in list(model.named_modules()):
                if isinstance(module, _Placeholder):
                    state = {k: v.to(config.device) for k, v in self.state.pop(name).items()}
                    vendor = config.quantizer.load_linear(module.linear, state)
                    set_submodule(model, name, vendor.train(model.training))
                    self.blocks.add(model, name, vendor)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return LoaderConfig
