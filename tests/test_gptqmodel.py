"""GPTQ and AWQ through gptqmodel: numbers, layouts, checkpoints of others, and the suite."""

# ruff: noqa: RUF012 (options are given as a plain dict)

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parameters import slow_but
from quantadapt_gptqmodel import AWQ, GPTQ
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.errors import ModelError, PlanRefused
from quantadapt.facade import facades, wrap
from quantadapt.layerwise import quantize_layerwise
from quantadapt.loading import from_pretrained
from quantadapt.testing import BackendSuite
from quantadapt.testing.bench import Bench
from quantadapt.testing.small_demo import biased, calibration_examples, small_model
from quantadapt.testing.tensors import change, relative

Made = Callable[..., nn.Module]


class TestGPTQ(BackendSuite):
    backend = "gptq"
    options = {"group_size": 64}


class TestAWQ(BackendSuite):
    """AWQ moves scales between layers: rows and columns have factors, and biases go with rows."""

    backend = "awq"
    options = {"group_size": 64}

    def test_dequantized_is_close_up_to_factors(self, bench: Bench) -> None:
        for name, facade in bench.facades().items():
            found = facade.dequantize()
            rows, columns = factors(found, bench.original(name))
            error = relative(found, bench.original(name) * rows[:, None] * columns)
            assert error <= bench.tolerance.weight.error, name

    def test_biases_go_with_the_rows(self, bench: Bench) -> None:
        dense = biased(bench)
        before, wanted = copy.deepcopy(dense), bench.logits(dense)
        model = bench.quantize(bench.plan, dense)
        for name, facade in facades(model):
            linear = before.get_submodule(name)
            rows, _ = factors(facade.dequantize(), linear.weight.detach())
            scale = facade.bias / linear.bias
            assert relative(scale / scale.mean(), rows / rows.mean()) < 0.1, name
        assert relative(bench.logits(model), wanted) < 3 * bench.tolerance.weight.error


