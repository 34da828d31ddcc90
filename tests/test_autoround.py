"""AutoRound: the suite, whether tuning is worth it, its and transformers' checkpoints, traces."""

# ruff: noqa: RUF012 (options are given as a plain dict)

import copy
import gc
import os
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from quantadapt_autoround import AutoRound
from quantadapt_autoround.tuning import CUBLAS, TRACE, give_logging_back, rows_of
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import quantadapt
from quantadapt.errors import DataError, ModelError, PlanRefused
from quantadapt.facade import facades
from quantadapt.loading import linear_layers, set_submodule
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing import BackendSuite, TargetSuite
from quantadapt.testing.small_demo import calibration_examples, demo_tokens, small_model
from quantadapt.testing.tensors import relative

LAYOUTS = [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True)]


class TestAutoRound(BackendSuite):
    backend = "autoround"
    options = {"bits": 4, "group_size": 32, "iters": 2}


class TestAutoRound3Asymmetric(TargetSuite):
    backend = "autoround"
    options = {"bits": 3, "group_size": 64, "sym": False, "iters": 2}


def dense_model():
    return AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()


def quantized(model=None, **options):
    given = {"group_size": 32, "iters": 2, **options}
    return quantadapt.quantize(
        str(small_model()) if model is None else model,
        "autoround",
        device="cpu",
        dtype="float32",
        calibration=calibration_examples(),
        **given,
    )


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(input_ids=demo_tokens() if ids is None else ids).logits.float()


# What it is for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "sym"), [(2, False), pytest.param(3, True, marks=pytest.mark.slow)]
)
def test_tuned_rounding_beats_the_nearest(bits, sym):
    """On the data that it was tuned on, and on other data."""
    quantizer = AutoRound(bits=bits, group_size=64, sym=sym, iters=20)
    dense, nearest = dense_model(), dense_model()
    tuned = quantizer.quantize(
        dense_model(), device="cpu", dtype=torch.float32, calibration=calibration_examples()
    )
    for name, linear in list(linear_layers(nearest, ("lm_head",))):
        set_submodule(nearest, name, quantizer.quantize_linear(linear))
    seen = torch.cat([example["input_ids"] for example in calibration_examples()])
    unseen = demo_tokens(128)[-64:]
    for ids in (seen, unseen):
        reference = logits(dense, ids)
        errors = [relative(logits(model, ids), reference) for model in (tuned, nearest)]
        assert errors[0] < 0.8 * errors[1], errors


# The layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "sym"), LAYOUTS)
@pytest.mark.parametrize("group_size", [32, None])
def test_a_layer_computes_what_it_dequantizes_to(bits, sym, group_size):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(128, 64)
    linear.weight = nn.Parameter(torch.randn(64, 128, generator=generator))
    linear.weight.data[7] = 0
    quantizer = AutoRound(bits=bits, sym=sym, group_size=group_size)
    layer = quantizer.quantize_linear(linear)
    weight = quantizer.target.dequantize(layer).float()
    assert quantizer.target.shape(layer) == (128, 64)
    assert relative(weight, linear.weight) < {2: 0.75, 3: 0.35, 4: 0.15, 8: 0.01}[bits]
    assert (weight[7] == 0).all()
    assert relative(layer(torch.eye(128)).t(), weight + linear.bias[:, None]) < 1e-6
    assert torch.equal(layer.bias, linear.bias)
    empty = nn.Linear(128, 64, device="meta")
    again = quantizer.load_linear(empty, dict(layer.state_dict()))
    assert torch.equal(quantizer.target.dequantize(again), weight.to(layer.scales.dtype))
    assert quantizer.from_model(nn.Sequential(again)) == quantizer


