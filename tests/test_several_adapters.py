"""Several adapters in one model are saved and read whatever they are called, and each as itself."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import llama, logits, moved, relative, saved_model, stock, stock_adapter, tuned
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.adapting.several import keys_of
from quantadapt.cli import main
from quantadapt.errors import ModelError, PlanRefused, SpecError
from quantadapt.evaluation.reference import has_reference
from quantadapt.exporting.adapters import put_beside
from quantadapt.exporting.beside import add_adapter
from quantadapt.model.own_biases import without_adapter
from quantadapt.planning.peft_options import peft_options
from quantadapt.registry.discovery import registry

HQQ = {"hqq": {"bits": 8, "group_size": 32}}
# What PEFT looks for in keys: parts of a model's names, of its own, and one that is neither.
NAMES = ["model", "layers", "0", "lora_A", "weight", "base_model", "other"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("base"), tied=False)


def with_second(base: str, name: str, backend: str = "none", **options: Any) -> Any:
    """Return a model with adapters `default` and `name`, of other ranks, both moved from zero."""
    model = tuned(base, backend, target_modules=["q_proj"], r=2, **options)
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.target_modules = 3, {"q_proj", "down_proj"}
    model.add_adapter(name, config)
    model.set_adapter(name)
    return moved(model)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_saved_whatever_another_is_called(name: str, base: str, tmp_path: Path) -> None:
    model = with_second(base, name)
    for active in ("default", name):
        model.set_adapter(active)
        expected = logits(model)
        saved = qa.save(model, tmp_path / active)
        assert relative(logits(stock_adapter(base, saved)), expected) < 1e-6
        assert relative(logits(qa.load(saved)), expected) < 1e-6
    model.base_model.set_adapter([name, "default"])
    expected = logits(model)
    again = qa.load(qa.save(model, tmp_path / "both"))
    assert again.active_adapters == [name, "default"]
    assert relative(logits(again), expected) < 1e-6


@pytest.mark.parametrize("name", ["model", "layers"])
@pytest.mark.parametrize("more", [{"modules_to_save": ["norm"]}, {"use_dora": True}])
def test_so_is_what_is_trained_beside_it(more, name: str, base: str, tmp_path: Path) -> None:
    model = with_second(base, name, "hqq", **more)
    for active in ("default", name):
        model.set_adapter(active)
        expected = logits(model)
        again = qa.load(qa.save(model, tmp_path / active))
        assert relative(logits(again), expected) < 1e-6


def test_a_checkpoint_holds_each_of_them(base: str, tmp_path: Path, random_data) -> None:
    model = with_second(base, "layers")
    qa.train(model, random_data, output=tmp_path, max_steps=1, save_steps=1)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    for folder, layers in ((checkpoint, 2), (checkpoint / "layers", 4)):  # A and B of each
        assert len(load_file(folder / "adapter_model.safetensors")) == 2 * layers


@pytest.mark.slow
def test_whose_weights_are_whose_is_as_peft_sees_it(base: str) -> None:
    """For a name that nothing else has, PEFT's own rule is right, for every method."""
    from peft.utils.save_and_load import _filter_state_dict_for_adapter_name as without

    compared = 0
    for record in registry().adapters():
        small = {name: 2 for name in ("r", "init_r") if name in peft_options(record)}
        try:
            model = qa.attach(qa.quantize(base, "none"), record.name, **small)
            model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        except Exception:  # some allow one adapter alone, or want other layers
            continue
        keys = model.state_dict()
        assert keys_of(model, "second") == set(keys) - set(without(keys, ["second"])), record.name
        compared += 1
    assert compared > 25


@pytest.mark.parametrize("name", ["a/b", "/a", "a/", "a\nb", "a" * 300])
def test_a_name_that_no_folder_can_have_is_refused_before_work(
    name: str, base: str, tmp_path: Path, random_data
) -> None:
    model = with_second(base, name)
    with pytest.raises(PlanRefused, match="cannot be saved: no folder can be called so"):
        qa.save(model, tmp_path)
    with pytest.raises(PlanRefused, match="cannot be saved: no folder can be called so"):
        qa.train(model, random_data, output=tmp_path, max_steps=1)
    assert not list(tmp_path.iterdir())


# Configs -----------------------------------------------------------------------------------------


