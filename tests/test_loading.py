"""Quantize on load: one dense layer at a time, and checkpoints that other tools read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rows import few_rows
from merging import moved
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import ModelError, OutputError
from quantadapt.evaluation.sizes import size_mib
from quantadapt.facade import facades
from quantadapt.layerwise import quantize_layerwise
from quantadapt.loading import from_pretrained, skipped_modules
from quantadapt.testing.small_demo import small_model


@pytest.fixture(scope="module")
def small() -> str:
    return str(small_model())


def test_never_more_than_one_dense_layer(small, monkeypatch) -> None:
    """The peak is the quantized model, one layer and what was read ahead (test_read_ahead.py): all
    other layers are on the meta device."""
    from quantadapt_hqq import HQQ

    waiting: list[nn.Linear] = []
    dense_at_once = []
    real_init = nn.Linear.__init__

    def remember(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        real_init(self, *args, **kwargs)
        waiting.append(self)

    real = HQQ.quantize_linear

    def counted(self: HQQ, linear: nn.Linear) -> nn.Module:
        alive = [m for m in waiting if m.weight is not None and m.weight.device.type != "meta"]
        dense_at_once.append(len(alive))
        vendor = real(self, linear)
        waiting.remove(linear)
        return vendor

    monkeypatch.setattr(nn.Linear, "__init__", remember)
    monkeypatch.setattr(HQQ, "quantize_linear", counted)
    model = HQQ().quantize(small, device="cpu", dtype=torch.float32)
    assert len(dense_at_once) == 14
    assert max(dense_at_once) == 1
    assert not any(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(("skip", "left"), [("down_proj", 12), ("model.layers.1", 7)])
def test_skipped_modules_stay_dense(small, skip, left) -> None:
    model = qa.quantize(small, "hqq", skip_modules=["lm_head", skip])
    names = [name for name, _ in facades(model)]
    assert len(names) == left
    assert not any(f".{skip}." in f".{name}." for name in names)
    assert type(model.lm_head) is nn.Linear


def test_tied_weights_of_a_live_model_stay_tied(small) -> None:
    model = from_pretrained(small)
    model.lm_head.weight = model.model.embed_tokens.weight
    model = qa.quantize(model, "hqq", dtype="bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "backend", ["hqq", "bnb-nf4", "bnb-int8", "torchao-int8", "eetq", "quanto"]
)
def test_a_checkpoint_with_dense_layers_comes_back(small, backend, tmp_path) -> None:
    model = qa.quantize(small, backend, skip_modules=["lm_head", "up_proj"])
    loaded = qa.load(qa.save(model, tmp_path / "q"))
    assert [n for n, _ in facades(loaded)] == [n for n, _ in facades(model)]
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_the_head_is_skipped_by_default(small) -> None:
    model = from_pretrained(small)
    assert "lm_head" in skipped_modules(model, None)
    assert type(qa.quantize(small, "none").lm_head) is nn.Linear


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-int8", "torchao-int8", "torchao-fp8"])
def test_saved_checkpoints_load_in_plain_transformers(small, backend, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = qa.quantize(small, backend)
    qa.save(model, tmp_path / "q")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    if backend == "bnb-nf4":
        plain.train()  # in evaluation it computes in bfloat16, on CPUs that can
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_live_model_with_a_device_map_is_adopted(small) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    layers = {f"model.layers.{i}": "cpu" for i in range(2)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    live = AutoModelForCausalLM.from_pretrained(
        small,
        dtype=torch.float32,
        device_map=layers | rest | {"lm_head": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        expected = live.train()(ids).logits
        model = qa.quantize(live, "bnb-nf4")
        assert model.quantadapt.quantizer.double_quant is False
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_live_model_that_has_been_evaluated_is_adopted(small, double_quant) -> None:
    """On CPUs that compute in bfloat16, bitsandbytes lays weights out anew when it evaluates."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    live = AutoModelForCausalLM.from_pretrained(
        small, dtype=torch.float32, quantization_config=config
    )
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        expected = live.train()(ids).logits
        live.eval()(ids)
        model = qa.quantize(live, "bnb-nf4")
        saved = {n: t.ndim for n, t in model.state_dict().items() if n.endswith(".absmax")}
        found = model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    assert set(saved.values()) == {1}  # of a checkpoint, as they are before anything is computed


