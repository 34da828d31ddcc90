"""The conformance suite can fail: a backend that lies is caught, each lie by the right test."""

import json
import re
import subprocess
import sys
from functools import cached_property
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from parameters import slow_but
from torch import nn

from quantadapt.capabilities import Merge, Rule
from quantadapt.errors import PluginError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget
from quantadapt.records import Adapter, Backend, Start
from quantadapt.registry import Provenance, registry
from quantadapt.testing import BackendSuite, Bench
from quantadapt.testing.plugin import Results
from quantadapt.testing.small_experts import KINDS

# An honest third-party backend: int8 per output channel -----------------------------------------


class AbsmaxLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        codes = (linear.weight / scale).round().clamp(-127, 127)  # bfloat16 rounds 127.4 to 128
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def weight_values(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight_values(), self.bias)


class AbsmaxTarget(LayerwiseTarget):
    def matches(self, module):
        return isinstance(module, AbsmaxLinear)

    def dequantize(self, module):
        return module.weight_values()


class Absmax(LayerwiseQuantizer):
    target_class: ClassVar = AbsmaxTarget

    @cached_property
    def target(self):
        return self.target_class(self)

    def quantize_linear(self, linear):
        return AbsmaxLinear(linear)

    def load_linear(self, linear, state):
        dtype = linear.weight.dtype
        empty = nn.Linear(linear.in_features, linear.out_features, "bias" in state, dtype=dtype)
        module = AbsmaxLinear(empty.requires_grad_(False))
        module.load_state_dict(state)
        return module

    def quantization_config(self):
        return {"quant_method": "absmax"}

    @classmethod
    def from_checkpoint(cls, quantization_config):
        return cls() if quantization_config.get("quant_method") == "absmax" else None

    @classmethod
    def from_model(cls, model):
        return cls() if any(isinstance(m, AbsmaxLinear) for m in model.modules()) else None


# The lies -----------------------------------------------------------------------------------------


class WrongShape(AbsmaxTarget):
    def shape(self, module):
        return module.in_features, 2 * module.out_features


class MissesLayers(AbsmaxTarget):
    def matches(self, module):
        return super().matches(module) and module.out_features != module.in_features


class FivePercentOff(AbsmaxTarget):
    def dequantize(self, module):
        return 1.05 * module.weight_values()


class OtherForward(AbsmaxTarget):
    quantizes_activations = True

    def forward(self, module, x):
        return 1.2 * module(x)


class DecodesOtherwise(AbsmaxTarget):
    def decodes(self, module, x):
        return x.numel() == module.in_features

    def forward(self, module, x):
        return (1.2 if self.decodes(module, x) else 1.0) * module(x)


class ForwardWithoutBias(AbsmaxTarget):
    def forward(self, module, x):
        return nn.functional.linear(x, module.weight_values())


class WrongInBfloat16(AbsmaxTarget):
    def dequantize(self, module):
        weight = module.weight_values()
        return 1.5 * weight if weight.dtype == torch.bfloat16 else weight


class ScaleTransposed(AbsmaxTarget):
    def dequantize(self, module):
        square = module.in_features == module.out_features
        return module.codes * (module.scale.t() if square else module.scale)


class ChangesAsItRuns(AbsmaxTarget):
    quantizes_activations = True

    def forward(self, module, x):
        module.codes[0, 0] += 1
        return module(x)


class ForgetsTheUpdate(AbsmaxTarget):
    def requantize(self, module, weight):
        module.codes = module.codes.flip(0)
        return module


class RequantizesToNaN(AbsmaxTarget):
    """All layers but the first: `max` of errors must not lose what is no number."""

    def requantize(self, module, weight):
        made = super().requantize(module, weight)
        if module.in_features != module.out_features:
            made.scale.fill_(torch.nan)
        return made


class IgnoresTheUpdate(AbsmaxTarget):
    def requantize(self, module, weight):
        return module


class RequantizesWithoutBias(AbsmaxTarget):
    def requantize(self, module, weight):
        made = super().requantize(module, weight)
        made.bias = None
        return made


class RequantizesWider(AbsmaxTarget):
    def requantize(self, module, weight):
        made = super().requantize(module, weight)
        made.codes = made.codes.to(torch.int16)
        return made


def lying(target):
    class Lying(Absmax):
        target_class: ClassVar = target

    return Lying


