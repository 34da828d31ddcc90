"""Exports: one file of a plugin is all that it takes to write a tuned model in a form of one's own.

The plugin here writes a toy of GGUF: magic, header, tensors. What it wrote is read back by code of
this test's own and compared with what transformers and PEFT make of base and adapter.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from few_rows import few_rows
from rich.console import Console

import quantadapt as qa
from quantadapt import cli, records
from quantadapt.cli.progress import RunDisplay, export_lines, plan_lines, show_result
from quantadapt.errors import MergeRefused, ModelError, OutputError, PlanRefused, PluginError
from quantadapt.exporting.saving import save
from quantadapt.planning.exports import export_of
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PLUGIN = '''
import json
import struct
from typing import Literal

from pydantic import Field

from quantadapt import Export, Exporter, Figure, Merge, Rule, hookimpl


class Tiny(Exporter):
    """The merged weights in one flat file."""

    dtype: Literal["float32", "float16"] = Field("float32", description="of the numbers")
    breaks: bool = Field(False, description="fail half-way")
    tells: Literal["figures", "nothing", "number"] = Field("figures", description="afterwards")

    @property
    def merges(self):
        return Merge.DENSE

    @property
    def planned(self):
        return f"tiny file of {self.dtype}"

    def write(self, tuned, folder):
        import torch

        header, blobs = {}, []
        for name, tensor in tuned.merged("dense").state_dict().items():
            header[name] = list(tensor.shape)
            blobs.append(tensor.to(getattr(torch, self.dtype)).numpy().tobytes())
        head = json.dumps({"dtype": self.dtype, "shapes": header}).encode()
        with (folder / "model.tiny").open("wb") as file:
            file.write(b"TINY" + struct.pack("<I", len(head)) + head)
            if self.breaks:
                raise ValueError("out of ink")
            file.writelines(blobs)
        if self.tells != "figures":
            return {"size": 5} if self.tells == "number" else None
        size = (folder / "model.tiny").stat().st_size
        return {"size": Figure(size / 2**20, "MiB", "lower"), "tensors": Figure(len(header))}


@hookimpl
def quantadapt_exports():
    no_ia3 = Rule("tiny-no-ia3", {"adapter": ("ia3",)}, "tiny knows no IA3", "use lora")
    no_half = Rule("tiny-half", {"export.dtype": ("float16",), "backend": ("hqq",)}, "odd", "none")
    return [Export("tiny", "a toy of GGUF", Tiny, rules=(no_ia3, no_half))]
'''


def read_tiny(file: Path) -> dict[str, np.ndarray]:
    """Read what the plugin wrote, without its help."""
    data = io.BytesIO(file.read_bytes())
    assert data.read(4) == b"TINY"
    (length,) = struct.unpack("<I", data.read(4))
    head = json.loads(data.read(length))
    dtype = np.dtype(head["dtype"])
    tensors = {}
    for name, shape in head["shapes"].items():
        values = data.read(int(np.prod(shape)) * dtype.itemsize)
        tensors[name] = np.frombuffer(values, dtype).reshape(shape)
    assert data.read() == b""
    return tensors


def by_stock_peft(adapter: Path) -> dict[str, np.ndarray]:
    """Return the weights of base and adapter, merged by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return {name: value.numpy() for name, value in merged.state_dict().items()}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Iterator[None]:
    """A distribution with the plugin, installed."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "tiny_export.py").write_text(PLUGIN)
    info = folder / "tiny_export-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-export\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantadapt]\ntiny = tiny_export\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        registry.cache_clear()
        assert registry().record(qa.Export, "tiny").summary == "a toy of GGUF"
        yield
    registry.cache_clear()
    sys.modules.pop("tiny_export", None)


def spec(output: Path, **values: Any) -> qa.Spec:
    defaults: dict[str, Any] = {
        "model": str(small_model()),
        "data": {"path": few_rows()},
        "backend": "none",
        "output": str(output),
        "train": {"max_steps": 2, "learning_rate": 4e-3, "per_device_train_batch_size": 2},
        "evaluate": {"max_examples": 4, "samples": 0, "unquantized": False},
        "export": {"merge": "never"},
    }
    return qa.Spec(**defaults | values)


def shown_run(wanted: qa.Spec) -> tuple[Any, str]:
    """Run it; return its result, and what the terminal showed."""
    console = Console(file=io.StringIO(), width=200)
    with RunDisplay(console) as display:
        result = qa.run(wanted, listener=display)
    show_result(console, result.folder, result.metrics)
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def tiny_run(plugin, tmp_path_factory) -> tuple[Any, str]:
    """A run, told by YAML to write the plugin's export."""
    folder = tmp_path_factory.mktemp("run")
    text = spec(folder / "run", export={"merge": "dense", "formats": ["tiny"]}).to_yaml()
    (folder / "run.yaml").write_text(text)
    return shown_run(qa.Spec.load(folder / "run.yaml"))


