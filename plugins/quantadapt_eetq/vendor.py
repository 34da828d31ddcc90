"""The vendor's kernel: whether it is here, and whether it computes what the reference does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantadapt.machine import this_machine
from quantadapt_eetq.tiles import pack, quantize_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]

HUB = "kernels-community/quantization-eetq"


def kernel_here(device: str) -> tuple[str, str]:
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
def gemm_for(device: torch.device, dtype: torch.dtype) -> Gemm | None:
    """Return the vendor's kernel if it is here and agrees with the reference, else None."""
    import torch

    name = kernel_here(str(device))[0] if dtype == torch.float16 else ""
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
