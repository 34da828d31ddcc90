"""bitsandbytes: nf4 and fp4 (QLoRA, https://arxiv.org/abs/2305.14314) and LLM.int8
(https://arxiv.org/abs/2208.07339). Checkpoints are transformers' own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from quantadapt.capabilities import Merge
from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget, Quantizer
from quantadapt.records import Backend

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_OF_EXPERT = re.compile(r"experts\.\d+\..*\.(absmax|SCB)$")
"""Tensors of checkpoints whose experts are quantized one by one."""
DECODING = 32
"""Tokens up to which the vendor's product with 4-bit weights beats dequantizing on CUDA."""


class _BitsAndBytes(LayerwiseQuantizer):
    def stays_dense(self, model: nn.Module, skip_modules: tuple[str, ...]) -> tuple[str, ...]:
        from quantadapt.loading import not_converted

        return not_converted(model, skip_modules)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from quantadapt.loading import Checkpoint

        if any(map(_OF_EXPERT.search, Checkpoint(path).files)):  # which transformers 5 cannot load
            return super().load(path, device=device, dtype=dtype)
        return Quantizer.load(self, path, device=device, dtype=dtype)

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"llm_int8_skip_modules": names}


class _FourBit(_BitsAndBytes):
    quant_type: ClassVar[str]

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        _check_nested(path)
        return super().load(path, device=device, dtype=dtype)

    double_quant: bool = Field(
        True, description="quantize the scales too (0.4 bits per weight less)"
    )
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        "uint8", description="dtype that holds the packed weights; FSDP1 wants the compute dtype"
    )

    @cached_property
    def target(self) -> FourBitTarget:
        return FourBitTarget(self)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        block, block_of_scales, tables = 64, 256, 32 * (16 + 256)
        if not self.double_quant:
            return 4 + 32 / block
        return 4 + (8 + 32 / block_of_scales) / block + tables / (in_features * out_features)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        module: Any = self._empty(linear)
        options = {k: v for k, v in vars(module.weight).items() if k != "module"}
        packed = Params4bit(linear.weight.data, requires_grad=False, **options)
        module.weight = packed.to(linear.weight.device)
        module.bias = linear.bias
        vendor: nn.Module = module
        return vendor

    def _empty(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor's module of that size."""
        import torch
        from bitsandbytes.nn import Linear4bit

        module: nn.Module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=getattr(torch, self.quant_storage),
            device="meta",
        )
        return module

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """transformers loads whole checkpoints; `load_state_dict` leaves out the scales."""
        from bitsandbytes.nn import Linear4bit, Params4bit
        from torch import nn

        codes, stats = state["weight"].clone(), {**state}
        del stats["weight"]
        bias = stats.pop("bias", None)
        packed = Params4bit.from_prequantized(codes, stats, device=codes.device)
        found, wanted = tuple(packed.quant_state.shape), (linear.out_features, linear.in_features)
        if (packed.quant_type, found) != (self.quant_type, wanted):
            what = f"they are {packed.quant_type} of {found}, not {self.quant_type} of {wanted}"
            raise ModelError(what)
        module: Any = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=packed.quant_state.dtype,
            compress_statistics=packed.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=packed.quant_storage,
            device="meta",
        )
        packed.module = module
        module.weight = packed
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        vendor: nn.Module = module
        return vendor

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Join them; quantized scales become plain ones, as each layer has an offset of its own."""
        import torch
        from bitsandbytes.nn import Params4bit
        from torch import nn

        packed: list[Any] = [layer.weight for layer in layers]
        states = [weight.quant_state for weight in packed]
        first, rows = states[0], sum(state.shape[0] for state in states)
        columns = first.shape[1]
        if any(state.shape.numel() % state.blocksize for state in states):
            what = f"the last block of {first.blocksize} weights of an expert is not full"
            raise ModelError(what, fix="quantize the original model again")
        stats = {
            "absmax": torch.cat([_scales(state) for state in states]),
            "quant_map": first.code,
            "blocksize": first.blocksize,
            "quant_type": first.quant_type,
            "dtype": str(first.dtype).removeprefix("torch."),
            "shape": (rows, columns),
        }
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=first.dtype)
        module: Any = self._empty(linear)
        codes = torch.cat([weight.data.reshape(-1, 1) for weight in packed])
        module.weight = Params4bit.from_prequantized(
            codes, stats, device=codes.device, module=module
        )
        vendor: nn.Module = module
        return vendor

    def quantization_config(self) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        config: dict[str, Any] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_quant_storage=self.quant_storage,
        ).to_dict()
        return config

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> _FourBit | None:
        config = quantization_config
        if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != cls.quant_type:
            return None
        return cls(
            double_quant=config.get("bnb_4bit_use_double_quant", False),
            quant_storage=config.get("bnb_4bit_quant_storage", "uint8"),
        )

    @classmethod
    def from_model(cls, model: nn.Module) -> _FourBit | None:
        for module in model.modules():
            if _is(module, "Params4bit"):
                weight: Any = module.weight
                if weight.quant_type != cls.quant_type:
                    return None
                storage = str(weight.quant_storage).removeprefix("torch.")
                return cls(double_quant=weight.compress_statistics, quant_storage=storage)
        return None


class NF4(_FourBit):
    """4-bit NormalFloat."""

    quant_type = "nf4"


class FP4(_FourBit):
    """4-bit float."""

    quant_type = "fp4"


class Int8(_BitsAndBytes):
    """LLM.int8: int8 weights per output channel, int8 activations per token. What goes into experts
    is not rounded: they are multiplied with the dequantized weights."""

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
        from bitsandbytes.nn import Int8Params

        device = linear.weight.device
        packed = Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        return self._module(linear, packed.to(device), linear.bias)

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
            if _is(module, "Int8Params"):
                return cls(threshold=module.state.threshold)  # type: ignore[union-attr, arg-type]
        return None


def _scales(state: Any) -> Tensor:
    """Return the scales of 4-bit blocks in float32, of quantized ones the numbers that they are."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        scales: Tensor = state.absmax
        return scales
    plain: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return plain.float()