@pytest.fixture
def run_cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return call


# An export of a plugin ---------------------------------------------------------------------------


def test_a_run_writes_what_stock_peft_merges(tiny_run) -> None:
    result, _ = tiny_run
    found, wanted = read_tiny(result.folder / "tiny" / "model.tiny"), None
    wanted = by_stock_peft(result.folder / "adapter")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)
    base = qa.quantize(str(small_model()), "none").state_dict()
    moved = [name for name, value in base.items() if not np.array_equal(found[name], value)]
    assert len(moved) >= 14  # all linear layers of two blocks: it is not the base that was written


def test_terminal_metrics_and_report_tell_it(tiny_run) -> None:
    result, terminal = tiny_run
    metrics = json.loads((result.folder / "metrics.json").read_text())
    size = (result.folder / "tiny" / "model.tiny").stat().st_size / 2**20
    assert list(metrics["exports"]) == ["adapter", "merged-dense", "tiny"]
    tiny = metrics["exports"]["tiny"]
    assert (tiny["state"], tiny["folder"], tiny["refusals"]) == ("written", "tiny", [])
    assert tiny["figures"]["size"] == {"value": size, "unit": "MiB", "better": "lower"}
    assert tiny["figures"]["tensors"]["value"] == len(read_tiny(result.folder / "tiny/model.tiny"))
    line = f"tiny: written to tiny/, size {size:.1f} MiB, tensors "
    assert line in terminal
    assert "tiny written" in terminal  # beside the stage, while it goes on
    report = (result.folder / "report.html").read_text()
    assert "<strong>tiny</strong>: written to tiny/, size" in report
    plan = json.loads((result.folder / "plan.json").read_text())
    assert plan["exports"][-1]["options"] == {
        "dtype": "float32",
        "breaks": False,
        "tells": "figures",
    }
    assert "adapter, dense merged model, tiny file of float32" in plan_lines(result.plan)[-1]


def test_what_is_known_of_the_merge(tiny_run) -> None:
    result, terminal = tiny_run
    dense = result.metrics["exports"]["merged-dense"]
    assert dense["figures"]["kl"]["value"] < 1e-6
    assert dense["figures"]["gain_kept"]["unit"] == "share"
    assert "merged-dense: written to merged/, KL to the adapter" in terminal
    merge = result.metrics["merge"]
    assert merge["kind"] == "dense"
    assert merge["kl"] == dense["figures"]["kl"]["value"]
    weights = by_stock_peft(result.folder / "adapter")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(result.folder / "merged", dtype=torch.float32)
    for name, value in merged.state_dict().items():
        np.testing.assert_allclose(value.numpy(), weights[name], rtol=0, atol=1e-6)


def test_it_is_written_later_too(tiny_run, run_cli, tmp_path) -> None:
    run = tiny_run[0].folder
    command = ("export", run, "tiny", "--set", "dtype=float16", "--output", tmp_path)
    code, out, err = run_cli(*command)
    assert (code, out.startswith(f"tiny: written to {tmp_path}/tiny/, size ")) == (0, True), err
    found, wanted = read_tiny(tmp_path / "tiny" / "model.tiny"), by_stock_peft(run / "adapter")
    for name, value in wanted.items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6)
    code, _, err = run_cli(*command)
    assert (code, "holds a model already" in err) == (2, True)
    code, _, err = run_cli(*command[:3], "--output", tmp_path, "--overwrite")
    assert code == 0, err
    assert read_tiny(tmp_path / "tiny" / "model.tiny")[name].dtype == np.float32


def test_the_figures_as_json(tiny_run, run_cli, tmp_path) -> None:
    code, out, err = run_cli("export", tiny_run[0].folder, "tiny", "-o", tmp_path, "--json")
    found = json.loads(out)
    assert (code, found["export"], found["path"]) == (0, "tiny", str(tmp_path / "tiny")), err
    assert found["figures"]["size"]["unit"] == "MiB"


