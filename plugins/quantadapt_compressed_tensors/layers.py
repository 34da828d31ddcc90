"""A layer of a compressed-tensors checkpoint: it holds what the files hold, by their names.

What rounds, weights and what goes into layers, is the library's own code; so a layer that is made
here has the library's codes, and rounds its inputs as transformers and the library do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.packing import Layout, unpack, weight_of
from quantadapt_compressed_tensors.schemes import Args, Scheme

SCHEME = "quantadapt_scheme"
"""Attribute of a layer, ours or the library's: how it is rounded."""
GRID = "quantadapt_grid"
"""Attribute of a dense layer: a grid, as `fresh_grid` gives it, that its weight may lie on."""
Tensors = dict[str, Tensor]

_HELD = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")
"""What a weight is made of beside its codes."""
_OF_CACHE = ("output_scale", "output_zero_point")
"""What a layer holds where the KV cache is rounded: read and left out."""


class CompressedLinear(nn.Module):
    """A linear layer of codes and scales.

    Args:
        scheme: how it is rounded.
        in_features, out_features: its sizes.
        tensors: what a file holds of it, by its name there, without bias.
        bias: [out_features] or None.
        parts: how many layers the rows are of: several where it is a stack of experts. What goes
            into a stack is not rounded.
    """

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        setattr(self, SCHEME, scheme)
        self.of_parts = scheme  # how each part is rounded in files
        self.in_features, self.out_features, self.parts = in_features, out_features, parts
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the dequantized weight, of rounded inputs where the scheme says
        so."""
        return forward(self, x)


def scheme_of(module: nn.Module) -> Scheme:
    """Return how a layer is rounded."""
    scheme: Scheme = getattr(module, SCHEME)
    return scheme


def tensors_of(module: nn.Module) -> Tensors:
    """Return what a layer holds beside its bias, by name."""
    held = {**module._parameters, **module._buffers}
    return {n: t.data for n, t in held.items() if t is not None and n != "bias"}


def codes_name(scheme: Scheme) -> str:
    """Return what the tensor of codes is called."""
    return "weight_packed" if scheme.format.endswith("pack-quantized") else "weight"


def dequantize(module: nn.Module) -> Tensor:
    """Return the weight of a layer in float32."""
    scheme, tensors = scheme_of(module), tensors_of(module)
    return _weight(scheme, tensors, *_sizes(module))


def _sizes(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _weight(scheme: Scheme, tensors: Tensors, rows: int, columns: int) -> Tensor:
    names = (codes_name(scheme), *(name for name in _HELD if name in tensors))
    args = scheme.weights
    height, width = args.block(rows, columns)
    powers = scheme.format.startswith("mx")
    layout = Layout(names, args.num_bits, rows, columns, height, width, powers)
    return one_kernel(weight_of, *(tensors[name] for name in names), static=(layout,))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """Run a layer, ours or the library's, with its bias."""
    bias: Any = module.bias
    given = None if bias is None else bias.to(x.dtype)
    weight = dequantize(module).to(x.dtype)
    return nn.functional.linear(rounded_inputs(module, x), weight, given)


@torch.no_grad()
def rounded_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return what goes into a layer, rounded as its scheme says, in the dtype of `x`. A token is
    the last dimension."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    inputs = scheme_of(module).inputs
    if inputs is None or getattr(module, "parts", 1) > 1 or not x.numel():
        return x
    args, tokens = _library_args(inputs), x.reshape(1, -1, x.shape[-1])
    whole = getattr(module, "input_global_scale", None)
    if inputs.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(tokens, args, module, global_scale=whole)
    else:
        scale, zero = module.input_scale, getattr(module, "input_zero_point", None)
    rounded: Tensor = fake_quantize(tokens, scale, zero, args, global_scale=whole)
    return rounded.to(x.dtype).view(x.shape)


# Rounding weights --------------------------------------------------------------------------------


@cache
def _library_args(args: Args) -> Any:
    """Return the library's object that says the same."""
    from compressed_tensors.quantization import QuantizationArgs

    values = args.said()
    values.pop("actorder", None)  # it says how scales were found; newer libraries refuse "group"
    return QuantizationArgs(**values)


def fresh_grid(args: Args, weight: Tensor, dtype: torch.dtype) -> Tensors:
    """Return scales and zero points for a weight, float32 [rows, columns], whose smallest and
    largest number of a block are the ends of its range.

    Args:
        args: how it is rounded.
        weight: where columns have groups of their own, in their order.
        dtype: which the scales have in files; they are numbers of it.
    """
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    grid: Tensors = {}
    if args.strategy == "tensor_group":
        grid["weight_global_scale"] = generate_gparam(*weight.aminmax())
    whole = grid.get("weight_global_scale")
    ends = _by_block(args, weight)
    scales, zeros = calculate_qparams(
        ends.amin((1, 3)), ends.amax((1, 3)), _library_args(args), global_scale=whole
    )
    shape = args.scales(*weight.shape)
    if args.scale_dtype is None:
        scales = scales.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
    grid["weight_scale"] = scales.view(shape)
    if not args.symmetric:
        grid["weight_zero_point"] = zeros.view(shape)
    return grid


