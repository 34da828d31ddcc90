"""A merge that is quantized again says what it keeps of the gain, and is refused if that is little.

Gains are computed here from plain logits of transformers' forward, in float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merging import (
    ADAPTERS,
    HELD_OUT,
    classifier,
    gpt2,
    llama,
    logits,
    moved,
    relative,
    seq2seq,
    tuned,
)
from parameters import slow_but
from transformers.pytorch_utils import Conv1D

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.errors import DataError, MergeRefused, PlanRefused, SpecError
from quantadapt.evaluation import Gain, TokenLosses, token_losses
from quantadapt.evaluation.held_out import held_out_data
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.rounding import AUTO, WAYS, rounded
from quantadapt.exporting.stage import export, write
from quantadapt.exporting.tuned import Tuned
from quantadapt.facade import linear_facades
from quantadapt.folders.run_folder import MARKER
from quantadapt.paths import MANIFEST
from quantadapt.planning.exports import export_of
from quantadapt.quantizing.examples import choose
from quantadapt.spec import Rounding
from quantadapt.testing.small_demo import small_model

WAYS_WITH_GRID = ("grid", "dithered", "compensated")
TRAIN = {"max_steps": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
"""On hqq with 4 bits, this moves weights less than its steps."""
NEAREST = {"rounding": "nearest"}
"""Which takes that away again."""


@torch.no_grad()
def nats(model: Any, data: Dataset) -> list[list[float]]:
    """The loss at each completion token of each example, one example at a time."""
    found = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].double()
        kept = torch.tensor(row["completion_mask"][1:]).bool()
        found.append((-logits.log_softmax(-1))[kept, ids[0, 1:][kept]].tolist())
    return found


def mean(losses: list[list[float]]) -> float:
    flat = [loss for example in losses for loss in example]
    return sum(flat) / len(flat)


@pytest.fixture(scope="module")
def trained() -> Any:
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "lora")
    qa.train(model, **TRAIN, verbose=False)
    return model


@pytest.fixture(scope="module")
def data(trained) -> Dataset:
    return held_out_data(None, trained.quantadapt.tokenizer).select(range(12))


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    qa.save(trained, folder)
    return folder


@pytest.fixture(scope="module")
def written(trained, data, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A merge that takes whatever is kept."""
    folder = tmp_path_factory.mktemp("written")
    given = {"data": data, "min_gain": 0, **NEAREST}
    return qa.merge(trained, folder, kind="requantize", **given), folder / "merged"


def test_the_gain_is_that_of_plain_losses(trained, data, written) -> None:
    found, merged = written
    base = qa.quantize(str(small_model()), "hqq")
    losses = [nats(model, data) for model in (base, trained, qa.load(merged))]
    before, after, kept = map(mean, losses)
    assert found["gain"] == pytest.approx(before - after, abs=1e-6)
    assert found["gain_kept"] == pytest.approx((before - kept) / (before - after), abs=1e-5)
    assert found["gain"] > 0.3
    assert found["gain_kept"] < 0.5
    assert 0 < found["gain_error"] < found["gain"] / 4


def test_too_little_is_refused_and_nothing_written(trained, data, written, tmp_path) -> None:
    with pytest.raises(MergeRefused, match="quantized again, the model keeps") as refused:
        qa.merge(trained, tmp_path, kind="requantize", data=data, **NEAREST)
    (problem,) = refused.value.problems
    assert problem.rule == "merge-keeps-the-gain"
    assert f"keeps {written[0]['gain_kept']:.0%} of the gain" in problem.what
    assert "less than 90%" in problem.what
    for way in ("--kind dense", "--onto", "beside the base", "min_gain"):
        assert way in problem.fix
    assert refused.value.figures["gain_kept"].value == written[0]["gain_kept"]
    assert list(tmp_path.iterdir()) == []


def test_a_lower_min_gain_takes_it(trained, data, written, tmp_path) -> None:
    less = written[0]["gain_kept"] - 0.001
    given = {"data": data, "min_gain": max(less, 1e-9), **NEAREST}
    found = qa.merge(trained, tmp_path, kind="requantize", **given)
    assert found["gain_kept"] == written[0]["gain_kept"]
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_dense_merge_keeps_all(trained, data, written, tmp_path) -> None:
    found = qa.merge(trained, tmp_path, data=data)
    assert found["gain_kept"] == pytest.approx(1, abs=1e-4)
    assert found["gain"] == written[0]["gain"]