@pytest.mark.parametrize(("bits", "sym"), LAYOUTS)
@pytest.mark.parametrize("group_size", [32, None])
def test_a_weight_is_packed_onto_the_scales_that_are_there(bits, sym, group_size):
    """The layer's own forward gives the nearest of all values that its scales allow."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(128, 64)
    linear.weight = nn.Parameter(torch.randn(64, 128, generator=generator))
    linear.weight.data[7] = 0
    quantizer = AutoRound(bits=bits, sym=sym, group_size=group_size)
    target, layer = quantizer.target, quantizer.quantize_linear(linear)
    own = target.dequantize(layer)
    again = target.repack(layer, own)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in layer.state_dict().items())
    grid = target.grid(layer)
    weight = own + 2 * torch.randn(64, 128, generator=generator)
    groups = torch.arange(128) // (group_size or 128)
    codes = torch.arange(2**bits).double()
    zero, scale = (part.double()[:, groups, None] for part in (grid.zero, grid.scale))
    values = (codes - zero) * scale
    off = (values - weight.double()[..., None]).abs().amin(-1)
    packed = target.repack(layer, weight)
    found = (packed(torch.eye(128)) - linear.bias).t().detach().double()
    assert ((found - weight).abs() - off).max() <= values.abs().max() * torch.finfo(own.dtype).eps
    assert torch.equal(packed.scales, layer.scales)
    assert torch.equal(target.dequantize(layer), own)


def test_whole_rows_are_told_from_groups_of_that_size():
    """The first layer's row may be as long as a group."""
    for group_size, sizes in ((128, (128, 256)), (None, (128, 256)), (None, (128,))):
        quantizer = AutoRound(group_size=group_size)
        layers = [quantizer.quantize_linear(nn.Linear(size, 64)) for size in sizes]
        assert quantizer.from_model(nn.Sequential(*layers)) == quantizer


def test_sizes_that_cannot_be_packed():
    assert AutoRound().misfit(256, 128) is None
    assert "does not divide 250 inputs" in AutoRound(group_size=None).misfit(250, 128)
    assert "does not divide 100 outputs" in AutoRound().misfit(256, 100)
    assert "group_size 128 does not divide 320" in AutoRound().misfit(320, 128)


# Checkpoints -------------------------------------------------------------------------------------


def assert_same(model, theirs):
    """Every packed layer computes the same; auto-round turns the rest into float16."""
    found = dict(facades(model))
    assert found
    for name, facade in found.items():
        vendor = theirs.get_submodule(name)
        assert type(vendor).__name__ == "QuantLinear"
        x = torch.randn(3, facade.in_features)
        assert relative(vendor(x), facade(x)) < 1e-6, name
    assert relative(logits(theirs), logits(model)) < 2e-3


@pytest.mark.parametrize(
    ("bits", "sym"),
    [
        (4, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((3, True), (4, True), (8, True))
        ),
    ],
)
def test_transformers_loads_our_checkpoint(bits, sym, tmp_path):
    model = quantized(bits=bits, sym=sym, skip_modules=["lm_head", "layers.0.mlp.up_proj"])
    folder = quantadapt.save(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs.model.layers[0].mlp.up_proj) is nn.Linear
    assert_same(model, theirs)


@pytest.mark.slow
def test_auto_rounds_own_checkpoint_is_adopted(tmp_path):
    import auto_round
    from transformers import AutoTokenizer

    rows = [example["input_ids"] for example in calibration_examples()]
    tuner = auto_round.AutoRound(
        dense_model(),
        tokenizer=AutoTokenizer.from_pretrained(small_model()),
        bits=4,
        group_size=32,
        iters=2,
        dataset=rows,
        seqlen=64,
        nsamples=len(rows),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    gc.freeze()  # it collects garbage all the time
    tuner.quantize()
    gc.unfreeze()
    tuner.save_quantized(str(tmp_path / "theirs"), format="auto_round")
    (config,) = (tmp_path / "theirs").glob("**/config.json")
    theirs = AutoModelForCausalLM.from_pretrained(config.parent)
    model = quantadapt.quantize(str(config.parent), "autoround", device="cpu", dtype="float32")
    assert model.quantadapt.quantizer == AutoRound(bits=4, group_size=32, iters=2)
    assert_same(model, theirs)
    assert torch.equal(logits(quantized(bits=4)), logits(model)), "tuned in another way"


@pytest.mark.parametrize(
    "changed",
    [
        {"packing_format": "auto_round:auto_awq"},
        {"data_type": "mx_fp"},
        {"bits": 5},
        {"group_size": 8},
        {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}},
        {"quant_method": "gptq"},
    ],
)
def test_other_formats_are_refused(changed):
    config = AutoRound(group_size=None).quantization_config()
    assert AutoRound.from_checkpoint(config) == AutoRound(group_size=None)
    assert AutoRound.from_checkpoint(config | changed) is None


