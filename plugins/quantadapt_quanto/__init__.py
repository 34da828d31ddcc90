"""Quanto: int8, int4, int2 and float8 weights without calibration
(https://github.com/huggingface/optimum-quanto).

Weights only, as transformers' QuantoConfig does it; groups of 128 to 32 below 8 bits, whichever
divides the row, else whole rows. Checkpoints are quanto's own, its tensors in safetensors and
`quanto_qmap.json`; quanto reads ours, and ours alone say in config.json what they are. transformers
quantizes with quanto but cannot load the result, and refuses it for the name of the type.

Weights are held in quanto's plain packing, not in that of one of its kernels: what it packs for its
int4 kernel in bfloat16 comes back changed when it is saved. `weights` unpacks them, since quanto
compiles C++ or CUDA for that the first time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from quantadapt.capabilities import Merge
from quantadapt.compiling import one_kernel
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import (
    ByteCodes,
    CodebookGrid,
    Grid,
    LayerwiseQuantizer,
    LayerwiseTarget,
    UniformGrid,
    float8_levels,
    twin,
)
from quantadapt.records import Backend
from quantadapt_quanto.weights import (
    ShiftedGrid,
    completed,
    dequantize,
    is_packed,
    is_quanto,
    layer_class,
    make_copyable,
    packed_rows,
    scaled,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

QTYPES = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8_e4m3fn"}


class Quanto(LayerwiseQuantizer):
    """Options of transformers' `QuantoConfig`."""

    weights: Literal["int8", "int4", "int2", "float8"] = Field(
        "int8", description="type of the weights; float8 is e4m3"
    )

    @cached_property
    def target(self) -> QuantoTarget:
        return QuantoTarget(self)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        scale = 32 if dtype == "float32" else 16
        if self.weights in ("int8", "float8"):
            return 8 + scale / in_features
        groups = (size for size in (128, 96, 64, 32) if in_features % size == 0)
        return int(self.weights[-1]) + 2 * scale / next(groups, in_features)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from optimum.quanto import quantize_weight
        from torch import nn

        make_copyable()
        weight, qtype = linear.weight.detach(), self._qtype()
        module: nn.Module = layer_class().qcreate(linear, weights=qtype, device="meta")
        optimizer: Any = module.optimizer
        how: dict[str, Any] = {"qtype": qtype, "axis": 0}
        if qtype.bits == 8:
            scale, shift = optimizer(weight, **how), None
            scale[scale == 0] = 1  # a row of zeros would become 0 / 0
        else:
            how["group_size"] = module.weight_group_size
            scale, shift = optimizer(weight, **how)
        packed = quantize_weight(weight, scale=scale, shift=shift, optimized=False, **how)
        module.weight = nn.Parameter(packed, requires_grad=False)
        return completed(module, linear.bias, scale)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor
        from torch import nn

        make_copyable()
        qtype = self._qtype()
        module: nn.Module = layer_class().qcreate(linear, weights=qtype, device="meta")
        how: dict[str, Any] = {"qtype": qtype, "axis": 0, "missing_keys": []}
        how |= {"size": linear.weight.shape, "stride": (linear.in_features, 1)}
        if qtype.bits == 8:
            how["activation_qtype"] = None
            packed = WeightQBytesTensor.load_from_state_dict(state, "weight.", **how)
        else:
            how["group_size"] = module.weight_group_size
            packed = WeightQBitsTensor.load_from_state_dict(state, "weight.", **how)
        module.weight = nn.Parameter(packed, requires_grad=False)
        return completed(module, state.get("bias"), packed._scale)

    def _qtype(self) -> Any:
        from optimum.quanto import qtypes

        return qtypes[QTYPES[self.weights]]

    def quantization_config(self) -> dict[str, Any]:
        return {"quant_method": "quanto", "weights": QTYPES[self.weights]}

    def save(self, model: nn.Module, path: Path) -> None:
        super().save(model, path)
        layer = {"weights": QTYPES[self.weights], "activations": "none"}
        layers = {
            name: layer
            for name, module in model.named_modules()
            if self.target.matches(getattr(module, "vendor", module))
        }
        text = json.dumps(layers, indent=2) + "\n"
        (path / "quanto_qmap.json").write_text(text, encoding="utf-8")

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Quanto | None:
        if quantization_config.get("quant_method") != "quanto":
            return None
        return cls._of_type(quantization_config.get("weights"))

    @classmethod
    def from_model(cls, model: nn.Module) -> Quanto | None:
        for module in model.modules():
            if is_quanto(module):
                make_copyable()
                return cls._of_type(module.weight_qtype.name)  # type: ignore[union-attr]
        return None

    @classmethod
    def _of_type(cls, name: Any) -> Quanto | None:
        names: dict[Any, Any] = {qtype: weights for weights, qtype in QTYPES.items()}
        return cls(weights=names[name]) if name in names else None


