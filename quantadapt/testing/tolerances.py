"""The one table of tolerances: by bits, by compute dtype, by whether activations are quantized.

All are relative (Frobenius norm of the difference over that of the reference) unless said.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightTolerance:
    """What quantizing may do to a weight.

    Attributes:
        error: dequantized against original.
        scale: how far the least-squares slope of dequantized on original may be from 1; an
            unbiased quantizer has slope 1 whatever its error.
        requantize: error of quantizing a dequantized weight again.
    """

    error: float
    scale: float
    requantize: float


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
    1: WeightTolerance(1.20, 0.30, 1.20),
    2: WeightTolerance(0.50, 0.20, 0.50),
    3: WeightTolerance(0.30, 0.05, 0.30),
    4: WeightTolerance(0.15, 0.03, 0.15),
    8: WeightTolerance(0.04, 0.01, 0.04),
    16: WeightTolerance(0.0, 1e-6, 0.0),
}

ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}


def tolerance(bits: float, dtype: str, quantizes_activations: bool = False) -> Tolerance:
    """Return the tolerances for a backend.

    Args:
        bits: bits per weight; the entry for the next lower number in the table counts.
        dtype: torch's name of the compute dtype.
        quantizes_activations: whether the vendor's forward quantizes those as well.
    """
    entry = max(n for n in WEIGHTS if n <= max(bits, 1))
    rounding = ROUNDING[dtype]
    activations = max(8e-2, rounding) if quantizes_activations else rounding
    return Tolerance(
        weight=WEIGHTS[entry],
        forward=activations,
        vendor=rounding,
        activations=activations,
        gradient=rounding,
        attach=rounding,
        low_precision=ROUNDING["bfloat16"] + (activations if quantizes_activations else 0.0),
    )