def test_a_truncated_checkpoint_is_a_sentence(small, tmp_path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((demo.MODEL_DIR / file).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be"):
        from_pretrained(str(tmp_path))


def test_a_pickle_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((demo.MODEL_DIR / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model.bin\)"):
        from_pretrained(str(tmp_path))


def test_biases_are_kept(tmp_path) -> None:
    """Their tensors arrive apart from the weights; T5 and GPT-2 like models have them."""
    from quantadapt_hqq import HQQ
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        attention_bias=True,
    )
    source = LlamaForCausalLM(config)
    bias = source.model.layers[0].self_attn.q_proj.bias
    nn.init.normal_(bias)
    source.save_pretrained(tmp_path)
    loaded = quantize_layerwise(HQQ(), str(tmp_path), device="cpu", dtype=torch.float32)
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.bias, bias)


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_buffers_that_no_file_holds_are_made(backend, tmp_path) -> None:
    """Up to transformers 5.23 GPT-J has one in the module whose layers are quantized."""
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 32}
    source = GPTJForCausalLM(GPTJConfig(vocab_size=64, **sizes))
    folder = tmp_path / "model"
    source.save_pretrained(folder)
    shutil.copytree(demo.MODEL_DIR, folder, dirs_exist_ok=True, ignore=_all_but_tokenizer)
    loaded = qa.quantize(str(folder), backend, device="cpu", dtype="float32")
    qa.save(loaded, tmp_path / "saved")
    wanted = dict(source.named_buffers())
    assert wanted
    for model in (loaded, qa.load(tmp_path / "saved", device="cpu")):
        found = dict(model.named_buffers())
        assert all(torch.equal(found[name], buffer) for name, buffer in wanted.items())


