"""EETQ: symmetric int8 weights, one scale per output channel (https://github.com/NetEase-FuXi/EETQ).

The vendor's CUDA kernel runs where it is installed (the `eetq` package, or `kernels`, which fetches
it from the hub), the card is one that it supports, and the dtype is float16, for which it takes
whatever it is given. Anywhere else a reference kernel in PyTorch does the same arithmetic on the
same tensors. Before the vendor's kernel is used, it is compared with the reference once.

Checkpoints are transformers' own (EetqConfig): `weight` holds int8 codes as the vendor packs them
for its kernels, which is one layout for compute capability 7.5 to 8.9, and `weight_scales` float16.
They can be exchanged in both directions, with two limits:

- What EETQ packed on a Volta card (7.0) has another layout, which nothing in such a checkpoint
  tells; it is read wrongly, by transformers on a newer card too.
- The layout is made of tiles of 64 x 64, so other sizes are a misfit. Layers that stayed dense are
  listed as `modules_to_not_convert`, without which transformers would pack everything but the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantadapt.capabilities import Merge
from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.machine import this_machine
from quantadapt.protocols import (
    ByteCodes,
    LayerwiseQuantizer,
    LayerwiseTarget,
    UniformGrid,
    rows_of_units,
    twin,
)
from quantadapt.records import Backend

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]

TILE = 64
LAYOUT = "turing"
"""How the codes lie in a checkpoint of ours; transformers' say nothing and mean the same."""
HUB = "kernels-community/quantization-eetq"
DECODING = 64
"""Rows of activations up to which the vendor's kernel beats dequantizing and a matrix product."""


class EETQ(LayerwiseQuantizer):
    """No options: 8 bits, per channel."""

    @cached_property
    def target(self) -> EETQTarget:
        return EETQTarget(self)

    def stays_dense(self, model: nn.Module, skip_modules: tuple[str, ...]) -> tuple[str, ...]:
        from quantadapt.loading import not_converted

        return not_converted(model, skip_modules)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % TILE:
                return f"EETQ packs tiles of {TILE} x {TILE}: {TILE} does not divide {size} {what}"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 8 + 16 / in_features

    def notes(self, device: str) -> tuple[str, ...]:
        name, comment = _vendor_here(device)
        if name:
            return (f"in float16 EETQ decodes with the vendor's kernel ({name}){comment}",)
        return (f"EETQ computes with its reference kernel in PyTorch: {comment}",)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        if misfit := self.misfit(linear.in_features, linear.out_features):
            raise ModelError(misfit, fix="leave such layers dense: skip_misfits: true")
        codes, scales = quantize_rows(linear.weight.detach())
        vendor: nn.Module = _module_class()(pack(codes), scales.half(), linear.bias)
        return vendor

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        bias = state["bias"].to(linear.weight.dtype) if "bias" in state else None
        vendor: nn.Module = _module_class()(state["weight"], state["weight_scales"].half(), bias)
        return vendor

    def quantization_config(self) -> dict[str, Any]:
        from transformers import EetqConfig

        return {**EetqConfig().to_dict(), "layout": LAYOUT}

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"modules_to_not_convert": names}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> EETQ | None:
        config = quantization_config
        known = config.get("quant_method") == "eetq" and config.get("layout", LAYOUT) == LAYOUT
        return cls() if known else None

    @classmethod
    def from_model(cls, model: nn.Module) -> EETQ | None:
        return cls() if any(_is_eetq(module) for module in model.modules()) else None


