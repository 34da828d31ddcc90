"""Tensors whose values are numbers: NaN and infinity are found, and the tensor is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..errors import NumbersError
from .held import held_tensors

CHUNK = 2**24
"""So many values are looked at a time: what that takes is not to matter beside the model."""
_FIX = "get a model whose weights are whole: what follows from these would be NaN as well"


def refuse_not_numbers(
    named: Iterable[tuple[str, Tensor]], *, where: str = "", fix: str = _FIX
) -> None:
    """Raise NumbersError where a tensor of floats holds NaN or infinity, naming the first."""
    for name, tensor in named:
        # A sharded layer's tensors have no memory between the passes.
        if not tensor.is_floating_point() or not tensor.untyped_storage().nbytes():
            continue
        flat = tensor.reshape(-1)
        starts = range(0, len(flat), CHUNK)
        if not all(_are_numbers(flat[start : start + CHUNK]) for start in starts):
            what = f"{name} holds values that are no numbers (NaN or infinity)"
            raise NumbersError(what, fix=fix, where=where)


def _are_numbers(values: Tensor) -> bool:
    if values.itemsize == 1:
        values = values.float()  # torch cannot look at eight bits as they are
    # A sum is a number only if all that is in it are, and found in a tenth of the time. One that
    # overflows says nothing.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def refuse_not_numbers_in(model: nn.Module, *, where: str = "") -> None:
    """Look at the plain parameters of a model, see `refuse_not_numbers`. Tensors of vendors' own
    classes are left out, and so are buffers: masks may hold infinity."""
    plain = (
        (name, parameter.data)
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and parameter.device.type != "meta"
    )
    refuse_not_numbers(plain, where=where)


def refuse_not_numbers_packed(
    model: nn.Module, is_packed: Callable[[nn.Module], bool], *, where: str = ""
) -> None:
    """Look at all that the quantized layers of a model hold, scales and zero points too; not at
    codes in a class of the vendor's, which may be kept as floats."""
    packed = [(name, module) for name, module in model.named_modules() if is_packed(module)]
    held = (
        (f"{name}.{part}", tensor) for name, layer in packed for part, tensor in held_tensors(layer)
    )
    plain = ((name, tensor) for name, tensor in held if type(tensor) in (Tensor, nn.Parameter))
    refuse_not_numbers(plain, where=where)