def test_eight_asymmetric_bits_are_refused():
    spec = Spec(backend={"name": "autoround", "bits": 8, "sym": False}, device="cpu")
    with pytest.raises(PlanRefused, match="autoround-8bit-asym"):
        plan(spec, check_output=False)


# What it is given, and what it leaves ------------------------------------------------------------


def test_rows_have_one_length_and_lose_next_to_nothing():
    lengths = (30, 64, 7, 50, 64, 1)
    total = sum(lengths)
    ids = torch.arange(total)
    examples = [{"input_ids": part[None]} for part in ids.split(lengths)]
    rows = rows_of(examples)
    assert {tuple(row.shape) for row in rows} == {(1, 64)}
    assert torch.equal(torch.cat(rows, 1)[0], ids[: total // 64 * 64])
    with pytest.raises(DataError, match="tokens only"):
        rows_of([{"pixel_values": torch.zeros(1, 3, 4, 4)}])


def test_nothing_is_left_behind(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)
    model = dense_model().train()
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    printed = repr(torch.tensor([1e-3, 2.0]))
    made = quantized(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert repr(torch.tensor([1e-3, 2.0])) == printed
    assert CUBLAS not in os.environ
    assert made is model
    assert made.training
    for name, module in made.named_modules():
        left = {"forward", "orig_forward", "global_name", "bits", "scale"} & set(vars(module))
        assert not left, name
    expected = logits(made)
    copied = copy.deepcopy(made)
    for _, facade in facades(made):
        facade.vendor.scales.zero_()
    assert torch.equal(logits(copied), expected)


def test_layers_outside_the_blocks_are_rounded_to_nearest():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, vocab_size=2048)
    model = quantized(OPTForCausalLM(config), group_size=32)
    names = {name for name, _ in facades(model)}
    outside = {name for name in names if "decoder.layers.0" not in name}
    assert outside == {"model.decoder.project_in", "model.decoder.project_out"}
    assert len(names) == 8


def test_giving_up_is_an_error(monkeypatch):
    """auto-round calls sys.exit where it finds no way on."""
    import auto_round

    def leave():
        raise SystemExit(-1)

    monkeypatch.setattr(auto_round, "AutoRound", lambda *_, **__: SimpleNamespace(quantize=leave))
    with pytest.raises(ModelError, match="gave up"):
        quantized()
    monkeypatch.setattr(
        auto_round, "AutoRound", lambda *_, **__: SimpleNamespace(quantize=lambda: None)
    )
    with pytest.raises(ModelError, match="no transformer block"):
        quantized()


def test_warnings_of_transformers_stay_its_own() -> None:
    """auto-round takes them over when it is imported; after its work they are given back."""
    import logging

    import auto_round.logger as theirs

    logging.Logger.warning_once = theirs.warning_once
    give_logging_back()
    assert logging.Logger.warning_once.__module__.startswith("transformers")


def test_loggers_of_others_can_still_trace(caplog) -> None:
    """neural-compressor's do, with keywords that auto-round's `trace` does not know."""
    import logging

    import auto_round.logger as theirs

    logging.Logger.trace = theirs.trace
    give_logging_back()
    with caplog.at_level(TRACE, "somebody"):
        logging.getLogger("somebody").trace("traced %s", "it", stacklevel=3)
    assert [record.getMessage() for record in caplog.records] == ["traced it"]