class EETQTarget(LayerwiseTarget):
    """`EetqLinear`, ours or transformers'."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return _is_eetq(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = module.weight.shape  # type: ignore[union-attr, misc]
        return in_features, out_features

    def dequantize(self, module: nn.Module) -> Tensor:
        vendor: Any = module
        return one_kernel(dequantize, vendor.weight.data, vendor.weight_scales.data)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        vendor: Any = module
        columns, scales = self.shape(module)[0], vendor.weight_scales.data
        pairs = vendor.weight.data.reshape(-1, 2 * columns)  # two rows alternate

        def read(start: int, end: int) -> Tensor:
            packed = pairs[start // 2 : end // 2].reshape(columns, -1)
            return one_kernel(dequantize, packed, scales[start:end])

        return rows_of_units(first, last, 2, read)

    def grid(self, module: nn.Module) -> UniformGrid:
        import torch

        vendor: Any = module
        scale, columns = vendor.weight_scales.data.float()[:, None], self.shape(module)[0]
        return UniformGrid(
            scale=scale, group_size=columns, dtype=torch.float32, lowest=-128, highest=127
        )

    def byte_codes(self, module: nn.Module) -> ByteCodes:
        import torch

        vendor: Any = module
        (columns, rows), scale = self.shape(module), vendor.weight_scales.data[:, None]
        grid = UniformGrid(
            scale=scale, group_size=columns, dtype=torch.float32, lowest=-128, highest=127
        )
        held = vendor.weight.data.view(torch.uint8).view(rows, columns)
        return ByteCodes(held=held, grid=grid, zero=128, run=TILE)

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return `x` in the order of `pack`: of 16 neighbours, both halves alternate."""
        return x.unflatten(-1, (-1, 2, 8)).transpose(-1, -2).flatten(-3)  # type: ignore[no-untyped-call, no-any-return]

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        codes, vendor = self.grid(module).codes(weight).to(torch.int8), twin(module)
        vendor.weight = torch.nn.Parameter(pack(codes), requires_grad=False)
        repacked: nn.Module = vendor
        return repacked

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether the vendor's kernel is there and the faster one for `x`."""
        rows = x.numel() // x.shape[-1]
        return rows <= DECODING and _vendor_gemm(x.device, x.dtype) is not None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of the rows of `weight`, as the vendor computes them."""
    import torch

    weight = weight.float()
    scales = weight.abs().amax(1) / 128
    exact = weight / scales[:, None]
    whole = exact.trunc()
    rounded = whole + ((exact - whole).abs() >= 0.5) * exact.sign()  # C rounds halves away from 0
    rounded = rounded.nan_to_num(nan=127)  # a row of zeros: 0 / 0, which the vendor clamps to 127
    return rounded.clamp(-128, 127).to(torch.int8), scales


def pack(codes: Tensor) -> Tensor:
    """Return codes [out, in] as the vendor's kernels want them, as int8 of shape [in, out].

    Two rows alternate in runs of 64; within 16 neighbours, pairs are spread so that one load feeds
    the tensor cores; each byte holds code + 128.
    """
    rows, columns = codes.shape
    # pairs of rows, row of the pair, runs, sixteens, halves, pairs in a half, code in a pair
    split = codes.reshape(rows // 2, 2, columns // TILE, 4, 2, 4, 2)
    return split.permute(0, 2, 1, 3, 5, 6, 4).reshape(columns, rows) ^ -128


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`: int8 [in, out] as the vendor packs it to codes [out, in]."""
    columns, rows = packed.shape
    split = packed.reshape(rows // 2, columns // TILE, 2, 4, 4, 2, 2)
    return split.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns) ^ -128


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [out, in] in float32."""
    return unpack(packed) * scales.float()[:, None]


@cache
def _module_class() -> Any:
    import torch
    from torch import nn

    class EetqLinear(nn.Module):
        """Holds what transformers' EetqLinear holds, and computes on any device."""

        def __init__(self, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> None:
            super().__init__()
            self.in_features, self.out_features = weight.shape
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.weight_scales = nn.Parameter(weight_scales, requires_grad=False)
            self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            gemm = _vendor_gemm(x.device, x.dtype)
            if gemm is None or (x.requires_grad and torch.is_grad_enabled()):
                weight = dequantize(self.weight, self.weight_scales)
                return nn.functional.linear(x, weight.to(x.dtype), bias)
            rows = x.detach().reshape(-1, self.in_features).contiguous()
            output = gemm(rows, self.weight, self.weight_scales).view(*x.shape[:-1], -1)
            return output if bias is None else output + bias

    return EetqLinear


def _is_eetq(module: nn.Module) -> bool:
    return type(module).__name__ == "EetqLinear" and hasattr(module, "weight_scales")


def _vendor_here(device: str) -> tuple[str, str]:
    """Return the module that has the vendor's kernel, and a proviso; or "", and why there is none.

    Loads nothing: it is asked while planning.
    """
    kind, _, index = device.partition(":")
    cards = this_machine().cuda
    if kind != "cuda" or not cards:
        return "", "the vendor's needs a CUDA card"
    name = next((n for n in ("EETQ", "kernels") if find_spec(n)), "")
    if not name:
        return "", "the vendor's is not installed (build eetq from source, or install kernels)"
    if name == "kernels" and not _is_on_hub():
        return "", "the vendor's is not in the local cache, and the hub is off"
    capability = cards[int(index)] if index.isdigit() and int(index) < len(cards) else cards[0]
    card = "compute capability " + ".".join(map(str, capability))
    if capability < (7, 5):
        return "", f"the vendor's has another layout for {card}"
    if capability >= (9, 0):
        return name, f", if this build of it covers {card}, which released ones do not"
    return name, ""


def _is_on_hub() -> bool:
    """Say whether the hub's kernel can be had: online, or from the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    cached = Path(HF_HUB_CACHE).glob(f"*--{HUB.replace('/', '--')}")
    return not HF_HUB_OFFLINE or any(cached)


@cache
def _vendor_gemm(device: torch.device, dtype: torch.dtype) -> Gemm | None:
    """Return the vendor's kernel if it is here and agrees with the reference, else None."""
    import torch

    name = _vendor_here(str(device))[0] if dtype == torch.float16 else ""
    if not name:
        return None
    try:
        gemm = _import_gemm(name)
        return gemm if _agrees(gemm, device) else None
    except Exception:  # built for another card, or for another torch: the reference does as well
        return None


def _import_gemm(name: str) -> Gemm:
    if name == "EETQ":
        from EETQ import w8_a16_gemm
    else:
        from kernels import get_kernel

        w8_a16_gemm = get_kernel(HUB, version=1).w8_a16_gemm
    gemm: Gemm = w8_a16_gemm
    return gemm


def _agrees(gemm: Gemm, device: torch.device) -> bool:
    """Compare a small product of few and of many rows, which take different ways inside."""
    import torch

    generator = torch.Generator().manual_seed(0)
    codes, scales = quantize_rows(torch.randn(128, 256, generator=generator))
    x = torch.randn(128, 256, generator=generator).to(device).half()
    expected = x.float() @ (codes * scales.half().float()[:, None]).to(device).t()
    packed, scales = pack(codes).to(device), scales.half().to(device)
    for rows in (1, 128):
        error = gemm(x[:rows], packed, scales).float() - expected[:rows]
        if not error.norm() < 0.02 * expected[:rows].norm():
            return False
    return True


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name="eetq",
            summary="EETQ int8 per channel, the vendor's kernel or a reference in PyTorch",
            quantizer=EETQ,
            merge=Merge.REQUANTIZE,
        )
    ]
