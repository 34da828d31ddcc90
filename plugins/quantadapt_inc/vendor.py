"""What one has to know of Intel Neural Compressor: its layers, and how to run it without leftovers.

INC picks one device when it is imported, logs to the console and to a folder in the home, writes
into the working directory, keeps every module that it has seen, and leaves attributes on those that
it only passed by. `running` and `showing` see to all that.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantadapt.errors import ModelError, PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TARGET = "INC_TARGET_DEVICE"
"""Names the device for INC, in the environment."""


def home(device: torch.device) -> str:
    """Return where INC works for layers on `device`. It has no FP8 for CUDA, and one device in a
    process; what it makes on a CPU runs on CUDA as well."""
    return str(device) if device.type == "hpu" else "cpu"


# Layers ----------------------------------------------------------------------------------------


def is_fp8(module: nn.Module) -> bool:
    """Say whether `module` is INC's FP8 layer."""
    return type(module).__name__ == "PatchedLinear"


def in_qdq(module: Any) -> bool:
    """Say whether it is one that rounds and multiplies in plain PyTorch."""
    return is_fp8(module) and bool(module.use_qdq)


def divides_by_zero(module: Any) -> bool:
    """Say whether it is such a layer with inputs of scale 0, which makes nan of zeros."""
    return in_qdq(module) and not bool(module.quant_input.scale)


def is_integer(module: nn.Module) -> bool:
    """Say whether `module` is INC's integer layer, with AWQ's scale of the inputs or without."""
    layer = inner(module)
    return type(layer).__name__ == "INCWeightOnlyLinear" and bool(layer.use_optimum_format)


def inner(module: Any) -> Any:
    """Return what holds the weight: AWQ puts a scale of the inputs in front of it."""
    return module.linear if type(module).__name__ in ("MulLinear", "ScaledLinear") else module


