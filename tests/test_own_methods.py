"""An adapter whose method PEFT does not ship does everything that PEFT's own do.

The plugin is the one that `quantadapt plugin new rescale --adapter` writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from few_rows import few_rows
from installing import installed
from torch import nn

import quantadapt as qa
from quantadapt import Adapter, cli, hookimpl, scaffold
from quantadapt.adapting.method import config_class
from quantadapt.errors import PlanRefused, PluginError
from quantadapt.exporting.merging import merged_model
from quantadapt.facade import facades
from quantadapt.matrix import declared
from quantadapt.planning.peft_options import method_problems, peft_options
from quantadapt.registry import checks, registry
from quantadapt.testing.small_demo import small_model
from quantadapt.testing.tensors import relative

RECORD = Adapter("own", "a test's", config="own_method:Config", method="own_method:Model")


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rescale") / "quantadapt-rescale"
    scaffold.write("rescale", folder, "adapter")
    with installed(folder, tmp_path_factory.mktemp("site")):
        yield folder


def elsewhere(code: str, *arguments: str) -> str:
    """Run code in a process of its own, with the plugin."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def set_randomly(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "rescale_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(40).reshape(2, 20) + 100).logits
    return found


# Before any work ----------------------------------------------------------------------------------


def test_the_plan_reads_its_options_from_the_source() -> None:
    made = qa.plan(qa.Spec(backend="none", adapter={"name": "rescale", "inputs": False}))
    assert made.adapter_options == {"inputs": False}
    assert made.merge == "dense"
    options = peft_options(made.adapter)
    assert list(options) == ["target_modules", "inputs"]
    assert options["inputs"].help == "learn scales for the inputs, too"
    wrong = {"name": "rescale", "input": True, "inputs": "all", "target_modules": "("}
    with pytest.raises(PlanRefused) as caught:
        qa.plan(qa.Spec(backend="none", adapter=wrong))
    text = str(caught.value)
    assert "adapter 'rescale' has no option 'input'" in text
    assert "did you mean 'inputs'" in text
    assert "'all' is not of type bool" in text
    assert "no regular expression" in text


def test_plan_list_and_matrix_import_nothing_heavy() -> None:
    code = (
        "import sys, quantadapt as qa\n"
        "from quantadapt import cli, matrix\n"
        "from quantadapt.registry import registry\n"
        "made = qa.plan(qa.Spec(backend='hqq', adapter='rescale'))\n"
        "(cell,) = matrix.declared([made.backend], [made.adapter])\n"
        "try: cli.main(['adapters', 'show', 'rescale'])\nexcept SystemExit: pass\n"
        "print(cell.word, {'torch', 'peft', 'quantadapt_rescale.method'} & set(sys.modules))"
    )
    assert elsewhere(code).splitlines()[-1] == "requantize set()"


def test_it_is_listed_and_shown(capsys) -> None:
    for arguments in (["adapters", "--json"], ["adapters", "show", "rescale", "--json"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    listed, shown = capsys.readouterr().out.split("]\n{", 1)
    assert '"name": "rescale"' in listed
    facts = json.loads("{" + shown)
    assert facts["plugin"] == "rescale (quantadapt-rescale 0.1.0)"
    assert facts["method"] == "quantadapt_rescale.method:RescaleModel"
    assert (facts["peft_type"], facts["merge"], facts["start"]) == ("RESCALE", "requantize", "zero")
    assert [option["name"] for option in facts["options"]] == ["target_modules", "inputs"]
    cells = declared(registry().backends(), [registry().adapter("rescale")])
    assert {cell.word for cell in cells if cell.backend in ("none", "hqq")} == {"requantize"}


# The work -----------------------------------------------------------------------------------------


def test_a_run_is_saved_merged_evaluated_and_loaded(tmp_path) -> None:
    values = {
        "model": str(small_model()),
        "data": {"path": few_rows()},
        "backend": {"name": "hqq", "bits": 4},
        "adapter": "rescale",
        "device": "cpu",
        "evaluate": {"max_examples": 4, "samples": 0, "unquantized": False},
        "output": str(tmp_path / "run"),
    }
    train = {"max_steps": 6, "learning_rate": 2e-2}
    result = qa.run(qa.Spec(**values, train=train, export={"merge": "requantize"}))
    perplexity = result.metrics["perplexity"]
    assert perplexity["tuned"] < perplexity["quantized"]
    assert result.metrics["merge"]["kind"] == "requantize"
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["inputs"]) == ("RESCALE", True)
    loaded = qa.load(tmp_path / "run", device="cpu")
    assert torch.equal(logits(loaded), logits(result.model))
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(tmp_path / "run"), "--device", "cpu", "--max-examples", "4"])
    assert not ended.value.code


