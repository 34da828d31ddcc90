"""AutoRound: rounding tuned by signed gradient descent, 2 to 8 bits
(https://arxiv.org/abs/2309.05516, https://github.com/intel/auto-round).

The library's own quantizer tunes one transformer block after the other; linear layers outside the
blocks stay dense, as they do there. The codes go into its PyTorch layer, and checkpoints are its
own: `auto_round:auto_gptq` where codes are symmetric, else `auto_round`. transformers loads ours,
and existing ones load here, if all their quantized layers have the same options. The exception is
`auto_round:auto_awq`, which the library writes for 4 asymmetric bits.

A single layer that is quantized again, for which there is no data, is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from quantadapt.capabilities import Merge, Rule
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import (
    LayerwiseQuantizer,
    LayerwiseTarget,
    UniformGrid,
    WordCodes,
    twin,
)
from quantadapt.records import Backend, Serving

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK = 32
"""Codes that are packed together along the inputs, and zero points along the outputs."""
DECODING = 128
"""Tokens up to which auto-round's Triton kernel beats dequantizing and a matrix product on CUDA."""
DENSE = {"bits": 16, "data_type": "float"}
"""What auto-round's configs say of a layer that stays dense."""
FORMATS = {True: ("auto_round:auto_gptq", "auto_round:gptq"), False: ("auto_round",)}
"""What the packing is called, by symmetry; the first name is the one that is written."""


