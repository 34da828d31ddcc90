"""Layers that transformers' loaders of quantized checkpoints take for dense, as `wo` of T5, which
its class keeps in float32: they are left dense, so what is saved can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import logits, moved, relative, saved_model, stock
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import quantadapt as qa
from quantadapt.facade import facades
from quantadapt.loading import not_converted
from quantadapt.quantizing.dense import MostlyDenseWarning

BY_NAME = ("bnb-nf4", "bnb-fp4", "bnb-int8", "eetq")
"""Backends whose checkpoints transformers loads by the names of the layers."""


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    ids = {"eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=2048, **sizes, **ids))
    return saved_model(model, tmp_path_factory.mktemp("t5"))


def quantized(source: Any, backend: str, dtype: str = "float32") -> Any:
    with pytest.warns(MostlyDenseWarning, match=f"{backend} leaves 2 .*DenseReluDense.wo is"):
        return qa.quantize(source, backend, dtype=dtype)


@pytest.mark.parametrize("live", [False, True], ids=["checkpoint", "live"])
@pytest.mark.parametrize("backend", BY_NAME)
def test_what_is_saved_loads(backend, live, t5, tmp_path) -> None:
    base = quantized(stock(t5) if live else t5, backend)
    names = [name for name, _ in facades(base)]
    assert len(names) == 14
    assert not any(name.endswith("wo") for name in names)
    expected = logits(base)
    qa.save(base, tmp_path / "base")
    assert relative(logits(qa.load(tmp_path / "base")), expected) < 1e-6
    if backend.startswith("bnb") and backend != "bnb-int8":  # int8: other kernels round otherwise
        assert relative(logits(stock(tmp_path / "base")), expected) < 1e-5


@pytest.mark.parametrize("backend", BY_NAME)
def test_adapters_on_such_a_base(backend, t5, tmp_path) -> None:
    model = moved(qa.attach(quantized(t5, backend), r=4))
    expected = logits(model)
    qa.save(model, tmp_path / "run")
    again = qa.load(tmp_path / "run")
    assert relative(logits(again), expected) < 1e-6
    qa.merge(again, tmp_path / "dense", kind="dense")
    off = relative(logits(stock(tmp_path / "dense" / "merged")), expected)
    assert off < (0.2 if backend == "bnb-int8" else 1e-5)  # int8: its activations are rounded, too


def test_float16_stays_float32_where_the_class_says_so(t5) -> None:
    """Of a live model as of a checkpoint: beyond 65504 `wo` would overflow."""
    wanted = {
        name: p.dtype for name, p in _half(t5).named_parameters() if name.endswith(".wo.weight")
    }
    assert set(wanted.values()) == {torch.float32}
    for source in (t5, _half(t5)):
        model = quantized(source, "bnb-nf4", "float16")
        found = {name: p.dtype for name, p in model.named_parameters() if name in wanted}
        assert found == wanted


def _half(folder: str) -> nn.Module:
    model: nn.Module = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    return model


class Strict(T5ForConditionalGeneration):
    """Keeps other layers in float32, in bfloat16 too."""

    _keep_in_fp32_modules_strict = ("layer_norm", "SelfAttention.k")


def test_a_live_model_keeps_what_its_class_wants_in_float32_always(t5) -> None:
    model = quantized(Strict.from_pretrained(t5, dtype=torch.bfloat16), "bnb-nf4", "bfloat16")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    norms = {dtype for name, dtype in dtypes.items() if "layer_norm" in name}
    assert norms == {torch.float32}
    assert dtypes["shared.weight"] == torch.bfloat16


def test_a_name_that_ends_as_a_dense_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "block": nn.ModuleDict()})
    model["block"]["o_proj"] = nn.Linear(8, 8)
    model["block"]["up"] = nn.Linear(8, 8)
    assert not_converted(model, ("proj",)) == ("block.o_proj",)
    assert not_converted(model, ()) == ()
