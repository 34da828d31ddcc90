"""A live module is planned as itself: its own config, its own layers, and how it is quantized."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from test_conformance_catches import Plugin, make  # noqa: F401 (a fixture)
from test_quantizing import Seeing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt import demo, planning
from quantadapt.errors import DataError, PlanRefused
from quantadapt.facade import facades, unwrap
from quantadapt.planning import on_disk, plan
from quantadapt.planning.live import config_of_module
from quantadapt.quantizing import UnusedOptionWarning
from quantadapt.spec import Spec

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=90,
)


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    return LlamaForCausalLM(TINY).to(dtype)


def quantized(dtype: str = "float32", **options) -> nn.Module:
    """A module that is quantized already, as one finds it that hqq made without us."""
    model = unwrap(qa.quantize(tiny(), "hqq", dtype=dtype, device="cpu", **options))
    del model.quantadapt
    return model


@pytest.fixture
def nothing_is_read(monkeypatch) -> None:
    """Whoever looks for a checkpoint's config fails, the demo's included."""

    def look(source: str) -> None:
        raise AssertionError(f"the config of {source!r} was read")

    for module in (on_disk, planning.stage):
        monkeypatch.setattr(module, "config_of", look)


def test_it_is_not_planned_as_the_demo(nothing_is_read) -> None:
    made = plan(Spec(), module=tiny(), check_output=False)
    assert (made.model, made.adopt) == ("", False)
    assert made.config["vocab_size"] == 90
    assert made.spec.train.max_steps != demo.TRAIN_DEFAULTS["max_steps"]
    assert plan(Spec(), module=nn.Linear(2, 2), check_output=False).config == {}


def test_nor_is_what_is_attached_to_it(nothing_is_read, monkeypatch) -> None:
    model = qa.quantize(tiny(), "hqq")
    monkeypatch.setattr(planning, "plan", lambda *_, **__: pytest.fail("a whole plan was made"))
    tuned = qa.attach(model, "lora", r=2)
    assert tuned.quantadapt.adapter_options["r"] == 2
    with pytest.raises(PlanRefused, match="did you mean 'lora_alpha'"):
        qa.attach(tuned.unload(), "lora", lora_alfa=2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(to_dict=lambda: {"a": 1}), {"a": 1}),
        (UserDict(a=1), {"a": 1}),  # as diffusers has it
        ("of some other kind", {}),
        (None, {}),
    ],
)
def test_its_config_in_any_form(config, expected) -> None:
    module = nn.Linear(2, 2)
    module.config = config
    assert config_of_module(module) == expected


def test_loftq_is_refused_before_the_adapter_is_there() -> None:
    """A live module has no unquantized weights to compare with."""
    model = qa.quantize(tiny(), "hqq")
    with pytest.raises(PlanRefused, match="LoftQ compares with the unquantized weights"):
        qa.attach(model, "loftq")
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_token_ids_are_compared_with_its_own_vocabulary(make) -> None:  # noqa: F811
    make(Plugin(Seeing, calibration=True))
    examples = [{"input_ids": torch.arange(20, 90)[None]}]
    qa.quantize(tiny(), "absmax", calibration=examples)
    with pytest.raises(DataError, match=r"the token id 90\n.*0 to 89"):
        qa.quantize(tiny(), "absmax", calibration=[{"input_ids": examples[0]["input_ids"] + 1}])
    with pytest.raises(PlanRefused, match="there is no data to do it on"):
        qa.quantize(tiny(), "absmax")
    # What is shown to a module that is no language model, or not as token ids, is its own affair.
    qa.quantize(nn.Sequential(nn.Linear(64, 64)), "absmax", calibration=examples)
    qa.quantize(tiny(), "absmax", calibration=[{"inputs_embeds": torch.zeros(1, 70, 64)}])


class TestQuantizedAlready:
    """It stays as it is and where it is; what was asked for and is not so is told."""

    def test_it_is_taken_as_it_is(self) -> None:
        module = quantized("bfloat16", bits=3)
        model = qa.quantize(module, "hqq")
        state = model.quantadapt
        assert (state.quantizer.bits, state.source, state.device) == (3, "", "cpu")
        assert state.dtype == torch.bfloat16
        assert {facade.compute_dtype for _, facade in facades(model)} == {torch.bfloat16}

    def test_what_agrees_may_be_said(self) -> None:
        said = {"device": "cpu", "dtype": "bfloat16", "bits": 3}
        assert len(list(facades(qa.quantize(quantized("bfloat16", bits=3), "hqq", **said)))) == 7

    def test_what_does_not_is_refused_at_once(self) -> None:
        with pytest.raises(PlanRefused) as caught:
            qa.quantize(quantized(), "hqq", bits=3, dtype="bfloat16", device="mps", nbits=4)
        found = {problem.where: problem for problem in caught.value.problems}
        assert "the module is quantized already, with bits=4" in found["backend.bits"].what
        assert "stays on cpu" in found["device"].what
        assert found["device"].fix == "leave out device='mps', or move the module there first"
        assert "computes in float32" in found["dtype"].what
        assert "backend.nbits" in found

    def test_layers_alone_do_not_say_what_the_rest_computes_in(self) -> None:
        one = unwrap(qa.quantize(nn.Sequential(nn.Linear(64, 64)), "hqq"))
        del one.quantadapt
        assert qa.quantize(one, "hqq", dtype="bfloat16").quantadapt.dtype == torch.bfloat16

    def test_calibration_that_is_not_used_is_told(self, make) -> None:  # noqa: F811
        make(Plugin(Seeing, calibration=True))
        examples = [{"input_ids": torch.arange(90)[None]}]
        module = unwrap(qa.quantize(tiny(), "absmax", calibration=examples))
        del module.quantadapt
        with pytest.warns(UnusedOptionWarning, match="not used: the model is quantized already"):
            qa.quantize(module, "absmax", calibration=examples)
        with pytest.warns(UnusedOptionWarning, match="these options of hqq need no data"):
            qa.quantize(tiny(), "hqq", calibration=examples)


def test_one_that_is_not_is_cast_and_moved_as_asked() -> None:
    model = qa.quantize(tiny(torch.bfloat16), "hqq", dtype="float32", device="cpu")
    assert model.quantadapt.dtype == torch.float32
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_tied_to_an_embedding_stays_dense(tied) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.middle = nn.Linear(32, 32)
            self.out = nn.Linear(32, 64, bias=False)
            if tied:
                self.out.weight = self.embedding.weight

    model = qa.quantize(Model(), "hqq", device="cpu", dtype="float32", group_size=None)
    assert [name for name, _ in facades(model)] == (["middle"] if tied else ["middle", "out"])
    assert not tied or model.out.weight is model.embedding.weight
    everything = qa.quantize(Model(), "hqq", device="cpu", skip_modules=[], group_size=None)
    assert [name for name, _ in facades(everything)] == ["middle", "out"]