def _int8(codes: Tensor, scales: Tensor) -> Any:
    """Return int8 codes [out, in] and the scales of their rows as bitsandbytes holds them."""
    from bitsandbytes.nn import Int8Params

    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def _check_nested(path: str) -> None:
    """Raise ModelError where the scales of quantized scales are gone: bitsandbytes would take their
    codes for scales."""
    from quantadapt.loading import Checkpoint

    names = Checkpoint(path).files
    for name in names:
        layer, _, part = name.rpartition(".weight.")
        if part == "nested_quant_map" and f"{layer}.weight.nested_absmax" not in names:
            what = f"it has no {layer}.weight.nested_absmax"
            raise ModelError(what, fix="make or download the checkpoint again", where=path)


def _look_for_lost_scales(state: Any) -> None:
    """Raise ValueError where there are too few of them: kernels would read past their end."""
    counts = [(state.absmax, math.prod(state.shape), state.blocksize), (state.code, 16, 1)]
    if state.nested:
        of_scales = state.state2
        counts += [(of_scales.absmax, state.absmax.numel(), of_scales.blocksize)]
        counts += [(of_scales.code, 256, 1)]
    for tensor, numbers, block in counts:
        if tensor.numel() * block < numbers:
            raise ValueError(
                f"{tensor.numel()} scales or values where {-(-numbers // block)} are due"
            )