def edited(folder: Path, **values: Any) -> None:
    """Change values in the config of a saved adapter; None takes one out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("adapter", "key", "value"),
    [
        ("lora", "r", 8),
        ("lora", "lora_alpha", 7),
        ("lora", "lora_alpha", None),
        ("lora", "use_rslora", True),
        ("lora", "target_modules", ["q_proj"]),
        ("lora", "target_modules", ["q_proj", "k_proj", "v_proj"]),
        ("lora", "target_modules", "q_proj"),
        ("lora", "alpha_pattern", {"q_proj": 1}),
        ("lora", "layers_to_transform", [0]),
        ("vera", "projection_prng_key", 1),
        ("loha", "alpha", 1),
        ("oft", "eps", 0.5),
        ("fourierft", "scaling", 1.0),
    ],
)
def test_a_config_that_was_edited_is_refused_by_key(
    adapter: str, key: str, value: Any, base: str, tmp_path: Path, capsys
) -> None:
    saved = qa.save(tuned(base, "none", adapter, target_modules=["q_proj", "o_proj"]), tmp_path)
    edited(saved, **{key: value})
    words = rf"\b{key} is .*, and the adapter was saved with|\b{key} is missing"
    with pytest.raises(ModelError, match=words):
        qa.load(saved)
    with pytest.raises(ModelError, match=words):
        qa.merge_onto(saved, base, tmp_path, check=False)
    with pytest.raises(SystemExit) as end:
        main(["merge", str(tmp_path)])
    assert end.value.code == 2
    assert re.search(key, capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()


def test_so_is_that_of_an_adapter_beside_the_first(base: str, tmp_path: Path) -> None:
    model = with_second(base, "other")
    model.base_model.set_adapter(["default", "other"])
    saved = qa.save(model, tmp_path)
    edited(saved / "other", lora_alpha=64)
    with pytest.raises(ModelError, match="lora_alpha is 64, and the adapter was saved with"):
        qa.load(saved)


def test_what_is_no_option_may_be_edited(base: str, tmp_path: Path) -> None:
    """Where the base lies, for one, or the order of a set."""
    model = tuned(base, target_modules=["q_proj", "o_proj"])
    expected = logits(model)
    saved = qa.save(model, tmp_path)
    names = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    edited(saved, base_model_name_or_path="elsewhere", target_modules=names[::-1], revision="main")
    assert torch.equal(logits(qa.load(saved)), expected)


def test_a_folder_of_before_has_no_such_note(base: str, tmp_path: Path) -> None:
    saved = qa.save(tuned(base, target_modules=["q_proj"]), tmp_path)
    file = saved / "quantadapt.json"
    manifest = json.loads(file.read_text())
    assert set(manifest.pop("adapter_config")) == {"default"}
    file.write_text(json.dumps(manifest))
    qa.load(saved)


# Of other runs on the same base -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
def test_an_adapter_of_another_run_answers_as_it_does_alone(backend, base, tmp_path) -> None:
    """Beside the first, whatever layers and ranks each has; the first and the base stay."""
    first, second = (
        qa.save(tuned(base, backend, target_modules=layers, r=r, **more), tmp_path / str(r))
        for layers, r, more in (
            (["q_proj"], 2, {}),
            (["q_proj", "down_proj"], 3, {"use_dora": True}),
        )
    )
    alone = [logits(qa.load(path)) for path in (first, second)]
    if backend == "none":
        assert relative(logits(stock_adapter(base, second)), alone[1]) < 1e-6
    assert relative(alone[0], alone[1]) > 1e-3
    model = qa.load(first)
    with model.disable_adapter():
        bare = logits(model)
    add_adapter(model, second, "beside")
    assert model.active_adapters == ["default"]
    for name, expected in zip(("default", "beside", "default"), (*alone, alone[0]), strict=True):
        model.set_adapter(name)
        assert relative(logits(model), expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)


def test_what_is_no_neighbour_is_refused_and_changes_nothing(base, tmp_path) -> None:
    """Each with the reason, and the model goes on as it was."""
    model = tuned(base, "hqq", target_modules=["q_proj"], r=2)
    other = llama(tmp_path / "other", tied=True)
    paths = {
        "is not the base that": qa.save(
            tuned(other, "hqq", target_modules=["q_proj"]), tmp_path / "a"
        ),
        "no IA3 beside LORA": qa.save(tuned(base, "hqq", "ia3"), tmp_path / "b"),
        "a base of its own": qa.save(
            tuned(base, "hqq", init_lora_weights="pissa", target_modules=["q_proj"]), tmp_path / "c"
        ),
        "there is no adapter here": qa.save(qa.quantize(base, "hqq", device="cpu"), tmp_path / "d"),
    }
    before = logits(model)
    for words, path in paths.items():
        with pytest.raises(ModelError, match=words):
            add_adapter(model, path, "beside")
    for name in ("default", "a.b", "a/b", ""):
        with pytest.raises(SpecError, match="no second adapter can be called"):
            add_adapter(model, paths["is not the base that"], name)
    with pytest.raises(ModelError, match="only what has an adapter"):
        add_adapter(qa.quantize(base, "hqq", device="cpu"), paths["is not the base that"], "beside")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("whole", "tied"), [("embed_tokens", False), ("lm_head", True)])
def test_tokens_of_what_another_trains_whole_are_refused(whole, tied, tmp_path) -> None:
    """PEFT makes such a model, which then fails at each pass."""
    base = llama(tmp_path / "base", tied=tied)
    layers = {"target_modules": ["q_proj"], "r": 2}
    model = tuned(base, "hqq", **layers, modules_to_save=[whole])
    before = logits(model)
    path = qa.save(tuned(base, "hqq", **layers, trainable_token_indices=[1, 2]), tmp_path / "a")
    with pytest.raises(ModelError, match="single tokens of it"):
        add_adapter(model, path, "beside")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_so_is_one_adapter_that_trains_both(whole: str, tied: bool, tmp_path: Path) -> None:
    """A head that is tied to the embedding holds its tokens, too."""
    base = llama(tmp_path / "base", tied=tied)
    both = {"modules_to_save": [whole], "trainable_token_indices": [1, 2]}
    if whole == "lm_head" and not tied:
        assert tuned(base, "hqq", target_modules=["q_proj"], **both)
        return
    with pytest.raises(PlanRefused, match=f"trains .*{whole} whole"):
        tuned(base, "hqq", target_modules=["q_proj"], **both)


def test_a_neighbour_that_does_not_fit_leaves_nothing_behind(base, tmp_path) -> None:
    """As one whose weights are of other layers than its config says."""
    model = tuned(base, "hqq", target_modules=["q_proj"], r=2)
    path = qa.save(tuned(base, "hqq", target_modules=["v_proj"], r=2), tmp_path / "a")
    before, keys = logits(model), set(model.state_dict())
    file = Path(path) / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if "layers.0" not in key}, file)
    with pytest.raises(ModelError, match="lacks what its config says"):
        add_adapter(model, path, "beside")
    assert list(model.peft_config) == ["default"]
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


# Biases, which are the base's own -----------------------------------------------------------------


@pytest.mark.parametrize(("bias", "layers"), [("lora_only", {"v_proj"}), ("all", {"v_proj"})])
@pytest.mark.parametrize("active", [["second"], ["second", "default"], ["default", "second"]])
def test_biases_are_read_whatever_else_was_adapted(bias, layers, active, base, tmp_path) -> None:
    """PEFT names them by the layers that have adapters, others beside it too: `q_proj.base_layer.
    bias` was refused where q_proj has none."""
    model = tuned(base, "none", target_modules=["q_proj"], r=2)
    config = copy.deepcopy(model.peft_config["default"])
    config.bias, config.target_modules = bias, layers
    model.add_adapter("second", config)
    model.set_adapter("second")
    moved(model)
    model.base_model.set_adapter(active)
    expected = logits(model)
    again = qa.load(qa.save(model, tmp_path))
    assert relative(logits(again), expected) < 1e-6


@pytest.mark.parametrize("size", [1, 5])
def test_a_bias_of_another_size_is_refused(size, base, tmp_path) -> None:
    """Of one number the whole bias was made, without a word."""
    model = tuned(base, "none", target_modules=["q_proj"], bias="all", r=2)
    saved = qa.save(model, tmp_path)
    weights = load_file(saved / "adapter_model.safetensors")
    (key, *_) = [key for key in weights if key.endswith("o_proj.bias")]
    weights[key.replace(".bias", ".base_layer.bias")] = torch.full((size,), 3.0)
    del weights[key]
    save_file(weights, saved / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit this base, or is damaged"):
        qa.load(saved)


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_base_alone_has_its_own_biases(bias, backend, base, tmp_path, recwarn) -> None:
    """PEFT leaves those that were trained in it, so that another model answered for the base; and
    warns that it does, which is not so here."""
    own = logits(qa.quantize(base, backend, **HQQ.get(backend, {})))
    model = tuned(base, backend, target_modules=["q_proj"], bias=bias, r=2)
    loaded = qa.load(qa.save(model, tmp_path))
    for each in (model, loaded):
        expected = logits(each)
        with each.disable_adapter():
            assert relative(logits(each), own) > 1e-2
        recwarn.clear()
        with without_adapter(each):
            assert relative(logits(each), own) < 1e-6
        assert not [w for w in recwarn if "disabling adapter layers" in str(w.message)]
        assert torch.equal(logits(each), expected)
    pissa = tuned(base, backend, target_modules=["q_proj"], bias=bias, init_lora_weights="pissa")
    expected = logits(pissa)
    loaded = qa.load(qa.save(pissa, tmp_path / "pissa"))  # with a base of its own
    assert relative(logits(loaded), expected) < 1e-6
    with without_adapter(pissa), without_adapter(loaded):
        assert relative(logits(loaded), logits(pissa)) < 1e-6


def test_peft_may_warn_of_biases_that_it_has_put_there_itself(base) -> None:
    """Nothing noted them as they were, so the base alone does keep those that were trained."""
    own = logits(onto := qa.quantize(base, "none"))
    config = LoraConfig(target_modules=["q_proj"], bias="all", r=2)
    model = moved(get_peft_model(onto, config))
    with pytest.warns(UserWarning, match="Careful, disabling"), without_adapter(model):
        assert relative(logits(model), own) > 1e-2


def test_an_adapter_with_biases_has_no_neighbours(base, tmp_path) -> None:
    """All of them answered with its biases, and so did the first where PEFT refused the second."""
    plain = qa.save(tuned(base, "none", target_modules=["v_proj"], r=2), tmp_path / "plain")
    biased = tuned(base, "none", target_modules=["q_proj"], bias="all", r=2)
    saved = qa.save(biased, tmp_path / "biased")
    for first, second in ((plain, saved), (saved, plain)):
        model = qa.load(first)
        before = logits(model)
        with pytest.raises(ModelError, match="trained biases of the base, which all share"):
            add_adapter(model, second, "beside")
        if first is plain:
            with pytest.raises(ModelError, match="no place for"):  # once biases had been read
                put_beside(model, saved, "beside")
        assert torch.equal(logits(model), before)


def test_the_bases_own_biases_stay_in_one_place(base) -> None:
    """What a CUDA graph has recorded of the base alone reads them there, also once the model was
    moved or cast."""
    model = tuned(base, "none", target_modules=["q_proj"], bias="all", r=2).double()
    own, places = logits(qa.quantize(base, "none").double()), []
    for _ in range(2):
        with without_adapter(model):
            assert relative(logits(model), own) < 1e-6
            places.append([bias.data_ptr() for bias, _ in model.quantadapt.own_biases])
    assert places[0] == places[1]


def test_biases_are_asked_of_each_adapter_and_not_of_the_first(base, tmp_path) -> None:
    """Saved options are those of the first adapter, and one that PEFT put there notes nothing: both
    were taken beside others, which then answered with their biases."""
    plain = qa.save(tuned(base, "none", target_modules=["v_proj"], r=2), tmp_path / "plain")
    model = tuned(base, "none", target_modules=["q_proj"], r=2)
    config = copy.deepcopy(model.peft_config["default"])
    config.bias = "all"
    model.add_adapter("second", config)
    model.set_adapter("second")
    saved = qa.save(moved(model), tmp_path / "second")
    theirs = get_peft_model(stock(base), LoraConfig(target_modules=["q_proj"], bias="all"))
    theirs.save_pretrained(tmp_path / "theirs")
    by_peft = PeftModel.from_pretrained(qa.quantize(base, "none"), str(tmp_path / "theirs"))
    for first, second in ((qa.load(plain), saved), (model, plain), (by_peft, plain)):
        before = logits(first)
        with pytest.raises(ModelError, match="trained biases of the base, which all share"):
            add_adapter(first, second, "beside")
        assert torch.equal(logits(first), before)


def test_without_biases_none_are_trained(tmp_path) -> None:
    """Of a model that has none, the base was said to be changed, and to be no reference."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    none = LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes, **heads))
    folder = saved_model(none, tmp_path / "base")
    model = tuned(folder, "none", target_modules=["q_proj"], bias="all", r=2)
    assert has_reference(model)
    second = moved(qa.attach(model.unload(), "lora", r=2))
    saved = qa.save(second, tmp_path / "second")
    assert not (tmp_path / "second" / "base").exists()
    assert relative(logits(qa.load(saved)), logits(second)) < 1e-6


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_trained_tokens_of_one_are_no_other_ones(backend, base, tmp_path) -> None:
    """Beside them PEFT finds no adapter that has none: `KeyError: ...trainable_tokens_delta`."""
    kinds: dict[str, dict[str, Any]] = {
        "tokens": {"trainable_token_indices": [105, 106]},
        "plain": {"use_dora": True},
        "others": {"trainable_token_indices": [107, 120]},
    }
    paths = {
        name: qa.save(tuned(base, backend, target_modules=["q_proj"], **more), tmp_path / name)
        for name, more in kinds.items()
    }
    alone = {name: logits(qa.load(path)) for name, path in paths.items()}
    if backend == "none":
        for name, path in paths.items():
            assert relative(logits(stock_adapter(base, path)), alone[name]) < 1e-6
    model = qa.load(paths["tokens"])
    for name in ("plain", "others"):
        add_adapter(model, paths[name], name)
    for name in ("plain", "default", "others", "plain"):
        model.set_adapter(name)
        assert relative(logits(model), alone["tokens" if name == "default" else name]) < 1e-6
    model.set_adapter("plain")
    again = qa.load(qa.save(model, tmp_path / "again"))
    assert relative(logits(again), alone["plain"]) < 1e-6
