"""What a file holds of a layer, checked, and the layer made of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.layers import CompressedLinear, Tensors, codes_name
from quantadapt_compressed_tensors.schemes import Scheme

_OF_CACHE = ("output_scale", "output_zero_point")
"""What a layer holds where the KV cache is rounded: read and left out."""


def loaded(schemes: Iterable[Scheme], linear: nn.Linear, state: Tensors) -> CompressedLinear:
    """Return the layer for what a file holds of it, by the one of `schemes` that it fits.

    Raises:
        ModelError: it fits none, or several that round inputs otherwise.
    """
    state = {name: tensor for name, tensor in state.items() if name not in _OF_CACHE}
    bias = state.pop("bias", None)
    size = linear.out_features, linear.in_features
    found: list[tuple[Scheme, Tensors]] = []
    reasons = []
    for scheme in schemes:
        try:
            found.append((scheme, _checked(scheme, state, *size)))
        except ModelError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    if len({scheme.inputs for scheme, _ in found}) > 1:
        what = "several of its config_groups fit its tensors, which round inputs otherwise"
        raise ModelError(what, fix="use a checkpoint whose groups hold other kinds of weights")
    scheme, tensors = found[0]
    given = None if bias is None else bias.to(linear.weight.dtype)
    return CompressedLinear(scheme, linear.in_features, linear.out_features, tensors, given)


def _checked(scheme: Scheme, state: Tensors, rows: int, columns: int) -> Tensors:
    """Return the tensors of a layer of that size, in the shapes that compressed-tensors writes.

    Raises:
        ModelError: one is missing, not known, or of another shape or dtype.
    """
    if misfit := scheme.misfit(columns, rows):
        raise _wrong(misfit)
    state, wanted = dict(state), _wanted(scheme, rows, columns)
    zeros = state.pop("weight_zero_point", None) if scheme.weights.symmetric else None
    if zeros is not None and bool(zeros.float().count_nonzero()):
        raise _wrong("it has zero points, which its scheme says it has not")
    if missing := [name for name in wanted if name not in state and name not in _OPTIONAL]:
        raise _wrong(f"it has no {' and no '.join(missing)}, which its scheme needs")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise _wrong(f"it has {', '.join(unknown)}, which its scheme has no place for")
    tensors = {name: _shaped(name, tensor, *wanted[name]) for name, tensor in state.items()}
    for name in ("weight_global_scale", "input_global_scale"):
        if name in tensors and not bool(tensors[name] > 0):
            raise _wrong(f"its {name} is {float(tensors[name]):g}, not above 0")
    shape = tensors.get("weight_shape")
    if shape is not None and shape.tolist() != [rows, columns]:
        raise _wrong(f"its weight_shape is {shape.tolist()}, its config wants {[rows, columns]}")
    order = tensors.get("weight_g_idx")
    if order is not None and bool((order == -1).any()):  # never set: groups follow each other
        del tensors["weight_g_idx"]
    elif order is not None:
        _check_order(order, columns, scheme.weights.group_size or columns)
    return tensors


_OPTIONAL = ("weight_shape", "weight_g_idx", "input_zero_point")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _wanted(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the shape and the dtypes of each tensor that a layer may hold."""
    args, inputs = scheme.weights, scheme.inputs
    scales, name = args.scales(rows, columns), codes_name(scheme)
    words = -(-columns * args.num_bits // 32)
    codes: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "pack-quantized": ((rows, words), (torch.int32,)),
        "int-quantized": ((rows, columns), (torch.int8,)),
        "nvfp4-pack-quantized": ((rows, columns // 2), (torch.uint8,)),
        "mxfp4-pack-quantized": ((rows, columns // 2), (torch.uint8,)),
    }
    found = {name: codes.get(scheme.format, ((rows, columns), (torch.float8_e4m3fn,)))}
    found["weight_scale"] = scales, _FLOATS
    if scheme.has_power_scales:
        found["weight_scale"] = scales, (torch.uint8,)
    if args.strategy == "tensor_group":
        found["weight_scale"] = scales, (torch.float8_e4m3fn,)
        found["weight_global_scale"] = (1,), _FLOATS
    if scheme.format == "pack-quantized":
        found["weight_shape"] = (2,), (torch.int64, torch.int32)
        if args.strategy == "group":
            found["weight_g_idx"] = (columns,), (torch.int32, torch.int64)
    if not args.symmetric:
        found["weight_zero_point"] = scales, (torch.int8,)
        if scheme.format == "pack-quantized":
            height = -(-rows * args.num_bits // 32)
            found["weight_zero_point"] = (height, *scales[1:]), (torch.int32,)
    if inputs is not None and inputs.has_own_scale:
        if inputs.strategy == "tensor_group":
            found["input_global_scale"] = (1,), _FLOATS
        else:
            found["input_scale"] = (1,), _FLOATS
        if not inputs.symmetric:
            found["input_zero_point"] = (1,), (torch.int8, torch.float8_e4m3fn)
    return found


def _shaped(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> Tensor:
    """Return a tensor in the shape that is wanted, if it is that but for dimensions of one."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise _wrong(f"its {name} is {found}, where its scheme wants {wanted}")
    if [n for n in tensor.shape if n > 1] != [n for n in shape if n > 1]:
        raise _wrong(f"its {name} is {list(tensor.shape)}, where its scheme wants {list(shape)}")
    return tensor.reshape(shape).contiguous()


def _check_order(order: Tensor, columns: int, size: int) -> None:
    """Raise ModelError where groups are not all of one size."""
    counts = order.long().clamp(0, columns).bincount(minlength=columns // size)
    if int(order.min()) < 0 or counts.tolist() != [size] * (columns // size):
        raise _wrong(f"its weight_g_idx does not make groups of {size}")


def _wrong(what: str) -> ModelError:
    fix = "check that config.json and the weights belong together, or download them again"
    return ModelError(what, fix=fix)