def test_the_command_refuses_it_too(folder, tmp_path, capsys) -> None:
    lines = demo.EVAL_FILE.read_text().splitlines()[:8]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    command = ["merge", folder, "--kind", "requantize", "--data", tmp_path / "some.jsonl"]

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in (*command, *arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((out + err).split())

    code, said = call("--output", tmp_path / "out", "--rounding", "nearest")
    assert code == 2
    assert "less than 90%; rounding nearest [rule merge-keeps-the-gain]" in said
    assert not (tmp_path / "out" / "merged").exists()
    code, said = call("--output", tmp_path / "out")
    assert (code, " of the gain of " in said) == (0, True), said
    assert "rounding dithered (keeping: nearest" in said
    for wrong in (2, -0.1, "nan"):
        code, said = call("--output", tmp_path / "new", "--min-gain", wrong)
        assert (code, "export.min_gain" in said) == (2, True)


def test_a_run_ends_well_and_tells_it(tmp_path) -> None:
    spec = qa.Spec(
        model=str(small_model()),
        backend="hqq",
        train=TRAIN,
        evaluate={"max_examples": 12, "samples": 0, "unquantized": False},
        export={"merge": "requantize", **NEAREST},
        output=str(tmp_path / "run"),
    )
    result = qa.run(spec, verbose=False)
    entry = result.metrics["exports"]["merged-requantized"]
    assert (entry["state"], entry["refusals"][0]["rule"]) == ("refused", "merge-keeps-the-gain")
    assert result.metrics["merge"]["kind"] == "refused"
    kept = result.metrics["merge"]["gain_kept"]
    assert kept == entry["figures"]["gain_kept"]["value"]
    assert kept < 0.9
    assert "merged" not in result.metrics["evaluations"]["perplexity"]["loss"]["values"]
    losses = result.metrics["evaluations"]["perplexity"]["loss"]["values"]
    gain = entry["figures"]["gain"]["value"]
    assert gain == pytest.approx(losses["quantized"] - losses["tuned"], abs=1e-6)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "merged").exists()
    assert json.loads((tmp_path / "run" / MARKER).read_text())["state"] == "finished"
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"keeps {kept:.0%} of the gain" in report
    assert "Way out:" in report
    # with more of the same, from its folder
    planned = export_of("merged-requantized", {"min_gain": 0})
    few = lambda own: held_out_data(None, own).select(range(12))  # noqa: E731
    again = Tuned(saved=tmp_path / "run" / "adapter", data=few)
    written, error = export(planned, again, tmp_path / "again")
    assert (written["state"], error) == ("written", None)


# What cannot be told --------------------------------------------------------------------------


def test_a_gain_that_may_be_chance_refuses_nothing(tmp_path) -> None:
    model = tuned(llama(tmp_path / "base", tied=False), "hqq", r=2)
    planned = export_of("merged-requantized", {"min_gain": 1})
    entry, error = export(planned, Tuned(model, data=lambda _: HELD_OUT), tmp_path / "run")
    assert (entry["state"], error) == ("written", None)
    gain, off = (entry["figures"][name]["value"] for name in ("gain", "gain_error"))
    assert gain < 2 * off
    assert ("too small here to tell" in entry["words"]) == (gain >= 1e-4)
    assert ("no gain in perplexity" in entry["words"]) == (gain < 1e-4)
    assert " of the gain of " not in entry["words"]


def test_what_predicts_no_tokens_has_no_gain(tmp_path) -> None:
    model = tuned(classifier(tmp_path / "base"), "hqq")
    found = qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT)
    assert set(found) == {"kind", "rounding", "error"}


