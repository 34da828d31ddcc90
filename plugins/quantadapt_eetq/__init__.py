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

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantadapt.capabilities import Merge
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt.records import Backend
from quantadapt_eetq.target import EETQTarget, is_eetq
from quantadapt_eetq.tiles import TILE, pack, quantize_rows
from quantadapt_eetq.vendor import kernel_here

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYOUT = "turing"
"""How the codes lie in a checkpoint of ours; transformers' say nothing and mean the same."""


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
        name, comment = kernel_here(device)
        if name:
            return (f"in float16 EETQ decodes with the vendor's kernel ({name}){comment}",)
        return (f"EETQ computes with its reference kernel in PyTorch: {comment}",)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from quantadapt_eetq.layers import EetqLinear

        if misfit := self.misfit(linear.in_features, linear.out_features):
            raise ModelError(misfit, fix="leave such layers dense: skip_misfits: true")
        codes, scales = quantize_rows(linear.weight.detach())
        return EetqLinear(pack(codes), scales.half(), linear.bias)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_eetq.layers import EetqLinear

        bias = state["bias"].to(linear.weight.dtype) if "bias" in state else None
        return EetqLinear(state["weight"], state["weight_scales"].half(), bias)

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
        return cls() if any(is_eetq(module) for module in model.modules()) else None


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
