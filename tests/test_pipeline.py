"""The stages one by one, as research code calls them, and whole runs that go wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from few_rows import few_rows

import quantadapt as qa
from quantadapt import demo
from quantadapt.cli.models import calibration_of
from quantadapt.errors import (
    DataError,
    MergeRefused,
    MissingDependency,
    ModelError,
    OutputError,
    PlanRefused,
    QuantadaptError,
    SpecError,
)
from quantadapt.evaluation.sizes import size_mib
from quantadapt.exporting import merging, saving
from quantadapt.facade import facades
from quantadapt.folders import atomic
from quantadapt.pipeline import run
from quantadapt.records import Backend
from quantadapt.registry import registry

FAST = {"max_steps": 6, "learning_rate": 4e-3, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The demo model cut to one layer, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("small")
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return str(folder)


def logits(model) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) + 100
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_lines_of_the_readme(small, tmp_path) -> None:
    model = qa.quantize(small, backend="hqq", bits=4)
    before = qa.evaluate(model, max_examples=16)["perplexity"]
    model = qa.attach(model, adapter="vera", r=64)
    result = qa.train(model, data=str(demo.TRAIN_FILE), **FAST | {"learning_rate": 3e-2})
    after = qa.evaluate(model, max_examples=16)["perplexity"]
    assert result.steps == 6
    assert after < 0.9 * before
    expected = logits(model)

    check = qa.merge(model, tmp_path)
    qa.save(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert check["kl"] < 1e-6
    assert check["top1"] > 0.99

    loaded = qa.load(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    merged = qa.load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_the_record_beside_the_adapter(small, tmp_path) -> None:
    model = qa.attach(qa.quantize(small, "hqq", bits=3), "lora", r=2)
    folder = qa.save(model, tmp_path)
    record = json.loads((folder / "quantadapt.json").read_text())
    assert record["base"] == small
    assert record["backend"] == "hqq"
    assert record["options"] == {"bits": 3, "group_size": 64, "axis": 1}
    assert record["versions"]["peft"]
    assert record["versions"]["hqq"]


def test_the_stages_take_paths_and_explain_mistakes(small, tmp_path) -> None:
    data = tmp_path / "a b.jsonl"
    data.write_text('{"text": "one two three four five six seven"}\n' * 20)
    model = qa.attach(qa.quantize(Path(small), "hqq"), "lora", r=2)
    assert qa.train(model, data, max_steps=1).steps == 1
    assert qa.evaluate(model, data)["tokens"] > 100
    with pytest.raises(SpecError, match="did you mean 'max_steps'"):
        qa.train(model, data, max_step=3)
    for wrong in (0, 1):
        with pytest.raises(SpecError, match=rf"data\.max_length: {wrong} is not possible"):
            qa.train(model, data, max_length=wrong)
        with pytest.raises(SpecError, match=rf"data\.max_length: {wrong} is not possible"):
            qa.evaluate(model, data, max_length=wrong)


def test_arguments_without_effect_are_refused(small, tmp_path) -> None:
    base = qa.quantize(small, "hqq", device="cpu")
    model = qa.attach(base, "lora", r=2)
    tokens = Dataset.from_dict({"input_ids": [[5] * 20] * 4, "completion_mask": [[1] * 20] * 4})
    for call in (
        lambda: qa.train(model, tokens, max_length=16, max_steps=1),
        lambda: qa.train(model, tokens, eval_data=tokens, eval_steps=1, max_length=16),
        lambda: qa.evaluate(model, tokens, max_length=16),
    ):
        with pytest.raises(QuantadaptError, match="max_length has no effect on a Dataset"):
            call()
    assert qa.evaluate(model, tokens)["tokens"] == 4 * 19
    qa.save(model, tmp_path)
    bare = qa.quantize(small, "hqq", device="cpu")
    with pytest.raises(QuantadaptError, match=r"device='cuda:1' has no effect: .* is, to cpu"):
        qa.load(tmp_path, base=bare, device="cuda:1")
    assert qa.load(tmp_path, base=bare, device="cpu").active_adapters == ["default"]
    qa.save(qa.quantize(small, "hqq"), tmp_path / "base")
    with pytest.raises(QuantadaptError, match=r"base has no effect: .* holds no adapter"):
        qa.load(tmp_path / "base", base=small)


def test_one_base_serves_one_adapter_at_a_time(small) -> None:
    model = qa.attach(qa.quantize(small, "hqq"), "lora", r=2)
    expected = logits(qa.attach(qa.quantize(small, "hqq"), "dora", r=2))
    with pytest.raises(PlanRefused, match=r"has an adapter already\n.*model = model\.unload\(\)"):
        qa.attach(model, "dora", r=2)
    again = qa.attach(model.unload(), "dora", r=2)
    assert again.quantadapt.adapter.name == "dora"
    assert torch.equal(logits(again), expected)


def test_a_base_that_is_elsewhere_is_named(small, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(Path(small).parent)
    model = qa.quantize(f"./{Path(small).name}", "hqq")
    qa.save(qa.attach(model, "lora", r=2), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"its base \./.* is not there, seen from"):
        qa.load("out")


def test_another_base_warns(small, tmp_path) -> None:
    qa.save(qa.attach(qa.quantize(small, "hqq"), "lora", r=2), tmp_path)
    with pytest.warns(qa.BaseMismatchWarning, match="'bits': 4.*now.*'bits': 3"):
        qa.load(tmp_path, base=qa.quantize(small, "hqq", bits=3))
    with pytest.warns(qa.BaseMismatchWarning, match="base: dtype 'float32', now 'bfloat16'$"):
        qa.load(tmp_path, base=qa.quantize(small, "hqq", dtype="bfloat16"))


def test_a_loaded_base_is_made_as_the_record_says(small, tmp_path) -> None:
    options = {"dtype": "bfloat16", "skip_modules": ["lm_head", "q_proj"], "bits": 3}
    model = qa.attach(qa.quantize(small, "hqq", **options), "lora", init_lora_weights=False)
    qa.save(model, tmp_path)
    loaded = qa.load(tmp_path)
    assert loaded.quantadapt.manifest() == model.quantadapt.manifest()
    assert [name for name, _ in facades(loaded)] == [name for name, _ in facades(model)]
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) > 0
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_a_merge_takes_all_layers_and_leaves_the_model_as_it_is(small) -> None:
    """Those without an adapter, one that is not quantized, and one that was trained whole."""
    options = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}
    base = qa.quantize(small, "hqq")
    without = logits(base)
    model = qa.attach(base, "lora", r=4, init_lora_weights=False, **options)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    expected = logits(model)
    merged = merging.merged_model(model, "dense")
    assert list(facades(merged)) == []
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert merged.quantadapt.tokenizer is model.quantadapt.tokenizer
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, without, atol=0.1)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(merging.bare_base(model)), without, rtol=0, atol=0)


def test_a_bias_of_the_adapter_is_merged_into_a_layer_that_is_quantized_again() -> None:
    base = qa.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "bnb-nf4")
    layer = qa.attach(base, "lora", r=4, lora_bias=True, target_modules=["0"]).base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].bias.copy_(torch.linspace(-1, 1, 64))
    merged = merging.merged_part("layer", layer, "requantize")
    added = layer.scaling["default"] * torch.linspace(-1, 1, 64)
    torch.testing.assert_close(merged.bias, layer.base_layer.bias + added)
    assert not merged.bias.requires_grad


def test_a_tied_weight_counts_once(small) -> None:
    model = qa.quantize(small, "none")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    assert size_mib(model) == pytest.approx(expected, rel=1e-3)


def test_experts_with_adapters_are_merged() -> None:
    """PEFT adapts the parameters of experts, too, with one layer around another."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        moe_intermediate_size=64, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=0, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    base = qa.quantize(DeepseekV3ForCausalLM(config), "hqq", device="cpu", dtype="float32").eval()
    ids = torch.arange(24)[None]
    before = base(ids).logits
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = {"r": 4, "init_lora_weights": False, "target_parameters": experts}
    model = qa.attach(base, "lora", **options).eval()
    expected = model(ids).logits
    assert {name for name, _ in model.named_parameters() if ".experts.base_layer.lora_A" in name}
    assert not torch.allclose(expected, before, atol=0.1)
    merged = merging.merged_model(model, "dense")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_a_merged_model_for_which_the_disk_is_too_small(small, tmp_path, monkeypatch) -> None:
    model = qa.attach(qa.quantize(small, "hqq"), "lora", r=2)
    monkeypatch.setattr(atomic, "free_space", lambda _: 1024)
    with pytest.raises(OutputError, match=r"MiB are needed, 1\.00 KiB are free"):
        qa.merge(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_requantized_merge_is_a_quantized_checkpoint(small, tmp_path) -> None:
    model = qa.attach(qa.quantize(small, "bnb-nf4"), "lora", r=4)
    qa.train(model, few_rows(), **FAST)
    check = qa.merge(model, tmp_path, kind="requantize")
    assert check["kl"] < 0.05
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    again = qa.load(tmp_path)
    assert again.quantadapt.backend.name == "bnb-nf4"
    assert len(list(facades(again))) == 7


def test_merge_refuses_with_one_exception_type(small, tmp_path) -> None:
    model = qa.attach(qa.quantize(small, "hqq"), "lily")
    with pytest.raises(MergeRefused) as caught:
        qa.merge(model, tmp_path)
    assert caught.value.problems[0].rule == "lily-no-merge"
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_to_merge_is_a_sentence(small, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merging, "merged_model", full)
    with pytest.raises(ModelError, match=r"too small to make a merged model.*\n.*--onto BASE"):
        qa.merge(qa.attach(qa.quantize(small, "hqq"), "lora", r=2), tmp_path)


def test_an_earlier_merge_is_found_before_the_work(small, tmp_path, monkeypatch) -> None:
    model = qa.attach(qa.quantize(small, "hqq"), "lora", r=2)
    qa.merge(model, tmp_path)
    monkeypatch.setattr(merging, "merged_model", lambda *_: pytest.fail("it was merged"))
    with pytest.raises(OutputError, match="the folder is not empty"):
        qa.merge(model, tmp_path)


def test_target_modules_that_match_nothing(small) -> None:
    with pytest.raises(qa.QuantadaptError, match=r"matches 'q_prj'.*\n.*did you mean 'q_proj'"):
        qa.attach(qa.quantize(small, "none"), "lora", target_modules=["q_prj"])
    with pytest.raises(qa.QuantadaptError, match="matches 'nothing"):
        qa.attach(qa.quantize(small, "none"), "lora", target_modules="nothing.*")


def test_an_encoder_decoder_trains(tmp_path) -> None:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=2048,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        pad_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path)
    model = qa.attach(qa.quantize(str(tmp_path), "hqq"), "lora", r=8)
    before = qa.evaluate(model, max_examples=16)["perplexity"]
    qa.train(model, few_rows(), **FAST | {"max_steps": 15, "learning_rate": 2e-2})
    assert qa.evaluate(model, max_examples=16)["perplexity"] < 0.8 * before