@pytest.mark.parametrize(
    ("losses", "examples", "error"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1], 0.0),
        ([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], math.sqrt(1 / 3) / 2),
        ([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1], 0.5),  # tokens of an example go together
        ([1.0, 1.0, 0.0], [0, 0, 2], 2 / 3 * math.sqrt(2) * math.sqrt(2) / 3),  # 1 says nothing
        ([0.5], [0], math.inf),
    ],
)
def test_the_standard_error_of_a_gain(losses, examples, error) -> None:
    tuned = TokenLosses(torch.zeros(len(losses), dtype=torch.float64), torch.tensor(examples))
    base = TokenLosses(torch.tensor(losses, dtype=torch.float64), torch.tensor(examples))
    gain = Gain.between(base, tuned)
    assert gain.value == pytest.approx(sum(losses) / len(losses))
    assert gain.error == pytest.approx(error)
    assert gain.is_sure == (gain.value > 2 * error)


def test_the_error_is_what_resampling_examples_finds() -> None:
    """Where tokens of an example go together; reference: a bootstrap over examples."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (60,), generator=generator)
    shared = 0.3 + 0.4 * torch.randn(60, generator=generator, dtype=torch.float64)
    examples = torch.arange(60).repeat_interleave(lengths)
    noise = 0.2 * torch.randn(len(examples), generator=generator, dtype=torch.float64)
    base = TokenLosses(shared[examples] + noise, examples)
    gain = Gain.between(base, TokenLosses(torch.zeros_like(noise), examples))
    sums = torch.zeros(60, dtype=torch.float64).index_add_(0, examples, base.nats)
    drawn = torch.randint(60, (4000, 60), generator=generator)
    means = sums[drawn].sum(1) / lengths[drawn].sum(1)
    assert gain.error == pytest.approx(float(means.std()), rel=0.08)


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}],
    ids=["pissa", "biases", "whole-head"],
)
def test_the_base_is_the_one_before_the_adapter(tmp_path, options) -> None:
    """Also where the adapter's start, or training, has changed what PEFT calls the base."""
    source = llama(tmp_path / "base", tied=False)
    bits = {"bits": 8, "group_size": 32}
    expected = token_losses(qa.quantize(source, "hqq", **bits), HELD_OUT).mean
    model = tuned(source, "hqq", **options)
    found = Tuned(model, data=lambda _: HELD_OUT).gain
    assert found.value == pytest.approx(expected - mean(nats(model, HELD_OUT)), abs=1e-5)


def test_losses_are_those_of_transformers_forward(trained, data) -> None:
    found, expected = token_losses(trained, data), nats(trained, data)
    by_length = sorted(expected, key=len)
    lengths = found.examples.bincount().tolist()
    assert sorted(lengths) == [len(losses) for losses in by_length]
    assert sorted(found.nats.tolist()) == pytest.approx(
        sorted(loss for losses in expected for loss in losses), abs=1e-5
    )


# Ways to round --------------------------------------------------------------------------------


def test_there_is_a_way_for_each_word() -> None:
    from typing import get_args

    assert {"auto", *WAYS} == set(get_args(Rounding))


@pytest.mark.parametrize("way", slow_but((*WAYS_WITH_GRID, "refined"), "dithered"))
def test_ways_keep_the_scales_of_the_base(way, trained, data, tmp_path) -> None:
    """What they keep is again that of plain losses, of the files."""
    shown = str(demo.TRAIN_FILE)
    given = {"data": data, "calibration": shown, "min_gain": 0, "rounding": way}
    found = qa.merge(trained, tmp_path, kind="requantize", **given)
    merged, base = qa.load(tmp_path / "merged"), qa.quantize(str(small_model()), "hqq")
    for name, facade in linear_facades(merged):
        scales, before = (m.get_submodule(name).vendor.meta for m in (merged, base))
        assert torch.equal(scales["scale"], before["scale"])
        assert torch.equal(scales["zero"], before["zero"])
        assert facade.has_grid
    before, after, kept = (mean(nats(model, data)) for model in (base, trained, merged))
    assert found["gain_kept"] == pytest.approx((before - kept) / (before - after), abs=1e-5)
    assert found["gain_kept"] > {"grid": -0.1, "compensated": 0.6}.get(way, 0.9)
    assert json.loads((tmp_path / "merged" / "quantadapt.json").read_text())["rounding"] == {
        "way": way,
        "kept": {},
        "left_out": {},
    }


