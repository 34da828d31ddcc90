"""Any evaluation, here of a plugin, is planned, measured and shown; its figures are right."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from few_rows import few_rows
from processes import in_processes
from rich.console import Console
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.cli.evaluate import _show
from quantadapt.cli.progress import RunDisplay, show_result
from quantadapt.data import load_held_out
from quantadapt.errors import PlanRefused, PluginError, SpecError
from quantadapt.evaluation import measure
from quantadapt.exporting.card import _figures
from quantadapt.folders.metrics import add_figures
from quantadapt.pipeline.result import RunResult
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model

EXAMPLES = 4
TOY = '''
from pydantic import Field
from quantadapt import Evaluation, Evaluator, Figure, Rule, hookimpl

class BitsPerByte(Evaluator):
    first: int = Field(100, ge=1, description="how many examples")

    def measure(self, model, given):
        import math
        from quantadapt.evaluation import perplexity
        examples = given.examples.select(range(min(self.first, len(given.examples))))
        found = perplexity(model, examples, batch_size=given.batch_size)
        bytes_ = sum(len(prompt.reference.encode()) for prompt in given.prompts[: self.first])
        bits = found.loss * found.tokens / math.log(2)
        return {"rate": Figure(bits / bytes_, "bits/byte", "lower"), "bytes": Figure(bytes_, "B")}

class TunedAlone(Evaluator):
    """Fails on the tuned model."""

    def wants(self, model):
        return model in ("tuned", "merged")

    def measure(self, model, given):
        raise RuntimeError("the judge does not answer")

class Broken(Evaluator):
    returns: str = "nothing"

    def measure(self, model, given):
        if self.returns == "interrupt":
            if hasattr(model, "peft_config"):
                raise KeyboardInterrupt
            return {"score": Figure(1)}
        figures = {"nothing": {}, "number": {"score": 1.0}, "text": {"score": Figure("high")},
                   "direction": {"score": Figure(1.0, "", "more")}}
        return figures[self.returns]

no_cpu = Rule("judge-no-cpu", {"device": ("cpu",)}, "a CPU is too slow", "take a GPU")

@hookimpl
def quantadapt_evaluations():
    return [
        Evaluation("bits-per-byte", "bits per byte of the answers", BitsPerByte),
        Evaluation("judge", "asks somebody", TunedAlone),
        Evaluation("broken", "returns what it should not", Broken),
        Evaluation("far", "needs a library", Broken, requires=("not-there-at-all>=1",)),
        Evaluation("gpu-judge", "is refused here", TunedAlone, rules=(no_cpu,)),
    ]
'''


def install(folder: Path, name: str, text: str) -> None:
    """Write a distribution with one plugin, as if it were installed."""
    (folder / f"{name}_evaluations.py").write_text(text)
    info = folder / f"{name}_evaluations-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-evaluations\nVersion: 1.0")
    (info / "entry_points.txt").write_text(f"[quantadapt]\n{name} = {name}_evaluations\n")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("toy")
    install(folder, "toy", TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("QUANTADAPT_PLUGINS", "none,hqq,toy")
        registry.cache_clear()
        assert not registry().broken
        yield
    registry.cache_clear()
    sys.modules.pop("toy_evaluations", None)


def spec(*evaluations: Any, **parts: Any) -> qa.Spec:
    quick = {"evaluations": list(evaluations), "max_examples": EXAMPLES, "samples": 0}
    train = {"max_steps": 6, "per_device_train_batch_size": 2}
    data = {"path": few_rows(), "eval_path": str(demo.EVAL_FILE)}
    given = {"model": str(small_model()), "evaluate": quick, "train": train, "data": data}
    return qa.Spec(**given | parts)


class Shown:
    """A run with three evaluations, one of which fails, and what the terminal showed of it."""

    def __init__(self, output: Path) -> None:
        screen = io.StringIO()
        console = Console(file=screen, width=120)
        wanted = spec(
            *("perplexity", "bits-per-byte", "judge"),
            backend={"name": "hqq", "bits": 2},
            export={"merge": "requantize", "min_gain": 0},
            output=str(output),
        )
        with RunDisplay(console) as display:
            self.result = qa.run(wanted, listener=display)
        show_result(console, self.result.folder, self.result.metrics)
        self.text = screen.getvalue()
        self.metrics = json.loads((output / "metrics.json").read_text())
        self.page = (output / "report.html").read_text()


@pytest.fixture(scope="module")
def shown(toy: None, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return Shown(tmp_path_factory.mktemp("shown") / "run")


def by_hand(model: Any, tokenizer: Any) -> tuple[float, int]:
    """Return the summed loss in nats of a stock model on the held-out answers, and their bytes."""
    total, rows = 0.0, load_held_out(None, tokenizer).select(range(EXAMPLES))
    for row in rows:
        ids, counts = torch.tensor([row["input_ids"]]), torch.tensor([row["completion_mask"]])
        labels = ids.masked_fill(counts == 0, -100)
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=labels).loss
        total += float(loss) * int((labels[:, 1:] != -100).sum())
    lines = [json.loads(line) for line in demo.EVAL_FILE.read_text().splitlines()[:EXAMPLES]]
    return total, sum(len(line["output"].encode()) for line in lines)


# Shown without being known ------------------------------------------------------------------------


def test_the_figures_are_those_of_stock_transformers(shown, tokenizer, tmp_path) -> None:
    qa.merge(shown.result.model, tmp_path, kind="dense")
    found = shown.metrics["evaluations"]["bits-per-byte"]["rate"]["values"]
    for name, path in (("unquantized", small_model()), ("tuned", tmp_path / "merged")):
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        nats, count = by_hand(stock, tokenizer)
        assert found[name] == pytest.approx(nats / math.log(2) / count, rel=1e-5)
        perplexity = shown.metrics["evaluations"]["perplexity"]
        tokens = perplexity["tokens"]["values"][name]
        assert perplexity["loss"]["values"][name] == pytest.approx(nats / tokens, rel=1e-5)
        assert perplexity["perplexity"]["values"][name] == pytest.approx(
            math.exp(nats / tokens), rel=1e-5
        )


def test_metrics_tell_unit_direction_and_a_value_for_each_model(shown) -> None:
    found = shown.metrics["evaluations"]
    assert list(found) == ["perplexity", "bits-per-byte"]
    rate = found["bits-per-byte"]["rate"]
    assert (rate["unit"], rate["better"]) == ("bits/byte", "lower")
    assert list(rate["values"]) == ["unquantized", "quantized", "tuned", "merged"]
    assert rate["values"]["tuned"] < rate["values"]["quantized"]
    assert shown.metrics["perplexity"] == found["perplexity"]["perplexity"]["values"]


def test_terminal_and_report_tell_figure_unit_and_direction(shown) -> None:
    tuned = shown.metrics["evaluations"]["bits-per-byte"]["rate"]["values"]["tuned"]
    four, three = f"{tuned:#.4g}", f"{tuned:.3g}"
    assert f"bits-per-byte rate tuned {four} bits/byte" in shown.text
    assert "bits-per-byte rate, bits/byte" in shown.text
    assert shown.text.count("lower is better") == 2
    assert "Bits-per-byte rate" in shown.page
    assert "On held-out data, in bits/byte; lower is better." in shown.page
    assert f"{three} bits/byte" in shown.page
    assert "<td>bytes, B</td>" in shown.page


def test_the_gain_that_a_merge_keeps_is_in_nats(shown) -> None:
    values = shown.metrics["perplexity"]
    base, tuned, merged = (math.log(values[name]) for name in ("quantized", "tuned", "merged"))
    kept = shown.metrics["merge"]["gain_kept"]
    assert kept == pytest.approx((base - merged) / (base - tuned), rel=1e-6)
    of_perplexities = (values["quantized"] - values["merged"]) / (
        values["quantized"] - values["tuned"]
    )
    assert abs(kept - of_perplexities) > 1e-3


def test_without_a_loss_no_gain_is_claimed() -> None:
    from quantadapt.folders.metrics import add_figures, losses

    metrics: dict[str, Any] = {"evaluations": {}}
    add_figures(metrics, "other", "tuned", {"loss": qa.Figure(3.0, "bits per byte", "lower")})
    assert losses(metrics) == {}
    add_figures(metrics, "another", "tuned", {"loss": qa.Figure(2.0, "nats per token", "lower")})
    assert losses(metrics) == {"tuned": 2.0}


# One that fails -----------------------------------------------------------------------------------


def test_one_that_fails_is_told_once_and_costs_nothing_else(shown) -> None:
    why = "it failed: RuntimeError: the judge does not answer, on the tuned model"
    assert shown.text.count(f"evaluation 'judge' is left out from here on: {why}") == 1
    assert shown.metrics["failed_evaluations"] == {"judge": why}
    assert f"judge: {why}" in shown.text
    assert "the judge does not answer" in shown.page
    assert (shown.result.folder / "adapter" / "adapter_model.safetensors").exists()
    assert shown.metrics["merge"]["kind"] == "requantize"


def test_the_adapter_is_saved_before_anything_measures_it(toy, tmp_path) -> None:
    broken = {"name": "broken", "returns": "interrupt"}
    with pytest.raises(KeyboardInterrupt):
        qa.run(spec(broken, backend="none", output=str(tmp_path / "run")))
    loaded = qa.load(tmp_path / "run")
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert all(p.any() for p in trained)
    assert trained
    assert "interrupted" in (tmp_path / "run" / "quantadapt-run.json").read_text()


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("nothing", "it returned {}, not figures by name"),
        ("number", "figure 'score': it is 1.0, no Figure"),
        ("text", "its value is 'high', no number"),
        ("direction", "better is 'more', not 'lower', 'higher' or empty"),
    ],
)
def test_what_is_no_figure_is_refused(toy, returns: str, message: str) -> None:
    evaluator = qa.plan(spec({"name": "broken", "returns": returns})).evaluators["broken"]
    with pytest.raises(PluginError, match=r"evaluation 'broken'") as refused:
        measure("broken", evaluator, torch.nn.Linear(1, 1), qa.Given(examples=[]))  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_values_of_tensors_become_numbers() -> None:
    class OfTensors(qa.Evaluator):
        def measure(self, model: Any, given: qa.Given) -> dict[str, qa.Figure]:
            value: Any = torch.tensor(1.5)
            counts: Any = (numpy.int64(4), torch.tensor(5))
            more = {"c": qa.Figure(counts[0]), "d": qa.Figure(counts[1])}
            return {"a": qa.Figure(value), "b": qa.Figure(3), **more}

    found = measure("t", OfTensors(), torch.nn.Linear(1, 1), qa.Given(examples=[]))  # type: ignore[arg-type]
    assert [figure.value for figure in found.values()] == [1.5, 3, 4, 5]
    assert [type(figure.value) for figure in found.values()] == [float, int, int, int]


def test_counts_are_whole_and_sizes_readable_wherever_they_are_told(capsys) -> None:
    """A count was `96.0000` beside figures with errors, and 3.894e+04 from 10,000 on."""
    figures = {"reward": qa.Figure(0.5, "", "higher", 0.1), "answers": qa.Figure(38942)}
    figures["size"] = qa.Figure(0.0123, "MiB")
    console = Console(width=100)
    _show(SimpleNamespace(out=console, err=console), "data", {"rewarded": figures})
    assert capsys.readouterr().out.splitlines() == [
        "rewarded reward 0.5000 ± 0.1",
        "rewarded answers 38,942",
        "rewarded size 12.6 KiB",
        "higher is better, on data",
    ]
    metrics: dict[str, Any] = {"evaluations": {}}
    add_figures(metrics, "counts", "quantized", {"tokens": qa.Figure(38942)})
    add_figures(metrics, "counts", "tuned", {"tokens": qa.Figure(38942)})
    assert "| counts tokens | 38,942 | 38,942 |" in _figures(metrics)
    shown = repr(RunResult(None, Path("run"), None, metrics))  # type: ignore[arg-type]
    assert "counts tokens 38,942 to 38,942" in shown
    assert [str(figure) for figure in figures.values()] == ["0.5", "38,942", "12.6 KiB"]
    assert str(qa.Figure(14000.0, "MiB")) == "13.7 GiB"


# Named, with options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        (["bits-per-bite"], "did you mean 'bits-per-byte'?"),
        ([{"name": "bits-per-byte", "frist": 3}], "did you mean 'first'?"),
        ([{"name": "bits-per-byte", "first": 0}], "evaluation.first: 0 is not possible"),
        (["perplexity", "perplexity"], "'perplexity' is named twice"),
        ([{"name": "bits-per-byte", "first": 2}] * 2, "with other options"),
        (["far"], "evaluation 'far' needs not-there-at-all"),
        (["gpu-judge"], "a CPU is too slow [rule judge-no-cpu]"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_the_plan(
    toy, evaluations: list[Any], message: str
) -> None:
    with pytest.raises(PlanRefused) as refused:
        qa.plan(spec(*evaluations, device="cpu"))
    assert message in str(refused.value)


def test_the_plan_tells_the_options(toy) -> None:
    made = qa.plan(spec("perplexity", {"name": "bits-per-byte", "first": 3}))
    assert made.to_dict()["evaluations"] == [
        {"name": "perplexity", "options": {}},
        {"name": "bits-per-byte", "options": {"first": 3}},
    ]
    again = qa.Spec.load(_written(made.spec.to_yaml()))
    assert qa.plan(again).evaluators == made.evaluators


def test_one_name_with_other_options_is_another_evaluation(toy, tmp_path) -> None:
    few, many = ({"name": "bits-per-byte", "first": count} for count in (1, 3))
    wanted = spec(
        "bits-per-byte", few, many, backend="none", export={"merge": "never"},
        output=str(tmp_path / "run"), train={"max_steps": 1},
    )  # fmt: skip
    assert [item["name"] for item in qa.plan(wanted).to_dict()["evaluations"]] == [
        "bits-per-byte"
    ] * 3
    found = qa.run(wanted)
    figures = found.metrics["evaluations"]
    assert list(figures) == ["bits-per-byte", "bits-per-byte (first=1)", "bits-per-byte (first=3)"]
    for name, count in (("bits-per-byte (first=1)", 1), ("bits-per-byte (first=3)", 3)):
        alone = qa.evaluate(
            found.model, evaluation="bits-per-byte", max_examples=EXAMPLES, first=count
        )
        assert figures[name]["rate"]["values"]["tuned"] == pytest.approx(alone["rate"])
    page = (found.folder / "report.html").read_text()
    assert "Bits-per-byte (first=3) rate" in page


def fails_in_two(folder: Path, plugins: Path) -> list[Any]:
    """Run with an evaluation that fails on the tuned model, in one of two processes."""
    import os

    sys.path.insert(0, str(plugins))
    os.environ["QUANTADAPT_PLUGINS"] = "none,toy"
    registry.cache_clear()
    wanted = spec(
        "judge", backend="none", device="cpu", output=str(folder / "run"), train={"max_steps": 1}
    )
    try:
        qa.run(wanted)
    except qa.QuantadaptError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", "was raised"]


@pytest.mark.slow
def test_one_that_fails_on_several_processes_ends_the_run_in_all(tmp_path) -> None:
    """Some may wait for others in it, so none goes on; what was trained is kept."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    install(plugins, "toy", TOY)
    for kind, text in in_processes(2, fails_in_two, tmp_path, tmp_path, plugins):
        assert kind == "PluginError"
        assert "evaluation 'judge': it failed with RuntimeError: the judge does not" in text
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "quantadapt-run.json").read_text())["state"] == "failed"
    assert (run / "report.html").exists()