def factors(found: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Return a factor for each row and each column that make `original` most like `found`."""
    rows, columns = torch.ones(len(found)), torch.ones(found.shape[1])
    for _ in range(20):
        scaled = original * rows[:, None]
        columns = (found * scaled).sum(0) / scaled.square().sum(0)
        scaled = original * columns
        rows = (found * scaled).sum(1) / scaled.square().sum(1)
    return rows, columns


@pytest.fixture(scope="module")
def source() -> str:
    return str(small_model(1))


@pytest.fixture(scope="module")
def dense(source: str) -> nn.Module:
    return from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(source: str) -> Made:
    """Quantizes one layer of the demo; the same options give the same model, not a copy."""
    known: dict[str, nn.Module] = {}

    def make(backend: str, **options: Any) -> nn.Module:
        key = f"{backend} {sorted(options.items())}"
        if key not in known:
            given = {"dtype": "float32", "calibration": calibration_examples(), **options}
            known[key] = qa.quantize(source, backend, **given).eval()
        return known[key]

    return make


def logits(model: nn.Module) -> Tensor:
    """On the examples that were calibrated on."""
    with torch.no_grad():
        ids = torch.cat([example["input_ids"] for example in calibration_examples()])
        output: Tensor = model(input_ids=ids).logits.float()
    return output


def first_input(dense: nn.Module) -> Tensor:
    """Return what the first attention layer is given, [tokens, hidden]."""
    seen: list[Tensor] = []
    layer = dense.get_submodule("model.layers.0.self_attn.q_proj")
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    logits(dense)
    hook.remove()
    return seen[0].flatten(0, 1)


# Numbers -------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"bits": 8, "group_size": -1},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 64, "desc_act": True},
    {"bits": 3, "group_size": 64},
    {"bits": 2, "group_size": 32, "sym": False},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gptq_trades_weight_error_for_output_error(made, dense, source, options) -> None:
    """The weights are up to half as far off again as rounded ones, the outputs half as far."""
    model = made("gptq", **options)
    nearest = quantize_layerwise(GPTQ(**options), source, device="cpu", dtype=torch.float32)
    x = first_input(dense)
    target = GPTQ().target
    for name, facade in facades(model):
        weight = dense.get_submodule(name).weight
        plain = target.dequantize(nearest.get_submodule(name)).float()
        error, of_plain = relative(facade.dequantize(), weight), relative(plain, weight)
        assert of_plain < error < 2 * of_plain, name
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            wanted = x @ weight.T
            found = relative(x @ facade.dequantize().T, wanted)
            assert found < 0.75 * relative(x @ plain.T, wanted), name
    assert relative(logits(model), logits(dense)) < 0.75 * relative(logits(nearest), logits(dense))


def test_awq_lowers_the_error(made, dense, source) -> None:
    nearest = quantize_layerwise(AWQ(group_size=64), source, device="cpu", dtype=torch.float32)
    error = relative(logits(made("awq", group_size=64)), logits(dense))
    assert error < 0.95 * relative(logits(nearest), logits(dense))


def test_awq_makes_room_where_inputs_are_large(source) -> None:
    """A few large channels in front of a layer: what AWQ is there for."""
    live = from_pretrained(source, dtype=torch.float32).eval()
    live.get_submodule("model.layers.0.input_layernorm").weight.data[::32] *= 50
    wanted = logits(live)
    quantizer = AWQ(group_size=128)
    nearest = quantize_layerwise(quantizer, copy.deepcopy(live), device="cpu", dtype=torch.float32)
    examples = calibration_examples()
    model = quantizer.quantize(live, device="cpu", dtype=torch.float32, calibration=examples)
    assert relative(logits(model), wanted) < 0.7 * relative(logits(nearest), wanted)


@pytest.mark.parametrize(("backend", "options"), [("gptq", CASES[2]), ("awq", {"group_size": 32})])
def test_the_same_calibration_gives_the_same_codes(made, backend, options, monkeypatch) -> None:
    """Whether or not the blocks compute while it is recorded what they are called with."""
    from quantadapt.calibration import recording

    def no_chain(*_: Any) -> None:
        raise recording._NoChain

    state = made(backend, **options).state_dict()
    monkeypatch.setattr(recording.Recorder, "_check", no_chain)
    again = made(backend, skip_modules=["lm_head"], **options).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


# Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gptqmodel_reads_and_writes_layers_alike(made, options) -> None:
    """Its own forward computes the same, and its own packing gives the same words."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from quantadapt_gptqmodel.layers import unpacked

    for _, facade in facades(made("gptq", **options)):
        vendor: Any = copy.deepcopy(facade.vendor)
        x = torch.randn(3, vendor.in_features)
        with torch.no_grad():
            assert relative(vendor(x), TorchLinear.forward(vendor, x)) < 1e-6
        codes, zeros = unpacked(vendor)
        scales = vendor.scales.t().float()
        linear = nn.Linear(vendor.in_features, vendor.out_features, bias=False)
        groups = vendor.g_idx.long()
        linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
        state = {name: vendor.get_buffer(name).clone() for name in vendor.state_dict()}
        vendor.pack_original(linear, scales, zeros.float(), vendor.g_idx)
        assert all(torch.equal(vendor.get_buffer(name), state[name]) for name in state)


def test_gptqmodel_reads_and_writes_awq_alike(made) -> None:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from quantadapt_gptqmodel.layers import unpacked

    for _, facade in facades(made("awq", group_size=64)):
        vendor: Any = copy.deepcopy(facade.vendor)
        zeros = unpacked(vendor)[1]
        state = {name: vendor.get_buffer(name).clone() for name in vendor.state_dict()}
        x = torch.randn(3, vendor.in_features)
        with torch.no_grad():
            assert relative(vendor(x), AwqTorchLinear.forward(vendor, x)) < 2e-3  # in float16
        scales = state["scales"].t().float()
        linear = nn.Linear(vendor.in_features, vendor.out_features, bias=False)
        linear.weight.data = facade.dequantize()
        vendor.pack(linear, scales, zeros.float())
        assert all(torch.equal(vendor.get_buffer(name), state[name]) for name in state)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing(bits) -> None:
    from quantadapt_gptqmodel.codes import add_to_packed, pack, unpack

    codes = torch.randint(0, 2**bits, (5, 96))
    words = pack(codes, bits)
    assert words.shape == (5, 96 * bits // 32)
    assert torch.equal(unpack(words, bits).long(), codes)
    assert torch.equal(add_to_packed(add_to_packed(words, bits, -1), bits, 1), words)
    positive = pack(codes.clamp(min=1), bits)
    assert torch.equal(unpack(add_to_packed(positive, bits, -1), bits), codes.clamp(min=1) - 1)


@pytest.mark.parametrize(("backend", "options"), [("gptq", CASES[2]), ("awq", {"group_size": 32})])
def test_an_assigned_weight_is_rounded_to_nearest(made, backend, options) -> None:
    model = copy.deepcopy(made(backend, **options))
    for _, facade in facades(model):
        before = facade.dequantize()
        facade.weight = before
        assert torch.equal(facade.dequantize(), before)
        facade.weight = torch.randn_like(before)
        assert relative(facade.dequantize(), torch.randn_like(before)) > 1
        facade.weight = (other := torch.randn_like(before))
        assert relative(facade.dequantize(), other) < 0.2


# Checkpoints ---------------------------------------------------------------------------------

SAVED = [
    ("gptq", CASES[1]),
    ("gptq", CASES[2]),
    ("gptq", {"group_size": 64, "sym": False}),
    ("gptq", {"group_size": 64, "skip_modules": ["lm_head", "down_proj"]}),
    ("awq", {"group_size": 64}),
    ("awq", {"group_size": 64, "sym": True, "skip_modules": ["lm_head", "down_proj"]}),
]


@pytest.mark.parametrize(("backend", "options"), SAVED, ids=str)
def test_what_is_saved_loads_in_plain_transformers(made, backend, options, tmp_path) -> None:
    model = made(backend, **options)
    qa.save(model, tmp_path / "q")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    names = {name for name, _ in facades(model)}
    assert {n for n, m in plain.named_modules() if hasattr(m, "qweight")} == names
    assert relative(logits(plain), logits(model)) < 5e-3  # its CPU kernel computes in bfloat16
    again = qa.quantize(str(tmp_path / "q"), backend, dtype="float32")
    assert change(logits(again), logits(model)) == 0
    assert {name for name, _ in facades(again)} == names


def test_zeros_are_saved_less_one_where_no_zero_is_0(made, tmp_path) -> None:
    """The layout that every loader knows, unless levels are not symmetric."""
    from quantadapt_gptqmodel.codes import unpack
    from safetensors.torch import load_file

    for sym, layout in ((True, "gptq"), (False, "gptq_v2")):
        qa.save(made("gptq", group_size=64, sym=sym), tmp_path / layout)
        config = json.loads((tmp_path / layout / "config.json").read_text())
        assert config["quantization_config"]["checkpoint_format"] == layout
        saved = load_file(tmp_path / layout / "model.safetensors")
        zeros = unpack(saved["model.layers.0.mlp.up_proj.qzeros"], 4)
        assert bool((zeros == 7).all()) == sym


@pytest.fixture(scope="module")
def theirs(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """An act-order checkpoint that gptqmodel calibrated and saved, and its logits."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=4, group_size=64, desc_act=True, device="cpu", offload_to_disk=False
    )
    model = GPTQModel.load(source, config)
    rows = [example["input_ids"][0].tolist() for example in calibration_examples()[:4]]
    folder = tmp_path_factory.mktemp("theirs") / "q"
    with chdir(folder.parent):  # it writes logs wherever it is
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    model.save(str(folder))
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu")
    for module in loaded.model.modules():
        if hasattr(module, "qweight"):  # without torch.compile, which takes its time
            vars(module).pop("dequantize_weight", None)
    return folder, logits(loaded.model.float())


def test_what_gptqmodel_saves_is_adopted(theirs) -> None:
    folder, wanted = theirs
    model = qa.quantize(str(folder), "gptq", dtype="float32")
    found = model.quantadapt.quantizer
    assert (found.bits, found.group_size, found.desc_act, found.sym) == (4, 64, True, True)
    facade = next(facade for _, facade in facades(model))
    assert (facade.vendor.g_idx.diff() < 0).any(), "its groups are scattered"
    assert relative(logits(model), wanted) < 2e-3  # theirs is in float16 or bfloat16


def test_a_live_model_is_adopted_until_its_kernel_repacks(theirs) -> None:
    folder, wanted = theirs
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(live.model.layers[0].mlp.up_proj).__name__ == "TorchAtenLinear"
    used = copy.deepcopy(live)
    assert relative(logits(qa.quantize(live, "gptq", dtype="float32")), wanted) < 2e-3
    logits(used)
    with pytest.raises(ModelError, match=r"_proj is a TorchAtenLinear.*order of its own"):
        qa.quantize(used, "gptq", dtype="float32")


def test_an_awq_checkpoint_of_others(made, dense, tmp_path) -> None:
    """As AutoAWQ wrote them: packed by gptqmodel's own code, with the keys of its config."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from safetensors.torch import load_file, save_file

    model = made("awq", group_size=64)
    qa.save(model, tmp_path / "q")
    saved = load_file(tmp_path / "q" / "model.safetensors")
    for name, facade in facades(model):
        vendor: Any = facade.vendor
        fresh = AwqTorchLinear(4, 64, False, False, facade.in_features, facade.out_features)
        linear = nn.Linear(facade.in_features, facade.out_features, bias=False)
        linear.weight.data = facade.dequantize()
        from quantadapt_gptqmodel.layers import unpacked

        fresh.pack(linear, vendor.scales.t().float(), unpacked(vendor)[1].float())
        saved |= {f"{name}.{key}": value for key, value in fresh.state_dict().items()}
    save_file(saved, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        tmp_path / "q",
        lambda old: {
            "bits": 4,
            "group_size": 64,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
    )
    assert (
        change(logits(qa.quantize(str(tmp_path / "q"), "awq", dtype="float32")), logits(model)) == 0
    )


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("gptq", {"group_size": 48}, "its group_size is 48; gptqmodel can read -1, 16, 32"),
        ("gptq", {"bits": 5}, "its bits is 5; gptqmodel can read 2, 3, 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "gptq checkpoints in the layout marlin"),
        ("awq", {"group_size": 100}, "its group_size is 100"),
        ("awq", {"version": "gemv"}, "awq checkpoints in the layout gemv are not read"),
    ],
)
def test_checkpoints_that_cannot_be_read(made, backend, changes, message, tmp_path) -> None:
    qa.save(made(backend, group_size=64), tmp_path / "q")
    edit_config(tmp_path / "q", lambda old: {**old, **changes})
    with pytest.raises(PlanRefused, match=message) as caught:
        qa.quantize(str(tmp_path / "q"), backend, dtype="float32")
    assert caught.value.problems[0].fix


def test_a_checkpoint_of_the_other_method(made, tmp_path) -> None:
    qa.save(made("awq", group_size=64), tmp_path / "q")
    with pytest.raises(PlanRefused, match=r"quantized with awq.*\n.*use --backend awq"):
        qa.quantize(str(tmp_path / "q"), "gptq")


def test_groups_without_a_scale(made, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    qa.save(made("gptq", group_size=64), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    saved = load_file(file)
    saved["model.layers.0.mlp.up_proj.g_idx"] += 1
    save_file(saved, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="more groups than the 4 that have a scale"):
        qa.quantize(str(tmp_path / "q"), "gptq")


def test_rescaled_activations_are_refused(tmp_path, made) -> None:
    from safetensors.torch import load_file, save_file

    qa.save(made("awq", group_size=64), tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    scales = {"model.layers.0.mlp.act.scales": torch.full((768,), 2.0)}
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"act.scales: activations that are rescaled"):
        qa.quantize(str(tmp_path / "q"), "awq")


@pytest.mark.parametrize(
    ("quantizer", "sizes", "reason"),
    [
        (GPTQ(group_size=128), (320, 64), "groups of 128 do not divide its 320 inputs"),
        (GPTQ(group_size=-1), (320, 100), "its 100 outputs are no multiple of 32"),
        (AWQ(group_size=32), (320, 100), "its 100 outputs are no multiple of 8"),
        (AWQ(group_size=32), (320, 104), None),
    ],
)
def test_sizes_that_do_not_fit(quantizer, sizes, reason) -> None:
    found = quantizer.misfit(*sizes)
    assert found is None if reason is None else reason in found
    if reason is None:
        linear = nn.Linear(*sizes)
        weight = quantizer.target.dequantize(quantizer.quantize_linear(linear))
        assert relative(weight, linear.weight) < 0.1


# Architectures -------------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**TINY, head_dim=16)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**TINY, eos_token_id=2)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{k: v for k, v in TINY.items() if "key_value" not in k})
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128
        )
    ),
}
FOLDS = {"gemma2": 8, "cohere": 6, "neox": 4, "t5": 20}
"""In how many places scales can move. What is special: norms of 1 + weight, one norm for attention
and MLP, LayerNorm with bias, two stacks of blocks."""


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ragged() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, length) for length in (20, 33, 17, 40)]
    return [{"input_ids": torch.randint(3, 128, size, generator=generator)} for size in sizes]


