"""Training through the quantizer: what was trained is what is merged, read from disk."""

from __future__ import annotations

import time
import warnings
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from merging import HELD_OUT, IDS, logits, moved, saved_model, stock
from parameters import slow_but
from torch.nn.functional import linear

import quantadapt as qa
from quantadapt import cli
from quantadapt.adapting.fused import FusedLoraLinear
from quantadapt.adapting.merge_aware import (
    StaysMergeAwareWarning,
    make_merge_aware,
    rounded_weights,
)
from quantadapt.errors import MergeRefused, PlanRefused
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.tuned import Tuned
from quantadapt.facade import QuantLinear, facades, lora_change
from quantadapt.planning import plan
from quantadapt.planning.exports import export_of
from quantadapt.protocols import Figure, UniformGrid
from quantadapt.spec import Spec

BACKENDS = {
    "hqq": {"bits": 4},
    "bnb-nf4": {},
    "bnb-int8": {},
    "torchao-int8": {},
    "torchao-int4": {"group_size": 32},
    "torchao-intx": {"bits": 3, "group_size": 32},
    "torchao-fp8": {},
    "quanto": {"weights": "int4"},
    "eetq": {},
    "mxfp4": {},
    "nvfp4": {},
    "finegrained-fp8": {},
}
ADAPTERS = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "vera": {"r": 16},
    "adalora": {"init_r": 6, "target_r": 4},
    "ia3": {},
}


DATA = Dataset.from_dict(
    {
        "input_ids": [[100 + (i * j) % 40 for j in range(16)] for i in range(1, 17)],
        "completion_mask": [[1] * 16] * 16,
    }
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=2048, attention_bias=True, **sizes, **heads)
    return saved_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("base"))


def aware(base: str, backend: str, adapter: str = "lora", dtype: str = "float32", **options):
    """A model with an adapter that has moved by a part of a step, and computes as it is merged."""
    model = qa.quantize(base, backend, dtype=dtype, **BACKENDS[backend])
    model = moved(qa.attach(model, adapter, **ADAPTERS[adapter], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and adapter in ("lora", "dora"):
                parameter *= 0.4
    before = logits(model)
    make_merge_aware(model)
    return model.eval(), before


def kl(found: torch.Tensor, reference: torch.Tensor) -> float:
    p, q = (x.double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


OTHERS = [name for name in ADAPTERS if name != "lora"]
CELLS = [
    *((backend, "lora") for backend in BACKENDS),
    *(("hqq", adapter) for adapter in OTHERS),
    *(
        pytest.param(backend, adapter, marks=pytest.mark.slow)
        for backend in ("bnb-nf4", "bnb-int8", "quanto")
        for adapter in OTHERS
    ),
]


@pytest.mark.parametrize(("backend", "adapter"), CELLS)
def test_merged_files_are_the_trained_model(base, backend, adapter, tmp_path):
    model, unrounded = aware(base, backend, adapter)
    trained = logits(model)
    assert kl(trained, unrounded) > 1e-6  # rounding is there to be seen
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    assert kl(logits(qa.load(tmp_path)), trained) < 1e-6


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_16_bits_is_merged_as_it_computes(base, backend, adapter):
    """Scales and changes of a part of a step are finer than that; by `merge`, and by PEFT alone."""
    model, unrounded = aware(base, backend, adapter, "bfloat16")
    trained = logits(model)
    assert kl(trained, unrounded) > 1e-6
    assert kl(logits(merged_model(model, "requantize")), trained) < 1e-9
    assert kl(logits(model.merge_and_unload()), trained) < 1e-9


def test_activations_that_are_rounded_carry_no_difference_on():
    """What the sums of merging leave of a change is what training rounds: a weight that becomes
    another step elsewhere would change what the layers after it round."""
    torch.manual_seed(0)
    start = torch.randint(-127, 128, (256, 512)) * 0.01
    grid = UniformGrid(scale=torch.full((256, 1), 0.01), group_size=512, dtype=torch.float32,
                       lowest=-127, highest=127)  # fmt: skip
    start = grid.nearest(start)
    for change in torch.randn(20, 256, 512) * 1e-3:
        merged = (start + change) - start
        assert torch.equal(grid.dithered(start, change), grid.dithered(start, merged))


@pytest.mark.parametrize("scaling", [1, 0.25, 16, 0.7, 8 / 3])
def test_what_is_rounded_is_what_peft_adds(scaling):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(96, 64)), config).base_model.model[0]
    layer.scaling["default"] = scaling
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    assert torch.equal(lora_change(a, b, scaling), layer.get_delta_weight("default"))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "vera"])
@pytest.mark.parametrize("backend", ["gptq", "gptq-by-activation", "awq", "autoround"])
def test_what_was_calibrated_is_not_calibrated_again(base, backend, adapter, tmp_path):
    """Layer by layer, without data."""
    options = {"gptq-by-activation": {"desc_act": True}, "autoround": {"iters": 2}}.get(backend, {})
    examples = [{"input_ids": torch.tensor(row)[None]} for row in DATA["input_ids"]]
    model = qa.quantize(
        *(base, backend.partition("-")[0]), calibration=examples, group_size=32, **options
    )
    model = moved(qa.attach(model, adapter, **ADAPTERS[adapter]))
    model.quantadapt.calibration = None
    unrounded = logits(model)
    make_merge_aware(model)
    trained = logits(model)
    assert kl(trained, unrounded) > 1e-6
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    assert kl(logits(qa.load(tmp_path)), trained) < 1e-6


