"""What is lent to a model while it trains is taken back, also after a training that fails."""

from __future__ import annotations

import gc
import sys
import types
import warnings
import weakref
from contextlib import suppress
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from parameters import slow_but
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import quantadapt as qa
from quantadapt import compiling
from quantadapt import fused_kernels as fused_kernels_file
from quantadapt.errors import SlowerWarning
from quantadapt.fused_kernels import fused_kernels
from quantadapt.model.patches import patched, restored
from quantadapt.spec import TrainSpec
from quantadapt.testing.small_demo import demo_tokens, small_model
from quantadapt.training import lent as lent_file
from quantadapt.training import train
from quantadapt.training.lent import fast_attention, fused_layers, one_row_each
from quantadapt.training.lent_to_trainers import quiet

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def mixtral() -> Any:
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=2, output_router_logits=True)
    return MixtralForCausalLM(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


def adapted(make: Any = llama, adapter: str = "lora") -> Any:
    return qa.attach(qa.quantize(make(), "torchao-int8", device="cpu"), adapter).eval()


def attributes(owner: Any) -> dict[str, Any]:
    """What `vars` of something holds; dicts by what is in them now."""
    return {k: dict(v) if type(v) is dict else v for k, v in vars(owner).items()}


def everything(model: Any) -> dict[str, dict[str, Any]]:
    """All that training could change: of the model, its configs, the libraries and the process."""
    import datasets
    from huggingface_hub import constants
    from transformers import masking_utils
    from transformers.utils import logging

    base = model.get_base_model()
    owners = {name or "model": module for name, module in model.named_modules()}
    owners |= {"config": model.config, "text config": model.config.get_text_config()}
    owners |= {"generation": base.generation_config, "file": sys.modules[type(base).__module__]}
    owners |= {"masking": masking_utils, "hub": constants, "compiling": compiling}
    found = {name: attributes(owner) for name, owner in owners.items()}
    found["process"] = {
        "verbosity": logging.get_verbosity(),
        "bars": datasets.are_progress_bars_disabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "warnings": list(warnings.filters),
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
    }
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what is another object than before, and not an equal one either."""

    def same(one: Any, other: Any) -> bool:
        if type(one) is type(other) is dict:
            return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
        plain = not isinstance(one, torch.Tensor) and type(one) is type(other)
        return one is other or (plain and bool(one == other))

    missing = object()
    return [
        f"{owner}: {name}"
        for owner, was in before.items()
        for name in was.keys() | after[owner].keys()
        if not same(was.get(name, missing), after[owner].get(name, missing))
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "packing": {"packing": True},
    "recomputed": {"gradient_checkpointing": True, "save_steps": 1},
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    "little memory": {"memory": "min"},
}


def run(model: Any, tokenizer: Any, data: Any, output: Any, **options: Any) -> None:
    spec = TrainSpec(max_steps=2, per_device_train_batch_size=2, **options)
    train(model, tokenizer, data, spec, output=output, seed=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fails", slow_but([False, True], True))
def test_nothing_is_left_changed(options, fails, tokenizer, random_data, tmp_path) -> None:
    model = adapted()
    breaks = (
        model.get_base_model()
        .model.layers[1]
        .register_forward_hook(lambda *_: 1 / 0 if fails and model.training else None)
    )
    before = everything(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            run(model, tokenizer, random_data, tmp_path, **options)
    else:
        run(model, tokenizer, random_data, tmp_path, **options)
    assert not (left := differences(before, everything(model))), left
    breaks.remove()


@pytest.mark.parametrize("make", [mixtral, t5])
def test_nothing_is_left_changed_of_other_architectures(
    make, tokenizer, random_data, tmp_path
) -> None:
    model = adapted(make)
    before = everything(model)
    run(model, tokenizer, random_data, tmp_path)
    assert not (left := differences(before, everything(model))), left


def test_hidden_states_can_be_asked_for_afterwards(tokenizer, random_data, tmp_path) -> None:
    model = adapted(mixtral)
    run(model, tokenizer, random_data, tmp_path)
    found = model(input_ids=torch.arange(8)[None], output_hidden_states=True)
    assert len(found.hidden_states) == 3


def test_a_comparison_that_would_find_it() -> None:
    model = adapted()
    before = everything(model)
    layer = model.get_base_model().model.layers[0]
    layer.forward, model.config.use_cache, compiling._active = len, False, True
    found = differences(before, everything(model))
    compiling._active = False
    changed = {"base_model.model.model.layers.0: forward", "compiling: _active"}
    assert set(found) == changed | {"config: use_cache", "text config: use_cache"}


def test_modules_keep_the_mode_that_each_had(tokenizer, random_data, tmp_path) -> None:
    model = adapted()
    model.get_base_model().lm_head.train()
    run(model, tokenizer, random_data, tmp_path)
    assert [name for name, m in model.named_modules() if m.training] == ["base_model.model.lm_head"]


class Owner:
    """Something with an attribute of its own, and one of its class."""

    inherited = 1

    def __init__(self) -> None:
        self.own = 2


def test_attributes_are_restored_and_new_ones_are_gone() -> None:
    owner = Owner()
    with suppress(KeyError), restored([owner], "own", "inherited", "new"):
        owner.own, owner.inherited, owner.new = 3, 3, 3
        raise KeyError
    assert vars(owner) == {"own": 2}
    with patched(owner, inherited=5):
        assert (owner.inherited, owner.own) == (5, 2)
    assert (vars(owner), owner.inherited) == ({"own": 2}, 1)


# What costs speed alone is told ------------------------------------------------------------------


def test_a_search_for_packed_rows_that_has_moved_is_told(monkeypatch) -> None:
    from transformers import __version__, masking_utils

    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    notes: list[str] = []
    with one_row_each(notes.append):
        assert masking_utils.is_tracing() is False
    (note,) = notes
    assert f"transformers {__version__} has no masking_utils.find_packed" in note


def test_layers_that_peft_computes_itself_are_told(monkeypatch) -> None:
    from peft import LoraConfig, __version__

    notes: list[str] = []
    with fused_layers(adapted(), on_note=notes.append):
        assert notes == []
    monkeypatch.setattr(LoraConfig, "_register_custom_module", lambda *_: None)
    with fused_layers(adapted(), on_note=notes.append) as training:
        assert training._layers == []
    assert notes[0].startswith("14 LoRA layers are PEFT's own")
    assert f"peft {__version__}" in notes[0]


def test_a_compiler_that_has_moved_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", None)
    with pytest.warns(SlowerWarning, match="neg runs uncompiled, which is slower: import of"):
        assert compiling._compile(torch.neg, (torch.ones(2),), ()) is None


def test_a_kernel_by_hand_gets_the_wanted_dtype_or_is_given_up_for_good(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr(compiling, "_refused", set())
    given: list[Any] = []
    there: Any = types.SimpleNamespace(device=torch.device("cuda", 0))
    with compiling.results_in(torch.float16):
        compiling._by_hand(lambda *a: given.append(a), (there, 1), (2,))
    compiling._by_hand(lambda *a: given.append(a), (there,), ())
    assert given == [(there, 1, 2, torch.float16), (there, None)]

    def broken(*_: Any) -> torch.Tensor:
        given.append("tried")
        raise RuntimeError("no C compiler\nsee the log")

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.warns(SlowerWarning, match="broken runs uncompiled.*: no C compiler$"):
        assert compiling._by_hand(broken, (there,), ()) is None
    assert compiling._by_hand(broken, (there,), ()) is None
    assert given.count("tried") == 1
    with pytest.raises(torch.OutOfMemoryError):  # whoever fits a run to its card has to know
        compiling._by_hand(full, (there,), ())
    here = torch.arange(3)
    assert torch.equal(compiling.one_kernel(torch.neg, here, written=broken), -here)


def test_libraries_are_quiet_but_what_makes_us_slower_is_told() -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    with warnings.catch_warnings(record=True) as heard, quiet():
        warnings.warn_explicit("advice", UserWarning, "trainer.py", 1, "transformers.trainer")
        warnings.warn("slow", SlowerWarning, stacklevel=1)
        assert constants.HF_HUB_DISABLE_TELEMETRY is True
    assert [str(warning.message) for warning in heard] == ["slow"]
    assert constants.HF_HUB_DISABLE_TELEMETRY is before


# Attention ---------------------------------------------------------------------------------------


def test_cudnn_is_asked_for_shapes_that_come_again_and_for_long_rows(monkeypatch) -> None:
    monkeypatch.setattr(lent_file, "PLANNED_FROM", 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model, asked = adapted(), []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(
        lambda *_: asked.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with fast_attention(model, torch.device("cuda")):
        for length in (4, 6, 4, 9, 10, 4, 6):
            model(input_ids=torch.ones(1, length, dtype=torch.long))
    assert asked == [False, False, True, False, True, True, True]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert not model.get_base_model()._forward_pre_hooks


# Liger -------------------------------------------------------------------------------------------


def liger(monkeypatch, lend: Any) -> None:
    """Put a liger-kernel in place that knows Llama, on a CPU, too."""
    patching = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    if lend is not None:
        patching._apply_liger_kernel_to_instance = lend  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        package = types.ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, patching.__name__, patching)
    monkeypatch.setattr(fused_kernels_file, "_runs_liger", lambda _: True)


def patching(model: Any, **_: Any) -> None:
    """Patch as Liger does: functions that the model's file defines, and attributes of modules."""
    sys.modules[type(model).__module__].apply_rotary_pos_emb = len  # type: ignore[attr-defined]
    for layer in model.model.layers:
        layer.input_layernorm.offset = 0.0
        layer.input_layernorm.forward = types.MethodType(len, layer.input_layernorm)


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_liger_patches_is_taken_back(fails, monkeypatch) -> None:
    def lend(model: Any, **_: Any) -> None:
        patching(model)
        if fails:
            raise ArithmeticError

    liger(monkeypatch, lend)
    model, notes = adapted(), []
    before = everything(model)
    if fails:
        with pytest.raises(ArithmeticError), fused_kernels(model, notes.append):
            pass
    else:
        with fused_kernels(model, notes.append) as done:
            assert done is True
            assert len(differences(before, everything(model))) == 5
    assert (differences(before, everything(model)), notes) == ([], [])


def test_experts_get_none_of_ligers_kernels(monkeypatch) -> None:
    """Neither do those behind PEFT's wrappers, where Liger looks for them."""

    def lend(model: Any, **_: Any) -> None:
        patching(model)
        for layer in model.model.layers:
            layer.mlp.experts.forward = types.MethodType(len, layer.mlp.experts)

    liger(monkeypatch, lend)
    monkeypatch.setattr(
        sys.modules["liger_kernel.transformers.monkey_patch"],
        "MODEL_TYPE_TO_APPLY_LIGER_FN",
        {"mixtral": None},
    )
    dense = qa.attach(qa.quantize(mixtral(), "none", device="cpu"), "lora").eval()
    for model in (adapted(mixtral), dense):
        before, notes = everything(model), []
        with fused_kernels(model, notes.append):
            changed = differences(before, everything(model))
            assert changed
            assert not [name for name in changed if "experts" in name]
        assert (differences(before, everything(model)), notes) == ([], [])


@pytest.mark.parametrize(
    ("lend", "words"), [(lambda *_, **__: None, "patched no layer"), (None, "cannot import name")]
)
def test_a_liger_that_has_changed_is_told(lend, words, monkeypatch) -> None:
    liger(monkeypatch, lend)
    monkeypatch.setattr("quantadapt.dependencies.installed_version", lambda _: "0.99")
    notes: list[str] = []
    with fused_kernels(adapted(), notes.append) as done:
        assert not done
    (note,) = notes
    assert note.startswith("Liger's kernels are not used: liger-kernel 0.99")
    assert words in note


def test_on_a_cpu_the_model_stays_as_it_is() -> None:
    model = adapted()
    before = everything(model)
    with fused_kernels(model, print) as done:
        assert done is False
        assert not (left := differences(before, everything(model))), left


def loss_and_gradients(model) -> dict[str, torch.Tensor]:
    ids = demo_tokens().to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_the_same_and_nothing_stays(dtype) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    model = qa.quantize(str(small_model()), "bnb-nf4", device="cuda", dtype=dtype)
    model = qa.attach(model, "lora", init_lora_weights=False).train()
    expected = loss_and_gradients(model)
    before = everything(model)
    with fused_kernels(model, pytest.fail) as done:
        assert done is True
        assert differences(before, everything(model)) != []
        found = loss_and_gradients(model)
    assert not (left := differences(before, everything(model))), left
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).float().norm() / value.float().norm())
        assert error < (1e-4 if dtype == "float32" else 0.05), (name, error)


def test_nothing_of_a_model_that_was_trained_stays() -> None:
    """The memory of its base is needed for the next one."""
    tuned = qa.attach(qa.quantize(str(small_model()), "bnb-nf4"), "lora", r=2)
    qa.train(tuned, max_steps=1, per_device_train_batch_size=2, gradient_checkpointing=True)
    left = [weakref.ref(module) for module in tuned.modules()]
    del tuned
    gc.collect()
    assert [type(ref()).__name__ for ref in left if ref() is not None] == []