@pytest.mark.parametrize("way", slow_but(WAYS_WITH_GRID, "dithered"))
@pytest.mark.parametrize(
    ("kind", "adapter", "options"),
    [
        ("tied", "lora", ADAPTERS["head"]),
        ("untied", "lora", ADAPTERS["whole-linear"]),
        ("untied", "dora", {}),
        ("untied", "ia3", {}),
        ("gpt2", "lora", {}),
        ("t5", "lora", {}),
    ],
    ids=["tied-head", "whole", "dora", "ia3", "conv1d", "encoder-decoder"],
)
def test_ways_on_models_of_all_kinds(way, kind, adapter, options, tmp_path) -> None:
    """In 8 bits all of them come near; of the files, and in the dtype of the base."""
    folder = tmp_path / "base"
    made = {"gpt2": lambda: gpt2(folder), "t5": lambda: seq2seq(folder, "t5")}
    source = made[kind]() if kind in made else llama(folder, tied=kind == "tied")
    model = qa.quantize(source, "hqq", bits=8, group_size=32)
    model = moved(qa.attach(model, adapter, **options), by=0.01)  # within what the scales allow
    before = logits(model)
    shown = [{"input_ids": ids[None]} for ids in torch.randint(5, 2000, (6, 40))]
    given = {"data": HELD_OUT, "calibration": shown, "min_gain": 0, "rounding": way}
    qa.merge(model, tmp_path, kind="requantize", **given)
    near(qa.load(tmp_path / "merged"), merged_model(model, "dense"))
    assert torch.equal(logits(model), before)


def near(merged: Any, dense: Any) -> None:
    """Quantized weights are those of the dense model, but for a few steps of 8 bits."""
    wanted = dense.state_dict()
    found = dict(linear_facades(merged))
    assert len(found) >= 8
    for name, facade in found.items():
        weight = wanted[f"{name}.weight"]
        transposed = isinstance(dense.get_submodule(name), Conv1D)
        assert relative(facade.dequantize(), weight.T if transposed else weight) < 0.05, name


