"""HQQ: half-quadratic quantization, 1 to 8 bits without calibration (https://github.com/mobiusml/hqq).

transformers 5 refuses its own HqqConfig, so the hqq library is used itself. Checkpoints have the
layout that transformers 4 wrote for HQQ: hqq's tensors in safetensors, `quant_method: hqq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, ValidationError

from quantadapt.capabilities import Merge
from quantadapt.compiling import one_kernel
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import ByteCodes, LayerwiseQuantizer, LayerwiseTarget, UniformGrid, twin
from quantadapt.records import Backend

if TYPE_CHECKING:
    from torch import Tensor, nn


class HQQ(LayerwiseQuantizer):
    """Options of hqq's `BaseQuantizeConfig`."""

    bits: Literal[1, 2, 3, 4, 8] = Field(
        4, description="bits per weight; 1 keeps next to nothing of the model"
    )
    group_size: int | None = Field(
        64, ge=8, multiple_of=8, description="weights that share a scale; null: a whole row"
    )
    axis: Literal[0, 1] = Field(
        1,
        description="1 groups along in_features, 0 along out_features and, in experts, across them",
    )

    @cached_property
    def target(self) -> HQQTarget:
        return HQQTarget(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        weights, group = in_features * out_features, self._group(in_features, out_features)
        if weights % group:
            return f"{out_features} x {in_features} weights do not divide into groups of {group}"
        packed = weights // group if self.axis == 1 else group
        together = {1: 8, 2: 4, 4: 2}.get(self.bits, 1)  # values in a byte come from so many groups
        if packed % together:
            return f"{packed} groups cannot be packed by {together}, as {self.bits} bits demand"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        group = self._group(in_features, out_features)
        packed: float = self.bits
        if self.bits == 3:  # ten rows of codes in one of int32
            rows = in_features * out_features // group if self.axis == 1 else group
            packed = 32 * -(-rows // 10) / rows
        return packed + 2 * (32 if dtype == "float32" else 16) / group

    def _group(self, in_features: int, out_features: int) -> int:
        return self.group_size or (in_features if self.axis == 1 else out_features)

    def _config(self) -> dict[str, Any]:
        from hqq.core.quantize import BaseQuantizeConfig

        config: dict[str, Any] = BaseQuantizeConfig(
            nbits=self.bits, group_size=self.group_size, axis=self.axis
        )
        return config

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import HQQLinear
        from torch import nn

        from quantadapt_hqq.quantize import quantize

        weight, config = linear.weight, self._config()
        options = config["weight_quant_params"]
        options["group_size"] = self._group(linear.in_features, linear.out_features)
        device = str(weight.device)
        module: Any = HQQLinear(
            None, config, compute_dtype=weight.dtype, device=device, initialize=False
        )
        names = ("nbits", "group_size", "axis", "round_zero")
        packed, meta = quantize(weight, **{name: options[name] for name in names})
        # What HQQLinear's own methods do, except that they empty CUDA's cache for each layer.
        module.W_q = nn.Parameter(packed, requires_grad=False)
        module.meta = meta | {
            "compute_dtype": weight.dtype,
            "scale": meta["scale"].to(weight.dtype),
            "zero": meta["zero"].to(weight.dtype),
        }
        module.in_features, module.out_features = linear.in_features, linear.out_features
        if linear.bias is not None:
            module.bias = linear.bias.detach().to(weight.dtype, copy=True)
        module.in_gpu = module.ready = True
        vendor: nn.Module = module
        return vendor

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from hqq.core.quantize import HQQLinear
        from torch import nn

        device = str(state["W_q"].device)
        module: Any = HQQLinear(
            None, self._config(), compute_dtype=linear.weight.dtype, device=device, initialize=False
        )
        state["W_q"] = nn.Parameter(state["W_q"], requires_grad=False)
        module.load_state_dict(state)
        for name in ("scale", "zero"):
            if not module.meta.keys() & {name, f"{name}_q", f"meta_{name}"}:
                raise KeyError(name)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        vendor: nn.Module = module
        return vendor

    def quantization_config(self) -> dict[str, Any]:
        return {"quant_method": "hqq", "quant_config": self._config()}

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"skip_modules": names}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> HQQ | None:
        if quantization_config.get("quant_method") != "hqq":
            return None
        try:
            found = quantization_config["quant_config"]["weight_quant_params"]
            return cls(bits=found["nbits"], group_size=found["group_size"], axis=found["axis"])
        except (KeyError, ValidationError):  # options by layer, or others than ours
            return None

    @classmethod
    def from_model(cls, model: nn.Module) -> HQQ | None:
        metas: list[dict[str, Any]] = [m.meta for m in model.modules() if _is_hqq(m)]  # type: ignore[misc]
        if not metas:
            return None
        bits, axis, group_size = (metas[0][name] for name in ("nbits", "axis", "group_size"))
        if all(meta["group_size"] in (None, meta["shape"][axis]) for meta in metas):
            group_size = None  # hqq may have noted the size of a whole row
        return cls(bits=bits, group_size=group_size, axis=axis)


class HQQTarget(LayerwiseTarget):
    """`hqq.core.quantize.HQQLinear`."""

    def __init__(self, quantizer: HQQ) -> None:
        super().__init__(quantizer)
        self.reads_rows = quantizer.axis == 1

    def matches(self, module: nn.Module) -> bool:
        return _is_hqq(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        _follow(module)
        vendor: Any = module
        meta = vendor.meta
        if meta["quant_zero"] or meta["quant_scale"] or meta["view_as_float"]:
            weight: Tensor = vendor.dequantize()
            return weight
        return one_kernel(
            _dequantize,
            *(vendor.W_q.data, meta["scale"], meta["zero"]),
            static=(meta["nbits"], tuple(meta["shape"])),
            otherwise=vendor.dequantize,
        )

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        _follow(module)
        vendor: Any = module
        meta = vendor.meta
        columns, size = meta["shape"][1], meta["group_size"] or meta["shape"][meta["axis"]]
        other = meta["quant_zero"] or meta["quant_scale"] or meta["view_as_float"]
        if other or meta["axis"] != 1 or first * columns % size or last * columns % size:
            return super().dequantize_rows(module, first, last)
        groups = slice(first * columns // size, last * columns // size)
        codes = _unpacked(vendor.W_q.data, meta["nbits"], groups)
        scale, zero = (meta[name].view(-1, 1)[groups] for name in ("scale", "zero"))
        return codes.to(scale.dtype).sub_(zero).mul_(scale).view(-1, columns)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        _follow(module)
        output: Tensor = module(x)
        return output

    def grid(self, module: nn.Module) -> UniformGrid | None:
        _follow(module)
        vendor: Any = module
        meta = vendor.meta
        if meta["quant_zero"] or meta["quant_scale"] or meta["view_as_float"]:
            return None  # of layers that others made
        scale, zero, size = _by_rows(meta)
        bits, dtype = meta["nbits"], scale.dtype
        return UniformGrid(
            scale=scale, zero=zero, group_size=size, dtype=dtype, lowest=0, highest=2**bits - 1
        )

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        grid, vendor = self.grid(module), cast("Any", module)
        bits, (rows, columns) = vendor.meta["nbits"], vendor.meta["shape"]
        packed = vendor.W_q.data
        bytes_ = packed.element_size() == 1 and packed.numel() * 8 == rows * columns * bits
        if grid is None or vendor.meta["axis"] != 1 or not bytes_ or rows * bits % 8:
            return None
        return ByteCodes(held=packed.view(-1, columns), grid=grid, bits=bits, high_first=True)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch
        from hqq.core.quantize import Quantizer

        grid, vendor = self.grid(module), cast("Any", module)
        assert grid is not None
        meta = vendor.meta
        size = meta["group_size"] or meta["shape"][meta["axis"]]
        codes = grid.codes(weight).to(torch.uint8)
        codes = codes.reshape((-1, size) if meta["axis"] == 1 else (size, -1))
        packed = Quantizer.pack[meta["packing"]](codes)
        return twin(module, W_q=torch.nn.Parameter(packed, requires_grad=False))


def _dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, shape: tuple[int, int]
) -> Tensor:
    """As hqq does. The codes of a byte (of ten in an int32, for 3 bits) belong to rows that lie far
    apart; their number may have been padded."""
    import torch

    together = 10 if bits == 3 else 8 // bits
    shifts = torch.arange((together - 1) * bits, -1, -bits, device=packed.device)
    codes = (packed >> shifts.to(packed.dtype)[:, None, None]) & (2**bits - 1)
    rows = shape[0] * shape[1] // packed.shape[1]
    weight: Tensor = (codes.flatten(0, 1)[:rows].to(scale.dtype) - zero) * scale
    return weight.view(shape)


def _unpacked(packed: Tensor, bits: int, groups: slice) -> Tensor:
    """Return the codes of some groups, [groups, group_size], as `_dequantize` unpacks them all."""
    import torch

    together, found = 10 if bits == 3 else 8 // bits, []
    for part in range(together):
        start, end = part * len(packed), (part + 1) * len(packed)
        here = packed[max(groups.start, start) - start : max(min(groups.stop, end) - start, 0)]
        found.append((here >> (together - 1 - part) * bits) & (2**bits - 1))
    return torch.cat(found)


def _by_rows(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Return scales and zero points of a layer, [out_features, groups of a row], and how many
    weights these groups have. Groups that are no part of a row become groups of one weight."""
    (rows, columns), axis = meta["shape"], meta["axis"]
    size = meta["group_size"] or meta["shape"][axis]
    found: tuple[Tensor, Tensor] = meta["scale"], meta["zero"]
    if axis == 1 and columns % size == 0:
        return found[0].reshape(rows, -1), found[1].reshape(rows, -1), size
    shape = (rows * columns // size, size) if axis == 1 else (size, rows * columns // size)
    scale, zero = (part.expand(shape).reshape(rows, columns) for part in found)
    return scale, zero, 1


def _is_hqq(module: nn.Module) -> bool:
    return type(module).__name__ == "HQQLinear" and hasattr(module, "W_q")


def _follow(module: Any) -> None:
    """Keep scales and zeros beside the packed weight: hqq holds them outside `parameters()`."""
    for name in ("scale", "zero"):
        if (tensor := module.meta.get(name)) is not None and tensor.device != module.W_q.device:
            module.meta[name] = tensor.to(module.W_q.device)


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name="hqq",
            summary="half-quadratic quantization, 1-8 bits, no calibration data",
            quantizer=HQQ,
            requires=("hqq>=0.2.7",),
            imports=("hqq.core.quantize",),
            extra="quantadapt[hqq]",
            merge=Merge.REQUANTIZE,
        )
    ]
