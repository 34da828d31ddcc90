"""Nothing that a downloaded file says is obeyed: code of checkpoints, escape sequences, markup."""

from __future__ import annotations

import io
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
from few_rows import few_rows

import quantadapt as qa
from quantadapt import cli
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
RUN = {
    "data": {"path": few_rows()},
    "adapter": {"name": "lora", "r": 2},
    "train": {"max_steps": 1},
    "device": "cpu",
}
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


@pytest.fixture
def here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process, where somebody types yes; returns code and text."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    return run


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
    from quantadapt.quantizing.tokenizer import load_tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on stdin"))
    with pytest.raises(PlanRefused, match="not run unless asked for"):
        reading.read_config(str(own_model))
    with pytest.raises(PlanRefused, match="not run unless asked for"):
        load_tokenizer(str(own_tokenizer))
    change(own_model / "config.json", model_type="llama")  # transformers has it then
    assert type(reading.from_pretrained(str(own_model))).__module__.startswith("transformers.")
    load_tokenizer(str(own_model))
    assert not marker.exists()


@pytest.mark.parametrize("stdin", [pytest.param("", marks=pytest.mark.slow), "y\ny\ny\n"])
@pytest.mark.parametrize("kind", ["own_model", "own_tokenizer"])
def test_the_command_line_refuses_it_whatever_is_typed(kind, stdin, request, marker) -> None:
    model = request.getfixturevalue(kind)
    shown = call("run", "--model", model, "--backend", "none", "--max-steps", 1, stdin=stdin)
    assert shown.returncode == 2, shown.stderr
    assert "--trust-remote-code" in shown.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "command", ["plan", "quantize", "eval", "generate", "chat", "serve", "data"]
)
def test_every_command_refuses_it(
    own_model: Path, marker: Path, tmp_path, command: str, here
) -> None:
    arguments = {
        "plan": ["--model", own_model],
        "quantize": [own_model, "--output", tmp_path / "q"],
        "eval": [own_model],
        "generate": [own_model, "--prompt", "x"],
        "chat": [own_model],
        "serve": [own_model, "--port", "0"],
        "data": [qa.demo.TRAIN_FILE, "--model", own_model],
    }
    code, shown = here(command, *arguments[command])
    assert code == 2, shown
    assert "config.json wants to run configuration_own.Config" in shown
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


def test_a_run_folder_cannot_say_that_it_is_trusted(own_model, marker, tmp_path, here) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "quantadapt-run.json").write_text('{"state": "finished"}')
    said = {"model": str(own_model), "backend": "none", "trust_remote_code": True}
    (folder / "spec.yaml").write_text(yaml.safe_dump(said))
    code, shown = here("plan", folder / "spec.yaml", "--output", tmp_path / "out")
    assert code == 2, shown
    assert "--trust-remote-code" in shown
    again = ("plan", folder / "spec.yaml", "-o", tmp_path / "out", "--trust-remote-code")
    code, shown = here(*again)
    assert code == 0, shown
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


def test_a_chat_template_cannot_reach_python(tmp_path: Path, marker: Path, here) -> None:
    shutil.copytree(small_model(), tmp_path / "m")
    code = "''.__class__.__mro__[1].__subclasses__()"
    template = "{{ CODE }}{% for m in messages %}{{ m['content'] }}{% endfor %}".replace(
        "CODE", code
    )
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    data = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.write_text(json.dumps({"messages": chat}) + "\n")
    code, shown = here("data", data, "--model", tmp_path / "m")
    assert code != 0
    assert "not expected" not in shown, shown
    assert "<class" not in shown


@pytest.mark.parametrize("tag", ["python/object/apply:os.system", "python/name:os.system"])
def test_a_spec_makes_no_objects(tmp_path: Path, marker: Path, tag: str) -> None:
    (tmp_path / "spec.yaml").write_text(f"backend: !!{tag} ['touch {marker}']\n")
    with pytest.raises(qa.QuantadaptError):
        qa.Spec.load(tmp_path / "spec.yaml")
    (tmp_path / "plain.yaml").write_text("backend: none\n")
    text = f"!!{tag} ['touch {marker}']"
    assert qa.Spec.load(tmp_path / "plain.yaml", [f"model={text}"]).model == text
    assert not marker.exists()


# What is shown on a terminal ----------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[red]x[/red]"
SHOWN = r"\x1b]0;owned\x1b[2J\x9b31m\u202e[red]x[/red]"


