"""AQLM: additive quantization to about 2 bits, arXiv:2401.06118 (https://github.com/Vahe1994/AQLM).

The aqlm library runs AQLM models and cannot make them; `make` does. Checkpoints are
those that transformers (AqlmConfig) reads and the authors publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from quantadapt.capabilities import KEEP, Merge, Rule
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget
from quantadapt.records import Backend

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

SIZES = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
"""What a checkpoint says of its codes, and what transformers assumes where it does not."""
EFFORT = ("beam_size", "max_epochs", "steps_per_epoch", "init_max_iter", "relative_mse_tolerance")
MADE_WITH = "made_with"
DECODING = 128
"""Tokens up to which the library's kernels beat dequantizing and a matrix product on CUDA."""


class AQLM(LayerwiseQuantizer):
    """Codes take num_codebooks * nbits_per_codebook / (in_group_size * out_group_size) bits per
    weight, where a code of 1 to 7 bits is stored in 8, and one of 9 to 15 in 16; codebooks come
    on top, once per layer, and once for a stack of experts, which is fitted as a whole. 2x8 with
    groups of 8 suits small models and is quick to make and to run; from 1B parameters on, 1x16
    with groups of 8 is the most accurate."""

    num_codebooks: int = Field(2, ge=1, le=16, description="entries that are summed for a group")
    nbits_per_codebook: int = Field(
        8, ge=1, le=16, description="a codebook has 2**nbits entries; kernels exist for 8 and 16"
    )
    in_group_size: int = Field(8, ge=1, description="weights along in_features in a group")
    out_group_size: int = Field(1, ge=1, description="weights along out_features in a group")
    beam_size: int = Field(4, ge=1, description="codings kept per row while codes are searched")
    max_epochs: int = Field(10, ge=0, description="rounds of refining codebooks, searching codes")
    steps_per_epoch: int = Field(10, ge=1, description="conjugate gradient steps per refinement")
    init_max_iter: int = Field(20, ge=0, description="k-means iterations of the start")
    relative_mse_tolerance: float = Field(
        0.01, ge=0, lt=1, description="a round that gains less than this share is the last"
    )
    seed: int = Field(0, ge=0, description="of the k-means start")
    work_folder: str | None = Field(
        None,
        description="finished layers are kept here, so that a killed run goes on; null: "
        "$QUANTADAPT_CACHE/aqlm, or quantadapt/aqlm in the user's cache folder",
    )

    @cached_property
    def target(self) -> AQLMTarget:
        return AQLMTarget(self)

    @property
    def bits(self) -> float:
        """Bits per weight, without codebooks and scales."""
        group = self.in_group_size * self.out_group_size
        return self.num_codebooks * self.nbits_per_codebook / group

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        scale, group = 32 if dtype == "float32" else 16, self.in_group_size * self.out_group_size
        codes = self.num_codebooks * (8 if self.nbits_per_codebook <= 8 else 16) / group
        books = self.num_codebooks * (1 << self.nbits_per_codebook) * group * scale
        scales = scale / (in_features * self.out_group_size)
        return codes + books / (in_features * out_features) + scales

    def misfit(self, in_features: int, out_features: int) -> str | None:
        for size, features, what in (
            (self.in_group_size, in_features, "inputs"),
            (self.out_group_size, out_features, "outputs"),
        ):
            if features % size:
                return f"groups of {size} do not divide its {features} {what}"
        entries = self.num_codebooks * 2**self.nbits_per_codebook
        numbers = entries * self.in_group_size * self.out_group_size
        if numbers >= in_features * out_features:
            what = f"its codebooks would hold {numbers} numbers, as many as its weight or more"
            return f"{what}; 2 codebooks of 8 bits suit small layers"
        return None

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
        from quantadapt_aqlm.make import make

        shown = calibration or []
        return make(self, source, shown, device=device, dtype=dtype, skip=skip_modules)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Quantize one layer without data: its weight is approximated, and not its outputs."""
        from quantadapt_aqlm.make import fitted

        return self.load_linear(linear, fitted(self, linear))

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_aqlm.layers import Layer

        sizes = {name: getattr(self, name) for name in SIZES}
        return Layer.filled(linear, state, sizes, self)

    def save(self, model: nn.Module, path: Path) -> None:
        from quantadapt_aqlm.layers import as_stored

        layers = (getattr(module, "vendor", module) for module in model.modules())
        with as_stored([layer for layer in layers if _is_aqlm(layer)]):
            super().save(model, path)

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "aqlm",
            **{name: getattr(self, name) for name in SIZES},
            MADE_WITH: {name: getattr(self, name) for name in (*EFFORT, "seed")},
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        # transformers 4 looks for names of weights here, 5 for names of modules.
        dense = [full for name in names for full in (name, f"{name}.weight")]
        return {"linear_weights_not_to_quantize": dense}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> AQLM | None:
        if quantization_config.get("quant_method") != "aqlm":
            return None
        sizes = {name: quantization_config.get(name, default) for name, default in SIZES.items()}
        try:
            return cls(**sizes, **quantization_config.get(MADE_WITH, {}))
        except (ValidationError, TypeError) as error:
            what = f"the quantization_config is no AQLM one: {error}"
            raise ModelError(what, fix="download the checkpoint's config.json again") from None

    @classmethod
    def from_model(cls, model: nn.Module) -> AQLM | None:
        for module in model.modules():
            if _is_aqlm(module):
                found: AQLM | None = vars(module).get("made_with")
                return found or cls(**{name: getattr(module, name) for name in SIZES})
        return None


class AQLMTarget(LayerwiseTarget):
    """`aqlm.QuantizedLinear`."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return _is_aqlm(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_aqlm.layers import dequantize

        return dequantize(module)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from quantadapt_aqlm.layers import dequantize_rows

        return dequantize_rows(module, first, last)

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether one of the library's kernels is there and the faster one for `x`."""
        from quantadapt_aqlm.layers import vendor_product

        few = x.numel() <= DECODING * x.shape[-1]
        return few and x.is_cuda and vendor_product(module, x) is not None

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_aqlm.layers import run

        return run(module, x)


def _is_aqlm(module: nn.Module) -> bool:
    return any(kind.__module__ == "aqlm.inference" for kind in type(module).__mro__)


@hookimpl
def quantadapt_backends() -> list[Backend]:
    never = Rule(
        "aqlm-merge-never",
        {"action": ("merge",)},
        "AQLM codes are fitted to calibration data, and merged weights would need new ones",
        f"{KEEP}, or merge onto the unquantized model (quantadapt merge RUN --onto MODEL)",
        policy=True,
    )
    return [
        Backend(
            name="aqlm",
            summary="AQLM: additive quantization to about 2 bits, calibrated",
            quantizer=AQLM,
            requires=("aqlm>=1.1.7", "numba>=0.60"),
            imports=("aqlm",),
            extra="quantadapt[aqlm]",
            calibration=True,
            merge=Merge.NEVER,
            rules=(never,),
        )
    ]
