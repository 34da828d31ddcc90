"""A live module, planned as itself: by its own config, and by how it is quantized already.

Looks at the module without importing torch, which whoever made the module has done.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..dependencies import import_requirements, missing_requirements
from ..errors import Problem
from ..protocols import Quantizer
from ..records import Backend
from .parts import Draft, fresh_quantizer, refuse_other_options

if TYPE_CHECKING:
    from torch import nn


def config_of_module(module: nn.Module) -> dict[str, Any]:
    """Return a module's own config, as a config.json would hold it; empty if it has none."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(config) if isinstance(config, Mapping) else {}


def refuse_unused(draft: Draft) -> None:
    """Note what has no effect on a module that is there already."""
    if draft.spec.model is not None:
        what = f"the module is taken as it is, and {draft.spec.model} is not read"
        draft.problems.append(Problem(what, "leave the model out, or the module", where="model"))


def quantizer_of_module(
    draft: Draft, backend: Backend | None, module: nn.Module
) -> tuple[Quantizer | None, bool]:
    """Return the quantizer, and whether the module was quantized by it already: then it stays as
    it is and where it is, and the draft's device and dtype become its own."""
    if backend is None or missing_requirements(backend):  # told already
        return fresh_quantizer(draft, backend), False
    import_requirements(backend)
    adopted = backend.quantizer.from_model(module)
    if adopted is None:
        return fresh_quantizer(draft, backend), False
    refuse_other_options(draft, adopted, "module")
    spec, device, dtype = draft.spec, _device_of(module), _dtype_of(module, adopted)
    if device:
        if spec.device not in ("auto", device, device.partition(":")[0]):
            what = f"the module is quantized already, and stays on {device}"
            fix = f"leave out device={spec.device!r}, or move the module there first"
            draft.problems.append(Problem(what, fix, where="device"))
        spec.device = device
    if dtype in backend.dtypes:
        if spec.dtype not in ("auto", dtype):
            what = f"the module is quantized already, and computes in {dtype}"
            fix = f"leave out dtype={spec.dtype!r}, or load the module in {spec.dtype}"
            draft.problems.append(Problem(what, fix, where="dtype"))
        spec.dtype = dtype  # type: ignore[assignment]
    return adopted, True


def _device_of(module: nn.Module) -> str:
    """Return where a module is, by its first tensor; empty if it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return "" if tensor is None else str(tensor.device)


def _dtype_of(module: nn.Module, quantizer: Quantizer) -> str:
    """Return torch's name of what a quantized module computes in, by the first of its weights that
    is not quantized; empty if it has none."""
    target = quantizer.target
    layers = [name for name, child in module.named_modules() if target.matches(child)]
    quantized = tuple(f"{name}." if name else "" for name in layers)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not name.startswith(quantized):
            return str(parameter.dtype).removeprefix("torch.")
    return ""
