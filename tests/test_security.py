"""Nothing that a downloaded file says is obeyed: code of checkpoints, escape sequences, markup."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantadapt as qa
from quantadapt.errors import PlanRefused
from quantadapt.testing.small_demo import small_model

CONFIG = """
    import os
    from pathlib import Path

    Path(os.environ["QA_MARKER"]).write_text("configuration")
    from transformers import LlamaConfig


    class Config(LlamaConfig):
        model_type = "qa_own"
"""
MODEL = """
    import os
    from pathlib import Path

    Path(os.environ["QA_MARKER"]).write_text("modeling")
    from transformers import LlamaForCausalLM

    from .configuration_own import Config


    class Model(LlamaForCausalLM):
        config_class = Config
"""
TOKENIZER = """
    import os
    from pathlib import Path

    Path(os.environ["QA_MARKER"]).write_text("tokenization")
    from transformers import PreTrainedTokenizerFast


    class Tokenizer(PreTrainedTokenizerFast):
        pass
"""
RUN = {"adapter": {"name": "lora", "r": 2}, "train": {"max_steps": 1}, "device": "cpu"}
SMALL = {"evaluate": {"max_examples": 2, "samples": 1, "max_new_tokens": 2}}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that is written where code of a checkpoint runs."""
    monkeypatch.setenv("QA_MARKER", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def own_model(tmp_path: Path, marker: Path) -> Path:
    """Return a checkpoint of a model that transformers does not know, with its code."""
    folder = tmp_path / "own"
    shutil.copytree(small_model(), folder)
    auto_map = {"AutoConfig": "configuration_own.Config"}
    auto_map["AutoModelForCausalLM"] = "modeling_own.Model"
    change(folder / "config.json", model_type="qa_own", auto_map=auto_map)
    (folder / "configuration_own.py").write_text(textwrap.dedent(CONFIG))
    (folder / "modeling_own.py").write_text(textwrap.dedent(MODEL))
    return folder


@pytest.fixture
def own_tokenizer(tmp_path: Path, marker: Path) -> Path:
    """Return a checkpoint of a model that transformers knows, with a tokenizer of its own."""
    folder = tmp_path / "own-tokenizer"
    shutil.copytree(small_model(), folder)
    auto_map = {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    (folder / "tokenization_own.py").write_text(textwrap.dedent(TOKENIZER))
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def call(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line; `stdin` is what somebody types."""
    return subprocess.run(
        [sys.executable, "-m", "quantadapt", *map(str, arguments)],
        env={**os.environ, "QUANTADAPT_PLUGINS": "none,hqq"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CALLS: dict[str, Callable[[str, Path], object]] = {
    "quantize": lambda model, out: qa.quantize(model, "none", device="cpu"),
    "plan": lambda model, out: qa.plan(qa.Spec(model=model, backend="none", device="cpu")),
    "run": lambda model, out: qa.run(qa.Spec(model=model, backend="none", output=str(out), **RUN)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["own_model", "own_tokenizer"])
def test_python_refuses_code_of_a_checkpoint(name, kind, request, tmp_path, marker) -> None:
    model = request.getfixturevalue(kind)
    with pytest.raises(PlanRefused, match="trust_remote_code: true") as caught:
        CALLS[name](str(model), tmp_path / "out")
    named = "modeling_own.Model" if kind == "own_model" else "tokenization_own.Tokenizer"
    assert named in str(caught.value)
    assert not marker.exists()


def test_loading_below_the_plan_never_asks(own_model, own_tokenizer, marker, monkeypatch) -> None:
    """As for a hub id, whose config comes only with the download."""
    from quantadapt.loading import reading
    from quantadapt.quantizing.stage import load_tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on stdin"))
    with pytest.raises(PlanRefused, match="not run unless asked for"):
        reading.read_config(str(own_model))
    with pytest.raises(PlanRefused, match="not run unless asked for"):
        load_tokenizer(str(own_tokenizer))
    change(own_model / "config.json", model_type="llama")  # transformers has it then
    assert type(reading.from_pretrained(str(own_model))).__module__.startswith("transformers.")
    load_tokenizer(str(own_model))
    assert not marker.exists()


@pytest.mark.parametrize("stdin", ["", "y\ny\ny\n"])
@pytest.mark.parametrize("kind", ["own_model", "own_tokenizer"])
def test_the_command_line_refuses_it_whatever_is_typed(kind, stdin, request, marker) -> None:
    model = request.getfixturevalue(kind)
    shown = call("run", "--model", model, "--backend", "none", "--max-steps", 1, stdin=stdin)
    assert shown.returncode == 2, shown.stderr
    assert "--trust-remote-code" in shown.stderr
    assert not marker.exists()


@pytest.mark.parametrize("command", ["plan", "quantize", "eval", "generate", "data"])
def test_every_command_refuses_it(own_model: Path, marker: Path, tmp_path, command: str) -> None:
    arguments = {
        "plan": ["--model", own_model],
        "quantize": [own_model, "--output", tmp_path / "q"],
        "eval": [own_model],
        "generate": [own_model, "--prompt", "x"],
        "data": [qa.demo.TRAIN_FILE, "--model", own_model],
    }
    shown = call(command, *arguments[command], stdin="y\n")
    assert shown.returncode == 2, shown.stderr
    assert "config.json wants to run configuration_own.Config" in shown.stderr
    assert not marker.exists()


def test_it_runs_where_the_spec_asks_and_is_asked_for_again(own_model, marker, tmp_path) -> None:
    spec = qa.Spec(
        model=str(own_model), backend="none", output=str(tmp_path / "run"),
        trust_remote_code=True, **RUN, **SMALL,
    )  # fmt: skip
    result = qa.run(spec)
    assert marker.exists()
    assert type(result.model.get_base_model()).__name__ == "Model"
    assert yaml.safe_load((result.folder / "spec.yaml").read_text())["trust_remote_code"] is False
    marker.unlink()
    for folder in (result.folder, result.folder / "merged"):
        with pytest.raises(PlanRefused, match="trust_remote_code"):
            qa.load(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = result.model(input_ids=ids).logits
    loaded = qa.load(result.folder, device="cpu", trust_remote_code=True)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    merged = qa.load(result.folder / "merged", device="cpu", trust_remote_code=True)
    assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-4


def test_a_run_folder_cannot_say_that_it_is_trusted(own_model, marker, tmp_path) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "quantadapt-run.json").write_text('{"state": "finished"}')
    said = {"model": str(own_model), "backend": "none", "trust_remote_code": True}
    (folder / "spec.yaml").write_text(yaml.safe_dump(said))
    shown = call("plan", folder / "spec.yaml", "--output", tmp_path / "out")
    assert shown.returncode == 2, shown.stderr
    assert "--trust-remote-code" in shown.stderr
    again = call("plan", folder / "spec.yaml", "-o", tmp_path / "out", "--trust-remote-code")
    assert again.returncode == 0, again.stderr
    assert not marker.exists()


def test_merging_onto_a_base_with_code_of_its_own(own_model, marker, tmp_path) -> None:
    tuned = qa.attach(qa.quantize(small_model(), "none", device="cpu"), "lora", r=2)
    with pytest.raises(PlanRefused, match="trust_remote_code"):
        qa.merge_onto(tuned, str(own_model), tmp_path / "out")
    assert not marker.exists()
    found = qa.merge_onto(tuned, str(own_model), tmp_path / "out", trust_remote_code=True)
    assert found["kl"] < 1e-6
    assert marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_the_hub_are_code_too(tmp_path: Path, key: str) -> None:
    shutil.copytree(small_model(), tmp_path / "m")
    change(tmp_path / "m" / "config.json", **{key: "somebody/kernels"})
    with pytest.raises(PlanRefused, match="the kernels of somebody/kernels"):
        qa.quantize(tmp_path / "m", "none")


def test_what_transformers_has_itself_needs_no_code(own_model: Path, marker: Path) -> None:
    """Falcon's and Phi-3's checkpoints still name the code of the time before."""
    change(own_model / "config.json", model_type="llama")
    plan = qa.plan(qa.Spec(model=str(own_model), backend="none"), check_output=False)
    assert any("transformers has this model itself" in note for note in plan.notes)
    model = qa.quantize(str(own_model), "none", device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()