def _all_but_tokenizer(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("tokenizer")]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("hqq", {"bits": 3}),
        pytest.param("bnb-nf4", {"double_quant": False}, marks=pytest.mark.slow),
    ],
)
def test_a_quantized_checkpoint_on_the_hub_is_adopted(
    small, backend, options, tmp_path, monkeypatch
) -> None:
    """As it lies in the hub's cache after a download."""
    repository = tmp_path / "hub" / "models--org--packed"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = qa.quantize(small, backend, **options)
    qa.save(model, repository / "snapshots" / ("0" * 40))
    for module in ("huggingface_hub", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = qa.quantize("org/packed", backend).quantadapt.quantizer
    assert found.model_dump(include=set(options)) == options


def test_the_format_of_hqq_checkpoints(small, tmp_path) -> None:
    """hqq's own tensors in safetensors, and `quant_method: hqq`, as transformers 4 wrote them."""
    from safetensors import safe_open

    qa.save(qa.quantize(small, "hqq", bits=2), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "hqq"
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 2
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert {"model.layers.0.mlp.up_proj.W_q", "model.layers.0.mlp.up_proj.scale"} <= names


@pytest.mark.parametrize(
    ("backend", "bytes_per_weight"),
    [("none", 4), ("bnb-int8", 1), ("torchao-int8", 1), ("torchao-intx", 1), ("bnb-nf4", 0.5)],
)
def test_the_size_of_a_quantized_model(small, backend, bytes_per_weight) -> None:
    """Also where the weight is a tensor subclass made of several tensors."""
    model = qa.quantize(small, backend)
    weights = sum(f.in_features * f.out_features for _, f in facades(model))
    linear = [f"{name}." for name, _ in facades(model)]
    rest = sum(
        p.numel() * 4 for n, p in model.named_parameters() if not n.startswith(tuple(linear))
    )
    packed = size_mib(model) * 2**20 - rest
    assert 1.0 <= packed / (weights * bytes_per_weight) < 1.25


@pytest.mark.parametrize("backend", ["hqq", "quanto", "eetq"])
def test_layers_with_another_name_in_the_checkpoint_are_found(backend, tmp_path) -> None:
    """GPT-NeoX's head is `lm_head`, and `embed_out` in a checkpoint."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    made = qa.quantize(GPTNeoXForCausalLM(config), backend, dtype="float32", skip_modules=[])
    folder = qa.save(made, tmp_path / "saved")
    for file in small_model().glob("*token*"):
        shutil.copy(file, folder)
    loaded, ids = qa.load(folder), torch.arange(20)[None] + 5
    with torch.no_grad():
        expected = made.eval()(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)


def test_a_checkpoint_of_other_layers_is_refused(small, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder: Path = qa.save(qa.quantize(small, "hqq"), tmp_path / "saved")
    weights = load_file(folder / "model.safetensors")
    renamed = {key.replace("model.layers.", "blocks."): value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="none of this model's layers is quantized"):
        qa.load(folder)


@pytest.mark.slow
def test_attaching_and_loading_leave_the_process_as_it_was(small, tmp_path) -> None:
    """For VeRA, PEFT looks for layers of GPTQ, and so imports gptqmodel, which sets variables."""
    code = f"""
import logging, os
import quantadapt as qa
model = qa.quantize({small!r}, "hqq")
import peft, torchao, transformers
before = dict(os.environ), logging.getLogger().level, logging.getLogger().handlers[:]
qa.save(qa.attach(model, "vera"), {str(tmp_path)!r})
qa.load({str(tmp_path)!r})
after = dict(os.environ), logging.getLogger().level, logging.getLogger().handlers[:]
assert after == before, set(after[0].items()) ^ set(before[0].items())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Saving where it was loaded from ------------------------------------------------------------------

IDS = torch.arange(40).reshape(2, 20) + 100


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("live", [True, False])
def test_a_calibrated_base_survives_saving_over_itself(small, live, tmp_path) -> None:
    """Of a live module it lies there alone."""
    examples = [{"input_ids": torch.arange(60 * n, 60 * n + 60)[None]} for n in range(2)]
    source = from_pretrained(small) if live else small
    options = {"group_size": 32, "calibration": examples}
    model = moved(qa.attach(qa.quantize(source, "gptq", device="cpu", **options), "lora", r=2))
    qa.save(model, tmp_path)
    expected = logits(model)
    for folder in (tmp_path, tmp_path, tmp_path / "elsewhere"):
        loaded = qa.load(tmp_path, device="cpu")
        qa.save(loaded, folder, overwrite=True)
        assert torch.equal(logits(qa.load(folder, device="cpu")), expected)
    qa.save(qa.load(tmp_path, device="cpu"), tmp_path, base=False, overwrite=True)
    assert torch.equal(logits(qa.load(tmp_path, device="cpu")), expected)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_adapter_survives_saving_over_itself(small, start, tmp_path) -> None:
    model = moved(qa.attach(qa.quantize(small, "hqq"), "lora", r=2, init_lora_weights=start))
    qa.save(model, tmp_path)
    for _ in range(2):
        qa.save(qa.load(tmp_path), tmp_path, overwrite=True)
    assert torch.allclose(logits(qa.load(tmp_path)), logits(model), atol=1e-5)


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_a_base_survives_saving_over_itself(small, backend, tmp_path) -> None:
    model = qa.quantize(small, backend)
    qa.save(model, tmp_path / "q")
    with pytest.raises(OutputError):
        qa.save(qa.load(tmp_path / "q"), tmp_path / "q", overwrite=True)
    assert torch.equal(logits(qa.load(tmp_path / "q")), logits(model))


def test_a_model_is_not_written_over_the_one_that_it_was_made_from(small, tmp_path) -> None:
    dense = qa.save(qa.quantize(small, "none"), tmp_path / "dense")
    before = (dense / "model.safetensors").read_bytes()
    for backend in ("hqq", "none"):
        with pytest.raises(OutputError):
            qa.save(qa.quantize(str(dense), backend), dense, overwrite=True)
    assert (dense / "model.safetensors").read_bytes() == before
    # A base beside an adapter that was put onto it by hand: it is what `load` will want.
    base = qa.save(qa.quantize(small, "hqq"), tmp_path / "run" / "base")
    tuned = moved(qa.attach(qa.quantize(str(base), "hqq"), "lora", r=2))
    qa.save(tuned, tmp_path / "run", overwrite=True)
    assert torch.equal(logits(qa.load(tmp_path / "run")), logits(tuned))


def test_the_adapter_is_there_even_if_its_base_cannot_be_saved(small, tmp_path, monkeypatch):
    from quantadapt.exporting import saving

    model = qa.attach(qa.quantize(small, "hqq"), "lora", r=2, init_lora_weights="pissa")
    monkeypatch.setattr(saving, "save_base", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qa.save(model, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# Heads, and what a checkpoint is ------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend", ["none", "hqq", "bnb-nf4", "bnb-int8", "torchao-int8", "eetq", "quanto"]
)
def test_a_head_that_is_quantized_comes_back(backend, tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    model = qa.quantize(str(tmp_path / "source"), backend, skip_modules=[])
    names = [name for name, _ in facades(model)]
    assert "lm_head" in names
    loaded = qa.load(qa.save(model, tmp_path / "q"))
    assert [name for name, _ in facades(loaded)] == names
    assert torch.equal(logits(loaded), logits(model))
    tuned = moved(qa.attach(loaded, "lora", target_modules=["lm_head"]))
    qa.save(tuned, tmp_path / "tuned")
    assert torch.equal(logits(qa.load(tmp_path / "tuned")), logits(tuned))


def test_a_dense_head_of_a_quantized_checkpoint_is_not_quantized_by_a_merge(small, tmp_path):
    from quantadapt.exporting.merging import merged_model

    folder = qa.save(qa.quantize(small, "hqq", bits=8), tmp_path / "q")
    tuned = moved(qa.attach(qa.quantize(str(folder), "hqq"), "lora", r=2))
    assert "lm_head" in tuned.quantadapt.skip_modules
    merged = merged_model(tuned, "requantize")
    assert type(merged.lm_head) is nn.Linear


def test_a_checkpoint_without_a_tokenizer_is_loaded(small, tmp_path) -> None:
    from quantadapt.errors import QuantadaptError

    bare = tmp_path / "bare"
    shutil.copytree(small, bare, ignore=lambda _, names: [n for n in names if "token" in n])
    model = qa.quantize(str(bare), "hqq")
    assert model.quantadapt.tokenizer is None
    tuned = moved(qa.attach(model, "lora", r=2))
    qa.save(tuned, tmp_path / "tuned")
    assert torch.equal(logits(qa.load(tmp_path / "tuned")), logits(tuned))
    with pytest.raises(QuantadaptError, match="came without a tokenizer"):
        qa.train(tuned, few_rows(), max_steps=1)
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        qa.quantize(str(bare), "hqq")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["hqq", "quanto", "finegrained-fp8"])
def test_a_head_that_stays_dense_is_no_packed_layer(
    backend: str, dtype: str, tmp_path: Path
) -> None:
    """Its dtype says so, whichever a model computes in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    model = qa.quantize(str(tmp_path / "dense"), backend, dtype=dtype, device="cpu")
    qa.save(model, tmp_path / "base")
    again = qa.load(tmp_path / "base", device="cpu")
    assert type(again.lm_head) is torch.nn.Linear
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