class DropsBiases(Absmax):
    def quantize_linear(self, linear):
        module = AbsmaxLinear(linear)
        module.bias = None
        return module


class SaysNothingOfExperts(Absmax):
    quantizes_experts: ClassVar = False


class LeavesExpertsDense(Absmax):
    def quantize_linear(self, linear):
        return linear if linear.out_features >= 512 else super().quantize_linear(linear)


class LosesExperts(Absmax):
    def load_linear(self, linear, state):
        if linear.out_features >= 512:
            state["codes"] = state["codes"] // 2 * 2
        return super().load_linear(linear, state)


class SavesTooLittle(Absmax):
    def load_linear(self, linear, state):
        state["codes"] = state["codes"] // 2 * 2
        return super().load_linear(linear, state)


class ChangesTheNorms(Absmax):
    def quantize(self, source, **options):
        model = super().quantize(source, **options)
        model.model.norm.weight.data *= 1.01
        return model


class SkipsNothing(Absmax):
    def quantize(self, source, *, skip_modules, **options):
        return super().quantize(source, **options)


class ForgetsAnOption(Absmax):
    rounds: int = 1


class ForgetsTheScales(Absmax):
    def bits_per_weight(self, in_features, out_features, *, device, dtype):
        return 7.5


class FewSteps(Absmax):
    """Few steps in groups of 16, at scales of least squares, in int8 all the same."""

    bits: int = 3
    rescaled: bool = False

    def quantize_linear(self, linear):
        module, steps = AbsmaxLinear(linear), 2 ** (self.bits - 1) - 1
        weight = linear.weight.detach().unflatten(1, (-1, 16))
        codes = (steps * weight / weight.abs().amax(2, keepdim=True)).round()
        scale = (weight * codes).sum(2, keepdim=True) / (codes * codes).sum(2, keepdim=True)
        if self.rescaled:  # as the suite's sentence says
            values = codes * scale
            scale *= (weight * weight).sum(2, keepdim=True) / (weight * values).sum(2, keepdim=True)
        module.codes = codes.flatten(1).to(torch.int8)
        module.scale = scale.expand_as(codes).flatten(1).contiguous()
        return module


class SaysEightBits(FewSteps):
    """Of its three."""

    bits: int = 8

    def quantize_linear(self, linear):
        return FewSteps(bits=3, rescaled=True).quantize_linear(linear)


class CountsFourBits(Absmax):
    bits: int = 4

    def bits_per_weight(self, in_features, out_features, *, device, dtype):
        return self.bits + 32 / in_features


class AdoptsAll(Absmax):
    @classmethod
    def from_checkpoint(cls, quantization_config):
        return cls()


class ForgetsWhatItIs(Absmax):
    @classmethod
    def from_checkpoint(cls, quantization_config):
        return None


NO_VERA = Rule("absmax-no-vera", {"adapter": ("vera",)}, "it is not liked here", "use lora")
NO_MERGE = Rule("absmax-no-merge", {"action": ("merge",)}, "it is not liked here", "keep it")
NEVER = Rule("absmax-never", {"backend.speed": (1,)}, "there is no such option", "none")
BFLOAT16 = Rule(
    "absmax-no-bfloat16", {"dtype": ("bfloat16",)}, "it is not liked here", "use others"
)


class Plugin:
    def __init__(self, quantizer=Absmax, adapters=(), **fields):
        values = {"merge": Merge.REQUANTIZE, "devices": ("cpu",), **fields}
        self.backend = Backend("absmax", "a test's own", quantizer, **values)
        self.adapters = adapters

    @hookimpl
    def quantadapt_backends(self):
        return [self.backend]

    @hookimpl
    def quantadapt_adapters(self):
        return list(self.adapters)


@pytest.fixture
def make():
    """Return a function that registers a plugin and gives the suite and its bench."""
    benches = []
    registry.cache_clear()

    def made(plugin=None, **attributes):
        plugin = plugin or Plugin()
        registry().add("absmax", lambda: plugin, Provenance("absmax"))
        assert "absmax" in registry().plugins
        suite = type("Suite", (BackendSuite,), {"backend": "absmax", "adapters": ("lora",)})
        for name, value in attributes.items():
            setattr(suite, name, value)
        benches.append(Bench(suite))
        return suite(), benches[-1]

    yield made
    for bench in benches:
        bench.close()
    registry.cache_clear()


