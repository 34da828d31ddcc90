"""LLM.int8: a scale for each row of weights, and one for each token."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from quantadapt.compiling import one_kernel
from quantadapt.protocols import ByteCodes, LayerwiseTarget, UniformGrid, twin
from quantadapt_bnb.base import BitsAndBytes, holds

if TYPE_CHECKING:
    from torch import Tensor, nn


class Int8(BitsAndBytes):
    """LLM.int8: int8 weights per output channel, int8 activations per token. What goes into experts
    is not rounded: they are multiplied with the dequantized weights. Nor is a single token on CUDA,
    as answers are written."""

    threshold: float = Field(
        6.0,
        ge=0,
        description="input columns with a larger magnitude are computed in 16 bits; 0: none",
    )

    @cached_property
    def target(self) -> Int8Target:
        return Int8Target(self)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 8 + 32 / in_features

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        import torch
        from bitsandbytes.functional import int8_vectorwise_quant

        # As Int8Params does, but where the weight is: that one quantizes what comes from the CPU.
        codes, scales, _ = int8_vectorwise_quant(linear.weight.data.to(torch.float16).contiguous())
        return self._module(linear, _int8(codes, scales), linear.bias)

    def _module(self, linear: nn.Linear, packed: Any, bias: Any) -> nn.Module:
        from bitsandbytes.nn import Linear8bitLt

        module: nn.Module = Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=self.threshold,
            device="meta",
        )
        module.weight = packed
        module.bias = bias
        return module

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from torch import nn

        bias = None if "bias" not in state else nn.Parameter(state["bias"], requires_grad=False)
        return self._module(linear, _int8(state["weight"], state["SCB"]), bias)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        import torch
        from torch import nn

        packed: list[Any] = [layer.weight for layer in layers]
        codes = torch.cat([weight.data for weight in packed])
        scales = torch.cat([weight.SCB for weight in packed])
        linear = nn.Linear(codes.shape[1], len(codes), bias=False, device="meta")
        return self._module(linear, _int8(codes, scales), None)

    def quantization_config(self) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        config: dict[str, Any] = BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=self.threshold,
        ).to_dict()
        return config

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Int8 | None:
        if not quantization_config.get("load_in_8bit"):
            return None
        return cls(threshold=quantization_config.get("llm_int8_threshold", 6.0))

    @classmethod
    def from_model(cls, model: nn.Module) -> Int8 | None:
        for module in model.modules():
            if holds(module, "Int8Params"):
                return cls(threshold=module.state.threshold)  # type: ignore[union-attr, arg-type]
        return None


class Int8Target(LayerwiseTarget):
    """`bitsandbytes.nn.Linear8bitLt`."""

    quantizes_activations = True
    straight_through = False
    """0.8% of rounding a layer. The vendor's forward waits for the GPU and takes twice as long."""
    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return holds(module, "Int8Params")

    def dequantize(self, module: nn.Module) -> Tensor:
        vendor: Any = module
        return one_kernel(_dequantize_int8, vendor.weight.data, _row_scales(module))

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        vendor: Any = module
        scales = _row_scales(module)[first:last]
        return one_kernel(_dequantize_int8, vendor.weight.data[first:last], scales)

    def grid(self, module: nn.Module) -> UniformGrid:
        import torch

        scale, columns = _row_scales(module).view(-1, 1) / 127, self.shape(module)[0]
        return UniformGrid(
            scale=scale, group_size=columns, dtype=torch.float32, lowest=-127, highest=127
        )

    def byte_codes(self, module: nn.Module) -> ByteCodes:
        vendor: Any = module
        return ByteCodes(held=vendor.weight.data, grid=self.grid(module))

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        codes = self.grid(module).codes(weight).to(torch.int8)
        made = twin(module, weight=_int8(codes, _row_scales(module)))
        made.state = state = copy.copy(cast("Any", module.state))
        state.CB = state.SCB = None  # the first forward takes them from the weight
        return made

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Round the activations, as in evaluation; a layer of a model that was training when it was
        quantized would not, on a CPU. The vendor's takes inputs of 2 or 3 axes, no more."""
        rows = x.flatten(0, -3) if x.ndim > 3 else x
        output = super().forward(module.eval() if module.training else module, rows)
        return output.reshape(*x.shape[:-1], output.shape[-1])


def _row_scales(module: nn.Module) -> Tensor:
    """Return 127 times the scale of each row, float32 [out_features]."""
    vendor: Any = module
    # The first forward moves it.
    scales: Tensor = vendor.state.SCB if vendor.weight.SCB is None else vendor.weight.SCB
    return scales


def _int8(codes: Tensor, scales: Tensor) -> Any:
    """Return int8 codes [out, in] and the scales of their rows as bitsandbytes holds them."""
    from bitsandbytes.nn import Int8Params

    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def _dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * (scale.view(-1, 1) / 127)
