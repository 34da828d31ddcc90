"""The one table of tolerances: by bits, by compute dtype, by whether activations are quantized.

All are relative (Frobenius norm of the difference over that of the reference) unless said.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class WeightTolerance:
    """What quantizing may do to a weight.

    Attributes:
        error: dequantized against original.
        scale: how far the least-squares slope of dequantized on original may be from 1; an
            unbiased quantizer has slope 1 whatever its error.
        again: error of quantizing a dequantized weight again.
        merged: error of quantizing a weight into which an adapter was merged.
    """

    error: float
    scale: float
    again: float
    merged: float


@dataclass(frozen=True)
class Tolerance:
    """Everything that one backend is measured with.

    Attributes:
        weight: by bits.
        forward: facade against `F.linear` with the dequantized weight, and merged against adapter
            model where both compute with the same weights.
        vendor: facade against the vendor's own forward.
        activations: merged against adapter model where the latter quantizes activations.
        gradient: of the input, against autograd through the dense layer.
        attach: change of the logits by attaching an adapter whose start is ROUNDING.
        low_precision: float32 against bfloat16 or autocast, of one layer's output.
    """

    weight: WeightTolerance
    forward: float
    vendor: float
    activations: float
    gradient: float
    attach: float
    low_precision: float


WEIGHTS = {
    1: WeightTolerance(error=1.2, scale=0.6, again=0.05, merged=1.5),
    2: WeightTolerance(error=0.55, scale=0.03, again=0.05, merged=0.7),
    3: WeightTolerance(error=0.25, scale=0.01, again=0.05, merged=0.35),
    4: WeightTolerance(error=0.15, scale=0.018, again=0.03, merged=0.2),
    8: WeightTolerance(error=0.03, scale=0.003, again=0.01, merged=0.04),
    16: WeightTolerance(error=0.0, scale=1e-6, again=0.0, merged=1e-6),
}
# Measured on the demo's first two layers, worst layer (torch 2.13, hqq 0.2.8, bitsandbytes 0.50,
# torchao 0.18), each with a margin of 15 to 40%:
#   bits  error                                               scale        again
#   1     hqq 1.1 (hqq only shifts its two levels)            0.55         2e-7
#   2     hqq 0.46, torchao 0.48                              0.012        0.0043
#   3     hqq 0.20, along axis 0 0.22, torchao 0.21           0.0027       0.0068
#   4     hqq 0.092, axis 0 0.11, nf4 0.095, fp4 0.13, torchao 0.096, nvfp4 0.088, mxfp4 0.114
#                                                             0.015 (mxfp4) 0.015 (hqq)
#   8     hqq 0.0054, bitsandbytes and torchao int8 0.0083, float8 0.026
#                                                             0.001 (fp8)  0.004 (torchao int8)
# `merged` is wider than `error`: sparse updates (waveft, 0.13 at 4 bits) leave outliers behind.

ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
# By compute dtype. float32: merges differ by 2e-7 to 7e-7, torchao's int8 kernel by 4e-7 from
# dequantize + GEMM. bfloat16: a few units in the last place (4e-3), some layers deep.

ACTIVATIONS = 3.0
# For each unit of the error of a layer, as a target declares it (`activation_error`, 1% by
# default). bitsandbytes int8: 0.8% a layer, 1.1% in the logits, 1.5% after merging; e4m3 by
# token: 2.7% a layer, 5.1% in the logits after merging experts.


STATIC_ACTIVATIONS = 7e-2
# With scales from calibration, for a whole tensor: INC's e4m3 3.3% a layer, e5m2 5.8%.

CALIBRATED = 2.0
# Quantizers that minimize the error of a layer's output leave more of it in the weights: gptq 0.18
# and autoround 0.02 off in scale at 4 bits.


def tolerance(
    bits: float, dtype: str, *, activation_error: float = 0.0, calibrates: bool = False
) -> Tolerance:
    """Return the tolerances for a backend.

    Args:
        bits: bits per weight; the entry for the next lower number in the table counts.
        dtype: torch's name of the compute dtype.
        activation_error: of a layer's output, where the vendor's forward quantizes activations.
        calibrates: whether the quantizer looks at data.
    """
    entry = max(n for n in WEIGHTS if n <= max(bits, 1))
    rounding = ROUNDING[dtype]
    coarse = max(ACTIVATIONS * activation_error, STATIC_ACTIVATIONS if calibrates else 0.0)
    activations = max(coarse, rounding) if activation_error else rounding
    weight = WEIGHTS[entry]
    if calibrates:
        weight = WeightTolerance(*(CALIBRATED * value for value in astuple(weight)))
    return Tolerance(
        weight=weight,
        forward=activations,
        vendor=rounding,
        activations=activations,
        gradient=rounding,
        attach=rounding,
        low_precision=ROUNDING["bfloat16"] + (activations if activation_error else 0.0),
    )
