"""nf4 and fp4: blocks of 64 weights with a scale each, which may be quantized itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from quantadapt.errors import ModelError
from quantadapt.protocols import CodebookGrid, LayerwiseTarget, twin
from quantadapt_bnb.base import BitsAndBytes, holds, on_default_stream
from quantadapt_bnb.packed import as_packed, dense, dense_rows, scales_of, with_codes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DECODING = 32
"""Tokens up to which the vendor's product with 4-bit weights beats dequantizing on CUDA."""


class _FourBit(BitsAndBytes):
    quant_type: ClassVar[str]

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
        import torch
        from bitsandbytes.nn import Params4bit

        packed = Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            quant_storage=getattr(torch, self.quant_storage),
        )
        with on_default_stream(linear.weight.device):
            packed = packed.to(linear.weight.device)
        return self._module(packed, linear.bias)

    def _module(self, packed: Any, bias: Any) -> nn.Module:
        """Return the vendor's layer around a packed weight."""
        from bitsandbytes.nn import Linear4bit

        state = packed.quant_state
        module: nn.Module = Linear4bit(
            *reversed(state.shape),
            bias=False,
            compute_dtype=state.dtype,
            compress_statistics=packed.compress_statistics,
            quant_type=packed.quant_type,
            quant_storage=packed.quant_storage,
            device="meta",
        )
        module.weight, module.bias = packed, bias
        return module

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        _check_nested(path)
        return super().load(path, device=device, dtype=dtype)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """transformers loads whole checkpoints; `load_state_dict` leaves out the scales."""
        from bitsandbytes.nn import Params4bit
        from torch import nn

        codes, stats = state["weight"].clone(), {**state}
        del stats["weight"]
        bias = stats.pop("bias", None)
        packed = Params4bit.from_prequantized(codes, stats, device=codes.device)
        found, wanted = tuple(packed.quant_state.shape), (linear.out_features, linear.in_features)
        if (packed.quant_type, found) != (self.quant_type, wanted):
            what = f"they are {packed.quant_type} of {found}, not {self.quant_type} of {wanted}"
            raise ModelError(what)
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        packed.module = module = self._module(packed, own)
        return module

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Join them; quantized scales become plain ones, as each layer has an offset of its own."""
        import torch
        from bitsandbytes.nn import Params4bit

        packed: list[Any] = [layer.weight for layer in layers]
        states = [weight.quant_state for weight in packed]
        first, rows = states[0], sum(state.shape[0] for state in states)
        if any(state.shape.numel() % state.blocksize for state in states):
            what = f"the last block of {first.blocksize} weights of an expert is not full"
            raise ModelError(what, fix="quantize the original model again")
        stats = {
            "absmax": torch.cat([scales_of(state) for state in states]),
            "quant_map": first.code,
            "blocksize": first.blocksize,
            "quant_type": first.quant_type,
            "dtype": str(first.dtype).removeprefix("torch."),
            "shape": (rows, first.shape[1]),
        }
        codes = torch.cat([weight.data.reshape(-1, 1) for weight in packed])
        joined = Params4bit.from_prequantized(codes, stats, device=codes.device)
        joined.module = module = self._module(joined, None)
        return module

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
        packed = [as_packed(m) for m in model.modules() if holds(m, "Params4bit")]
        if not packed or packed[0].quant_type != cls.quant_type:
            return None
        storage = str(packed[0].quant_storage).removeprefix("torch.")
        return cls(double_quant=packed[0].compress_statistics, quant_storage=storage)


class NF4(_FourBit):
    """4-bit NormalFloat."""

    quant_type = "nf4"


class FP4(_FourBit):
    """4-bit float."""

    quant_type = "fp4"


class FourBitTarget(LayerwiseTarget):
    """`bitsandbytes.nn.Linear4bit`."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return holds(module, "Params4bit")

    def dequantize(self, module: nn.Module) -> Tensor:
        return dense(as_packed(module))

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        rows = dense_rows(as_packed(module), first, last)
        return super().dequantize_rows(module, first, last) if rows is None else rows

    def grid(self, module: nn.Module) -> CodebookGrid | None:
        packed = as_packed(module)
        state = packed.quant_state
        if packed.data.shape[0] == 1:
            return None
        (rows, columns), size = state.shape, state.blocksize
        scales = scales_of(state)
        if columns % size == 0:
            scales = scales.view(rows, -1)
        else:  # blocks that go on in the next row become blocks of one weight
            scales, size = scales.repeat_interleave(size)[: rows * columns].view(rows, columns), 1
        return CodebookGrid(scale=scales, group_size=size, dtype=state.dtype, levels=state.code)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        grid = self.grid(module)
        assert grid is not None
        packed = with_codes(as_packed(module), grid.codes(weight))
        packed.module = made = twin(module, weight=packed)
        return made

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
        own: Any = module.bias
        bias = None if own is None else own.to(x.dtype)
        state: Any = module.weight.quant_state  # type: ignore[union-attr]
        if x.is_cuda:
            from bitsandbytes import matmul_4bit

            packed: Any = module.weight
            row = packed.data.reshape(1, -1)  # how versions before 0.50 want it
            product: Tensor = matmul_4bit(x, row, state, bias=bias)
            return product
        if x.shape[-1] % state.blocksize:
            from torch.nn import functional

            return functional.linear(x, self.dequantize(module).to(x.dtype), bias)
        training = module.training
        try:
            output: Tensor = module.train()(x)
        finally:
            module.train(training)
        return output


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