def names_of_tests(suite):
    return sorted(name for name in dir(suite) if name.startswith("test_"))


def run(suite, bench, name):
    """Run one test of a suite as pytest would, with every value of its parameters."""
    method = getattr(suite, name)
    wanted = method.__code__.co_varnames[2 : method.__code__.co_argcount]
    if "adapter" in wanted:
        kinds = ("dense", "requantize") if "kind" in wanted else ()
        for adapter in bench.adapters_for(getattr(method, "cells", "attach")):
            for rest in [(kind,) for kind in kinds] or [()]:
                method(bench, adapter, *rest)
    elif "experts" in wanted:
        for experts in KINDS:
            method(bench, experts)
    elif "reentrant" in wanted:
        for reentrant in (True, False):
            method(bench, reentrant)
    else:
        method(bench)


@pytest.mark.slow
def test_an_honest_backend_passes(make):
    suite, bench = make(adapters=("lora", "ia3"))
    names = names_of_tests(suite)
    assert len(names) > 30
    for name in names:
        run(suite, bench, name)


DECLARED = "test_experts_are_quantized_as_declared"
LIES = {
    "experts that are not told of": (Plugin(SaysNothingOfExperts), DECLARED),
    "experts left dense": (Plugin(LeavesExpertsDense), DECLARED),
    "experts that could be quantized": (
        Plugin(SaysNothingOfExperts),
        "test_experts_are_not_left_dense_without_need",
    ),
    "experts that are not loaded as saved": (
        Plugin(LosesExperts),
        "test_experts_are_saved_and_loaded",
    ),
    "layers missed": (Plugin(lying(MissesLayers)), "test_finds_every_linear_layer_but_the_head"),
    "5% off": (Plugin(lying(FivePercentOff)), "test_dequantized_is_close_to_the_original"),
    "5% off, in the forward": (Plugin(lying(FivePercentOff)), "test_forward_is_the_vendors"),
    "another forward": (
        Plugin(lying(OtherForward)),
        "test_forward_is_that_of_the_dequantized_weight",
    ),
    "another forward of one token": (
        Plugin(lying(DecodesOtherwise)),
        "test_forward_is_that_of_the_dequantized_weight",
    ),
    "scale transposed": (
        Plugin(lying(ScaleTransposed)),
        "test_dequantized_is_close_to_the_original",
    ),
    "wrong in bfloat16": (Plugin(lying(WrongInBfloat16)), "test_bfloat16"),
    "what stays dense is changed": (
        Plugin(ChangesTheNorms),
        "test_what_is_not_quantized_stays_as_it_is",
    ),
    "what is skipped is quantized": (
        Plugin(SkipsNothing),
        "test_skipped_modules_stay_dense",
    ),
    "base changed in training": (
        Plugin(lying(ChangesAsItRuns)),
        "test_base_stays_byte_for_byte",
    ),
    "merge loses the update": (Plugin(lying(ForgetsTheUpdate)), "test_requantized_merge"),
    "requantizing garbles": (
        Plugin(lying(ForgetsTheUpdate)),
        "test_requantizing_the_dequantized_weight",
    ),
    "requantizing gives NaN": (Plugin(lying(RequantizesToNaN)), "test_requantized_merge"),
    "merge without the update": (
        Plugin(lying(IgnoresTheUpdate)),
        "test_requantizing_the_dequantized_weight",
    ),
    "requantizing drops the bias": (
        Plugin(lying(RequantizesWithoutBias)),
        "test_requantizing_the_dequantized_weight",
    ),
    "requantizing with more bits": (
        Plugin(lying(RequantizesWider)),
        "test_requantizing_the_dequantized_weight",
    ),
    "biases dropped": (Plugin(DropsBiases), "test_biases_are_kept"),
    "biases dropped in the forward": (
        Plugin(lying(ForwardWithoutBias)),
        "test_the_vendors_forward_adds_the_bias",
    ),
    "bits not counted": (
        Plugin(ForgetsTheScales),
        "test_bits_per_weight_are_those_of_a_layer",
    ),
    "codes lost on disk": (Plugin(SavesTooLittle), "test_save_and_load_give_equal_logits"),
    "an option lost on disk": (Plugin(ForgetsAnOption), "test_save_and_load_give_equal_logits"),
    "adopts what others quantized": (Plugin(AdoptsAll), "test_other_models_are_not_adopted"),
    "a refusal of what works": (Plugin(rules=(NO_VERA,)), "test_refused_cells_do_not_work"),
    "a refused merge that works": (Plugin(rules=(NO_MERGE,)), "test_refused_merges_do_not_work"),
    "a backend that never merges": (Plugin(merge=Merge.NEVER), "test_refused_merges_do_not_work"),
    "dense only, and could more": (Plugin(merge=Merge.DENSE), "test_refused_merges_do_not_work"),
    "a refused dtype that works": (
        Plugin(rules=(BFLOAT16,)),
        "test_what_the_backends_rules_refuse_does_not_work",
    ),
}