def test_16_bits_stay_16_bits_and_take_small_changes(tmp_path) -> None:
    """A change is rounded from float32: in bfloat16 a twentieth of a step would be lost before."""
    model = qa.quantize(
        llama(tmp_path / "base", tied=False), "hqq", dtype="bfloat16", bits=8, group_size=32
    )
    model = moved(qa.attach(model, "lora", r=4, bias="all"))
    name = "model.layers.0.mlp.down_proj"
    layer: Any = model.get_base_model().get_submodule(name)
    facade, change = layer.base_layer, layer.get_delta_weight("default").float()
    step = facade.target.grid(facade.vendor).scale.float().mean()
    with torch.no_grad():
        layer.lora_B["default"].weight *= step / 20 / change.square().mean().sqrt()
        change, start = layer.get_delta_weight("default").float(), facade.dequantize().float()
    lost = (start + change).bfloat16().float() - start
    assert float((lost * change).sum() / change.square().sum()) < 0.7
    given = {"data": HELD_OUT, "min_gain": 0, "rounding": "dithered"}
    qa.merge(model, tmp_path, kind="requantize", **given)
    merged = qa.load(tmp_path / "merged")
    floating = [v for v in merged.state_dict().values() if torch.is_floating_point(v)]
    assert {value.dtype for value in floating} == {torch.bfloat16}
    found = merged.get_submodule(name).dequantize().float() - start
    assert float((found * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.3)


class Measured(Tuned):
    """One whose ways keep what is given here."""

    shares: dict[str, float]

    def gain_kept(self, merged: Any) -> float:
        return self.shares[merged]


@pytest.mark.parametrize(
    ("least", "shares", "tried"),
    [
        (0.9, {"nearest": 0.96}, 1),
        (0.9, {"nearest": 0.04, "dithered": 0.98}, 2),
        (0.9, {"nearest": 0.91, "dithered": 0.92, "refined": 0.99}, 3),
        (0.9, {"nearest": 0.04, "dithered": 0.93, "refined": 0.92}, 3),
        (0.99, {"nearest": 0.04, "dithered": 0.96, "refined": 0.97, "compensated": 0.5}, 4),
        (0, {"nearest": 0.04, "dithered": 0.5, "refined": 0.7}, 3),
        (0.9, {"nearest": 0.04, "dithered": 0.5, "refined": 0.6, "compensated": 0.7}, 4),
    ],
)
def test_auto_takes_the_best_and_no_more_time_than_it_has_to(
    least, shares, tried, trained, data, monkeypatch
) -> None:
    for way in WAYS:
        same = dataclasses.replace(WAYS[way], why_not=lambda _: "", make=lambda _, way=way: way)
        monkeypatch.setitem(WAYS, way, same)
    tuned = Measured(trained, data=lambda _: data)
    object.__setattr__(tuned, "shares", shares)
    found = rounded(tuned, "auto", least)
    assert [*found.kept] == [*shares][:tried]
    assert found.way == found.model == max(shares, key=shares.__getitem__)


def test_the_first_way_that_keeps_enough_is_taken(trained, data, written, tmp_path) -> None:
    found = qa.merge(trained, tmp_path, kind="requantize", data=data)
    assert found["rounding"] == "dithered"
    assert found["kept_nearest"] == pytest.approx(written[0]["gain_kept"], abs=1e-5)
    assert found["kept_dithered"] == pytest.approx(found["gain_kept"], abs=1e-5)
    assert found["gain_kept"] >= 0.9


def test_where_none_keeps_enough_the_best_is_told(trained, data, tmp_path) -> None:
    with pytest.raises(MergeRefused, match="compensated was left out: it needs data") as refused:
        qa.merge(trained, tmp_path, kind="requantize", data=data, min_gain=1)
    assert "rounding dithered (keeping: nearest" in str(refused.value)


def test_data_that_no_way_can_use_cost_no_merge(trained, data) -> None:
    """As of an objective whose examples are pairs: the ways that need none are tried all the same,
    and why the other was not is told."""
    pairs = Dataset.from_dict({"chosen_ids": [[1, 2, 3]]})
    tuned = Tuned(trained, data=lambda _: data, examples=lambda _: choose(pairs))
    found = rounded(tuned, "auto", 1.0)
    assert list(found.kept) == ["nearest", "dithered"]
    assert found.way == "dithered"
    assert "no column input_ids" in found.left_out["compensated"]


def test_a_way_that_memory_does_not_suffice_for_is_left_out(trained, data, monkeypatch) -> None:
    def too_large(tuned: Tuned) -> None:
        raise torch.OutOfMemoryError

    small = dataclasses.replace(WAYS["compensated"], why_not=lambda _: "", make=too_large)
    monkeypatch.setitem(WAYS, "compensated", small)
    tuned = Tuned(trained, data=lambda _: data)
    found = rounded(tuned, "auto", 1.0)
    assert (found.way, [*found.left_out]) == ("dithered", ["refined", "compensated"])
    for way in (*AUTO[0], *AUTO[1]):
        monkeypatch.setitem(WAYS, way, small)
    with pytest.raises(MergeRefused, match=r"GPU is too small(.|\n)*--device cpu"):
        rounded(tuned, "auto", 1.0)


@pytest.mark.parametrize("given", [{"rounding": "best"}, {"rounding": 4}, {"rounding": None}])
def test_ways_that_are_none(given, trained, data, tmp_path) -> None:
    with pytest.raises(PlanRefused, match=r"export.rounding: .*(.|\n)*'nearest', 'grid'"):
        qa.merge(trained, tmp_path, kind="requantize", data=data, **given)
    with pytest.raises(SpecError, match=r"export.rounding"):
        qa.Spec(export={"merge": "requantize", **given})


def test_a_way_without_data_or_grid(trained, data, tmp_path) -> None:
    with pytest.raises(MergeRefused, match=r"needs data(.|\n)*--calibration FILE"):
        qa.merge(trained, tmp_path, kind="requantize", data=data, rounding="compensated")
    wanted = qa.Spec(backend="none", export={"merge": "requantize", "rounding": "dithered"})
    with pytest.raises(PlanRefused, match=r"rounding-grid"):
        qa.plan(wanted)
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    with pytest.raises(MergeRefused, match="not known what values"):
        qa.merge(model, tmp_path, kind="requantize", data=data, rounding="grid")


# What is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [2, -0.5, math.nan, math.inf, "much", True])
def test_values_that_are_no_share(wrong, folder, tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    with pytest.raises(PlanRefused, match=r"export.min_gain"):
        qa.merge(model, tmp_path, kind="requantize", min_gain=wrong)
    with pytest.raises(SpecError, match=r"export.min_gain"):
        qa.Spec(export={"merge": "requantize", "min_gain": wrong})


def test_it_has_to_have_an_effect(tmp_path) -> None:
    for export_ in ({"min_gain": 0.5}, {"merge": "never", "min_gain": 0.5}):
        with pytest.raises(PlanRefused, match=r"export.min_gain: it has no effect"):
            qa.plan(qa.Spec(export=export_, output=str(tmp_path)))
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    with pytest.raises(PlanRefused, match="has no option 'min_gain'"):
        qa.merge(model, tmp_path, min_gain=0.5)


AGAIN = {"content": "requantized"}
EXPORTS_WITH_CONTENT = [
    {"name": "hub", "repo": "me/it", "dry_run": True},
    {"name": "vllm"},
]


@pytest.mark.parametrize("export", EXPORTS_WITH_CONTENT)
def test_exports_with_content_round_as_they_are_told(export, tmp_path) -> None:
    """The spec's word holds for them where they say nothing themselves."""
    general = {"merge": "never", "rounding": "dithered", "min_gain": 0.5}
    for own, meant in (({}, "dithered"), ({"rounding": "grid"}, "grid")):
        told = {**general, "formats": [export | AGAIN | own]}
        spec = qa.Spec(backend="bnb-nf4", export=told, output=str(tmp_path))
        options = qa.plan(spec).exports[-1].to_dict()["options"]
        assert (options["rounding"], options["min_gain"]) == (meant, 0.5)


@pytest.mark.parametrize("export", EXPORTS_WITH_CONTENT)
def test_what_quantizes_nothing_again_rounds_nothing(export, tmp_path) -> None:
    for wrong, value in (("rounding", "dithered"), ("min_gain", 0.5)):
        options = {wrong: value}
        for general, own in (({}, options), (options, {})):
            one = export | {"content": "merged"} | own
            spec = {"merge": "never", "formats": [one], **general}
            with pytest.raises(PlanRefused, match=f"export.{wrong}: it has no effect"):
                qa.plan(qa.Spec(export=spec, output=str(tmp_path)))


def test_a_plan_refuses_a_rounding_without_a_grid_in_all_exports(tmp_path) -> None:
    for one in EXPORTS_WITH_CONTENT:
        formats = [one | AGAIN | {"rounding": "dithered"}]
        spec = qa.Spec(backend="none", export={"merge": "never", "formats": formats})
        with pytest.raises(PlanRefused, match="rounding-grid"):
            qa.plan(spec)


def test_an_export_with_content_rounds_in_the_way_that_it_names(trained, data, tmp_path) -> None:
    planned = export_of("hub", {"repo": "me/it", "dry_run": True, "rounding": "dithered", **AGAIN})
    write(planned.exporter, Tuned(trained, data=lambda _: data), tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["rounding"]["way"] == "dithered"


@pytest.mark.parametrize(
    "export_",
    [
        {"merge": "requantize", "min_gain": 0.5},
        {"merge": "never", "formats": ["merged-requantized"], "min_gain": 0.5},
        {"merge": "never", "formats": [{"name": "merged-requantized", "min_gain": 0.5}]},
        {"merge": "requantize", "formats": [{"name": "merged-requantized", "min_gain": 0.5}]},
    ],
)
def test_it_is_planned(export_, tmp_path) -> None:
    made = qa.plan(qa.Spec(export=export_, output=str(tmp_path)))
    assert made.exports[-1].to_dict()["options"]["min_gain"] == 0.5


def test_data_without_a_token_to_predict(trained, tmp_path) -> None:
    silent = Dataset.from_dict({"input_ids": [[5, 6, 7]], "completion_mask": [[1, 0, 0]]})
    with pytest.raises(DataError, match="hold no token to predict"):
        qa.merge(trained, tmp_path, kind="requantize", data=silent)
    empty = Dataset.from_dict({"input_ids": [], "completion_mask": []})
    with pytest.raises(DataError, match="hold no token to predict"):
        qa.merge(trained, tmp_path, data=empty)
