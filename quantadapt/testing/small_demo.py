"""What the suites run on: a few layers of the demo model, and tokens of its data."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import demo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .bench import Bench

SEQUENCE = 24


@cache
def small_model(layers: int = 2) -> Path:
    """Return a checkpoint folder with the first layers of the demo; made once per process."""
    return Path(_small_model(layers).name)


@cache
def _small_model(layers: int) -> tempfile.TemporaryDirectory[str]:
    from transformers import AutoModelForCausalLM

    kept = tempfile.TemporaryDirectory(prefix="quantadapt-model-")
    source = _source()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(kept.name)
    for file in source.glob("*token*.json"):
        shutil.copy(file, kept.name)
    return kept


def _source() -> Path:
    return Path(os.environ.get("QUANTADAPT_TESTING_MODEL", demo.MODEL_DIR))


def biased(bench: Bench) -> nn.Module:
    """Return the dense model with random biases in every linear layer but the head."""
    import torch

    from ..loading.reading import from_pretrained

    dense: Any = bench.dense
    config = copy.deepcopy(dense.config)
    config.attention_bias = config.mlp_bias = True
    folder, device_map = str(bench.folder()), {"": bench.suite.device}
    made = type(dense)(config)
    made.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        if name.endswith(".bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    return from_pretrained(folder, dtype=bench.torch_dtype, device_map=device_map).eval()


@cache
def calibration_examples() -> list[dict[str, Tensor]]:
    """Return demo data to calibrate on: 24 examples of 64 tokens."""
    return [{"input_ids": row[None]} for row in demo_tokens(64).reshape(24, 64)]


@cache
def demo_tokens(rows: int = 4) -> Tensor:
    """Return tokens of the demo's instructions, [rows, SEQUENCE]."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    lines = demo.TRAIN_FILE.read_text(encoding="utf-8").splitlines()[: 8 * rows]
    records = [json.loads(line) for line in lines]
    text = "\n".join(f"{r['instruction']}\n{r['output']}" for r in records)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: rows * SEQUENCE]
    return torch.tensor(ids).reshape(rows, SEQUENCE)