def outputs(model: nn.Module) -> Tensor:
    ids = ragged()[0]["input_ids"]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_scales_move_without_changing_the_model(name, monkeypatch) -> None:
    from quantadapt_gptqmodel import awq

    from quantadapt.calibration.blocks import each_block
    from quantadapt.loading import linear_layers, skipped_modules

    moved = []

    def some_scales(weights: list[Tensor], inputs: Any, *_: Any) -> Tensor:
        moved.append(len(weights))
        return torch.rand(len(inputs.total)) + 0.5

    monkeypatch.setattr(awq, "_best_scales", some_scales)
    monkeypatch.setattr(awq, "_clipped", lambda weight, *_: weight)
    model = random_model(name)
    before = outputs(model)
    names = [name for name, _ in linear_layers(model, skipped_modules(model, None))]
    for block in each_block(model, ragged(), names=names):
        awq.rescale_and_clip(block, 32, lambda weight: weight)
    assert relative(outputs(model), before) < 1e-5
    assert len(moved) == FOLDS[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "quantizer",
    [pytest.param(GPTQ(group_size=32), marks=pytest.mark.slow), AWQ(group_size=32)],
    ids=repr,
)
def test_every_architecture_with_blocks(quantizer, name) -> None:
    model = random_model(name)
    before = outputs(model)
    nearest = quantize_layerwise(quantizer, copy.deepcopy(model), device="cpu", dtype=torch.float32)
    plain = relative(outputs(wrap(nearest, quantizer.target, torch.float32)), before)
    quantized = qa.quantize(
        model,
        "gptq" if isinstance(quantizer, GPTQ) else "awq",
        dtype="float32",
        calibration=ragged() * 4,
        group_size=32,
    )
    # transformers' loader of AWQ takes what T5 wants in float32 for dense.
    dense = ("head", ".wo") if isinstance(quantizer, AWQ) else ("head",)
    layers = (n for n, m in quantized.named_modules() if type(m) is nn.Linear)
    assert not [n for n in layers if not n.endswith(dense)]
    assert relative(outputs(quantized), before) < plain