def test_a_screen_obeys_nothing_that_it_is_given() -> None:
    from io import StringIO

    from rich.markup import escape
    from rich.progress import Progress, TextColumn
    from rich.table import Table
    from rich.text import Text

    from quantadapt.showing.screen import Screen

    out = StringIO()
    screen = Screen(out, width=200)
    table = Table(title=Text(EVIL), caption=Text(EVIL))
    table.add_column(escape(EVIL))
    table.add_row(Text(EVIL))
    screen.print(EVIL, markup=False)
    screen.print(table)
    with Progress(TextColumn("{task.description}", markup=False), console=screen) as bar:
        bar.add_task(EVIL)
    text = out.getvalue()
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text)
    assert text.count(SHOWN) >= 3, "rich leaves the bell out itself"
    screen.print("one\ttwo\nthree é 日本 😀", markup=False)
    assert out.getvalue().endswith("one     two\nthree é 日本 😀\n")


def test_its_own_colours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from quantadapt.showing.screen import Screen

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = StringIO()
    Screen(out).print("[bold]x[/bold]", "\x1b[31m", sep="")
    assert out.getvalue() == "\x1b[1mx\x1b[0m\\x1b[31m\n"


def test_data_names_and_errors_are_shown_as_they_are(tmp_path: Path, capsys) -> None:
    """Prompts, the names of folders and models, keys of a spec: as text, wherever they come out."""
    model, out = tmp_path / "m[red]x", tmp_path / "run[red]x"
    shutil.copytree(small_model(), model)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{EVIL} {i}", "completion": f"{EVIL} {i}"} for i in range(8)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    what = ["--model", model, "--data", data, "--backend", "none", "--max-steps", 1, "-o", out]
    less = ["--set", "evaluate.max_examples=2", "--set", "evaluate.max_new_tokens=2"]
    calls = [
        ("run", *what, *less),
        ("plan", *what, "--overwrite", "--json"),
        ("plan", *what, "--set", f"train.{EVIL}=1", "--backend", EVIL),
        ("data", data, "--model", model),
        ("eval", out, "--data", data, "--json"),
        ("generate", out, "--prompt", EVIL),
        ("generate", tmp_path / EVIL.replace("/", ""), "--prompt", "x"),
        ("plan", "--model", tmp_path / EVIL.replace("/", ""), "--data", EVIL),
    ]
    for arguments in calls:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        text = "".join(capsys.readouterr())
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text), arguments[0]
        assert ended.value.code in (0, 1, 2)
        assert "not expected" not in text, text
        assert "[red]x" in text or arguments[0] in ("eval", "generate")
    page = (out / "report.html").read_text()
    assert "\x1b" not in page
    assert "\x07" not in page


def test_an_error_is_plain_text_in_python_too() -> None:
    with pytest.raises(PlanRefused) as caught:
        qa.plan(qa.Spec(backend=EVIL))
    assert "\x1b" not in str(caught.value)
    assert "[red]x[/red]" in str(caught.value)


@pytest.mark.slow
def test_records_of_plugins_are_shown_as_they_are(tmp_path: Path) -> None:
    name = EVIL
    (tmp_path / "qa_evil.py").write_text(
        "from quantadapt import Backend, Quantizer, hookimpl\n"
        "@hookimpl\ndef quantadapt_backends():\n"
        f"    return [Backend({name!r}, {EVIL!r}, Quantizer, requires=())]\n"
    )
    info = tmp_path / "qa_evil-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qa-evil\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[quantadapt]\nevil = qa_evil\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    commands = [["backends"], ["backends", "show", name], ["matrix", "--backend", name]]
    for command in commands:
        shown = subprocess.run(
            [sys.executable, "-m", "quantadapt", *command],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        text = shown.stdout + shown.stderr
        assert "Traceback" not in text
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text), command


def test_a_warning_is_plain_text_in_python_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(small_model(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vis\x1b]0;title\x07ual.x"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="vis") as caught:
        qa.quantize(folder, "none", device="cpu")
    assert all("\x1b" not in str(warning.message) for warning in caught)
    assert any(r"vis\x1b]0;title\x07ual.x" in str(warning.message) for warning in caught)


def test_all_warnings_are_spelled_out() -> None:
    own = [file for file in Path(qa.__file__).parent.rglob("*.py") if file.name != "moved.py"]
    direct = [str(file) for file in own if "warnings.warn(" in file.read_text(encoding="utf-8")]
    assert [Path(file).name for file in direct] == ["errors.py"]