def sizes(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    return int(layer.in_features), int(layer.out_features)


@cache
def scaled_class() -> Any:
    """Return INC's `MulLinear` with a bias to look at."""
    from neural_compressor.torch.algorithms.weight_only.modules import MulLinear

    class ScaledLinear(MulLinear):  # type: ignore[misc]
        @property
        def bias(self) -> Any:
            return self.linear.bias

    return ScaledLinear


def integers(layer: Any) -> Tensor:
    """Return what `layer.recover()` does, without its loop over columns."""
    codes = (layer.qweight[:, None] >> _shifts(layer)[:, None]) & (2**layer.bits - 1)
    codes = codes.flatten(0, 1)[: layer.in_features]
    groups = layer.g_idx.long()
    weight: Tensor = ((codes - zero_points(layer)[groups]) * layer.scales[groups]).t()
    return weight.contiguous()


def zero_points(layer: Any) -> Tensor:
    """Return the zero points of an integer layer, [groups, out_features]."""
    stored = (layer.qzeros[:, :, None] >> _shifts(layer)).flatten(1)[:, : layer.out_features]
    zeros: Tensor = (stored + 1) & (2**layer.bits - 1)
    return zeros


def is_plain(layer: Any) -> bool:
    """Say whether groups of an integer layer follow each other and have one zero point, whatever a
    config says: INC's GPTQ may order columns by their weight, and a model be of several kinds. The
    tensors are looked at once, which waits for a GPU."""
    looked_at = vars(layer).get("_plain")
    there = [(tensor, _version(tensor)) for tensor in (layer.qzeros, layer.g_idx)]
    if looked_at is not None and all(
        old is new and before == now
        for (old, before), (new, now) in zip(looked_at[0], there, strict=True)
    ):
        return bool(looked_at[1])
    import torch

    groups = torch.arange(layer.in_features, device=layer.g_idx.device) // layer.group_size
    follow = torch.equal(layer.g_idx.long(), groups)
    plain = follow and bool((zero_points(layer) == 2 ** (layer.bits - 1)).all())
    vars(layer)["_plain"] = there, plain
    return plain


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shifts(layer: Any) -> Tensor:
    import torch

    steps = torch.arange(layer.n_pack, dtype=torch.int32, device=layer.qweight.device)
    return steps * int(layer.bits)


def complete(module: nn.Module, bias: Tensor | None) -> None:
    """Make a layer that INC made what facades and checkpoints need."""
    import torch

    layer = inner(module)
    if is_fp8(module):
        from neural_compressor.torch.algorithms.fp8_quant import save_load

        save_load.process_model_for_scalar_scale(module)  # puts scales into the state_dict
        if in_qdq(layer):  # in memory, rows of outputs, as those who read the codes want them
            layer.weight.data = layer.weight.data.t().contiguous().t()
        vars(module).update(orig_mod=None, orig_mod_parent=None, forward_orig=None)
        return
    if layer is not module:
        module.__class__ = scaled_class()
        layer.behind_scale = True
    layer.bias = bias  # INC rounds it to float16, and makes one where there is none
    layer._non_persistent_buffers_set.add("scale_bf16_to_fp8")  # not used
    if layer.g_idx is None:  # readers of GPTQ checkpoints want it
        del layer.g_idx
        groups = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
        layer.register_buffer("g_idx", groups.to(layer.scales.device))


def looking_on(model: nn.Module, device: torch.device) -> None:
    """Move a model that INC prepared for FP8 to `device`, and what keeps the largest inputs."""
    for module in model.to(device).modules():
        found: Any = getattr(module, "_mod_extra_config", None)
        for observer in () if found is None else (*found.inputs, *(found.outputs or ())):
            observer.state = observer.state.to(device)


# Models ----------------------------------------------------------------------------------------


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that holds these tensors."""
    from torch import nn

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert, in place, what is not quantized."""
    import torch

    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
    return model


def in_blocks(names: list[str], model: nn.Module, method: str) -> list[str]:
    """Return what the layers `names` are called within each block of the model.

    Raises:
        ModelError: INC's GPTQ or AWQ would break, or leave layers out silently.
    """
    from torch import nn

    stacks = [n for n, m in model.named_modules() if type(m) in (nn.ModuleList, nn.Sequential)]
    blocks: dict[str, list[str]] = {}
    for name in names:
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        block, _, rest = name.removeprefix(f"{stack}.").partition(".")
        blocks.setdefault(f"{stack}.{block}" if stack else name, []).append(rest)
    first, *others = list(blocks.values()) or [[]]
    if len(stacks) == 1 and all(first) and all(other == first for other in others):
        return first
    what = f"INC's {method} wants one stack of blocks with the same layers, and none outside it; "
    what += f"here are {', '.join(list(blocks)[:3])}, ..."
    raise ModelError(what, fix="use method: fp8 or rtn, or other skip_modules")


@contextmanager
def showing(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Show INC the layers `names` only, in eval mode; take off what it leaves on modules."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    hidden = list(_hidden(model, names))
    config: Any = getattr(model, "config", None)
    caches = bool(getattr(config, "use_cache", False))
    try:
        model.eval()
        if caches:
            config.use_cache = False  # INC runs blocks again and again
        for owner, child, module in hidden:
            setattr(owner, child, _hiding_class()(module))
        yield
    finally:
        if caches:
            config.use_cache = True
        for owner, child, module in hidden:
            setattr(owner, child, module)
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _hidden(model: nn.Module, names: list[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name in it, module) of what INC would quantize although it is not wanted."""
    from torch import nn

    for name, module in model.named_modules():
        convolution = type(module).__name__ in ("Conv1d", "Conv2d", "Conv1D")
        if name not in names and (convolution or isinstance(module, nn.Linear)):
            parent, _, child = name.rpartition(".")
            yield model.get_submodule(parent), child, module


@cache
def _hiding_class() -> Any:
    from torch import nn

    class Hidden(nn.Module):
        """A layer that stays dense, under a type that INC does not know."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            vars(self)["module"] = module

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["module"], name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return vars(self)["module"](*args, **kwargs)

        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            vars(self)["module"]._apply(fn, recurse)  # where the model goes, it goes, too
            return self

    return Hidden


# INC itself ------------------------------------------------------------------------------------


@contextmanager
def running(device: torch.device) -> Iterator[None]:
    """Have INC work for layers on `device`, and keep it from leaving files, messages and models
    behind."""
    _import_for("hpu" if device.type == "hpu" else "cpu")
    logger, tempdir = logging.getLogger("neural_compressor"), tempfile.tempdir
    level = logger.level
    with tempfile.TemporaryDirectory(prefix="quantadapt-inc-") as scratch:
        tempfile.tempdir = scratch
        logger.setLevel(max(level, logging.ERROR))
        try:
            yield
        finally:
            tempfile.tempdir = tempdir
            logger.setLevel(level)
            _forget()


@cache
def _import_for(device: str) -> None:
    """Import INC, which looks at the environment and at the working directory when it comes in.

    Raises:
        PluginError: it was imported before, for another device.
    """
    quiet = {"LOGLEVEL": "ERROR", "LOG_LEVEL_INC": "6"}  # 6: no log folder in the home
    wanted = {**{k: v for k, v in quiet.items() if k not in os.environ}, TARGET: device}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        import transformers  # noqa: F401  (some of INC's files look whether it is there, once)
        from neural_compressor.common import options

        workspace = options._workspace
        with tempfile.TemporaryDirectory() as scratch:
            options._workspace = scratch
            import_module("neural_compressor.torch.algorithms.layer_wise")  # makes a folder
            import_module("neural_compressor.torch.quantization")
            from neural_compressor.torch.utils.auto_accelerator import auto_detect_accelerator

            options._workspace = workspace
        found = [auto_detect_accelerator().name(), auto_detect_accelerator("auto").name()]
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    if found != [device, device]:
        what = f"neural_compressor was imported for {found[0]} earlier in this process"
        raise PluginError(what, fix=f"set {TARGET}={device} in the environment", where="device")


def _forget() -> None:
    """Empty INC's lists of modules that it has seen; they would keep every model alive."""
    from neural_compressor.torch.algorithms.fp8_quant import model_configs
    from neural_compressor.torch.algorithms.fp8_quant._core import patching_common, save_measure

    patching_common.parent_child_mod_dict.clear()
    save_measure.gmod_list.clear()
    model_configs.IMOD_DICT.clear()
