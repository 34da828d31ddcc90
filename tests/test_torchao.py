"""torchao: which live models and checkpoints are adopted."""

from __future__ import annotations

import pytest
import torch
from quantadapt_torchao import Int4, Int8, Intx
from torch import nn
from torchao import quantization
from transformers import TorchAoConfig


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        (quantization.Int8WeightOnlyConfig(version=2), Int8()),
        (quantization.Int8DynamicActivationInt8WeightConfig(version=2), None),
        (
            quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
            ),
            Intx(group_size=32),
        ),
        (
            quantization.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
            ),
            None,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weight_only_models_are_adopted(config, quantizer) -> None:
    """Facades would leave out the rounding of activations that others were made with."""
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model, config)
    found = [kind.from_model(model) for kind in (Int8, Intx)]
    assert found == [quantizer if isinstance(quantizer, kind) else None for kind in (Int8, Intx)]
    if quantizer is None:
        assert Int4.from_model(model) is None


@pytest.mark.parametrize("size", [32, 4, None])
def test_groups_that_there_are_not_here(size) -> None:
    """Too small for an option, or a whole row."""
    grain = quantization.PerGroup(size) if size else quantization.PerAxis(0)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=grain)
    stored = TorchAoConfig(config).to_dict()
    found = [kind.from_checkpoint(stored) for kind in (Intx, Int4)]
    ours = [Intx(group_size=32), Int4(group_size=32, layout="unpacked")]
    assert found == (ours if size == 32 else [None, None])
    model = nn.Sequential(nn.Linear(24, 24))
    if size == 4:
        quantization.quantize_(model, config)
        assert [kind.from_model(model) for kind in (Intx, Int4)] == [None, None]
