"""nf4 and fp4: blocks of 64 weights with a scale each, which may be quantized itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.protocols import CodebookGrid, LayerwiseTarget, twin
from quantadapt_bnb.base import BitsAndBytes, holds

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DECODING = 32
"""Tokens up to which the vendor's product with 4-bit weights beats dequantizing on CUDA."""


class _FourBit(BitsAndBytes):
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
            if holds(module, "Params4bit"):
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


class FourBitTarget(LayerwiseTarget):
    """`bitsandbytes.nn.Linear4bit`."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return holds(module, "Params4bit")

    def dequantize(self, module: nn.Module) -> Tensor:
        packed = _as_packed(module)
        data, state = packed.data, packed.quant_state
        _look_for_lost_scales(state)

        def vendors() -> Tensor:
            return _dequantized(data, state)

        if not state.nested or data.shape[0] == 1:  # 1: an old layout, transposed
            return vendors()
        scales, of_scales = state.absmax, state.state2
        return one_kernel(
            _dequantize_4bit,
            *(data, scales, of_scales.code, of_scales.absmax, state.offset, state.code),
            static=(state.blocksize, of_scales.blocksize, tuple(state.shape), state.dtype),
            otherwise=vendors,
        )

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        import torch
        from bitsandbytes.functional import QuantState

        packed = _as_packed(module)
        state, columns = packed.quant_state, packed.quant_state.shape[1]
        start, end, size = first * columns, last * columns, packed.quant_state.blocksize
        if start % size or end % size or packed.data.shape[0] == 1:
            return super().dequantize_rows(module, first, last)
        _look_for_lost_scales(state)
        own = QuantState(
            absmax=_scales(state)[start // size : end // size],
            shape=(last - first, columns),
            code=state.code,
            blocksize=size,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        codes = packed.data.view(torch.uint8).view(-1, 1)[start // 2 : end // 2]
        return _dequantized(codes, own)

    def grid(self, module: nn.Module) -> CodebookGrid | None:
        packed = _as_packed(module)
        state = packed.quant_state
        if packed.data.shape[0] == 1:
            return None
        (rows, columns), size = state.shape, state.blocksize
        scales = _scales(state)
        if columns % size == 0:
            scales = scales.view(rows, -1)
        else:  # blocks that go on in the next row become blocks of one weight
            scales, size = scales.repeat_interleave(size)[: rows * columns].view(rows, columns), 1
        return CodebookGrid(scale=scales, group_size=size, dtype=state.dtype, levels=state.code)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        grid, packed = self.grid(module), copy.copy(_as_packed(module))
        assert grid is not None
        codes = grid.codes(weight).to(torch.uint8).view(-1)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        bytes_ = packed.data.view(torch.uint8)
        both = codes.new_zeros(bytes_.numel())
        both[: codes.numel() // 2] = codes[::2] << 4 | codes[1::2]
        packed.data = both.view(bytes_.shape).view(packed.data.dtype)
        vendor = twin(module)
        vendor.weight = packed
        packed.module = vendor
        repacked: nn.Module = vendor
        return repacked

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
        import torch

        if x.is_cuda:
            from bitsandbytes import matmul_4bit

            packed: Any = module.weight
            own: Any = module.bias
            bias = None if own is None else own.to(x.dtype)
            row = packed.data.reshape(1, -1)  # how versions before 0.50 want it
            product: Tensor = matmul_4bit(x, row, packed.quant_state, bias=bias)
            return product
        held: Any = module
        if _misread(held.weight.quant_state):
            bias = None if held.bias is None else held.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.dequantize(module).to(x.dtype), bias)
        training = module.training
        try:
            output: Tensor = module.train()(x)
        finally:
            module.train(training)
        return output


def _as_packed(module: nn.Module) -> Any:
    """Return the weight in the layout of checkpoints, whatever a vendor's forward made of it."""
    packed: Any = module.weight
    if getattr(packed.quant_state, "packing_format_for_cpu", False):
        _restore(packed)
    return packed


def _scales(state: Any) -> Tensor:
    """Return the scales of 4-bit blocks in float32, of quantized ones the numbers that they are."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        scales: Tensor = state.absmax
        return scales
    plain: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return plain.float()


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


def _misread(state: Any) -> bool:
    """Say whether bitsandbytes' kernel for CPUs with AVX-512 takes wrong scales for a weight: it
    counts the blocks of each row for itself, and here they go on in the next row."""
    return bool(state.absmax.device.type == "cpu" and state.shape[-1] % state.blocksize)


def _dequantized(codes: Tensor, state: Any) -> Tensor:
    """Return what codes stand for: the vendor's product, of rows that are whole blocks."""
    from bitsandbytes.functional import dequantize_4bit

    if not _misread(state) or codes.shape[0] == 1:  # 1: an old layout, transposed
        return dequantize_4bit(codes, state)  # type: ignore[no-any-return]
    flat, size = copy.copy(state), math.prod(state.shape)
    flat.shape = (1, size) if size % state.blocksize else (size // state.blocksize, state.blocksize)
    found: Tensor = dequantize_4bit(codes, flat)
    return found.view(tuple(state.shape))


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