@pytest.mark.slow
def test_it_is_loaded_in_a_fresh_process(tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), "rescale")
    set_randomly(model)
    qa.save(model, tmp_path / "run")
    code = (
        "import sys, torch, quantadapt as qa\n"
        "model = qa.load(sys.argv[1], device='cpu').eval()\n"
        "ids = torch.arange(40).reshape(2, 20) + 100\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[2])\n"
        "trainable = {n for n, p in model.named_parameters() if p.requires_grad}\n"
        "assert trainable and all('rescale_' in name for name in trainable), trainable\n"
    )
    elsewhere(code, str(tmp_path / "run"), str(tmp_path / "logits.pt"))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path) -> None:
    def run(name: str, **train: object) -> qa.RunResult:
        spec = qa.Spec(
            model=str(small_model()),
            backend="none",
            adapter="rescale",
            device="cpu",
            evaluate={"max_examples": 2, "samples": 0, "unquantized": False},
            export={"merge": "never"},
            train={
                "learning_rate": 2e-2,
                "save_steps": 2,
                "lr_scheduler_type": "constant",
                **train,
            },
            output=str(tmp_path / name),
        )
        return qa.run(spec)

    whole = run("whole", max_steps=4)
    run("parts", max_steps=2)
    parts = run("parts", max_steps=4, resume=True)
    assert relative(logits(parts.model), logits(whole.model)) < 1e-6


@pytest.mark.parametrize("inputs", [True, False])
def test_merges_are_those_of_float64(inputs: bool) -> None:
    """On 4 bits with biases: dense exactly, and requantized as the backend rounds just that."""
    torch.manual_seed(0)
    base = qa.quantize(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)), "hqq", group_size=16)
    expected = {}
    for name, facade in facades(base):
        facade.bias.data = torch.randn(facade.out_features)
        expected[name] = (facade.dequantize().double(), facade.bias.detach().double())
    model = qa.attach(base, "rescale", inputs=inputs)
    set_randomly(model)
    for name, (weight, bias) in expected.items():
        layer = model.get_base_model().get_submodule(name)
        out = 1 + layer.rescale_out["default"].detach().double()
        weight = weight * out[:, None]
        if inputs:
            weight = weight * (1 + layer.rescale_in["default"].detach().double())
        expected[name] = (weight, bias * out)
    dense, again = merged_model(model, "dense"), merged_model(model, "requantize")
    x = torch.randn(5, 64)
    y = x.double()
    for weight, bias in expected.values():
        y = y @ weight.t() + bias
    assert relative(model(x), y) < 1e-6
    assert relative(dense(x), y) < 1e-6
    quantizer = base.quantadapt.quantizer
    for name, facade in facades(again):
        linear = dense.get_submodule(name)
        assert relative(linear.weight, expected[name][0]) < 1e-6
        assert relative(facade.bias, expected[name][1]) < 1e-6
        rounded = quantizer.target.dequantize(quantizer.quantize_linear(linear))
        assert torch.equal(facade.dequantize(), rounded)
        assert 0 < relative(facade.dequantize(), expected[name][0]) < 0.15


@pytest.mark.slow
def test_it_is_merged_onto_the_unquantized_base_in_a_fresh_process(tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), "rescale")
    set_randomly(model)
    qa.save(model, tmp_path / "saved")
    code = (
        "import sys, quantadapt as qa\n"
        "qa.merge_onto(sys.argv[1], sys.argv[2], sys.argv[3], check=False, device='cpu')\n"
    )
    elsewhere(code, str(tmp_path / "saved"), str(small_model()), str(tmp_path))
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = dict(AutoModelForCausalLM.from_pretrained(small_model()).named_modules())
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "rescale_out"):
            out, in_ = (1 + s["default"].double() for s in (layer.rescale_out, layer.rescale_in))
            expected = plain[name].weight.double() * out[:, None] * in_
            assert relative(merged.get_submodule(name).weight, expected) < 1e-6


def test_two_adapters_may_share_a_method() -> None:
    record = registry().adapter("rescale")
    outputs = replace(record, name="rescale-out", peft_type="RESCALE", defaults={"inputs": False})
    assert config_class(outputs) is config_class(record)


# Mistakes of a plugin's author --------------------------------------------------------------------