def _by_block(args: Args, weight: Tensor) -> Tensor:
    """Return a weight as [blocks, height, blocks, width], filled up with zeros."""
    height, width = args.block(*weight.shape)
    rows, columns = weight.shape
    filled = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    return filled.view(filled.shape[0] // height, height, -1, width)


def on_grid(args: Args, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
    """Return `weight`, float32, rounded to nearest onto a grid as `fresh_grid` gives it."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    rounded: Tensor = fake_quantize(weight, *_spelled(grid), _library_args(args), _whole(grid))
    return rounded


def _spelled(grid: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return grid["weight_scale"], grid.get("weight_zero_point")


def _whole(grid: Mapping[str, Tensor]) -> Tensor | None:
    return grid.get("weight_global_scale")


def better_grid(args: Args, weight: Tensor, *grids: Tensors) -> Tensors:
    """Return the grid that is closer to `weight`, block by block; of one that has a scale for the
    whole weight, in all."""
    first, second = grids
    errors = [
        _by_block(args, (on_grid(args, weight, grid) - weight).square()).sum((1, 3))
        for grid in grids
    ]
    if args.strategy == "tensor_group":
        return second if errors[1].sum() < errors[0].sum() else first
    closer = (errors[1] < errors[0]).view(args.scales(*weight.shape))
    return {name: torch.where(closer, second[name], first[name]) for name in first}


def grid_of(module: nn.Module) -> Tensors:
    """Return the grid that a layer has, as `fresh_grid` gives it."""
    scheme, tensors = scheme_of(module), tensors_of(module)
    scales = tensors["weight_scale"]
    powers = scheme.format.startswith("mx")
    grid = {"weight_scale": torch.exp2(scales.float() - 127) if powers else scales.float()}
    if "weight_zero_point" in tensors:
        grid["weight_zero_point"] = zeros_of(scheme, tensors, _sizes(module)[0])
    if (whole := tensors.get("weight_global_scale")) is not None:
        grid["weight_global_scale"] = whole
    return grid


def zeros_of(scheme: Scheme, tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    """Return the zero points of a layer, int8, in the shape of its scales."""
    zeros = tensors["weight_zero_point"]
    if zeros.dtype == torch.int32:
        zeros = unpack(zeros.t(), scheme.weights.num_bits, rows).t()
    return zeros.to(torch.int8)


def pack_zeros(scheme: Scheme, zeros: Tensor) -> Tensor:
    """Return zero points, int8 in the shape of the scales, as the format has them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if scheme.format != "pack-quantized":
        return zeros.contiguous()
    words: Tensor = pack_to_int32(zeros.contiguous(), scheme.weights.num_bits, packed_dim=0)
    return words.contiguous()


def packed(scheme: Scheme, weight: Tensor, grid: Mapping[str, Tensor], dtype: Any) -> Tensors:
    """Return what a file holds of a weight, float32, that is rounded onto a grid.

    Args:
        scheme: how.
        weight: [out_features, in_features].
        grid: as `fresh_grid` gives it; with `weight_g_idx` where columns have groups of their own.
        dtype: of the scales where the format leaves it open.
    """
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args, name, order = scheme.weights, codes_name(scheme), grid.get("weight_g_idx")
    held = torch.int8 if args.type == "int" else torch.float8_e4m3fn
    codes = quantize(
        in_groups(weight, order),
        *_spelled(grid),
        _library_args(args),
        dtype=None if args.num_bits == 4 and args.type == "float" else held,
        global_scale=_whole(grid),
    )
    codes = in_place(codes, order).contiguous()
    tensors: Tensors = {name: codes, **grid}
    scale = grid["weight_scale"]
    if scheme.format.startswith("mx"):
        tensors["weight_scale"] = compress_mx_scale(scale, torch.uint8)
    else:
        wanted = torch.float8_e4m3fn if args.strategy == "tensor_group" else dtype
        tensors["weight_scale"] = scale.to(wanted)
    if args.type == "float":
        if args.num_bits == 4:
            tensors[name] = pack_fp4_to_uint8(codes)
    elif scheme.format == "pack-quantized":
        tensors[name] = pack_to_int32(codes, args.num_bits)
        tensors["weight_shape"] = torch.tensor(weight.shape, device=weight.device)
    if not args.symmetric:
        tensors["weight_zero_point"] = pack_zeros(scheme, grid["weight_zero_point"].to(torch.int8))
    return {key: value.contiguous() for key, value in tensors.items()}


def in_groups(weight: Tensor, order: Tensor | None) -> Tensor:
    """Return a weight with the columns of a group side by side; `order` is the group of each."""
    return weight if order is None else weight[:, order.argsort(stable=True)]


def in_place(weight: Tensor, order: Tensor | None) -> Tensor:
    """Undo `in_groups`."""
    return weight if order is None else weight[:, order.argsort(stable=True).argsort()]


# Files -------------------------------------------------------------------------------------------


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
    if scheme.format.startswith("mx"):
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