@pytest.mark.parametrize("adapter", slow_but(["lora", "dora", "vera", "ia3"], "dora"))
@pytest.mark.parametrize("scheme", [("W4A8", 32), ("FP8_DYNAMIC", None)])
def test_with_gradients_activations_are_rounded_as_in_the_merged_model(base, scheme, adapter):
    """PEFT's own forward rounds those of the base alone, and what is trained would be another."""
    model = qa.quantize(base, "compressed-tensors", scheme=scheme[0], group_size=scheme[1])
    model = moved(qa.attach(model, adapter, **ADAPTERS[adapter]))
    make_merge_aware(model)
    served = logits(merged_model(model, "requantize"))
    found = model.train()(input_ids=IDS).logits
    assert found.requires_grad
    assert kl(found.detach(), served) < 1e-5  # an edge of a code, at most


def test_what_transformers_loads_is_the_trained_model(base, tmp_path):
    model, _ = aware(base, "bnb-nf4")
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    theirs = stock(tmp_path / "merged")
    with torch.no_grad():  # in eval mode bitsandbytes computes in bfloat16 on CPUs that can
        assert kl(theirs.train()(IDS).logits, logits(model)) < 1e-9


@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4", "torchao-int4", "eetq"])
def test_a_dense_merge_holds_the_weights_that_were_trained(base, backend, tmp_path):
    """Read by transformers alone, in float32, where rounding hides no difference."""
    model, unrounded = aware(base, backend)
    trained = logits(model)
    assert kl(trained, unrounded) > 1e-6
    qa.merge(model, tmp_path, kind="dense", data=HELD_OUT)
    assert kl(logits(stock(tmp_path / "merged")), trained) < 1e-9


def test_an_adapter_beside_its_base_is_not_what_vllm_would_serve(base, tmp_path, capsys):
    model, _ = aware(base, "bnb-nf4")
    qa.save(model, tmp_path / "run")
    export = ("export", str(tmp_path / "run"), "vllm", "--set")
    with pytest.raises(SystemExit) as ended:
        cli.main([*export, "content=adapter"])
    assert ended.value.code == 2
    assert "[rule vllm-merge-aware]" in capsys.readouterr().err
    assert "PEFT alone does not" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    formats = [{"name": "vllm", "content": "adapter"}]
    found = refused(backend="bnb-nf4", export={"merge": "never", "formats": formats})
    assert ("vllm-merge-aware", "export") in found


def some_layer(model):
    return next(m for m in model.modules() if isinstance(m, FusedLoraLinear))