def test_it_is_listed_and_shown(plugin, run_cli) -> None:
    _, out, _ = run_cli("exports")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        *("adapter", "compressed-tensors", "gguf", "gguf-adapter", "hub", "merged-dense"),
        *("merged-requantized", "ollama", "onto-base", "tiny", "vllm"),
    ]
    _, out, _ = run_cli("exports", "show", "tiny")
    for text in ("tiny (tiny-export 1.0)", "float32 | float16", "of the numbers", "tiny-no-ia3"):
        assert text in out
    _, out, _ = run_cli("schema")
    known = json.loads(out)["$defs"]["FormatSpec"]
    assert "tiny" in known["properties"]["name"]["examples"]


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "what", "fix"),
    [
        ("tinny", "no export is called 'tinny'", "did you mean 'tiny'?"),
        ({"name": "tiny", "dtyp": 1}, "export 'tiny' has no option 'dtyp'", "did you mean 'dtype'"),
        ({"name": "tiny", "dtype": "int3"}, "'int3' is not possible", "'float32' or 'float16'"),
        ("onto-base", "it has to be set, and is not", ""),
    ],
)
def test_unknown_names_and_options(plugin, tmp_path, format_, what, fix) -> None:
    with pytest.raises(PlanRefused) as caught:
        qa.plan(spec(tmp_path, export={"formats": [format_]}))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert fix in problem.fix
    assert problem.where.startswith("export")


def test_mistakes_on_the_command_line(tiny_run, run_cli) -> None:
    code, _, err = run_cli("export", tiny_run[0].folder, "tinny")
    assert (code, "did you mean 'tiny'?" in err) == (2, True)
    code, _, err = run_cli("export", tiny_run[0].folder, "tiny", "--set", "dtyp=1")
    assert (code, "did you mean 'dtype'?" in err) == (2, True)
    code, _, err = run_cli("export", "nowhere", "tiny", "--set", "dtype=float16")
    assert (code, "there is no adapter here" in err) == (2, True)


