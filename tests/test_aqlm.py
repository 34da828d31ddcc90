"""AQLM: how good what is made is, work folders, checkpoints of the stock library, and the suite."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from parameters import slow_but
from quantadapt_aqlm import AQLM, SIZES, additive
from quantadapt_aqlm.layers import settled
from torch import nn

import quantadapt as qa
from quantadapt.errors import ModelError, OutputError, PlanRefused
from quantadapt.facade import facades
from quantadapt.loading import from_pretrained
from quantadapt.testing import BackendSuite
from quantadapt.testing.small_demo import calibration_examples, demo_tokens, small_model
from quantadapt.testing.tensors import change, relative

QUICK: dict[str, Any] = {"beam_size": 1, "max_epochs": 1, "steps_per_epoch": 5, "init_max_iter": 2}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Finished layers are kept for the tests of this module and no longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTADAPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class TestAQLM(BackendSuite):
    backend = "aqlm"
    options: ClassVar = QUICK


def make(layers: int = 1, **options) -> nn.Module:
    source = str(small_model(layers))
    examples = calibration_examples()
    return qa.quantize(
        source, "aqlm", device="cpu", dtype="float32", calibration=examples, **options
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=demo_tokens()).logits


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: facade.vendor.codes for name, facade in facades(model)}


# What is made ----------------------------------------------------------------------------------


def output_errors(model: nn.Module) -> dict[str, float]:
    """Return each layer's relative output error on tokens that calibration did not show."""
    dense = from_pretrained(str(small_model()), dtype=torch.float32).eval()
    quantized, found, hooks = dict(facades(model)), {}, []
    for name, facade in quantized.items():

        def compare(_, args, y, name=name, facade=facade):
            found[name] = relative(facade(args[0]), y)

        hooks.append(dense.get_submodule(name).register_forward_hook(compare))
    with torch.no_grad():
        dense(input_ids=demo_tokens(96)[-24:])
    return found


def bits_per_weight(model: nn.Module) -> float:
    """Return the bits of codes, codebooks and scales, the latter two in half precision."""
    layers = [facade.vendor for _, facade in facades(model)]
    code_bits = sum(v.codes.numel() * v.nbits_per_codebook for v in layers)
    numbers = sum(v.codebooks.numel() + v.scales.numel() for v in layers)
    return (code_bits + 16 * numbers) / sum(v.in_features * v.out_features for v in layers)


@pytest.mark.slow
def test_it_beats_hqq_at_fewer_bits() -> None:
    hqq = output_errors(qa.quantize(str(small_model()), "hqq", bits=2, device="cpu"))
    model = make(2, num_codebooks=1, in_group_size=4, **{**QUICK, "max_epochs": 2})
    assert bits_per_weight(model) < 2.25  # hqq: 2 + 32 / 64
    for name, error in output_errors(model).items():
        assert error < 0.75 * hqq[name], name