def _written(text: str) -> Path:
    path = Path("spec.yaml")
    path.write_text(text)
    return path


def test_a_single_name_will_do_and_none_measures_nothing(toy) -> None:
    assert [*qa.plan(qa.Spec(evaluate={"evaluations": "judge"})).evaluators] == ["judge"]
    assert qa.plan(spec()).evaluators == {}
    with pytest.raises(SpecError, match="evaluations"):
        qa.Spec(evaluate={"evaluations": 3})


def test_two_of_one_name_clash(toy, tmp_path, monkeypatch) -> None:
    again = TOY.replace("broken", "flawed").replace('"far"', '"farther"')
    install(tmp_path, "other", again.replace('"gpu-judge"', '"g"').replace('"judge"', '"j"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "none,toy,other")
    registry.cache_clear()
    try:
        with pytest.raises(PlanRefused) as refused:
            qa.plan(spec("bits-per-byte"))
        assert qa.plan(spec("perplexity", backend="none")).evaluators
    finally:
        monkeypatch.undo()
        registry.cache_clear()
    clash = "the evaluation name 'bits-per-byte' is claimed by "
    assert clash in str(refused.value)
    for plugin in ("toy (toy-evaluations 1.0)", "other (other-evaluations 1.0)"):
        assert plugin in str(refused.value)


def test_a_class_that_cannot_measure_is_told_when_it_is_loaded() -> None:
    from quantadapt.registry.checks import contents

    class Plugin:
        @qa.hookimpl
        def quantadapt_evaluations(self) -> list[qa.Evaluation]:
            return [qa.Evaluation("idle", "does nothing", qa.Evaluator)]

    with pytest.raises(PluginError, match="evaluation 'idle': Evaluator lacks measure"):
        contents(Plugin(), "plugin")


# From the command line and from Python ------------------------------------------------------------


def test_eval_measures_what_is_named(shown, capsys, tokenizer) -> None:
    output = str(shown.result.folder)
    options = ["--max-examples", str(EXAMPLES), "--evaluation", "perplexity"]
    options += ["--evaluation", "bits-per-byte", "--set", "bits-per-byte.first=2", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", output, *options])
    found = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    rate = found["evaluations"]["bits-per-byte"]["rate"]
    part = qa.evaluate(
        shown.result.model, evaluation="bits-per-byte", max_examples=EXAMPLES, first=2
    )
    assert rate == {"value": pytest.approx(part["rate"]), "unit": "bits/byte", "better": "lower"}
    whole = shown.metrics["evaluations"]["bits-per-byte"]["rate"]["values"]["tuned"]
    assert abs(part["rate"] - whole) > 1e-6
    tuned = shown.metrics["perplexity"]["tuned"]
    assert found["evaluations"]["perplexity"]["perplexity"]["value"] == pytest.approx(tuned)


def test_eval_prints_figures_with_unit_and_direction(shown, capsys) -> None:
    options = ["--max-examples", str(EXAMPLES), "--evaluation", "bits-per-byte"]
    with pytest.raises(SystemExit):
        cli.main(["eval", str(shown.result.folder), *options])
    printed = capsys.readouterr()
    tuned = shown.metrics["evaluations"]["bits-per-byte"]["rate"]["values"]["tuned"]
    assert printed.out == f"bits-per-byte rate {tuned:.4f} bits/byte\n"
    assert printed.err.splitlines()[-1].startswith("lower is better; bytes ")
    assert ", on what the run held out" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluation", "bits-per-bite"], "did you mean 'bits-per-byte'?"),
        (["--set", "perplexity.lines=3"], "evaluation 'perplexity' has no option 'lines'"),
        (["--set", "perplexiti.lines=3"], "did you mean 'perplexity'?"),
        (["--set", "perplexity=3"], "write NAME.OPTION=VALUE"),
    ],
)
def test_eval_refuses_before_it_loads_anything(
    toy, capsys, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "nowhere", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_perplexity_from_python_is_as_it_was() -> None:
    model = qa.quantize(None, "none", device="cpu")
    found = qa.evaluate(model, max_examples=2)
    assert list(found) == ["perplexity", "loss", "tokens"]
    assert math.log(found["perplexity"]) == pytest.approx(found["loss"])
    assert isinstance(found["tokens"], int)
    with pytest.raises(PlanRefused, match="did you mean 'perplexity'"):
        qa.evaluate(model, evaluation="perplexty")