class AutoRound(LayerwiseQuantizer):
    """Options of auto-round's `SignRoundConfig`."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    group_size: int | None = Field(
        128, ge=16, multiple_of=16, description="weights that share a scale; null: a whole row"
    )
    sym: bool = Field(True, description="symmetric codes, without zero points")
    iters: int = Field(200, ge=1, description="steps of signed gradient descent for each block")

    @cached_property
    def target(self) -> AutoRoundTarget:
        return AutoRoundTarget(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        for size, what in ((in_features, "inputs"), (out_features, "outputs")):
            if size % BLOCK:
                return f"auto-round packs {BLOCK} at a time: {BLOCK} does not divide {size} {what}"
        if self.group_size and in_features % self.group_size:
            return f"group_size {self.group_size} does not divide {in_features} inputs"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return self.bits + (self.bits + 16) / (self.group_size or in_features)

    @property
    def quantizes_experts(self) -> bool:
        return True

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: list[dict[str, Tensor]] | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        from quantadapt import loading
        from quantadapt.calibration.experts import close_experts, open_experts, round_experts
        from quantadapt_autoround.layers import packed
        from quantadapt_autoround.tuning import rows_of, tune

        model = source
        if isinstance(model, str):
            model = loading.from_pretrained(model, dtype=dtype)
        model.requires_grad_(False)
        loading.cast_parameters(model, dtype)
        skip = loading.skipped_modules(model, skip_modules)
        opened = open_experts(model, skip, self.misfit)
        names = {name for name, _ in loading.linear_layers(model, skip)}
        tuned = tune(self, model, names, rows_of(calibration or []), device)
        for name in sorted(names):
            linear: Any = model.get_submodule(name).to(device)
            # What is in no block, a head say, is rounded to nearest.
            found = tuned.get(name)
            vendor = packed(self, linear, *found) if found else self.quantize_linear(linear)
            loading.set_submodule(model, name, vendor.train(linear.training))
        close_experts(model, opened, lambda _, layers: self.join_rows(layers))
        round_experts(model, skip, self, device)
        loading.cast_parameters(model, dtype)
        return model.to(device)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from auto_round.data_type import QUANT_FUNC_WITH_DTYPE

        from quantadapt_autoround.layers import packed

        nearest = QUANT_FUNC_WITH_DTYPE["int_sym" if self.sym else "int_asym"]
        weight = linear.weight.detach().float()
        _, scales, zeros = nearest(weight, bits=self.bits, group_size=self.group_size or -1)
        return packed(self, linear, scales, zeros)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        import torch
        from torch import nn

        from quantadapt_autoround.layers import empty

        vendors: list[Any] = layers
        rows = sum(vendor.outfeatures for vendor in vendors)
        linear = nn.Linear(vendors[0].infeatures, rows, bias=False, device="meta")
        module = empty(self, linear)
        for name in ("qweight", "qzeros", "scales"):
            setattr(module, name, torch.cat([getattr(vendor, name) for vendor in vendors], 1))
        vendor: nn.Module = module
        return vendor

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_autoround.layers import empty

        module = empty(self, linear)
        for name in ("qweight", "qzeros", "scales"):
            setattr(module, name, state[name])
        if "bias" in state:
            module.bias = state["bias"].to(linear.weight.dtype)
        vendor: nn.Module = module
        return vendor

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "auto-round",
            "packing_format": FORMATS[self.sym][0],
            "data_type": "int",
            **self.model_dump(),
            "group_size": self.group_size or -1,
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"extra_config": dict.fromkeys(names, DENSE)}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> AutoRound | None:
        config = quantization_config
        bits, group_size = config.get("bits"), config.get("group_size")
        sym, others = bool(config.get("sym")), config.get("extra_config") or {}
        if (
            config.get("quant_method") != "auto-round"
            or config.get("packing_format") not in FORMATS[sym]
            or config.get("data_type", "int") != "int"
            or bits not in (2, 3, 4, 8)
            or any(other.get("bits", bits) < 16 for other in others.values())
        ):
            return None
        group_size = None if group_size == -1 else group_size
        try:
            return cls(bits=bits, group_size=group_size, sym=sym, iters=config.get("iters") or 200)
        except ValidationError:  # options that there are not here
            return None

    @classmethod
    def from_model(cls, model: nn.Module) -> AutoRound | None:
        from quantadapt_autoround.layers import is_autoround, zero_offset

        layers: list[Any] = [module for module in model.modules() if is_autoround(module)]
        if not layers:
            return None
        first = layers[0]
        whole = all(layer.group_size == layer.infeatures for layer in layers)
        return cls(
            bits=first.bits,
            group_size=None if whole else first.group_size,
            sym=bool(zero_offset(first)),
            iters=getattr(first, "iters", 200),
        )


class AutoRoundTarget(LayerwiseTarget):
    """`auto_round_extension.torch.qlinear_torch.QuantLinear`, and that in qlinear_torch_zp."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        from quantadapt_autoround.layers import is_autoround

        return is_autoround(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        vendor: Any = module
        return vendor.infeatures, vendor.outfeatures

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_autoround.layers import dequantized

        return dequantized(module)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from quantadapt_autoround.layers import dequantized_rows

        return dequantized_rows(module, first, last)

    def grid(self, module: nn.Module) -> UniformGrid:
        from quantadapt_autoround.layers import zeros_of

        vendor: Any = module
        scale = vendor.scales.t().contiguous()
        return UniformGrid(
            scale=scale,
            zero=zeros_of(vendor).contiguous(),
            group_size=vendor.infeatures // scale.shape[1],
            dtype=scale.dtype,
            lowest=0,
            highest=2**vendor.bits - 1,
        )

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from quantadapt_autoround.layers import pack_codes

        vendor: Any = module
        return twin(module, qweight=pack_codes(self.grid(module).codes(weight), vendor.bits))

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether auto-round's Triton kernel is there and the faster one for `x`."""
        from quantadapt_autoround.layers import has_kernel

        return x.numel() <= DECODING * x.shape[-1] and has_kernel(module, x)

    def word_codes(self, module: nn.Module) -> WordCodes:
        from quantadapt_autoround.layers import zero_offset

        vendor: Any = module
        return WordCodes(
            held=vendor.qweight,
            bits=vendor.bits,
            scale=vendor.scales,
            group_size=vendor.infeatures // len(vendor.scales),
            zeros=vendor.qzeros,
            zero=zero_offset(vendor),
        )

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run auto-round's Triton kernel where it runs, else the module's forward."""
        from quantadapt_autoround.layers import has_kernel, product

        output: Tensor = product(module, x) if has_kernel(module, x) else module(x)
        return output


@hookimpl
def quantadapt_backends() -> list[Backend]:
    no_zeros = Rule(
        "autoround-8bit-asym",
        {"backend.bits": (8,), "backend.sym": (False,)},
        "auto-round has no asymmetric codes of 8 bits",
        "use sym: true, or fewer bits",
    )
    return [
        Backend(
            name="autoround",
            summary="auto-round 2-8 bits, rounding tuned on calibration data",
            quantizer=AutoRound,
            requires=("auto-round>=0.16",),
            imports=("auto_round",),
            extra="quantadapt[auto-round]",
            calibration=True,
            merge=Merge.REQUANTIZE,
            serves=(Serving("vllm", "vllm>=0.9"),),
            rules=(no_zeros,),
        )
    ]
