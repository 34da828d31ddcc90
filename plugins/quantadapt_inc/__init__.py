"""Intel Neural Compressor: calibrated FP8 for weights and activations; integer weights by rounding
(RTN), GPTQ or AWQ (https://github.com/intel/neural-compressor).

On a Gaudi card (hpu) FP8 runs in the card's kernels. Elsewhere it is INC's QDQ mode, which rounds
weights and activations to FP8 and multiplies in the compute dtype. FP8 and RTN take any module;
GPTQ and AWQ want one stack of blocks, as decoders have.

INC has no FP8 for CUDA. What it makes on a CPU is plain PyTorch, which runs there; inputs are
looked at on the GPU, and one token is multiplied with the codes by a kernel of the core.

Checkpoints have INC's layout, as safetensors. Those of RTN and GPTQ, but for 3 bits, are GPTQ
checkpoints at the same time, for whoever reads these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from quantadapt.capabilities import KEEP, Merge, Rule
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt.records import Backend
from quantadapt_inc.config import fp8_details, in_blocks
from quantadapt_inc.layers import (
    MADE_BY,
    complete,
    inner,
    is_fp8,
    scaled_class,
    sizes,
    zero_points,
)
from quantadapt_inc.quantize import cast, replace_layers
from quantadapt_inc.target import INCTarget
from quantadapt_inc.vendor import home, running

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    Examples = list[dict[str, Tensor]]

OF_FP8: dict[str, Any] = {"fp8_format": "e4m3"}
OF_INTEGERS: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": True}
"""The options of fp8, and of the other methods, with their defaults."""


class INC(LayerwiseQuantizer):
    """fp8 rounds weights and activations; rtn, gptq and awq round weights. Stacks of experts are
    rounded without data by each of them, and what goes into them is not rounded."""

    method: Literal["fp8", "rtn", "gptq", "awq"] = Field(
        "fp8", description="fp8, or integer weights by rounding to nearest, GPTQ or AWQ"
    )
    fp8_format: Literal["e4m3", "e5m2"] | None = Field(
        None, validate_default=True, description="of fp8: e4m3 (default), or e5m2, wide and coarse"
    )
    bits: Literal[2, 3, 4, 8] | None = Field(
        None, validate_default=True, description="of rtn, gptq, awq: bits per weight; default 4"
    )
    group_size: int | None = Field(
        None,
        ge=8,
        validate_default=True,
        description="of rtn, gptq, awq: weights that share a scale; default 64",
    )
    symmetric: bool | None = Field(
        None, validate_default=True, description="of rtn, gptq, awq: no zero points; default true"
    )

    @field_validator(*OF_FP8, *OF_INTEGERS)
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        method, name = info.data.get("method"), str(info.field_name)
        own = OF_FP8 if method == "fp8" else OF_INTEGERS
        if value is not None and method and name not in own:
            raise ValueError(f"method {method} has no {name}")
        if value is False and info.data.get("bits") == 8:
            raise ValueError("INC overflows where 8 bits have zero points")
        return own.get(name) if value is None else value

    @cached_property
    def target(self) -> INCTarget:
        return INCTarget(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        if self.method == "awq" and self.group_size and in_features % self.group_size:
            return f"AWQ wants whole groups: {self.group_size} does not divide {in_features} inputs"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        if self.bits is None:  # fp8, one scale for the whole layer
            return 8
        packed = 32 / (32 // self.bits)  # whole codes in a word of int32: ten of 3 bits
        group = self.group_size or in_features
        return packed + (packed + 16) / group + 32 / out_features

    def notes(self, device: str) -> tuple[str, ...]:
        notes = []
        if self.method == "fp8" and not device.startswith("hpu"):
            notes += ["INC rounds to FP8 and multiplies in the compute dtype: no FP8 kernel here"]
        if device.startswith("cuda"):
            slow = ", which takes long" if self.method in ("gptq", "awq") else ""
            notes += [f"INC quantizes on the CPU{slow}; what it makes is used on the GPU"]
        return tuple(notes)

    # Quantizing --------------------------------------------------------------------------------

    @property
    def needs_data(self) -> bool:
        return self.method != "rtn"

    @property
    def quantizes_experts(self) -> bool:
        return True

    def quantize(
        self,
        source: str | nn.Module,
        *,
        device: str,
        dtype: torch.dtype,
        calibration: Examples | None = None,
        skip_modules: tuple[str, ...] | None = None,
    ) -> nn.Module:
        if self.method == "rtn":
            return super().quantize(source, device=device, dtype=dtype, skip_modules=skip_modules)
        import torch

        from quantadapt.calibration.experts import round_experts
        from quantadapt.loading import from_pretrained, linear_layers, skipped_modules

        wanted = torch.device(device)
        here = home(wanted)
        if isinstance(source, str):
            source = from_pretrained(source, dtype=dtype, device_map={"": here})
        skip = skipped_modules(source, skip_modules)
        names = [name for name, _ in linear_layers(source, skip)]
        model = cast(source.to(here), dtype)
        if self.method != "fp8":
            in_blocks(names, model, self.method)
            cast(model, torch.float32)
        replace_layers(self, model, names, self.method, dtype, calibration or [], wanted)
        round_experts(model, skip, self, device, f"INC's {self.method} knows linear layers alone")
        return cast(model, dtype)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Quantize a layer without data: integers by rounding, FP8 for inputs from -1 to 1."""
        import torch
        from torch import nn

        from quantadapt.loading import linear_of

        dtype = linear.weight.dtype
        method = "fp8" if self.method == "fp8" else "rtn"
        wanted = dtype if method == "fp8" else torch.float32
        weight = linear.weight.detach().to(wanted, copy=True)  # INC works in place
        bias = None if linear.bias is None else linear.bias.detach()
        alone = nn.Sequential(linear_of(weight, bias))
        ones = torch.ones_like(weight[:1])
        replace_layers(self, alone, ["0"], method, dtype, [{"input": ones}], weight.device)
        return alone[0]

    # Checkpoints -------------------------------------------------------------------------------

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        import torch

        from quantadapt.loading import linear_of

        dtype, device = linear.weight.dtype, next(iter(state.values())).device
        bias = next((v.to(dtype) for k, v in state.items() if k in ("bias", "linear.bias")), None)
        if self.method == "fp8":
            ones = torch.ones(linear.weight.shape, dtype=dtype, device=device)
            vendor = self.quantize_linear(linear_of(ones, bias))
        else:
            with running(device):
                from neural_compressor.torch.algorithms.weight_only import modules

                how = {"bits": self.bits, "group_size": self.group_size, "device": device}
                vendor = modules.INCWeightOnlyLinear(*sizes(linear), **how)
                if "input_scale" in state:
                    vendor = scaled_class()(vendor, state["input_scale"])
                complete(vendor, bias, self)
        if wrong := vendor.state_dict().keys() ^ state.keys():
            what = f"a layer has other tensors than this backend's: {', '.join(sorted(wrong))}"
            raise ModelError(what, fix="load it with neural_compressor.torch.quantization.load")
        vendor.load_state_dict(state)
        return vendor

    def save(self, model: nn.Module, path: Path) -> None:
        from transformers import PreTrainedModel

        from quantadapt.layerwise import save_layerwise

        config = self.quantization_config() | fp8_details(model)
        if isinstance(model, PreTrainedModel):
            described: Any = SimpleNamespace(
                quantization_config=lambda: config, left_dense=self.left_dense
            )
            return save_layerwise(described, model, path)
        from safetensors.torch import save_model

        save_model(model, str(path / "model.safetensors"))
        text = json.dumps(config, indent=2) + "\n"
        (path / "quantization_config.json").write_text(text, encoding="utf-8")
        return None

    def quantization_config(self) -> dict[str, Any]:
        if self.fp8_format:
            return {"quant_method": "inc", "mode": "LOAD", "fp8_config": self.fp8_format.upper()}
        is_gptq = self.method != "awq" and self.bits != 3
        return {
            "quant_method": "gptq" if is_gptq else "inc",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": False,
            "meta": {"quantizer": ["neural-compressor"], "method": self.method},
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        if self.fp8_format:
            return {}  # `fp8_details` names them
        left: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in names if name != head}
        return {"dynamic": left} if left else {}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> INC | None:
        config = quantization_config
        if "fp8_config" in config:
            return cls(fp8_format=config["fp8_config"].lower())
        meta = config.get("meta") or {}
        if "neural-compressor" not in meta.get("quantizer", ()):
            return None
        names = {"bits": "bits", "group_size": "group_size", "symmetric": "sym"}
        return cls(method=meta["method"], **{name: config[key] for name, key in names.items()})

    @classmethod
    def from_model(cls, model: nn.Module) -> INC | None:
        vendors = [module for module in model.modules() if cls().target.matches(module)]
        for vendor in vendors:
            if not hasattr(vendor, MADE_BY):  # INC made it without us
                complete(vendor, inner(vendor).bias, _guess(vendor))
        return getattr(vendors[0], MADE_BY) if vendors else None


def _guess(vendor: Any) -> INC:
    """Return the quantizer for a layer that was made elsewhere."""
    if is_fp8(vendor):
        return INC(fp8_format="e5m2" if "e5m2" in str(vendor.lp_dtype) else "e4m3")
    layer = inner(vendor)
    return INC(
        method="rtn" if layer is vendor else "awq",
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=bool((zero_points(layer) == 2 ** (layer.bits - 1)).all()),
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    never = Rule(
        "inc-merge-never",
        {"action": ("merge",)},
        "INC's scales are calibrated for the weights that they belong to, and not made again",
        f"{KEEP}, or merge onto the unquantized model (quantadapt merge RUN --onto MODEL)",
        policy=True,
    )
    return [
        Backend(
            name="inc",
            summary="Intel Neural Compressor: calibrated FP8; RTN, GPTQ and AWQ of 2-8 bits",
            quantizer=INC,
            requires=("neural-compressor>=3.10",),
            imports=("neural_compressor",),
            extra="quantadapt[inc]",
            devices=("cpu", "cuda", "hpu"),
            dtypes=("float32", "bfloat16"),
            calibration=True,
            merge=Merge.NEVER,
            rules=(never,),
        )
    ]