FIRST = {test: lie for lie, (_, test) in reversed(LIES.items())}
"""For each test of the suite one lie that it catches."""


@pytest.mark.parametrize("lie", slow_but(LIES, *FIRST.values()))
def test_a_lie_is_caught(make, lie):
    plugin, name = LIES[lie]
    adapters = ("lora", "vera") if "refusal" in lie else ("lora",)
    options = {"rounds": 2} if "option" in lie else {}
    suite, bench = make(plugin, adapters=adapters, options=options)
    with pytest.raises(AssertionError) as caught:
        run(suite, bench, name)
    said = str(caught.value).splitlines()[0]  # what is wrong, and what to do
    assert not said.startswith("assert ")
    assert re.search(r"[.?:] [`A-Z]", said), said


# What a sentence says to do --------------------------------------------------------------------

CLOSE = "test_dequantized_is_close_to_the_original"


def test_a_scale_of_least_squares_is_told_how_to_become_right(make):
    suite, bench = make(Plugin(FewSteps))
    words = r"too small or too large.*by 0\.\d+, and 0\.01 is allowed\. A scale fitted by least "
    words += r"squares shrinks weights .* Multiply it by \(w \* w\)\.sum\(\) / \(w \* v\)\.sum\(\)"
    with pytest.raises(AssertionError, match=words):
        run(suite, bench, CLOSE)
    suite, bench = make(Plugin(FewSteps), options={"rescaled": True})
    run(suite, bench, CLOSE)


def test_a_bits_option_that_is_not_the_precision_is_told_how_to_declare_it(make):
    suite, bench = make(Plugin(SaysEightBits))
    words = r"Tolerances are those of 8 bits, which the option `bits` says; the layers store \d+.* "
    words += r"set `bits` in the class of the suite"
    with pytest.raises(AssertionError, match=words):
        run(suite, bench, CLOSE)
    suite, bench = make(Plugin(SaysEightBits), bits=3)
    run(suite, bench, CLOSE)


def test_bits_that_the_stored_size_contradicts_are_told_how_to_be_counted(make):
    suite, bench = make(Plugin(CountsFourBits))
    words = (
        r"declares 4\.\d+ bits, a layer stores 8\.\d+\. Count .*4 bits in an int8 take 8, whatever "
    )
    with pytest.raises(AssertionError, match=words):
        run(suite, bench, "test_bits_per_weight_are_those_of_a_layer")


def test_an_adapter_that_hardly_moves_is_trained_at_a_higher_rate(make):
    suite, bench = make(adapters=("vera",))
    suite.test_loss_falls(bench, "vera")


def test_a_wrong_shape_is_caught_by_the_core(make):
    suite, bench = make(Plugin(lying(WrongShape)))
    with pytest.raises(PluginError, match=r"returned \(256, 256\), its shape says \(512, 256\)"):
        run(suite, bench, "test_metadata_is_right_and_free")


def test_a_checkpoint_that_its_maker_does_not_know_is_caught(make):
    suite, bench = make(Plugin(ForgetsWhatItIs))
    with pytest.raises(Exception, match="cannot read it"):
        run(suite, bench, "test_saved_checkpoint_is_adopted")