OPTIONS = "target_modules: list[str] | str | None = None"


def method(body: str = OPTIONS, after: str = "") -> ModuleType:
    """A module with a method; `find_spec` finds nothing of it, as of any that is not a file."""
    module = ModuleType("own_method")
    source = f"""
from dataclasses import dataclass
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

@dataclass
class Config(PeftConfig):
    {body}
{after}

class Model(BaseTuner):
    prefix = "own_"
"""
    sys.modules["own_method"] = module
    exec(source, vars(module))
    return module


@pytest.fixture
def unknown_to_peft() -> Iterator[None]:
    """PEFT and Python forget the test's method."""
    from peft import mapping

    yield
    sys.modules.pop("own_method", None)
    for table in ("CONFIG", "TUNER", "PREFIX"):
        getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING").pop("OWN", None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"config": "own"}, "config is 'own'; a method of its own has both config and method"),
        ({"method": ""}, 'each as "module:Class"'),
        ({"config": "", "method": ""}, "names no method; give it peft_type, or config and method"),
    ],
)
def test_a_record_that_names_no_method_is_a_broken_plugin(fields, words) -> None:
    record = replace(RECORD, **{"peft_type": "", **fields})
    listed = SimpleNamespace(quantadapt_adapters=hookimpl(lambda: [record]))
    with pytest.raises(PluginError, match=words):
        checks.contents(listed, "own")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"config": "own_method:Config"}, "its config, own_method:Config, cannot be found or read"),
        (
            {"method": "quantadapt_rescale.method:Rescale"},
            "its method, quantadapt_rescale.method:R",
        ),
        ({"peft_type": "LORA"}, "PEFT has a method LORA itself"),
        ({"config": "quantadapt_rescale.method:RescaleLayer"}, "has no target_modules"),
        ({"config": "", "method": ""}, "the installed PEFT has no method OWN"),
    ],
)
def test_the_plan_tells_what_a_record_lacks(fields, words) -> None:
    whole = replace(registry().adapter("rescale"), name="own", peft_type="OWN")
    assert method_problems(whole) == []
    assert any(words in problem.what for problem in method_problems(replace(whole, **fields)))


def test_options_come_from_bases_elsewhere(tmp_path, monkeypatch) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "base.py").write_text(
        "from peft import LoraConfig as Their\nclass Base(Their):\n    depth: int = 1\n"
    )
    (package / "config.py").write_text(
        "import own_package.base\nfrom .base import Base\n"
        "class Config(own_package.base.Base):\n    depth: int = 2\n    width: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = Adapter("own", "", config="own_package.config:Config", method="own_package:Model")
    options = peft_options(record)
    assert {"r", "lora_alpha", "depth", "width"} <= options.keys()
    assert (options["depth"].default, options["width"].annotation) == ("2", "float")
    assert "peft_type" not in options


def test_two_methods_of_one_name_are_told_apart(unknown_to_peft) -> None:
    method()
    first = config_class(RECORD)
    assert config_class(RECORD) is first
    method()
    with pytest.raises(
        PluginError, match=r"PEFT knows another method OWN, .*\n.*another peft_type"
    ):
        config_class(RECORD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": "own_method:Missing"}, "its config own_method:Missing cannot be imported"),
        ({"method": "nowhere:Model"}, "its method nowhere:Model cannot be imported: ModuleNotF"),
        ({"method": "own_method:Config"}, "own_method:Config is no subclass of .*BaseTuner"),
    ],
)
def test_a_class_that_is_none_of_pefts_is_told(unknown_to_peft, change, words) -> None:
    method()
    with pytest.raises(PluginError, match=words):
        config_class(replace(RECORD, **change))


def test_a_config_may_not_call_itself_otherwise(unknown_to_peft) -> None:
    from quantadapt.adapting.stage import peft_config

    method(after="    def __post_init__(self):\n        self.peft_type = 'OTHER'\n")
    model = qa.quantize(nn.Sequential(nn.Linear(8, 8)), "none")
    with pytest.raises(PluginError, match="its config says peft_type OTHER, its record OWN"):
        peft_config(model, RECORD, {})


def test_an_adapter_whose_plugin_is_gone_is_not_loaded(tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "none", device="cpu"), "rescale")
    qa.save(model, tmp_path)
    path = tmp_path / "adapter" / "quantadapt.json"
    path.write_text(path.read_text().replace('"rescale"', '"rescaled"'))
    with pytest.raises(PlanRefused, match="no adapter is called 'rescaled'"):
        qa.load(tmp_path)
