"""Image-text models: what of them is quantized and adapted; the rest stays as it is."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import quantadapt as qa
from quantadapt import planning
from quantadapt.errors import PlanRefused, SpecError
from quantadapt.evaluation.sizes import size_mib
from quantadapt.facade import facades
from quantadapt.model.towers import towers_of
from quantadapt.spec import Spec
from quantadapt.training.recomputing import decoder_layers

FAMILIES = ["qwen", "gemma"]
MERGER = {"qwen": "model.visual.merger", "gemma": "model.multi_modal_projector"}
SEEING = {"qwen": "model.visual.", "gemma": "model.vision_tower."}


def adapted(model) -> list[str]:
    prefix = "base_model.model."
    return [n.removeprefix(prefix) for n, m in model.named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_is_quantized_and_adapted(family, small_picture_models) -> None:
    path = str(small_picture_models[family])
    model = qa.quantize(path, "hqq", dtype="float32")
    assert {n.split(".layers")[0] for n, _ in facades(model)} == {"model.language_model"}
    assert len(dict(facades(model))) == 14
    stock = transformers.AutoModelForImageTextToText.from_pretrained(path).state_dict()
    own = model.state_dict()
    others = [n for n in stock if not n.startswith(("model.language_model.layers", "lm_head"))]
    assert len(others) > 20
    assert all(torch.equal(stock[name], own[name]) for name in others)
    tuned = qa.attach(model, "lora", r=4)
    assert {name.split(".layers")[0] for name in adapted(tuned)} == {"model.language_model"}
    assert len(adapted(tuned)) == 14


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_too(family, small_picture_models) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(small_picture_models[family])
    made = qa.quantize(model, "hqq", device="cpu", dtype="float32")
    assert {n.split(".layers")[0] for n, _ in facades(made)} == {"model.language_model"}


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_choose(family, small_picture_models) -> None:
    # torchao's int8 takes layers of any size
    path = str(small_picture_models[family])
    model = qa.quantize(path, "torchao-int8", dtype="float32", towers=["language", "vision"])
    names = [name for name, _ in facades(model)]
    assert any(name.startswith(SEEING[family]) for name in names)
    assert not any(name.startswith(MERGER[family]) for name in names)
    assert not any(name == "lm_head" for name in names)
    tuned = qa.attach(model, "lora", r=4)
    assert any(name.startswith(SEEING[family]) for name in adapted(tuned))
    # what is trained, and what comes behind it, is recomputed
    assert len(decoder_layers(tuned.get_base_model())) == 4


def test_the_projector_in_the_vision_tower_by_itself(small_picture_models) -> None:
    path = str(small_picture_models["qwen"])
    model = qa.quantize(path, "torchao-int8", dtype="float32", towers=["projector"])
    assert [n for n, _ in facades(model)] == [
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
    ]


@pytest.mark.slow
def test_a_tower_that_is_frozen_is_not_recomputed(small_picture_models) -> None:
    for family in FAMILIES:
        model = qa.quantize(str(small_picture_models[family]), "hqq", dtype="float32")
        assert len(decoder_layers(qa.attach(model, "lora").get_base_model())) == 2


def test_skipped_modules_come_beside(small_picture_models) -> None:
    path = str(small_picture_models["qwen"])
    model = qa.quantize(
        path, "torchao-int8", dtype="float32", skip_modules=["lm_head", "down_proj"]
    )
    names = [name for name, _ in facades(model)]
    assert len(names) == 12
    assert not any("down_proj" in name or "visual" in name for name in names)


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*(q_proj|down_proj)", r".*\.(qkv|q_proj|down_proj)"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_both_have_are_of_the_language_model(
    family, targets, small_picture_models
) -> None:
    model = qa.quantize(str(small_picture_models[family]), "hqq", dtype="float32")
    found = adapted(qa.attach(model, "lora", target_modules=targets))
    assert len(found) == 4
    assert all(name.startswith("model.language_model.") for name in found)


@pytest.mark.parametrize(("family", "name"), [("qwen", "qkv"), ("gemma", "fc1")])
def test_a_name_of_the_vision_tower_is_refused(family, name, small_picture_models) -> None:
    model = qa.quantize(str(small_picture_models[family]), "hqq", dtype="float32")
    with pytest.raises(PlanRefused, match=r"towers: \[language, vision\]"):
        qa.attach(model, "lora", target_modules=["q_proj", name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_tells_towers_and_memory(family, small_picture_models, tmp_path) -> None:
    path = small_picture_models[family]
    spec = Spec(model=str(path), output=str(tmp_path / "run"), dtype="float32")
    plan = planning.plan(spec)
    stored = load_file(path / "model.safetensors")
    between = [n for n in stored if "projector" in n or ".merger." in n]
    seeing = sum(t.numel() for n, t in stored.items() if "vis" in n and n not in between)
    total = sum(tensor.numel() for tensor in stored.values())
    assert any(f"vision ({seeing / total:.1%} of the weights)" in note for note in plan.notes)
    share = sum(stored[name].numel() for name in between) / total
    assert any(f"projector ({share:.1%} of the weights)" in note for note in plan.notes)
    assert sum("towers:" in note for note in plan.notes) == 1
    model = qa.quantize(str(path), "hqq", dtype="float32")
    # the share is that of what is counted, and all of the model is not
    counted = "100.0% of the weights of language, embeddings and head not counted"
    assert plan.share.amount == counted
    assert f"quantized are {counted}" in model.quantadapt.notes
    work = plan.memory.work
    predicted = work.quantized_bytes + work.dense_bytes
    # hqq keeps scales outside of its parameters, which size_mib knows
    assert predicted == pytest.approx(size_mib(model) * 2**20, rel=0.1)


def test_towers_that_a_model_has_not_are_refused(tmp_path, small_picture_models) -> None:
    with pytest.raises(PlanRefused, match="no towers to choose from"):
        planning.plan(Spec(towers=["vision"], output=str(tmp_path / "run")))
    with pytest.raises(SpecError, match="towers"):
        Spec(towers=["audio"])
    with pytest.raises(SpecError, match="towers"):
        Spec(towers=[])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_learnt_too(family, small_picture_models, tmp_path) -> None:
    model = qa.quantize(str(small_picture_models[family]), "hqq", dtype="float32")
    tuned = qa.attach(model, "lora", r=4)
    before = {n: p.clone() for n, p in tuned.named_parameters() if p.requires_grad}
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "Which colour is this? It is red."}\n' * 8)
    result = qa.train(tuned, data, max_steps=3, learning_rate=1e-2, logging_steps=1)
    assert result.losses[-1][1] < result.losses[0][1] - 0.1
    after = dict(tuned.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" in n)


KINDS = ["LlavaConfig", "Idefics3Config", "Qwen3VLConfig", "Mistral3Config", "InternVLConfig"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_families_say_what_they_are_made_of(kind) -> None:
    config = getattr(transformers, kind)()
    for part in (config.text_config, config.vision_config):
        for name in ("num_hidden_layers", "depth"):
            if hasattr(part, name):
                setattr(part, name, 1)
        part.pad_token_id = 0
    if hasattr(config.vision_config, "out_hidden_size"):  # as in real checkpoints
        config.vision_config.out_hidden_size = config.text_config.hidden_size
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    towers = towers_of(model)
    assert set(towers) == {"language", "vision", "projector"}
    parts = [name for names in towers.values() for name in names]
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{part}.") for part in parts) == 1, name


def test_models_of_text_alone_have_no_towers() -> None:
    for kind in ("LlamaConfig", "T5Config", "BartConfig", "WhisperConfig"):
        config = getattr(transformers, kind)()
        for auto in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM):
            if type(config) in auto._model_mapping:
                with torch.device("meta"):
                    assert towers_of(auto.from_config(config)) == {}