class TestRun:
    """Whole runs: what they leave, and what they leave alone."""

    def spec(self, small, tmp_path, **values) -> qa.Spec:
        defaults = {
            "model": small,
            "data": {"path": few_rows()},
            "output": str(tmp_path / "run"),
            "train": FAST,
            "evaluate": {"max_examples": 16, "samples": 1, "max_new_tokens": 8},
        }
        return qa.Spec(**defaults | values)

    def test_a_run_folder(self, small, tmp_path) -> None:
        stages = []
        result = qa.run(
            self.spec(small, tmp_path),
            listener=lambda event, data: event == "stage" and stages.append(data["name"]),
        )
        names = {p.name for p in (tmp_path / "run").iterdir()}
        assert {
            "spec.yaml",
            "plan.json",
            "metrics.json",
            "metrics.jsonl",
            "environment.json",
            "adapter",
            "merged",
            "report.html",
        } <= names
        found = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert found["perplexity"]["tuned"] < found["perplexity"]["quantized"]
        assert found["perplexity"]["merged"] == pytest.approx(
            found["perplexity"]["tuned"], rel=1e-4
        )
        assert found["merge"]["gain_kept"] == pytest.approx(1.0, abs=1e-3)
        assert found["size"]["quantized_mib"] < found["size"]["dense_mib"]
        assert result.metrics["train"]["steps"] == 6
        memory = result.metrics["train"]["memory"]
        assert (memory["layers"], memory["recomputed_layers"], memory["offload"]) == (1, 0, False)
        assert [s for i, s in enumerate(stages) if s not in stages[:i]] == [
            "plan",
            "evaluate",
            "quantize",
            "attach",
            "train",
            "export",
        ]
        with pytest.raises(PlanRefused, match="overwrite"):
            qa.run(self.spec(small, tmp_path))

    @pytest.mark.slow
    def test_the_spec_of_a_resumed_run_runs_again(self, small, tmp_path) -> None:
        evaluate = {"max_examples": 4, "samples": 0, "unquantized": False}
        values = {"backend": "none", "export": {"merge": "never"}, "evaluate": evaluate}
        qa.run(self.spec(small, tmp_path, **values))
        qa.run(self.spec(small, tmp_path, train=FAST | {"resume": True}, **values))
        assert not qa.Spec.load(tmp_path / "run" / "spec.yaml").train.resume

    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_losses(self, small, tmp_path) -> None:
        def losses(name: str) -> list[float]:
            qa.run(self.spec(small, tmp_path, output=str(tmp_path / name)))
            lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["loss"] for line in lines]

        first = losses("a")
        assert losses("b") == pytest.approx(first, rel=1e-6)

    def test_ctrl_c_during_export_leaves_no_half_adapter(
        self, small, tmp_path, monkeypatch
    ) -> None:
        def interrupted(folder: Path, state: object, **more: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(saving, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qa.run(self.spec(small, tmp_path))
        names = {p.name for p in (tmp_path / "run").iterdir()}
        assert "adapter" not in names
        assert not [name for name in names if name.endswith(".tmp")]
        state = json.loads((tmp_path / "run" / "quantadapt-run.json").read_text())["state"]
        assert state == "interrupted"

    def test_bad_data_is_told_before_the_folder_is_made(self, small, tmp_path) -> None:
        data = tmp_path / "bad.jsonl"
        data.write_text('{"text": "fine"}\n{"text": 3}\n')
        with pytest.raises(DataError, match=r"bad.jsonl:2"):
            qa.run(self.spec(small, tmp_path, data={"path": str(data)}))
        assert not (tmp_path / "run").exists()

    def test_a_foreign_folder_is_untouched(self, small, tmp_path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("years of work")
        with pytest.raises(PlanRefused, match="was not made by quantadapt"):
            qa.run(self.spec(small, tmp_path, overwrite=True))
        assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"

    def test_a_vendor_that_fails_to_import(self, small, tmp_path, monkeypatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
        with pytest.raises(MissingDependency, match=r"quantadapt\[hqq\]"):
            qa.run(self.spec(small, tmp_path))
        assert not (tmp_path / "run").exists()

    def test_a_vendor_that_is_not_installed(self, small, monkeypatch) -> None:
        real: Backend = registry().backend("hqq")
        backends = registry()._tables["backend"]
        missing = replace(real, requires=("surely-not-installed>=1",))
        monkeypatch.setitem(backends, "hqq", [replace(backends["hqq"][0], record=missing)])
        with pytest.raises(qa.QuantadaptError, match=r"pip install 'quantadapt\[hqq\]'"):
            qa.quantize(small, "hqq")


def test_nothing_to_load(tmp_path) -> None:
    with pytest.raises(ModelError, match="neither an adapter nor a model"):
        qa.load(tmp_path)


def test_a_model_from_elsewhere_is_told_apart() -> None:
    with pytest.raises(qa.QuantadaptError, match=r"call model = quantadapt.quantize"):
        qa.attach(torch.nn.Linear(4, 4))


def test_save_never_replaces_what_it_did_not_write(small, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="save did not write"):
        qa.save(qa.quantize(small, "hqq"), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_home_folder_is_as_safe(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    model = qa.quantize(small, "none")
    with pytest.raises(OutputError, match="save did not write"):
        qa.save(model, "~/thesis")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"
    assert qa.save(model, "~/model") == tmp_path / "model"
    torch.testing.assert_close(logits(qa.load("~/model")), logits(model), rtol=0, atol=0)


class TestTheBaseBesideAnAdapter:
    """`path/base` belongs to the adapter that was saved last."""

    def saved(self, small, path, adapter: str, bits: int) -> torch.Tensor:
        model = qa.attach(qa.quantize(small, "hqq", bits=bits), adapter, r=4)
        qa.save(model, path, overwrite=True)
        return logits(model)

    def test_a_calibrated_one_goes_along_as_it_is(self, small, tmp_path) -> None:
        model = qa.attach(qa.quantize(small, "hqq", bits=3), "lora", r=4)
        model.quantadapt.calibration = [{"input_ids": torch.arange(8)[None]}]
        qa.save(model, tmp_path)
        assert (tmp_path / "base" / "config.json").exists()
        loaded = qa.load(tmp_path)
        assert loaded.quantadapt.manifest() == model.quantadapt.manifest()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)

    def test_another_one_takes_its_place(self, small, tmp_path) -> None:
        self.saved(small, tmp_path, "pissa", bits=8)
        expected = self.saved(small, tmp_path, "pissa", bits=3)
        torch.testing.assert_close(logits(qa.load(tmp_path)), expected, rtol=0, atol=0)

    def test_an_adapter_without_one_does_not_get_that_of_the_last(self, small, tmp_path) -> None:
        self.saved(small, tmp_path, "pissa", bits=3)
        assert (tmp_path / "base").exists()
        expected = self.saved(small, tmp_path, "lora", bits=3)
        torch.testing.assert_close(logits(qa.load(tmp_path)), expected, rtol=0, atol=0)

    def test_a_calibrated_one_goes_along_when_it_was_loaded(self, small, tmp_path) -> None:
        self.saved(small, tmp_path, "lora", bits=3)
        loaded = qa.load(tmp_path)
        state = loaded.quantadapt
        state.backend = replace(state.backend, calibration=True)
        qa.save(loaded, tmp_path / "again", base=False)
        assert not (tmp_path / "again" / "base").exists()
        qa.save(loaded, tmp_path / "again", overwrite=True)
        assert (tmp_path / "again" / "base" / "config.json").exists()

    def test_one_that_loading_rewrites_goes_along(self, small, tmp_path) -> None:
        model = qa.attach(qa.quantize(small, "hqq", bits=3), "pissa", r=4)
        qa.save(model, tmp_path, base=False)
        again = qa.save(qa.load(tmp_path), tmp_path / "again")
        torch.testing.assert_close(logits(qa.load(again)), logits(model), rtol=0, atol=0)
        assert (tmp_path / "again" / "base").exists()

    @pytest.mark.parametrize("folder", ["adapter", "base"])
    def test_nothing_is_written_beside_or_over_a_foreign_one(self, folder, small, tmp_path) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match="save did not write"):
            self.saved(small, tmp_path, "pissa", bits=3)
        assert [path.name for path in tmp_path.rglob("*")] == [folder, "thesis.txt"]


def test_merging_calibrates_on_what_the_run_did(small, tmp_path, tokenizer) -> None:
    spec = qa.Spec(
        data={"calibration_path": str(demo.EVAL_FILE), "calibration_examples": 5, "max_length": 64}
    )
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    found = calibration_of(str(tmp_path), None, tokenizer)
    assert len(found) == 5
    assert max(example["input_ids"].numel() for example in found) == 64
    spec.data.calibration_path = None
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert len(calibration_of(str(tmp_path), None, tokenizer)) == 5
    assert calibration_of(str(tmp_path / "none"), None, tokenizer) is None


def test_an_unknown_optimizer_is_refused_before_any_work(small, tmp_path) -> None:
    spec = qa.Spec(model=small, output=str(tmp_path / "run"), train={"optim": "adamw_troch"})
    with pytest.raises(PlanRefused, match="did you mean 'adamw_torch'"):
        qa.run(spec)
    assert not (tmp_path / "run").exists()


def test_target_modules_are_looked_for_before_any_work(small, tmp_path) -> None:
    adapter = {"name": "lora", "target_modules": ["q_prj"]}
    train = {"lr_scheduler_type": "cosin"}
    spec = qa.Spec(model=small, output=str(tmp_path / "run"), adapter=adapter, train=train)
    with pytest.raises(PlanRefused, match="did you mean 'q_proj'") as caught:
        qa.run(spec)
    assert "did you mean 'cosine'?" in str(caught.value)
    assert not (tmp_path / "run").exists()


class FailsAfterStages:
    """A plugin whose hook is broken."""

    @qa.hookimpl
    def quantadapt_stage_done(self, stage):
        raise RuntimeError(f"no {stage} for me")


def test_a_plugin_that_fails_after_a_stage_does_not_cost_the_run(small, tmp_path) -> None:
    plugin, events = FailsAfterStages(), []
    registry().manager.register(plugin, "broken-hook")
    try:
        evaluate = {"max_examples": 2, "samples": 0, "unquantized": False}
        spec = qa.Spec(
            model=small, train={"max_steps": 1}, evaluate=evaluate, data={"path": few_rows()}
        )
        spec.output = str(tmp_path / "run")
        done = run(spec, listener=lambda event, data: events.append((event, data)))
    finally:
        registry().manager.unregister(plugin)
    assert (done.folder / "adapter" / "adapter_config.json").exists()
    notes = [data["text"] for event, data in events if event == "note"]
    assert any("'broken-hook' failed" in note and "no train for me" in note for note in notes)


def test_what_the_plan_noted_training_does_not_tell_again(small, tmp_path) -> None:
    told = []
    spec = qa.Spec(
        model=small,
        data={"path": str(demo.TRAIN_FILE), "eval_path": str(demo.EVAL_FILE)},
        train={"max_steps": 1, "stream": "all"},
        evaluate={"max_examples": 2, "samples": 0},
        output=str(tmp_path / "run"),
        device="cpu",
    )
    run(spec, listener=lambda event, data: told.append(data["text"] if event == "note" else ""))
    assert sum("train.stream has no effect here" in text for text in told) == 1
