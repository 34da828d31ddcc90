"""What the suites run on: a few layers of the demo model, and tokens of its data."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import demo

if TYPE_CHECKING:
    from torch import Tensor

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
    ids = tokenizer(text)["input_ids"][: rows * SEQUENCE]
    return torch.tensor(ids).reshape(rows, SEQUENCE)