class Experts(nn.Module):
    """A layer of its own, outside of any list; and experts, one of which is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.norm = nn.LayerNorm(64)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.out = nn.Linear(64, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        result: Tensor = self.out(x + self.experts[0](x) + self.experts[2](x))
        return result


@pytest.mark.parametrize(
    "quantizer", [GPTQ(group_size=32), AWQ(group_size=32)], ids=["gptq", "awq"]
)
def test_any_module_and_layers_that_see_no_data(quantizer) -> None:
    torch.manual_seed(0)
    model = Experts()
    dense, ids = copy.deepcopy(model), ragged()[0]["input_ids"]
    quantized = quantizer.quantize(
        model, device="cpu", dtype=torch.float32, calibration=ragged(), skip_modules=()
    )
    assert quantized is model
    assert model.training
    for name in ("experts.0", "experts.1", "experts.2", "out"):
        vendor = model.get_submodule(name)
        assert quantizer.target.matches(vendor)
        weight = dense.get_submodule(name).weight
        assert relative(quantizer.target.dequantize(vendor), weight) < 0.25, name
    assert relative(model(ids), dense(ids)) < 0.2


def test_blocks_that_are_skipped_hand_on_what_they_are_given(made, dense) -> None:
    model = made("gptq", group_size=64, skip_modules=["lm_head", "mlp"])
    assert {name.split(".")[3] for name, _ in facades(model)} == {"self_attn"}
    assert torch.equal(
        model.get_submodule("model.layers.0.mlp.up_proj").weight,
        dense.get_submodule("model.layers.0.mlp.up_proj").weight,
    )


def test_awq_of_a_head(made, dense) -> None:
    model = made("awq", group_size=64, skip_modules=[])
    assert "lm_head" in dict(facades(model))
    assert relative(logits(model), logits(dense)) < 0.2


def test_importing_the_plugin_imports_no_vendor() -> None:
    code = "import sys, quantadapt_gptqmodel; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_importing_gptqmodel_changes_nothing_else() -> None:
    """In a process of its own, because it happens once."""
    code = """
