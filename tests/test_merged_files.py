"""What a merge writes is the adapter, as transformers alone loads it from the files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from few_rows import few_rows
from merging import (
    ADAPTERS,
    HELD_OUT,
    classifier,
    gpt2,
    llama,
    logits,
    moved,
    neox,
    relative,
    seq2seq,
    stock,
    stock_adapter,
    tuned,
)
from parameters import slow_but

import quantadapt as qa
from quantadapt.adapting.stage import UnmergeableWarning
from quantadapt.errors import MergeRefused, ModelError, PlanRefused
from quantadapt.facade import QuantLinear
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request, tmp_path_factory) -> str:
    return llama(tmp_path_factory.mktemp("base"), tied=request.param == "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """For what has nothing to do with ties."""
    return llama(tmp_path_factory.mktemp("untied"), tied=False)


def on_bases(
    name: str, cases: Iterable[Any], tied: Iterable[Any], quick: Collection[Any] | None = None
) -> pytest.MarkDecorator:
    """Every case on an untied base; on a tied one as well those that a tie may change. By default
    those that are `quick`, all others with the slow ones."""
    pairs = [("untied", case) for case in cases] + [("tied", case) for case in tied]
    return pytest.mark.parametrize(
        ("base", name),
        [
            pytest.param(
                *pair, marks=[pytest.mark.slow] * (quick is not None and pair[1] not in quick)
            )
            for pair in pairs
        ],
        indirect=["base"],
    )


TIES = [name for name in ADAPTERS if {"head", "embedding", "both", "tokens"} & {*name.split("-")}]
HALF = tuple(ADAPTERS)[::2]
"""By default each kind of adapter is merged in one of two ways."""


def tied_in_config(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def merged(model, kind, base, folder) -> None:
    if kind == "onto":
        qa.merge_onto(model, base, folder, data=HELD_OUT)
    else:
        qa.merge(model, folder, kind=kind, data=HELD_OUT)


@on_bases("adapter", ADAPTERS, TIES, HALF)
def test_dense(base, adapter, tmp_path) -> None:
    model = tuned(base, "hqq", **ADAPTERS[adapter])
    expected = logits(model)
    found = qa.merge(model, tmp_path, data=HELD_OUT)
    assert found["kl"] < 1e-6
    loaded = stock(tmp_path / "merged")
    assert relative(logits(loaded), expected) < 1e-5
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied_in_config(tmp_path / "merged") == shared


@on_bases(
    "adapter",
    ["tokens-named", "whole-linear", "biases", "head"],
    ["tokens", "head"],
    ["tokens-named", "whole-linear", "tokens"],
)
def test_quantized_again(base, adapter, tmp_path) -> None:
    model = tuned(base, "hqq", **ADAPTERS[adapter])
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT)
    assert relative(logits(qa.load(tmp_path / "merged")), logits(model)) < 0.02


@on_bases("adapter", ADAPTERS, TIES, ADAPTERS.keys() - HALF)
def test_onto_the_base(base, adapter, tmp_path) -> None:
    saved = qa.save(tuned(base, **ADAPTERS[adapter]), tmp_path)
    found = qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)
    assert found["kl"] < 1e-6
    expected = logits(stock_adapter(base, saved))
    assert relative(expected, logits(stock(base))) > 0.01
    assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5


def test_only_what_is_still_equal_stays_tied(tmp_path) -> None:
    base = llama(tmp_path / "base", tied=True)
    for adapter, stays in {"tokens": True, "whole-both-tied": True, "head": False}.items():
        model = tuned(base, **ADAPTERS[adapter])
        for kind in ("dense", "onto"):
            folder = tmp_path / f"{adapter}-{kind}"
            merged(model, kind, base, folder)
            assert tied_in_config(folder / "merged") is stays


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [105, 106]},
    ],
    ids=["layers", "whole-head", "tokens"],
)
def test_encoder_decoders(name, options, tmp_path) -> None:
    """They tie an embedding with two others and the head."""
    base = seq2seq(tmp_path / "base", name)
    model = tuned(base, r=4, **options)
    expected = logits(model)
    for kind in ("dense", "onto"):
        merged(model, kind, base, tmp_path / kind)
        assert relative(logits(stock(tmp_path / kind / "merged")), expected) < 1e-5


@pytest.mark.parametrize("backend", slow_but(["none", "hqq"], "hqq"))
@pytest.mark.parametrize("whole", slow_but(["mlp", "c_proj", "h.1"], "c_proj", "h.1"))
def test_layers_of_gpt2_that_are_trained_whole(backend, whole, tmp_path) -> None:
    """The adapter holds them as GPT-2 does, transposed; of square ones no shape would tell."""
    base = gpt2(tmp_path / "base")
    options = {"target_modules": ["h.0.attn.c_attn"], "modules_to_save": [whole]}
    model = tuned(base, backend, **options)
    saved = qa.save(model, tmp_path / "run")
    read = {k: v for k, v in stock_adapter(base, saved).named_parameters() if "_to_save" in k}
    for name, parameter in model.named_parameters():
        if "_to_save" in name:
            torch.testing.assert_close(read[name], parameter, rtol=0, atol=0)
    expected = logits(model)
    assert relative(logits(qa.load(saved)), expected) < 1e-5
    merged(model, "dense", base, tmp_path)
    assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5
    merged(saved, "onto", base, tmp_path / "onto")
    loaded = logits(stock(tmp_path / "onto" / "merged"))
    assert relative(loaded, logits(stock_adapter(base, saved))) < 1e-5


def test_a_base_whose_files_have_other_names(tmp_path) -> None:
    base = neox(tmp_path / "base")
    saved = qa.save(tuned(base), tmp_path)
    merged(saved, "onto", base, tmp_path)
    expected = logits(stock_adapter(base, saved))
    assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5


def test_a_classifier_is_merged_and_checked_by_what_it_answers(tmp_path, monkeypatch) -> None:
    """Its head is trained whole, and it predicts no tokens."""
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from transformers import AutoModelForSequenceClassification as Classifier

    base = classifier(tmp_path / "base")
    model = tuned(base)
    saved, expected = qa.save(model, tmp_path), logits(model)
    by_peft = PeftModel.from_pretrained(Classifier.from_pretrained(base), str(saved))
    assert relative(logits(by_peft), expected) < 1e-5
    with pytest.raises(ModelError, match="as a classifier does, and predicts no tokens"):
        qa.evaluate(model, HELD_OUT)
    for kind in ("dense", "onto"):
        merged(model, kind, base, tmp_path / kind)
        files = Classifier.from_pretrained(tmp_path / kind / "merged")
        assert relative(logits(files), expected) < 1e-5
    monkeypatch.setattr(Linear, "merge", lambda self, **kwargs: None)
    for kind in ("dense", "onto"):
        with pytest.raises(ModelError, match="does not answer as the adapter: a relative error"):
            merged(model, kind, base, tmp_path / "lost")


# Several adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [True, False])
def test_the_active_adapter_is_merged_whatever_its_name(base, live, tmp_path) -> None:
    model = tuned(base, target_modules=["q_proj"])
    other = qa.attach(qa.quantize(base, "none"), "lora", target_modules=["down_proj"], r=2)
    model.add_adapter("other", other.peft_config["default"])
    model.set_adapter("other")
    expected = logits(moved(model))
    saved = model if live else qa.save(model, tmp_path)
    qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)
    assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5
    qa.merge(model, tmp_path / "dense", data=HELD_OUT)
    assert relative(logits(stock(tmp_path / "dense" / "merged")), expected) < 1e-5
    if not live:
        assert relative(logits(stock_adapter(base, saved)), expected) < 1e-5
        again = qa.load(saved)
        assert again.active_adapters == ["other"]
        assert relative(logits(again), expected) < 1e-5


def test_two_active_adapters_and_one_that_is_not(base, tmp_path) -> None:
    model = tuned(base, target_modules=["q_proj"])
    for name in ("second", "idle"):
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
        moved(model)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    saved = qa.save(model, tmp_path)
    assert relative(logits(qa.load(saved)), expected) < 1e-5
    qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)
    qa.merge(model, tmp_path / "dense", data=HELD_OUT)
    for folder in (tmp_path, tmp_path / "dense"):
        assert relative(logits(stock(folder / "merged")), expected) < 1e-5


# Starts that rewrite the base --------------------------------------------------------------------


@on_bases(
    "start",
    ["pissa", "olora", "orthogonal"],
    ["pissa_niter_4", "gaussian"],
    ["olora", "pissa_niter_4"],
)
@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_starts_are_merged_into_their_own_base(base, backend, start, tmp_path) -> None:
    """Live, and from the files of a run."""
    model = tuned(base, backend, r=4, init_lora_weights=start)
    expected = logits(model)
    saved = qa.save(model, tmp_path)
    assert relative(logits(qa.load(saved)), expected) < 1e-5
    for adapter in (model, qa.load(saved)):
        qa.merge(adapter, tmp_path, data=HELD_OUT, overwrite=True)
        assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5


@on_bases("start", ["pissa", "gaussian", False], ["olora", "orthogonal"], ["pissa", "orthogonal"])
def test_starts_that_are_found_again_are_merged_onto_the_base(base, start, tmp_path) -> None:
    model = tuned(base, r=4, init_lora_weights=start)
    saved = qa.save(model, tmp_path)
    qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)
    merged = logits(stock(tmp_path / "merged"))
    assert relative(merged, logits(model)) < 1e-4
    assert relative(merged, logits(stock_adapter(base, saved))) < 1e-4


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "pissa"])
@pytest.mark.parametrize("start", ["pissa_niter_4", "pissa_niter_16", "corda", "lora_ga"])
def test_starts_that_are_not_found_again_are_refused(untied, adapter, start, tmp_path) -> None:
    spec = {"name": adapter, "init_lora_weights": start}
    onto = {"name": "onto-base", "base": untied}
    planned = qa.Spec(
        model=untied, backend="none", adapter=spec, output=str(tmp_path), export={"formats": [onto]}
    )
    with pytest.raises(PlanRefused, match="random-start-onto"):
        qa.plan(planned)


def test_a_random_start_of_a_saved_adapter_is_refused(untied, tmp_path) -> None:
    saved = qa.save(tuned(untied, r=4, init_lora_weights="pissa_niter_4"), tmp_path)
    with pytest.raises(MergeRefused, match="random-start-onto"):
        qa.merge_onto(saved, untied, tmp_path, data=HELD_OUT)
    assert not (tmp_path / "merged").exists()


# Memory ------------------------------------------------------------------------------------------


def test_each_layer_is_made_dense_once(untied, monkeypatch) -> None:
    from quantadapt.exporting.merging import merged_model

    model, calls = tuned(untied, "hqq", target_modules=["q_proj", "down_proj"]), []
    make = QuantLinear.dense
    monkeypatch.setattr(QuantLinear, "dense", lambda self: calls.append(self) or make(self))
    merged_model(model, "dense")
    assert len(calls) == len(set(calls)) == 14


def test_the_adapter_is_there_when_its_base_cannot_be_saved(untied, tmp_path, monkeypatch) -> None:
    from quantadapt.exporting import saving

    def full(*args, **kwargs) -> None:
        raise OSError("no space")

    model = tuned(untied, "hqq", "pissa", r=4)
    monkeypatch.setattr(saving, "save_base", full)
    with pytest.raises(OSError, match="no space"):
        qa.save(model, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# What is not right is not written ----------------------------------------------------------------


def damaged(monkeypatch, change) -> None:
    """Have every file that safetensors writes changed once it is there."""
    import safetensors.torch as st

    write = st.save_file

    def written(tensors, path, **kwargs):
        write(change(dict(tensors)), path, **kwargs)

    monkeypatch.setattr(st, "save_file", written)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", written)


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(name)}


def scaled(name):
    return lambda tensors: {k: v * 1.5 if k.endswith(name) else v for k, v in tensors.items()}


def other_row(name, row):
    """A change that no held-out token shows: it does not touch that row."""

    def changed(tensors):
        for key, value in tensors.items():
            if key.endswith(name) and len(value) > row:
                tensors[key] = value.clone().index_fill_(0, torch.tensor([row]), 0.5)
        return tensors

    return changed


DAMAGES = {
    "lost": (without("layers.1.mlp.down_proj.weight"), r"layers\.1\.mlp\.down_proj.weight"),
    "lost-bias": (without("k_proj.bias"), r"model\.layers\.0\.self_attn\.k_proj.bias"),
    "scaled": (scaled("layers.1.mlp.down_proj.weight"), "down_proj.weight off by"),
    "scaled-embedding": (scaled("embed_tokens.weight"), "embed_tokens.weight"),
    "unused-row": (other_row("embed_tokens.weight", 2000), "embed_tokens.weight off by"),
}


@on_bases("damage", DAMAGES, ["scaled-embedding"])
@pytest.mark.parametrize("kind", ["dense", "requantize", "onto"])
def test_damaged_files_are_no_success(base, tmp_path, monkeypatch, kind, damage) -> None:
    model = tuned(base, target_modules=["q_proj"])
    change, what = DAMAGES[damage]
    (tmp_path / "merged").mkdir()
    damaged(monkeypatch, change)
    with pytest.raises(ModelError, match=what):
        merged(model, kind, base, tmp_path)
    assert list((tmp_path / "merged").iterdir()) == []
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_adapter_that_is_lost_is_no_success(untied, tmp_path, monkeypatch) -> None:
    """Of a merge that merges nothing the files are as meant; the answers show it."""
    from peft.tuners.lora import Linear

    model = tuned(untied)
    monkeypatch.setattr(Linear, "merge", lambda self, **kwargs: None)
    for kind in ("dense", "onto"):
        with pytest.raises(ModelError, match="does not answer as the adapter"):
            merged(model, kind, untied, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_numbers_is_no_success(untied, tmp_path) -> None:
    model = tuned(untied, modules_to_save=["norm"], target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "norm.modules_to_save" in name:
            parameter.data.fill_(float("nan"))
    for kind in ("dense", "requantize"):
        with pytest.raises(ModelError):
            qa.merge(model, tmp_path, kind=kind, data=HELD_OUT)
    assert not (tmp_path / "merged").exists()


def test_keys_that_the_base_has_no_place_for_are_named(untied, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    saved = qa.save(tuned(untied), tmp_path)
    file = saved / "adapter_model.safetensors"
    key = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file(load_file(file) | {key: torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match=r"no place for: .*layers\.9"):
        qa.merge_onto(saved, untied, tmp_path, data=HELD_OUT)
    kept = {k: v for k, v in load_file(file).items() if "layers.1" not in k and k != key}
    save_file(kept, file)
    with pytest.raises(ModelError, match="lacks what its config says"):
        qa.merge_onto(saved, untied, tmp_path, data=HELD_OUT)
    assert not (tmp_path / "merged").exists()


NO_BIAS = r"lora_bias trains .* layers that have none, e.g. model"


def test_a_bias_for_layers_without_one_is_refused_in_words(tmp_path) -> None:
    with pytest.warns(UnmergeableWarning, match=rf"cannot be merged: {NO_BIAS}"):
        model = tuned(str(small_model()), lora_bias=True, target_modules=["q_proj"])
    for kind in ("dense", "requantize", "onto"):
        with pytest.raises(MergeRefused, match=rf"lora_bias: {NO_BIAS}"):
            merged(model, kind, str(small_model()), tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_bias_that_layers_have_a_place_for_is_told_nothing_of(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmergeableWarning)
        tuned(llama(tmp_path, tied=False), lora_bias=True)


@pytest.mark.parametrize("merge", ["dense", "requantize", "auto"])
def test_a_run_does_not_plan_to_merge_such_a_bias(merge, tmp_path) -> None:
    spec = Spec(
        model=str(small_model()),
        data={"path": few_rows()},
        adapter={"name": "lora", "lora_bias": True},
        train={"max_steps": 1},
        evaluate={"max_examples": 1, "samples": 0},
        export={"merge": merge},
        output=str(tmp_path / "run"),
    )
    if merge != "auto":
        with pytest.raises(PlanRefused, match=NO_BIAS):
            qa.run(spec)
        assert not (tmp_path / "run").exists()
        return
    found = qa.run(spec)
    assert [problem.rule for problem in found.plan.merge_refusals] == ["lora-bias"]
    assert not (tmp_path / "run" / "merged").exists()