def a_layer(out_features=48, in_features=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(500, in_features, generator=generator)
    x = x @ torch.randn(in_features, in_features, generator=generator)
    return weight, x.t() @ x


def fit(weight, moment, **options):
    quantizer = AQLM(**{**QUICK, "nbits_per_codebook": 5, **options})
    return additive.quantize_weight(weight, moment, 500, quantizer, seed=0, storage=torch.float16)


def error_of(found, weight, moment) -> float:
    difference = weight - found.dequantize()
    return float(((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum())


@pytest.mark.parametrize("sizes", [(1, 8, 1), (3, 8, 1), (2, 4, 2)], ids=str)
def test_more_effort_gives_smaller_errors(sizes) -> None:
    count, in_size, out_size = sizes
    sizes = {"num_codebooks": count, "in_group_size": in_size, "out_group_size": out_size}
    weight, moment = a_layer()
    efforts = [
        {"max_epochs": 0, "init_max_iter": 5},
        {"max_epochs": 4, "init_max_iter": 5},
        {"max_epochs": 4, "init_max_iter": 5, "beam_size": 8, "relative_mse_tolerance": 0},
    ]
    errors = [
        error_of(fit(weight, moment, **sizes, **effort), weight, moment) for effort in efforts
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


def test_what_is_a_sum_of_entries_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    entries = nn.functional.normalize(torch.randn(16, 8, generator=generator))
    picked = torch.randint(0, 16, (48, 8), generator=generator)
    weight = entries[picked].reshape(48, 64)
    found = fit(weight, torch.eye(64), num_codebooks=1, max_epochs=3, init_max_iter=20)
    assert error_of(found, weight, torch.eye(64)) < 1e-5


def test_rows_of_zeros_stay_zero() -> None:
    weight, moment = a_layer()
    weight[3:5] = 0
    found = fit(weight, moment)
    assert found.dequantize()[3:5].abs().max() == 0
    assert found.scales.isfinite().all()


def test_the_same_in_small_portions(monkeypatch) -> None:
    weight, moment = a_layer()
    whole = fit(weight, moment, beam_size=4)
    monkeypatch.setattr(additive, "CHUNK", {"cpu": 1000})
    portions = fit(weight, moment, beam_size=4)
    assert error_of(portions, weight, moment) == pytest.approx(
        error_of(whole, weight, moment), rel=0.02
    )


def test_inputs_that_are_no_numbers() -> None:
    model = from_pretrained(str(small_model(1)), dtype=torch.float32)
    model.get_submodule("model.layers.0.input_layernorm").weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"gives model.layers.0.self_attn.q_proj inputs"):
        qa.quantize(model, "aqlm", calibration=calibration_examples(), **QUICK)


# The work folder -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def counted(monkeypatch, stop_at: int | None = None) -> list[str]:
    """Count the layers that are made; the process "dies" at one of them."""
    made: list[str] = []
    real = additive.quantize_weight

    def quantize_weight(*args, **kwargs):
        if len(made) == stop_at:
            raise Killed
        made.append("")
        return real(*args, **kwargs)

    monkeypatch.setattr(additive, "quantize_weight", quantize_weight)
    return made


def work_files(root) -> list:
    return sorted(root.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(monkeypatch, tmp_path, caplog) -> None:
    expected = make(2, **QUICK)
    options = {**QUICK, "work_folder": str(tmp_path)}
    with monkeypatch.context() as patch:
        counted(patch, stop_at=9)  # in the second block, between k and v
        with pytest.raises(Killed):
            make(2, **options)
    assert len(work_files(tmp_path)) == 9
    caplog.set_level(logging.INFO, "quantadapt.aqlm")
    with monkeypatch.context() as patch:
        made = counted(patch)
        resumed = make(2, **options)
    assert len(made) == 5
    assert len(work_files(tmp_path)) == 14
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
    for name, found in codes(resumed).items():
        assert torch.equal(found, codes(expected)[name]), name
    assert change(logits(resumed), logits(expected)) == 0
    said = [record.getMessage() for record in caplog.records]
    assert sum("was finished before" in line for line in said) == 9
    assert any("layer 14 of 14, model.layers.1.mlp.down_proj, took" in line for line in said)


@pytest.mark.slow
def test_damaged_layers_are_made_again(monkeypatch, tmp_path, caplog) -> None:
    options = {**QUICK, "work_folder": str(tmp_path)}
    expected = codes(make(**options))
    cut, flipped, empty, *_ = work_files(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-9])
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    empty.write_bytes(b"")
    made = counted(monkeypatch)
    found = codes(make(**options))
    assert len(made) == 3
    for file in (cut, flipped, empty):
        assert f"{file} is damaged" in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_models_options_and_data_have_other_work_folders(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(additive, "quantize_weight", lambda *_, **__: pytest.fail("enough"))
    source, examples = str(small_model(1)), calibration_examples()
    other = from_pretrained(source, dtype=torch.float32)
    other.get_submodule("model.norm").weight.data[0] += 1
    cases = [
        (source, {}, examples, "float32"),
        (source, {"seed": 1}, examples, "float32"),
        (source, {"in_group_size": 16}, examples, "float32"),
        (source, {}, examples[:-1], "float32"),
        (source, {}, examples, "bfloat16"),
        (other, {}, examples, "float32"),
    ]
    for model, options, shown, dtype in [*cases, cases[0]]:
        with pytest.raises(pytest.fail.Exception):
            qa.quantize(
                model, "aqlm", work_folder=str(tmp_path), dtype=dtype, calibration=shown, **options
            )
    assert len(list(tmp_path.iterdir())) == len(cases)


def test_where_finished_layers_are_kept(monkeypatch, tmp_path) -> None:
    from quantadapt_aqlm.make import _root

    assert _root(AQLM(work_folder="here")) == Path("here")
    monkeypatch.setenv("QUANTADAPT_CACHE", str(tmp_path))
    assert _root(AQLM()) == tmp_path / "aqlm"
    monkeypatch.delenv("QUANTADAPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _root(AQLM()) == tmp_path / "quantadapt" / "aqlm"


def test_a_work_folder_that_cannot_be(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="finished layers cannot be kept"):
        make(**QUICK, work_folder=str(tmp_path / "file"))


# Checkpoints -----------------------------------------------------------------------------------


def stock(folder) -> nn.Module:
    import numba
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    numba.set_num_threads(1)  # the library's kernel for CPUs is wrong with more
    return model


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        {**QUICK, "num_codebooks": 1, "nbits_per_codebook": 9},
        {**QUICK, "nbits_per_codebook": 6, "in_group_size": 4, "out_group_size": 2},
    ],
    ids=["2x8", "1x9", "2x6 in two rows"],
)
@pytest.mark.slow
def test_the_stock_library_reads_what_is_made(options, tmp_path) -> None:
    import aqlm

    model = make(**options)
    folder = qa.save(model, tmp_path / "model")
    loaded = stock(folder)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, aqlm.QuantizedLinear)}
    assert set(layers) == set(codes(model))
    assert all(torch.equal(layer.codes, codes(model)[name]) for name, layer in layers.items())
    assert relative(logits(loaded), logits(model)) < 1e-5
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {name: said[name] for name in SIZES} == {n: getattr(AQLM(**options), n) for n in SIZES}
    assert said["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]


@pytest.mark.slow
def test_a_stock_model_that_has_run_is_adopted(tmp_path) -> None:
    """Its first forward on a CPU transposes its codes for good."""
    model = make(**QUICK)
    loaded = stock(qa.save(model, tmp_path / "model"))
    logits(loaded)
    adopted = qa.quantize(loaded, "aqlm", device="cpu", dtype="float32")
    assert change(logits(adopted), logits(model)) == 0
    again = stock(qa.save(adopted, tmp_path / "again"))
    assert relative(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize("out_features", [8, 24])
def test_codes_are_settled_whatever_their_shape(out_features) -> None:
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(64, out_features, 8, 1, 2, 8, bias=False, dtype=torch.float32)
    layer.codes.data = torch.randint(-128, 127, layer.codes.shape, dtype=torch.int8)
    before = layer.codes.clone()
    layer.prepare_matmul_op(torch.zeros(1, 64))
    assert not torch.equal(layer.codes, before)
    for _ in range(2):
        assert torch.equal(settled(layer).codes, before)


@pytest.mark.slow
def test_the_vendors_kernel_is_right_with_many_threads() -> None:
    import numba

    model = make(**QUICK)
    threads = torch.get_num_threads()
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(threads)
    for _, facade in facades(model):
        x = torch.randn(200, facade.in_features)
        for y in (facade.target.forward(facade.vendor, x), facade.vendor(x)):
            assert relative(y, x @ facade.dequantize().t()) < 1e-5
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [3, 8, 9, 10])
def test_bits_per_weight_are_those_that_are_stored(bits) -> None:
    """Codes are stored in bytes or in pairs of them."""
    sizes = {"num_codebooks": 1, "nbits_per_codebook": bits, "in_group_size": 4}
    quantizer = AQLM(**{**QUICK, "init_max_iter": 0, "max_epochs": 0}, **sizes)
    layer = quantizer.quantize_linear(nn.Linear(128, 192, bias=False))
    tensors = (layer.codes, layer.codebooks, layer.scales)
    declared = quantizer.bits_per_weight(128, 192, device="cpu", dtype="float32")
    found = 8 * sum(tensor.nbytes for tensor in tensors) / (128 * 192)
    assert declared == pytest.approx(found, rel=1e-6)


def test_half_precision_is_what_is_stored(tmp_path) -> None:
    from safetensors.torch import load_file

    folder = qa.save(make(**QUICK), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in state.items()}
    half = torch.float16
    assert [kinds[name] for name in ("codes", "codebooks", "scales")] == [torch.int8, half, half]


def published(folder, sizes: dict[str, int], used: int = 7) -> nn.Module:
    """Write a checkpoint as the authors publish them; return the same model with dense weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    dense = LlamaForCausalLM(config).eval()
    state = dict(dense.state_dict())
    bits, in_size, out_size = (
        sizes[n] for n in ("nbits_per_codebook", "in_group_size", "out_group_size")
    )
    for name, layer in dense.named_modules():
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        out_groups, in_groups = layer.out_features // out_size, layer.in_features // in_size
        count = sizes["num_codebooks"]
        books = torch.zeros(count, 2**bits, out_size, in_size, dtype=torch.float16)
        entries = torch.randint(0, 2**bits, (used,))  # high ones too: they are negative when packed
        books[:, entries] = torch.randn(count, used, out_size, in_size).half() / 8
        chosen = entries[torch.randint(0, used, (out_groups, in_groups, count))]
        scales = torch.rand(out_groups, 1, 1, 1).half() + 0.5
        whole = sum(books[m].float()[chosen[..., m]] for m in range(count)) * scales.float()
        layer.weight.data = whole.transpose(1, 2).reshape(layer.out_features, layer.in_features)
        wrapped = torch.where(chosen >= 2 ** (bits - 1), chosen - 2**bits, chosen)
        del state[f"{name}.weight"]
        state[f"{name}.codes"] = wrapped.to(torch.int8 if bits <= 8 else torch.int16)
        state[f"{name}.codebooks"], state[f"{name}.scales"] = books, scales
    said = {
        "quant_method": "aqlm",
        **sizes,
        "linear_weights_not_to_quantize": ["model.embed_tokens.weight", "lm_head.weight"],
    }
    folder.mkdir()
    text = json.dumps({**config.to_dict(), "quantization_config": said})
    (folder / "config.json").write_text(text)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in small_model().glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return dense


GROUPS = {
    "1x16": {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1},
    "2x8": {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "out_group_size": 1},
    "8x8": {"num_codebooks": 8, "nbits_per_codebook": 8, "in_group_size": 32, "out_group_size": 1},
    "2x8 in four rows": {
        "num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "out_group_size": 4
    },
}  # fmt: skip


@pytest.mark.parametrize("group", slow_but(GROUPS, "2x8"))
def test_published_checkpoints_load(group, tmp_path) -> None:
    dense = published(tmp_path / "model", GROUPS[group])
    model = qa.quantize(str(tmp_path / "model"), "aqlm", device="cpu", dtype="float32")
    found = dict(facades(model))
    assert len(found) == 7
    for name, facade in found.items():
        assert relative(facade.dequantize(), dense.get_submodule(name).weight) < 1e-6
    x = torch.randn(3, facade.in_features)
    assert relative(facade.target.forward(facade.vendor, x), facade(x)) < 1e-5
    assert relative(logits(model), logits(dense)) < 1e-5
    tuned = qa.attach(model, "lora", r=4)
    tuned(input_ids=demo_tokens(), labels=demo_tokens()).loss.backward()


@pytest.mark.parametrize(
    ("change_", "said"),
    [
        ({"in_group_size": 16}, r"codebooks of a layer has shape \[2, 256, 1, 8\], expected"),
        ({"num_codebooks": "many"}, "is no AQLM one"),
    ],
)
def test_a_config_that_is_not_the_checkpoints(change_, said, tmp_path) -> None:
    folder = tmp_path / "model"
    published(folder, GROUPS["2x8"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change_
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelError, PlanRefused), match=said):  # the plan, or the files
        qa.quantize(str(folder), "aqlm")


def test_any_module_is_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    shown = [{"input": torch.randn(40, 64)} for _ in range(4)]
    expected = model(**shown[0])
    options = {**QUICK, "num_codebooks": 3, "nbits_per_codebook": 5}
    made = qa.quantize(model, "aqlm", dtype="float32", calibration=shown, **options)
    assert len(list(facades(made))) == 2
    assert relative(made(**shown[0]), expected) < 0.6


# Options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"in_group_size": 0}, "backend.in_group_size"),
        ({"num_codebooks": 17}, "backend.num_codebooks"),
        ({"nbits_per_codebook": 17}, "backend.nbits_per_codebook"),
        ({"beam_size": 0}, "backend.beam_size"),
        ({"relative_mse_tolerance": 1}, "backend.relative_mse_tolerance"),
        ({"codebooks": 2}, "backend.codebooks"),
    ],
)
def test_bad_options_are_named(options, where) -> None:
    with pytest.raises(PlanRefused) as caught:
        make(**options)
    assert [problem.where for problem in caught.value.problems] == [where]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_group_size": 24}, "groups of 24 do not divide its 256 inputs"),
        ({"out_group_size": 5}, "groups of 5 do not divide its 256 outputs"),
        ({"num_codebooks": 1, "nbits_per_codebook": 16}, "codebooks would hold 524288 numbers"),
    ],
)
def test_layers_that_do_not_fit_are_named(options, said) -> None:
    with pytest.raises(PlanRefused, match=r"model.layers.0.self_attn.q_proj and \d more") as caught:
        make(**options)
    assert said in str(caught.value)


@pytest.mark.slow
def test_layers_that_do_not_fit_stay_dense_on_request(tmp_path) -> None:
    least = {**QUICK, "init_max_iter": 0, "max_epochs": 0}
    model = make(**least, skip_misfits=True, num_codebooks=1, nbits_per_codebook=12)
    names = {name.rpartition(".")[2] for name, _ in facades(model)}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    loaded = stock(qa.save(model, tmp_path / "model"))
    assert relative(logits(loaded), logits(model)) < 1e-5
