"""Merging onto the unquantized base: the same as PEFT in memory, shard by shard."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch as st
import torch
from parameters import slow_but
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.errors import MergeRefused, ModelError
from quantadapt.exporting.stored import open_stored
from quantadapt.loading import from_pretrained
from quantadapt.loading.tensors import Checkpoint
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model

IDS = torch.arange(48).reshape(2, 24) + 100


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> str:
    """The small model in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    from_pretrained(str(small_model())).save_pretrained(folder, max_shard_size="1MB")
    for file in small_model().glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(list(folder.glob("*.safetensors"))) > 3
    return str(folder)


def perturbed(adapter: str, **options) -> torch.nn.Module:
    """A model with an adapter whose parameters all have moved."""
    model = qa.attach(qa.quantize(str(small_model()), "hqq", bits=3), adapter, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def mergeable() -> list[str]:
    adapters = registry().adapters()
    refused = {r.when["adapter"][0] for a in adapters for r in a.rules if "adapter" in r.when}
    return [a.name for a in adapters if a.merge and a.name not in refused and a.name != "loftq"]


@pytest.mark.parametrize(
    "adapter", slow_but(mergeable(), "lora", "dora", "vera", "ia3", "pissa", "loha", "oft")
)
def test_it_is_what_peft_does_in_memory(sharded, adapter, tmp_path) -> None:
    model = perturbed(adapter)
    saved = qa.save(model, tmp_path)
    found = qa.merge_onto(saved, sharded, tmp_path, check=False)
    assert found["layers"] == 14
    dense = from_pretrained(sharded)
    before = logits(dense)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(dense), str(saved)))
    merged = logits(qa.load(tmp_path / "merged"))
    moved = relative(expected, before)
    assert moved > 5e-5
    assert relative(merged, expected) < 0.01 * moved


def test_the_result_has_the_shards_of_the_base(sharded, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = qa.merge_onto(perturbed("lora"), sharded, tmp_path)
    merged = Checkpoint(str(tmp_path / "merged"))
    assert merged.files == Checkpoint(sharded).files
    assert merged.size == pytest.approx(Checkpoint(sharded).size, rel=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert logits(plain).isfinite().all()
    assert found["kl"] < 1e-7
    assert json.loads((tmp_path / "merged" / "quantadapt.json").read_text())["base"] == sharded
    assert found["top1"] == 1.0
    assert found["perplexity_merged"] == pytest.approx(found["perplexity_adapter"], rel=1e-5)


def test_memory_is_one_shard(sharded, tmp_path, monkeypatch) -> None:
    """What is read and merged before a file is written fits into that file."""
    saved = qa.save(perturbed("lora"), tmp_path)
    peaks = []
    write = st.save_file

    def written(tensors, path, **kwargs):
        peaks.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        write(tensors, path, **kwargs)

    monkeypatch.setattr(st, "save_file", written)
    qa.merge_onto(saved, sharded, tmp_path, check=False)
    assert len(peaks) == len(list(Checkpoint(sharded).shards()))
    assert max(peaks) < Checkpoint(sharded).size / 3


def test_a_stored_model_runs_and_holds_no_layer(sharded) -> None:
    model = open_stored(sharded, dtype=torch.float32)
    held = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert held == 0
    assert relative(logits(model), logits(from_pretrained(sharded))) < 1e-6


def test_modules_that_were_trained_whole_are_written(sharded, tmp_path) -> None:
    model = perturbed("lora", modules_to_save=["norm"])
    qa.merge_onto(model, sharded, tmp_path, check=False)
    merged = Checkpoint(str(tmp_path / "merged"))
    trained = model.base_model.model.model.norm.modules_to_save["default"].weight
    assert torch.equal(merged.read("model.norm.weight"), trained.detach())


def test_biases_are_merged_beside_their_weights(tmp_path) -> None:
    """Also where the base has a bias in the next file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2048, num_attention_heads=2, attention_bias=True, **sizes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base", max_shard_size=64 * 64 * 4 + 100)
    for file in small_model().glob("*token*.json"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    base = str(tmp_path / "base")
    files = Checkpoint(base).files
    assert (
        files["model.layers.0.self_attn.q_proj.weight"]
        != files["model.layers.0.self_attn.q_proj.bias"]
    )
    tuned = qa.attach(
        qa.quantize(base, "hqq"), "lora", lora_bias=True, init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    saved = qa.save(tuned, tmp_path)
    qa.merge_onto(saved, base, tmp_path, check=False)
    expected = logits(PeftModel.from_pretrained(from_pretrained(base), str(saved)))
    torch.testing.assert_close(logits(qa.load(tmp_path / "merged")), expected)
    merged = Checkpoint(str(tmp_path / "merged"))
    assert {merged.read(key).numel() > 0 for key in merged.files} == {True}  # where the index says
    assert relative(expected, logits(from_pretrained(base))) > 0.1


def test_bfloat16_bases_stay_bfloat16(tmp_path) -> None:
    from_pretrained(str(small_model()), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    qa.merge_onto(perturbed("lora"), str(tmp_path / "base"), tmp_path, check=False)
    merged = Checkpoint(str(tmp_path / "merged"))
    assert {merged.read(key).dtype for key in merged.files} == {torch.bfloat16}


def test_refusals(sharded, tmp_path) -> None:
    with pytest.raises(MergeRefused, match="depends on the input"):
        qa.merge_onto(perturbed("lily"), sharded, tmp_path)
    with pytest.raises(MergeRefused, match="what quantization took away"):
        qa.merge_onto(perturbed("loftq"), sharded, tmp_path)
    adapter = perturbed("lora")
    quantized = qa.save(qa.quantize(str(small_model()), "bnb-nf4"), tmp_path / "nf4")
    with pytest.raises(MergeRefused, match="is quantized itself, with bitsandbytes"):
        qa.merge_onto(adapter, str(quantized), tmp_path)
    config = json.loads((small_model() / "config.json").read_text())
    other = type(from_pretrained(str(small_model())).config)(**{**config, "hidden_size": 128})
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(MergeRefused, match="is not what the adapter's base was made from"):
        qa.merge_onto(adapter, str(tmp_path / "other"), tmp_path)
    with pytest.raises(ModelError, match="does not fit this base"):
        qa.merge_onto(adapter, str(tmp_path / "other"), tmp_path, force_base=True)
    assert not (tmp_path / "merged").exists()


def test_the_command(sharded, tmp_path, capsys) -> None:
    from quantadapt.cli import main

    saved = qa.save(perturbed("dora"), tmp_path / "run").parent
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(saved), "--onto", sharded, "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["layers"]) == ("onto", 14)
    assert found["kl"] < 1e-7
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(saved), "--onto", "./nowhere"])
    assert ended.value.code == 2