def test_a_rule_that_can_never_apply_is_caught(make):
    suite, bench = make(Plugin(rules=(NEVER,)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(suite, bench, "test_every_rule_of_the_backend_refuses")


def test_the_message_of_strict_says_what_to_do(make):
    suite, bench = make(Plugin(rules=(NO_VERA,)), adapters=("vera",))
    with pytest.raises(
        AssertionError, match=r"absmax-no-vera refuses something that works.*narrow"
    ):
        suite.test_refused_cells_do_not_work(bench, "vera")


def test_without_strict_a_wrong_refusal_passes(make):
    suite, bench = make(Plugin(rules=(NO_VERA,)), adapters=("vera",), strict=False)
    suite.test_refused_cells_do_not_work(bench, "vera")


def test_an_adapter_that_only_says_it_starts_at_zero_is_caught(make):
    liar = Adapter("liar", "c3a", "C3A", {"block_size": 128}, start=Start.ZERO)
    suite, bench = make(Plugin(adapters=(liar,)), adapters=("liar",))
    with pytest.raises(AssertionError):
        suite.test_attaching_changes_nothing(bench, "liar")


def test_an_adapter_that_starts_at_zero_and_does_not_say_so_is_caught(make):
    shy = Adapter("shy", "lora", "LORA", start=Start.CHANGED)
    suite, bench = make(Plugin(adapters=(shy,)), adapters=("shy",))
    with pytest.raises(AssertionError, match="declare it"):
        suite.test_attaching_changes_nothing(bench, "shy")


def test_a_merge_that_drops_the_adapter_is_caught(make):
    from quantadapt.facade import densify

    suite, bench = make()

    def dropped(model, kind):
        return densify(bench.fresh())

    with (
        patch("quantadapt.exporting.merging.merged_model", dropped),
        pytest.raises(AssertionError),
    ):
        suite.test_dense_merge(bench, "lora")


def test_a_merge_that_changes_the_model_is_caught(make):
    from quantadapt.exporting.merging import merged_model

    def careless(model, kind):
        merged = merged_model(model, kind)
        next(p for n, p in model.named_parameters() if "lora_B" in n).data.zero_()
        return merged

    suite, bench = make()
    with (
        patch("quantadapt.exporting.merging.merged_model", careless),
        pytest.raises(AssertionError),
    ):
        suite.test_dense_merge(bench, "lora")


def test_importing_the_suite_loads_nothing_heavy():
    code = "import sys, quantadapt.testing; print({'torch', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The results file ---------------------------------------------------------------------------------


def test_results_are_written_for_every_cell(make, tmp_path):
    suite, bench = make(Plugin(rules=(NO_VERA,)), adapters=("lora", "ia3", "vera"))
    bench.note("", dequantize_error=0.01)
    bench.note("lora", merge_error=1e-7, loss_before=2.0, loss_after=1.0)
    results = Results(tmp_path / "deep" / "matrix.json")
    for adapter, failed in (("lora", False), ("ia3", True), ("vera", False)):
        callspec = SimpleNamespace(params={"adapter": adapter})
        item = SimpleNamespace(
            funcargs={"bench": bench}, callspec=callspec, originalname="test_x", name="test_x"
        )
        report = SimpleNamespace(failed=failed)
        results.add(results.described(item, type(suite), report))
    results.pytest_sessionfinish()
    document = json.loads((tmp_path / "deep" / "matrix.json").read_text())
    assert document["generated"]["device"] == "cpu"
    assert document["generated"]["versions"]["peft"]
    found = {cell["adapter"]: cell for cell in document["cells"]}
    assert found["lora"]["verified"] == "passed"
    assert found["lora"]["declared"] == "REQUANTIZE"
    assert (found["lora"]["merge_error"], found["lora"]["dequantize_error"]) == (1e-7, 0.01)
    assert (found["ia3"]["verified"], found["ia3"]["failed"]) == ("failed", ["test_x"])
    assert (found["vera"]["declared"], found["vera"]["verified"]) == ("refused", "refused")


def test_a_failure_of_the_base_fails_every_cell(make, tmp_path):
    suite, bench = make(adapters=("lora", "ia3"))
    results = Results(tmp_path / "matrix.json")
    for adapter in ("lora", "ia3", ""):
        callspec = SimpleNamespace(params={"adapter": adapter} if adapter else {})
        item = SimpleNamespace(
            funcargs={"bench": bench}, callspec=callspec, originalname="test_y", name="test_y"
        )
        report = SimpleNamespace(failed=not adapter)
        results.add(results.described(item, type(suite), report))
    results.pytest_sessionfinish()
    document = json.loads((tmp_path / "matrix.json").read_text())
    assert [cell["verified"] for cell in document["cells"]] == ["failed", "failed"]