def passed(layer, x, dy):
    """Return output and gradients of a training pass: of x, A and B."""
    layer.train()
    x = x.clone().requires_grad_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y = layer(x)
    y.backward(dy)
    found = y.detach(), x.grad, a.grad, b.grad
    a.grad = b.grad = None
    return found


@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4", "bnb-int8", "torchao-int8"])
def test_gradients_go_straight_through(base, backend):
    """Fused and by PEFT's own forward, against autograd in float64."""
    model, _ = aware(base, backend)
    layer = some_layer(model)
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, 2, 9, 64, generator=generator)
    fused = passed(layer, x, dy)
    with patch.object(FusedLoraLinear, "fuses", return_value=False):
        generic = passed(layer, x, dy)

    facade: QuantLinear = layer.base_layer
    a, b = (part["default"].weight.detach().double().requires_grad_()
            for part in (layer.lora_A, layer.lora_B))  # fmt: skip
    change = layer.scaling["default"] * b @ a
    rounded = facade.moved(change.detach().float()).double()
    x = x.double().requires_grad_()
    y = linear(x, change + (rounded - change).detach(), facade.bias.double())
    y.backward(dy.double())
    for found in (fused, generic):
        for part, reference in zip(found, (y, x.grad, a.grad, b.grad), strict=True):
            assert (part - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.slow
def test_what_slow_rounding_costs_is_told(base, monkeypatch):
    model = qa.attach(qa.quantize(base, "hqq"), "lora", r=4, target_modules=["q_proj", "o_proj"])
    assert len(rounded_weights(model)) == 0
    given = {"max_steps": 2, "merge_aware": True, "per_device_train_batch_size": 4}
    own = UniformGrid.dithered

    def slow(self, start, change):
        time.sleep(0.1)
        return own(self, start, change)

    monkeypatch.setattr(UniformGrid, "dithered", slow)
    found = qa.train(model, DATA, **given)
    assert len(rounded_weights(model)) == 4
    assert 3 * found.dequantize_share < found.rounding_share <= 1
    plain = qa.train(qa.attach(qa.quantize(base, "hqq"), "lora", r=4), DATA, max_steps=1)
    assert plain.rounding_share is None


def test_another_rounding_is_refused(base, tmp_path):
    model, _ = aware(base, "hqq")
    with pytest.raises(MergeRefused, match="dithered"):
        qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, rounding="nearest")


def test_another_rounding_is_refused_before_anything_is_loaded(base, tmp_path, capsys):
    model, _ = aware(base, "hqq")
    qa.save(model, tmp_path)
    asked = ["merge", str(tmp_path), "--kind", "requantize", "--rounding", "nearest"]
    loads = patch("quantadapt.exporting.tuned.load", side_effect=AssertionError)
    with loads, pytest.raises(SystemExit) as ended:
        cli.main(asked)
    assert ended.value.code == 2
    assert "nearest makes another model" in capsys.readouterr().err
    written = patch("quantadapt.exporting.stage.write", side_effect=AssertionError)
    with written, pytest.raises(MergeRefused, match="nearest makes another model"):
        qa.merge(model, tmp_path / "live", kind="requantize", data=HELD_OUT, rounding="nearest")


