"""Intel Neural Compressor itself, imported and run without leftovers.

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

from quantadapt.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import nn

TARGET = "INC_TARGET_DEVICE"
"""Names the device for INC, in the environment."""


def home(device: torch.device) -> str:
    """Return where INC works for layers on `device`. It has no FP8 for CUDA, and one device in a
    process; what it makes on a CPU runs on CUDA as well."""
    return str(device) if device.type == "hpu" else "cpu"


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
