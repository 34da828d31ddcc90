"""Folders for vLLM, read here by stock transformers and PEFT; vLLM itself cannot run here.

The script that compares vLLM's answers runs against a stand-in of vLLM's interface. Models of
transformers are in train mode: in eval mode bitsandbytes computes in bfloat16 on CPUs that can.
"""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import moved
from peft import PeftModel
from test_gguf import command, tuned
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.errors import ModelError, PlanRefused
from quantadapt.exporting.tuned import Tuned
from quantadapt.planning.exports import export_of
from quantadapt.testing.small_demo import small_model

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "serving.py"
IDS = torch.arange(3, 40)[None]
STAND_IN = '''
"""vLLM's interface as far as the script uses it, by transformers and PEFT."""
from types import SimpleNamespace

import torch


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(
        self, model, dtype, enforce_eager, gpu_memory_utilization, enable_lora=False,
        max_lora_rank=0,
    ):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
        self.max_lora_rank = max_lora_rank

    def generate(self, prompts, wanted, lora_request=None):
        model = self.model
        if lora_request is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, lora_request.path).train()
            assert model.peft_config["default"].r <= self.max_lora_rank
        each = wanted if isinstance(wanted, list) else [wanted] * len(prompts)
        told = (prompt["prompt_token_ids"] for prompt in prompts)
        return [self.told(model, ids, how) for ids, how in zip(told, each, strict=True)]

    def told(self, model, ids, wanted):
        assert wanted.max_tokens == 1
        if hasattr(wanted, "prompt_logprobs"):  # vLLM has none with an adapter
            assert not hasattr(model, "peft_config")
            return self.answer(model, ids)
        assert wanted.logprobs == 1
        last = self.answer(model, [*ids, *wanted.allowed_token_ids]).prompt_logprobs[-1]
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[last])])

    def answer(self, model, ids):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found = [None]
        for place, token in enumerate(ids[1:]):
            row = scores[place]
            rank = lambda t: int((row > row[t]).sum()) + 1
            tokens = {token, int(row.argmax())}
            found.append({t: SimpleNamespace(logprob=float(row[t]), rank=rank(t)) for t in tokens})
        return SimpleNamespace(prompt_logprobs=found)
'''
REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.path = path
"""


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys) -> Any:
    """Run the script on a folder; return what it printed and how it ended."""
    package = tmp_path / "there" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "lora" / "__init__.py").write_text("")
    (package / "lora" / "request.py").write_text(REQUEST)

    monkeypatch.syspath_prepend(package.parent)

    def run(folder: Path) -> tuple[dict[str, float], int]:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr("sys.argv", [str(SCRIPT), str(folder)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return json.loads(capsys.readouterr().out.splitlines()[-1]), code

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def export(run: Path, content: str) -> Path:
    wanted = ["--set", f"content={content}", "--set", "examples=2", "-o", run.parent]
    assert command("export", run, "vllm", *wanted) == 0
    return run.parent / "vllm"


def test_the_adapter_beside_its_quantized_base(tmp_path, compared) -> None:
    run = tuned(tmp_path / "run", backend="bnb-nf4", rank_pattern={"down_proj": 12})
    with torch.no_grad():
        expected = qa.load(run, device="cpu").eval()(IDS).logits
    folder = export(run, "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert base.config.quantization_config.bnb_4bit_quant_type == "nf4"
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, folder / "adapter").train()(IDS).logits
    assert torch.allclose(found.float(), expected, atol=1e-3)
    text = (folder / "README.md").read_text()
    serve = "vllm serve base --dtype bfloat16 --enable-lora --max-lora-rank 16 "
    assert serve + "--lora-modules tuned=adapter" in text
    assert "It needs vllm-bnb-plugin from vLLM 0.28 on." in text
    for file in folder.glob("*/*.json"):
        assert str(small_model()) not in file.read_text()
    figures, code = compared(folder)
    assert code == 0
    assert figures["mean_apart"] < 1e-3
    assert figures["same_first_choice"] > 0.99


def test_the_merged_checkpoint_and_what_is_not_it(tmp_path, compared) -> None:
    folder = export(tuned(tmp_path / "run", backend="bnb-nf4"), "merged")
    text = (folder / "README.md").read_text()
    assert "\nvllm serve . --dtype bfloat16 --served-model-name tuned\n" in text
    assert "/v1/completions " in text  # it has no chat template
    assert """-d '{"model": "tuned", "prompt": "Hello"}'\n""" in text
    assert "It needs" not in text
    figures, code = compared(folder)
    assert code == 0
    assert figures["mean_apart"] < 1e-3
    noted = json.loads((folder / "expected.json").read_text())
    noted["examples"][0]["logprobs"] = [value - 0.3 for value in noted["examples"][0]["logprobs"]]
    (folder / "expected.json").write_text(json.dumps(noted))
    figures, code = compared(folder)
    assert code == 1
    assert 0.05 < figures["mean_apart"] < 0.31


def test_what_was_quantized_again_is_compared_with_itself(tmp_path, compared) -> None:
    """Not with the tuned model, which is rounding away from it."""
    run = tuned(tmp_path / "run", backend="bnb-nf4")
    folder = export(run, "requantized")
    figures, code = compared(folder)
    assert code == 0
    assert figures["mean_apart"] < 1e-3
    ids = torch.tensor(
        [json.loads((folder / "expected.json").read_text())["examples"][0]["tokens"]]
    )
    with torch.no_grad():
        before, after = (
            model.train()(ids).logits.log_softmax(-1)
            for model in (qa.load(run, device="cpu"), AutoModelForCausalLM.from_pretrained(folder))
        )
    assert (before - after).abs().mean() > 0.02


def test_what_the_script_lacks_is_a_sentence(tmp_path) -> None:
    (tmp_path / "vllm.py").touch()
    for path, says in (("", "vLLM is not installed"), (tmp_path, "has no expected.json")):
        given = [sys.executable, SCRIPT, tmp_path]
        environment = {**os.environ, "PYTHONPATH": str(path)}
        found = subprocess.run(given, capture_output=True, text=True, env=environment, check=False)
        assert found.returncode == 2
        assert says in found.stderr.splitlines()[-1]
        assert "Traceback" not in found.stderr


def test_what_asks_llama_cpp_tells_what_it_lacks(tmp_path) -> None:
    given = [sys.executable, "-S", SCRIPT.with_name("llamacpp.py"), tmp_path]
    found = subprocess.run(given, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "llama.cpp is not installed" in found.stderr.splitlines()[-1]


def test_the_adapter_beside_a_dense_base(tmp_path, compared) -> None:
    folder = export(tuned(tmp_path / "run", backend="none"), "adapter")
    figures, code = compared(folder)
    assert code == 0
    assert figures["mean_apart"] < 1e-4
    assert "It needs" not in (folder / "README.md").read_text()


@pytest.mark.slow
def test_quantized_again_as_the_base_was(tmp_path) -> None:
    folder = export(tuned(tmp_path / "run", backend="bnb-nf4"), "requantized")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.quantization_config.load_in_4bit


@pytest.mark.parametrize(
    ("backend", "adapter", "content", "why"),
    [
        ("hqq", "lora", "requantized", "vLLM reads no checkpoints of hqq.*\n.*content=merged"),
        ("hqq", "lora", "adapter", "vLLM reads no checkpoints of hqq"),
        ("autoround", "lora", "adapter", "no adapters on layers of autoround"),
        ("bnb-nf4", "dora", "adapter", "vLLM has no use_dora"),
        ("bnb-nf4", "vera", "adapter", "vLLM knows LoRA alone"),
        ("bnb-nf4", {"name": "lora", "r": 1024}, "adapter", "rank 512 and less, not 1024"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_in_the_plan(backend, adapter, content, why) -> None:
    export = {"merge": "never", "formats": [{"name": "vllm", "content": content}]}
    spec = qa.Spec(model=str(small_model()), backend=backend, adapter=adapter, export=export)
    with pytest.raises(PlanRefused, match=why):
        qa.plan(spec, check_output=False)
    if content == "requantized":
        export["formats"][0]["content"] = "merged"
        qa.plan(spec.model_copy(update={"export": qa.Spec(export=export).export}))


def changed_base(folder: Path, monkeypatch) -> Path:
    """A run whose start has changed its base, which is a quantized checkpoint, as if of the hub."""
    qa.save(qa.quantize(str(small_model()), "bnb-nf4", device="cpu"), folder / "base")
    monkeypatch.setattr("quantadapt.exporting.vllm.is_local", lambda _: False)
    return tuned(folder / "run", base=folder / "base", backend="bnb-nf4", init_lora_weights="pissa")


def test_a_base_that_its_start_has_changed_is_written_and_not_changed_again(
    tmp_path, compared, monkeypatch
) -> None:
    run = changed_base(tmp_path, monkeypatch)
    folder = export(run, "adapter")
    assert json.loads((folder / "expected.json").read_text())["model"] == "base"
    with torch.no_grad():
        expected = qa.load(run, device="cpu").eval()(IDS).logits
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        found = PeftModel.from_pretrained(base, folder / "adapter").train()(IDS).logits
    assert torch.allclose(found.float(), expected, atol=1e-3)
    figures, code = compared(folder)
    assert (code, figures["mean_apart"] < 1e-3) == (0, True)


def test_adapters_that_work_together_are_not_served_as_one(tmp_path, capsys) -> None:
    """What the card says to do with PEFT puts all of them on the base."""
    model = qa.attach(qa.quantize(str(small_model()), "none", device="cpu"), "lora", r=2)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    run = qa.save(moved(model), tmp_path / "run")
    with pytest.raises(ModelError, match="2 adapters are active, and vLLM adds one"):
        export_of("vllm", {"content": "adapter"}).exporter.write(Tuned(saved=run), tmp_path)
    card = (run / "README.md").read_text().split("With transformers and PEFT alone:")[1]
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"BASE"', repr(str(small_model()))).replace('"FOLDER"', repr(str(run)))
    exec(code, made := {})
    with torch.no_grad():
        expected, found = (one.eval()(IDS).logits for one in (model, made["model"]))
    assert torch.allclose(found, expected, atol=1e-4)