class QuantoTarget(LayerwiseTarget):
    """`optimum.quanto.QLinear`, frozen; ours is a subclass."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return is_quanto(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        return dequantize(module.weight)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        weight: Any = module.weight
        if is_packed(weight):
            return packed_rows(weight, first, last)
        if weight.axis != 0 or type(weight).__name__ != "WeightQBytesTensor":
            return super().dequantize_rows(module, first, last)
        scale = weight._scale if len(weight._scale) == 1 else weight._scale[first:last]
        return one_kernel(scaled, weight._data[first:last], scale)

    def grid(self, module: nn.Module) -> Grid | None:

        weight: Any = module.weight
        if weight.axis != 0:
            return None
        rows, columns = weight.shape
        scale = weight._scale.reshape(rows, -1)
        size, dtype = columns // scale.shape[1], scale.dtype
        if not is_packed(weight):
            codes = weight._data.dtype
            if not codes.is_floating_point:
                return UniformGrid(
                    scale=scale, group_size=size, dtype=dtype, lowest=-128, highest=127
                )
            levels = float8_levels(codes, scale.device)
            return CodebookGrid(scale=scale, group_size=size, dtype=dtype, levels=levels)
        return ShiftedGrid(
            scale=scale,
            zero=weight._shift.reshape(rows, -1),
            group_size=size,
            dtype=dtype,
            lowest=0,
            highest=2**weight.qtype.bits - 1,
        )

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        weight, grid = cast("Any", module.weight), self.grid(module)
        if grid is None or not is_packed(weight):
            return None if grid is None else ByteCodes(held=weight._data, grid=grid)
        bits, (rows, columns) = weight.qtype.bits, weight.shape
        held = weight._data._data
        if held.numel() * 8 != rows * columns * bits or rows * bits % 8:
            return None  # padded, or a byte's codes are of one row
        return ByteCodes(held=held.view(-1, columns), grid=grid, bits=bits, shifted=True)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch
        from optimum.quanto.tensor.packed import PackedTensor

        grid, old = self.grid(module), cast("Any", module.weight)
        assert grid is not None
        codes, names = grid.codes(weight), old.__tensor_flatten__()
        parts = {name: getattr(old, name) for name in names[0]}
        if is_packed(old):
            codes = codes.to(torch.uint8).view(old._data.shape)
            parts["_data"] = PackedTensor.pack(codes, old.qtype.bits)
        elif isinstance(grid, CodebookGrid):  # a code is the byte itself
            parts["_data"] = codes.to(torch.uint8).view(old._data.dtype)
        else:
            parts["_data"] = codes.to(old._data.dtype)
        packed = type(old).__tensor_unflatten__(parts, names[1], None, None)
        return twin(module, weight=torch.nn.Parameter(packed, requires_grad=False))


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name="quanto",
            summary="optimum-quanto int8, int4, int2 and float8 weights, no calibration data",
            quantizer=Quanto,
            requires=("optimum-quanto>=0.2.7",),
            imports=("optimum.quanto",),
            extra="quantadapt[quanto]",
            merge=Merge.REQUANTIZE,
        )
    ]