class FourBitTarget(LayerwiseTarget):
    """`bitsandbytes.nn.Linear4bit`."""

    def matches(self, module: nn.Module) -> bool:
        return _is(module, "Params4bit")

    def dequantize(self, module: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        packed: Any = module.weight
        if getattr(packed.quant_state, "packing_format_for_cpu", False):
            _restore(packed)
        data, state = packed.data, packed.quant_state
        _look_for_lost_scales(state)

        def vendors() -> Tensor:
            return dequantize_4bit(data, state)  # type: ignore[no-any-return]

        if not state.nested or data.shape[0] == 1:  # 1: an old layout, transposed
            return vendors()
        scales, of_scales = state.absmax, state.state2
        return one_kernel(
            _dequantize_4bit,
            *(data, scales, of_scales.code, of_scales.absmax, state.offset, state.code),
            static=(state.blocksize, of_scales.blocksize, tuple(state.shape), state.dtype),
            otherwise=vendors,
        )

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether `x` is on CUDA and holds few tokens. There is no kernel for rows of partial
        blocks."""
        state: Any = module.weight.quant_state  # type: ignore[union-attr]
        features = x.shape[-1]
        return x.is_cuda and x.numel() <= DECODING * features and features % state.blocksize == 0

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the vendor's product on CUDA, in the dtype of `x` whatever dtype the module is set
        to; on a CPU the vendor's forward as in training: in evaluation, where it computes in
        bfloat16, it lays the weight out anew and rounds its scales, for good."""
        if x.is_cuda:
            from bitsandbytes import matmul_4bit

            packed: Any = module.weight
            bias = None if module.bias is None else module.bias.to(x.dtype)  # type: ignore[operator]
            row = packed.data.reshape(1, -1)  # how versions before 0.50 want it
            product: Tensor = matmul_4bit(x, row, packed.quant_state, bias=bias)
            return product
        training = module.training
        try:
            output: Tensor = module.train()(x)
        finally:
            module.train(training)
        return output


class Int8Target(LayerwiseTarget):
    """`bitsandbytes.nn.Linear8bitLt`."""

    quantizes_activations = True
    straight_through = False
    """0.8 % of rounding a layer. The vendor's forward waits for the GPU and takes twice as long."""

    def matches(self, module: nn.Module) -> bool:
        return _is(module, "Int8Params")

    def dequantize(self, module: nn.Module) -> Tensor:
        vendor: Any = module
        codes, scale = vendor.weight.data, vendor.weight.SCB
        if scale is None:  # the first forward moves it
            scale = vendor.state.SCB
        return one_kernel(_dequantize_int8, codes, scale)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Round the activations, as in evaluation; a layer of a model that was training when it was
        quantized would not, on a CPU."""
        return super().forward(module.eval() if module.training else module, x)


def _restore(weight: Any) -> None:
    """Undo the layout that a vendor's forward on a CPU left a weight in. The vendor's own way back
    forgets the scales where they are not quantized themselves."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:
        state.absmax = scales


def _dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    code_of_scales: Tensor,
    scales_of_scales: Tensor,
    offset: Tensor,
    code: Tensor,
    block: int,
    block_of_scales: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """As bitsandbytes does with double quantization; the first of two weights is in the high bits
    of a byte."""
    import torch

    where = torch.arange(scales.numel(), device=scales.device) // block_of_scales
    absmax = code_of_scales[scales.int()] * scales_of_scales[where] + offset
    shifts = torch.arange(4, -1, -4, dtype=torch.uint8, device=packed.device)
    codes = (packed.view(torch.uint8).view(-1, 1) >> shifts) & 15
    return (code[codes.int()].view(-1, block) * absmax[:, None]).to(dtype).view(shape)


def _dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * (scale.view(-1, 1) / 127)


def _is(module: nn.Module, weight_class: str) -> bool:
    return type(getattr(module, "weight", None)).__name__ == weight_class


def _backend(name: str, summary: str, quantizer: type[Quantizer]) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        requires=("bitsandbytes>=0.48",),
        imports=("bitsandbytes",),
        extra="quantadapt[bitsandbytes]",
        merge=Merge.REQUANTIZE,
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        _backend("bnb-nf4", "bitsandbytes 4-bit NormalFloat, as in QLoRA", NF4),
        _backend("bnb-fp4", "bitsandbytes 4-bit float", FP4),
        _backend("bnb-int8", "bitsandbytes LLM.int8, int8 weights and activations", Int8),
    ]