def test_an_output_that_cannot_be_made_is_told_before_anything_is_loaded(
    tiny_run, run_cli, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("quantadapt.exporting.tuned.load", None)  # nobody asks it
    (file := tmp_path / "file").write_text("mine")
    code, _, err = run_cli("export", tiny_run[0].folder, "tiny", "-o", file)
    assert (code, f"{file} is a file" in err) == (2, True)
    code, _, err = run_cli("merge", tiny_run[0].folder, "-o", file / "inside")
    assert (code, f"{file} is a file" in err) == (2, True)
    code, _, err = run_cli("quantize", small_model(), "-b", "none", "-o", file / "inside")
    assert (code, f"{file} is a file" in err) == (2, True)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # as on a disk that is only read
    code, _, err = run_cli("export", tiny_run[0].folder, "tiny", "-o", tmp_path / "new")
    assert (code, f"make {tmp_path} writable" in err) == (2, True)
    assert file.read_text() == "mine"


def test_flags_of_rounding_go_with_a_merge_that_rounds(tiny_run, run_cli, tmp_path) -> None:
    run, out = tiny_run[0].folder, ("-o", tmp_path / "out")
    code, _, err = run_cli("merge", run, "--min-gain", 0.5, "--rounding", "grid", *out)
    assert (code, err.count("add --kind requantize, or leave it out")) == (2, 2)
    onto = ("--onto", "nowhere/at/all", "--kind", "requantize", "--min-gain", 0.5)
    code, _, err = run_cli("merge", run, *onto, *out)
    assert (code, "3 problems" in err, "--min-gain: it has no effect" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("values", "rule", "error"),
    [
        ({"adapter": "lily"}, "lily-no-merge", MergeRefused),
        ({"adapter": "ia3"}, "tiny-no-ia3", PlanRefused),
        (
            {"backend": "hqq", "export": {"formats": [{"name": "tiny", "dtype": "float16"}]}},
            "tiny-half",
            PlanRefused,
        ),
    ],
)
def test_refusals_are_told_when_it_is_planned(plugin, tmp_path, values, rule, error) -> None:
    exports = {"export": {"merge": "never", "formats": ["tiny"]}}
    with pytest.raises(error) as caught:
        qa.plan(spec(tmp_path / "run", **exports | values))
    (problem,) = caught.value.problems
    assert (problem.rule, bool(problem.what), bool(problem.fix)) == (rule, True, True)
    assert not (tmp_path / "run").exists()


def test_the_rules_of_an_export_do_not_concern_other_options(plugin, tmp_path) -> None:
    made = qa.plan(spec(tmp_path, backend="hqq", export={"formats": ["tiny"]}))
    assert [export.refusals for export in made.exports] == [(), (), ()]


def test_a_refused_export_of_a_saved_adapter(plugin, run_cli, tmp_path) -> None:
    save(qa.attach(qa.quantize(str(small_model()), "none"), "ia3"), tmp_path)
    code, out, err = run_cli("export", tmp_path, "tiny")
    assert (code, out) == (2, "")
    assert "tiny knows no IA3 [rule tiny-no-ia3]" in err
    assert "fix: use lora" in err


def test_an_automatic_merge_that_is_refused_is_told(tmp_path) -> None:
    made = qa.plan(spec(tmp_path, adapter="lily", export={"merge": "auto"}))
    _, merge = made.exports
    assert merge.words == "no merged model (lily-no-merge)"
    _, terminal = shown_run(made.spec)
    assert "merged-dense: no merged model\n  none x lily: its update depends on" in terminal
    assert "fix: keep the adapter beside the base" in terminal
    report = (tmp_path / "report.html").read_text()
    assert "lily-no-merge" in report
    assert "Way out:" in report


def test_two_exports_of_one_folder(tmp_path) -> None:
    both = {"merge": "dense", "formats": ["merged-requantized"]}
    with pytest.raises(PlanRefused, match=r"both write merged/(.|\n)*quantadapt export RUN"):
        qa.plan(spec(tmp_path, export=both))
    again = {"merge": "never", "formats": ["merged-dense", "merged-dense"]}
    with pytest.raises(PlanRefused, match="both write merged/"):
        qa.plan(spec(tmp_path, export=again))


@pytest.mark.parametrize(
    ("export", "names"),
    [
        ({}, ["adapter", "merged-dense"]),
        ({"merge": "never"}, ["adapter"]),
        ({"merge": "requantize"}, ["adapter", "merged-requantized"]),
        ({"merge": "dense", "formats": ["merged-dense"]}, ["adapter", "merged-dense"]),
        ({"formats": [{"name": "tiny"}, "adapter"], "merge": "never"}, ["adapter", "tiny"]),
    ],
)
def test_the_adapter_comes_first_whatever_is_named(plugin, tmp_path, export, names) -> None:
    assert [e.name for e in qa.plan(spec(tmp_path, export=export)).exports] == names


# What fails --------------------------------------------------------------------------------------


def test_an_export_that_fails_loses_nothing(plugin, tmp_path) -> None:
    broken = {"name": "tiny", "breaks": True}
    wanted = spec(tmp_path / "run", export={"merge": "never", "formats": [broken, "merged-dense"]})
    console = Console(file=io.StringIO(), width=200)
    with RunDisplay(console) as display, pytest.raises(PluginError, match="out of ink") as caught:
        qa.run(wanted, listener=display)
    assert caught.value.problems[0].where == "export tiny"
    assert "tiny-export 1.0" in caught.value.problems[0].fix
    folder = tmp_path / "run"
    adapter = by_stock_peft(folder / "adapter")
    merged = qa.load(folder / "merged").state_dict()
    for name, value in merged.items():
        np.testing.assert_allclose(value.numpy(), adapter[name], rtol=0, atol=1e-6)
    assert not (folder / "tiny").exists()
    assert [path.name for path in folder.glob(".*")] == []
    exports = json.loads((folder / "metrics.json").read_text())["exports"]
    assert [export["state"] for export in exports.values()] == ["written", "failed", "written"]
    assert "out of ink" in exports["tiny"]["words"]
    assert f"quantadapt export {folder} tiny" in exports["tiny"]["words"]
    assert console.file.getvalue().count("out of ink") == 1
    assert "out of ink" in (folder / "report.html").read_text()
    assert json.loads((folder / "quantadapt-run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("tells", "words"),
    [
        ("nothing", "it returned None, not figures by name"),
        ("number", "figure 'size': it is 5, no Figure"),
    ],
)
def test_what_an_export_returns_has_to_be_figures(plugin, tmp_path, tells, words) -> None:
    """It was an error of Python's at a line of quantadapt's."""
    wrong = {"name": "tiny", "tells": tells}
    wanted = spec(tmp_path / "run", export={"merge": "never", "formats": [wrong, "merged-dense"]})
    with pytest.raises(PluginError, match=words) as caught:
        qa.run(wanted)
    assert caught.value.problems[0].where == "export Tiny"
    exports = json.loads((tmp_path / "run" / "metrics.json").read_text())["exports"]
    assert [export["state"] for export in exports.values()] == ["written", "failed", "written"]
    assert not (tmp_path / "run" / "tiny").exists()


def test_what_was_there_stays_where_an_export_fails(tiny_run, run_cli) -> None:
    run = tiny_run[0].folder
    before = (run / "tiny" / "model.tiny").read_bytes()
    code, _, err = run_cli("export", run, "tiny", "--set", "breaks=true", "--overwrite")
    assert (code, "out of ink" in err, "tiny-export 1.0" in err) == (1, True, True)
    assert (run / "tiny" / "model.tiny").read_bytes() == before


# The built-in ones -------------------------------------------------------------------------------


def test_an_adapter_is_copied_with_the_base_that_it_needs(run_cli, tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "pissa", r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01
    save(model, tmp_path / "run")
    assert (tmp_path / "run" / "base").is_dir()
    code, out, err = run_cli("export", tmp_path / "run", "adapter", "-o", tmp_path / "copy")
    assert (code, "adapter: written to" in out) == (0, True), err
    ids = torch.arange(20)[None] + 100
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        found = qa.load(tmp_path / "copy").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    code, _, err = run_cli("export", tmp_path / "run", "adapter")
    assert (code, "holds a model already" in err) == (2, True)


def test_onto_base_in_a_run(tmp_path) -> None:
    base = str(small_model())
    onto = {"name": "onto-base", "base": base, "check": False}
    wanted = spec(tmp_path / "run", export={"merge": "never", "formats": [onto]})
    assert qa.plan(wanted).exports[1].words == f"model merged onto {base}"
    result, terminal = shown_run(wanted)
    assert result.metrics["exports"]["onto-base"]["figures"]["layers"]["value"] == 14
    assert f"onto-base: written to merged/, onto {base}" in terminal
    expected = by_stock_peft(tmp_path / "run" / "adapter")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(result.folder / "merged", dtype=torch.float32)
    for name, value in merged.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-6)
    with pytest.raises(PlanRefused, match="nowhere does not exist"):
        qa.plan(spec(tmp_path, export={"formats": [{"name": "onto-base", "base": "./nowhere"}]}))


@pytest.mark.slow
def test_merge_and_export_write_the_same(run_cli, tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "lora", r=2)
    save(model, tmp_path / "run")
    for arguments in (
        ("merge", tmp_path / "run", "--kind", "requantize", "-o", tmp_path / "a"),
        ("export", tmp_path / "run", "merged-requantized", "-o", tmp_path / "b"),
    ):
        code, out, err = run_cli(*arguments)
        assert code == 0, err
        assert "merged-requantized: " in out
        assert "KL to the adapter" in out
    files = ["model.safetensors", "config.json", "quantadapt.json"]
    for name in files:
        one, other = (tmp_path / part / "merged" / name for part in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


def test_an_export_that_is_there_is_not_replaced_unasked(tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    qa.merge(model, tmp_path)
    with pytest.raises(OutputError, match="the folder is not empty"):
        qa.merge(model, tmp_path)


BUILTIN = {e.name: e for e in registry().records(qa.Export)}


@pytest.mark.parametrize("name", ["adapter", "merged-dense", "merged-requantized", "onto-base"])
def test_built_in_exports_tell_what_they_do(name) -> None:
    """In the reference, in the plan, and for each option."""
    record = BUILTIN[name]
    page = (DOCS / "reference" / "exports.md").read_text()
    assert f"\n## {name}\n" in page
    assert record.summary in page
    schema = record.exporter.model_json_schema().get("properties", {})
    for option, field in schema.items():
        assert field["description"]
        assert f"| `{option}` |" in page
    planned = export_of(name, {"base": "o/n"} if "base" in schema else {})
    assert planned.words
    assert record.exporter.__doc__


def test_every_kind_of_record_has_its_hook_and_command() -> None:
    from quantadapt.cli.commands import COMMANDS
    from quantadapt.registry.checks import HOOKS

    for kind in records.KINDS:
        assert f"quantadapt_{kind}s" in HOOKS
        assert f"{kind}s" in COMMANDS


def test_lines_of_what_was_exported() -> None:
    refusal = {"what": "codes stay", "fix": "keep it", "where": "aqlm x lora", "rule": "never"}
    found = {
        "adapter": {"words": "written to adapter/", "refusals": []},
        "gguf": {"words": "no gguf", "refusals": [refusal]},
    }
    assert export_lines(found) == [
        "adapter: written to adapter/",
        "gguf: no gguf",
        "  aqlm x lora: codes stay [rule never]\n    fix: keep it",
    ]


def test_the_yaml_comes_back(tmp_path) -> None:
    formats = [{"name": "onto-base", "base": "o/n"}, "adapter"]
    text = qa.Spec(export={"formats": formats}).to_yaml()
    (tmp_path / "a.yaml").write_text(text)
    again = qa.Spec.load(tmp_path / "a.yaml")
    assert yaml.safe_load(again.to_yaml()) == yaml.safe_load(text)
    assert again.export.formats[0].options == {"base": "o/n"}


HANDED_ON = {
    "adapter": (),
    "hub": ("--set", "repo=me/it", "--set", "dry_run=true", "--set", "base=me/base"),
    "vllm": ("--set", "content=adapter"),
    "onto-base": (),
}


@pytest.fixture(scope="module")
def nf4_adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    save(qa.attach(qa.quantize(small_model(), "bnb-nf4", device="cpu"), r=2), folder)
    return folder


@pytest.mark.parametrize("name", HANDED_ON)
@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_what_a_link_leads_to_is_never_handed_on(
    name, kind, nf4_adapter, run_cli, tmp_path
) -> None:
    """A downloaded adapter could have any file of its user's pushed to the hub."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "tokens.json").write_text('{"key": "very secret"}')
    shutil.copytree(nf4_adapter, tmp_path / "downloaded")
    adapter = tmp_path / "downloaded" / "adapter"
    if kind == "pipe":
        os.mkfifo(adapter / "tokens.fifo")
    else:
        (adapter / "tokens").symlink_to(private / "tokens.json" if kind == "file" else private)
    out = tmp_path / "out"
    base = ("--set", f"base={small_model()}") if name == "onto-base" else ()
    options = ("--output", out, "--device", "cpu", *HANDED_ON[name], *base)
    code, _, shown = run_cli("export", adapter, name, *options)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert not any(b"very secret" in file.read_bytes() for file in files)
    if (name, kind) == ("onto-base", "pipe"):
        assert code == 0, "it copies the files that it knows"
        return
    assert code == (1 if kind == "pipe" else 2)
    assert ("leads out of the folder" if kind != "pipe" else "no file that could be") in shown
    assert not files


@pytest.mark.parametrize("name", ["tokenizer.json", "quantadapt.json", "adapter_config.json"])
def test_no_file_of_an_adapter_lies_elsewhere(name, nf4_adapter, tmp_path) -> None:
    shutil.copytree(nf4_adapter, tmp_path / "downloaded")
    file = tmp_path / "downloaded" / "adapter" / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} is a link that leads out of the folder"):
        qa.load(tmp_path / "downloaded", device="cpu")


def test_a_link_inside_and_the_cache_of_the_hub_are_no_way_out(
    nf4_adapter, run_cli, tmp_path
) -> None:
    snapshot = tmp_path / "models--me--it" / "snapshots" / "0123"
    shutil.copytree(nf4_adapter / "adapter", snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for file in snapshot.iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    (snapshot / "again.json").symlink_to("adapter_config.json")
    code, _, shown = run_cli("export", snapshot, "adapter", "--output", tmp_path / "out")
    assert code == 0, shown
    made = tmp_path / "out" / "adapter"
    assert not any(file.is_symlink() for file in made.iterdir())
    weights = "adapter_model.safetensors"
    assert (made / weights).read_bytes() == (blobs / weights).read_bytes()


def test_a_damaged_file_beside_an_adapter_is_named(nf4_adapter, run_cli, tmp_path) -> None:
    shutil.copytree(nf4_adapter, tmp_path / "mine")
    (tmp_path / "mine" / "adapter" / "notes.json").write_text("{no json")
    options = ("--output", tmp_path / "out", *HANDED_ON["hub"])
    code, _, shown = run_cli("export", tmp_path / "mine" / "adapter", "hub", *options)
    assert code == 1
    assert "notes.json: not valid JSON" in shown
    assert "tell its authors" not in shown