def test_training_on_without_saying_so_is_told(base):
    model = qa.attach(qa.quantize(base, "hqq"), "lora", r=4)
    given = {"max_steps": 1, "per_device_train_batch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaysMergeAwareWarning)
        qa.train(model, DATA, **given)
        qa.train(model, DATA, merge_aware=True, **given)
        qa.train(model, DATA, merge_aware=True, **given)
    with pytest.warns(StaysMergeAwareWarning, match="stays so"):
        qa.train(model, DATA, merge_aware=False, **given)
    assert model.quantadapt.merge_aware


def ways_out(model, folder, exporter):
    """What a refusal for too little gain tells to do."""
    tuned = Tuned(model, data=lambda _: HELD_OUT)
    little = {"gain": Figure(1.0), "gain_error": Figure(0.01), "gain_kept": Figure(0.1)}

    def compared(self, merged, judge):
        judge({**little, "kl": Figure(1.0)})
        raise AssertionError

    found = patch.object(Tuned, "compared", compared), patch.object(Tuned, "gain", None)
    with found[0], found[1], pytest.raises(MergeRefused) as refused:
        exporter.write(tuned, folder)
    return refused.value.problems[0].fix


def test_a_refusal_names_ways_that_the_export_has(base, tmp_path):
    plain = moved(qa.attach(qa.quantize(base, "compressed-tensors", group_size=32), "lora", r=4))
    expected = {"merged-requantized": True, "vllm": False, "compressed-tensors": False}
    for name, has_flags in expected.items():
        (folder := tmp_path / name).mkdir()
        options = {"group_size": 32} if name == "compressed-tensors" else {}
        fix = ways_out(plain, folder, export_of(name, options).exporter)
        assert ("--rounding" in fix) == ("--kind dense" in fix) == has_flags, fix
        assert ("train.merge_aware" in fix) == (name != "compressed-tensors"), fix
        assert "min_gain" in fix
    make_merge_aware(plain)
    (tmp_path / "aware").mkdir()
    fix = ways_out(plain, tmp_path / "aware", export_of("merged-requantized", {}).exporter)
    assert "merge_aware" not in fix
    assert "--rounding" not in fix


def test_options_of_lora(base, tmp_path):
    """rsLoRA, dropout, patterns of ranks, and a bias that is trained."""
    options = {"use_rslora": True, "lora_dropout": 0.3, "rank_pattern": {"q_proj": 2},
               "bias": "all"}  # fmt: skip
    model, _ = aware(base, "hqq", **options)
    x, dy = torch.randn(2, 2, 9, 64)
    dropped = passed(some_layer(model), x, dy)
    assert not torch.equal(dropped[0], passed(some_layer(model), x, dy)[0])
    trained = logits(model)
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    assert kl(logits(qa.load(tmp_path)), trained) < 1e-6


def test_without_its_adapter_it_is_the_base(base):
    quantized = qa.quantize(base, "hqq", **BACKENDS["hqq"])
    expected = logits(quantized)
    model, _ = aware(base, "hqq", "vera")
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_it_stays_so_in_files_and_where_peft_merges(base, tmp_path):
    model, _ = aware(base, "hqq")
    trained = logits(model)
    qa.save(model, tmp_path)
    loaded = qa.load(tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert kl(logits(loaded.merge_and_unload()), trained) < 1e-6


LATER = {
    "hqq": {"target_modules": ["v_proj", "down_proj"]},
    "bnb-nf4": {"target_modules": ["v_proj", "q_proj"], "use_dora": True},
    "bnb-int8": {"target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("backend", LATER)
def test_layers_adapted_later_are_merged_as_they_compute(base, backend, at_once, tmp_path):
    """PEFT's `add_adapter`; with the merge before or after the first forward."""
    from peft import LoraConfig

    model, _ = aware(base, backend, target_modules=["q_proj"])
    logits(model)
    model.add_adapter("other", LoraConfig(r=4, **LATER[backend]))
    model.set_adapter("other")
    moved(model, 0.04)
    qa.save(model, tmp_path / "saved")
    trained = None if at_once else logits(model)
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    trained = logits(model) if trained is None else trained
    assert torch.equal(logits(qa.load(tmp_path / "saved")), trained)
    assert kl(logits(qa.load(tmp_path)), trained) < 1e-6
    with model.disable_adapter():
        assert kl(logits(model), trained) > 1e-5
    loaded = qa.load(tmp_path / "saved")  # and PEFT merges before any forward
    assert kl(logits(loaded.merge_and_unload()), trained) < 1e-6
    if at_once:
        model.delete_adapter("other")
        model.add_adapter("other", LoraConfig(r=4, target_modules=["k_proj"]))
        model.set_adapter("other")
        moved(model, 0.04)
        trained = logits(model)
        assert kl(logits(model.merge_and_unload()), trained) < 1e-6


def test_another_adapter_on_the_base_begins_anew(base):
    model, _ = aware(base, "hqq", target_modules=["q_proj"])
    expected = qa.quantize(base, "hqq", **BACKENDS["hqq"])
    found, plain = (
        moved(qa.attach(each, "lora", r=4)).eval() for each in (model.unload(), expected)
    )
    assert not found.quantadapt.merge_aware
    assert torch.equal(logits(found), logits(plain))
    assert not any(facade.keeps_scales for _, facade in facades(found))
    make_merge_aware(found)
    assert not torch.equal(logits(found), logits(plain))


def test_layers_without_an_adapter_keep_their_bytes(base):
    from quantadapt.exporting.merging import merged_model

    model, _ = aware(base, "hqq", target_modules=["q_proj"])
    before = {name.replace(".base_layer", ""): facade.vendor
              for name, facade in facades(model.get_base_model())}  # fmt: skip
    for name, facade in facades(merged_model(model, "requantize")):
        own, vendor = before[name], facade.vendor
        assert torch.equal(vendor.meta["scale"], own.meta["scale"])
        assert torch.equal(vendor.W_q, own.W_q) == ("q_proj" not in name)


def losses(base, adapter="lora", **options):
    model = qa.attach(qa.quantize(base, "hqq", bits=3), adapter, **ADAPTERS[adapter])
    given = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1} | options
    found = qa.train(model, DATA, learning_rate=5e-3, merge_aware=True, **given)
    return [loss for _, loss in found.losses], model


def test_training_learns_and_recomputing_changes_nothing(base):
    plain, model = losses(base, gradient_checkpointing=False)
    assert plain[-1] < plain[0]
    recomputed, _ = losses(base, gradient_checkpointing=True)
    assert recomputed == pytest.approx(plain, rel=1e-5)
    parts, _ = losses(base, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts == pytest.approx(plain, rel=1e-4)
    with patch.object(FusedLoraLinear, "fuses", return_value=False):
        generic, _ = losses(base)
    assert generic == pytest.approx(plain, rel=1e-4)
    assert model.quantadapt.merge_aware


def test_validation_measures_the_model_that_is_merged(base, tmp_path):
    model = qa.attach(qa.quantize(base, "hqq", bits=3), "lora", r=4)
    found = qa.train(model, DATA, learning_rate=5e-3, merge_aware=True, max_steps=3, eval_steps=3,
                     eval_data=HELD_OUT, per_device_train_batch_size=4)  # fmt: skip
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, min_gain=0)
    merged = qa.evaluate(qa.load(tmp_path), HELD_OUT)["loss"]
    assert found.validation[-1][1] == pytest.approx(merged, abs=1e-5)


def refused(processes=None, **values):
    train = {"merge_aware": True, **values.pop("train", {})}
    with pytest.raises(PlanRefused) as error:
        plan(Spec(train=train, **values), check_output=False, processes=processes)
    return [(problem.rule, problem.where) for problem in error.value.problems]


def test_a_plan_refuses_what_cannot_be_trained_so():
    assert refused(backend="none") == [("merge-aware-grid", "train.merge_aware")]
    assert refused(backend="hqq", adapter="lily")[0][0] == "lily-no-merge"
    export = {"merge": "requantize", "rounding": "nearest"}
    assert refused(export=export) == [("merge-aware-rounding", "export.rounding")]
    shared = refused(backend="bnb-nf4", train={"parallel": "fsdp"}, processes=2, device="cpu")
    assert ("fsdp-merge-aware", "train.merge_aware") in shared


def test_python_refuses_what_a_plan_does(base):
    model = qa.attach(qa.quantize(base, "none"), "lora")
    with pytest.raises(PlanRefused, match="scales of none"):
        qa.train(model, DATA, merge_aware=True, max_steps=1)
    assert not model.quantadapt.merge_aware


def test_a_run_exports_the_quantized_model():
    for wanted, kind in (({}, "requantize"), ({"export": {"merge": "dense"}}, "dense")):
        made = plan(Spec(train={"merge_aware": True}, **wanted), check_output=False)
        assert made.merge == kind
        assert any(note.startswith("merge_aware") for note in made.notes)
    assert plan(Spec(), check_output=False).merge == "dense"