import logging, os, sys, warnings
import torch, transformers
from torch import nn
import quantadapt

def state():
    root = logging.getLogger()
    return dict(os.environ), [str(f) for f in warnings.filters], root.level, root.handlers[:]

model = nn.Sequential(nn.Linear(64, 64))
quantadapt.quantize(model, "hqq", device="cpu")
before = state()
model, example = nn.Sequential(nn.Linear(64, 64)), {"input": torch.ones(4, 64)}
quantadapt.quantize(model, "gptq", device="cpu", group_size=32, calibration=[example])
assert "gptqmodel" in sys.modules
for old, new in zip(before, state(), strict=True):
    assert old == new, (old, new)
"""
    unset = ("HF_HOME", "HF_HUB_CACHE", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_ORDER")
    given = {key: value for key, value in os.environ.items() if key not in unset}
    run = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Grids ---------------------------------------------------------------------------------------

GRIDS = [
    *(("gptq", case) for case in CASES),
    ("gptq", {"bits": 8, "group_size": 32, "sym": False}),
    ("gptq", {"bits": 4, "group_size": -1, "sym": False, "desc_act": True}),
    ("awq", {"group_size": 64}),
    ("awq", {"group_size": -1, "sym": True}),
]


@pytest.mark.parametrize(("backend", "options"), GRIDS, ids=str)
@pytest.mark.parametrize(
    "dtype", slow_but([torch.float16, torch.bfloat16, torch.float32], torch.float16)
)
def test_a_weight_is_packed_onto_the_scales_that_are_there(made, backend, options, dtype) -> None:
    """What the vendor's own code unpacks is, of the values that its scales allow, the nearest:
    against all of them, counted out in float64."""
    model = made(backend, **options)
    target = model.quantadapt.quantizer.target
    facade = dict(facades(model))["model.layers.0.self_attn.k_proj"]
    vendor: Any = copy.deepcopy(facade.vendor).to(dtype)
    own = target.dequantize(vendor)
    again = target.repack(vendor, own.float())
    assert own.dtype == dtype
    assert torch.equal(target.dequantize(again), own)
    if dtype != torch.bfloat16:  # in which two codes may stand for one value
        assert all(torch.equal(again.get_buffer(n), t) for n, t in vendor.state_dict().items())
    weight = own.float() + 2 * own.float().std() * torch.randn(own.shape)
    packed: Any = target.repack(vendor, weight)
    unpacked = target.dequantize(packed)
    nearest = allowed(vendor, facade.in_features)
    wanted = (nearest - weight.double()[..., None]).abs().amin(-1)
    slack = nearest.abs().amax() * torch.finfo(dtype).eps
    assert ((unpacked.double() - weight).abs() - wanted).max() <= slack
    assert all(
        torch.equal(packed.get_buffer(n), vendor.get_buffer(n)) for n in ("scales", "qzeros")
    )


def allowed(vendor: Any, in_features: int) -> Tensor:
    """Return all values that each weight can take, float64 [out, in, 2**bits]."""
    from quantadapt_gptqmodel.layers import unpacked

    zeros, scales = unpacked(vendor)[1].double(), vendor.scales.t().double()
    groups = getattr(vendor, "g_idx", None)
    if groups is None:
        groups = torch.arange(in_features) // (in_features // scales.shape[1])
    codes = torch.arange(2**vendor.bits)
    return (codes - zeros[:, groups.long(), None]) * scales[:, groups.long(), None]


def test_a_live_layer_of_another_kernel_is_packed_anew(theirs) -> None:
    """Its own kernel may keep what it unpacked before."""
    folder, _ = theirs
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = qa.quantize(live, "gptq", dtype="float32")
    target = model.quantadapt.quantizer.target
    facade = next(facade for _, facade in facades(model))
    before = facade.dequantize()
    weight = target.grid(facade.vendor).nearest(-before)
    packed = target.repack(facade.vendor, -before)
    x = torch.randn(3, facade.in_features)
    with torch.no_grad():
        assert relative(packed(x), x @ weight.float().T) < 1e-5
    assert torch.equal(facade.dequantize(), before)
