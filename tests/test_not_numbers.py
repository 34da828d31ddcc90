"""NaN and infinity in what is stored of quantized layers, adapters and their configs: refused, by
name, whatever holds them."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantadapt as qa
from quantadapt.errors import ModelError, NumbersError
from quantadapt.facade import facades
from quantadapt.model.numbers import refuse_not_numbers
from quantadapt.testing.small_demo import small_model

LAYER = "model.layers.1.mlp.up_proj"
# Where a layer's scales, zero points and code tables lie in the files.
STORED = {
    "hqq": ("scale", "zero"),
    "bnb-nf4": ("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map"),
    "bnb-int8": ("SCB",),
    "torchao-int8": ("_weight_scale",),
    "torchao-int4": ("_weight_scale",),
    "torchao-fp8": ("_weight_scale", "_weight_qdata"),
    "quanto": ("weight._scale",),
    "eetq": ("weight_scales",),
}
CASES = [(backend, name) for backend, names in STORED.items() for name in names]
_KEPT = TemporaryDirectory(prefix="quantadapt-")


@cache
def quantized(backend: str) -> Path:
    return qa.save(qa.quantize(small_model(), backend, device="cpu"), Path(_KEPT.name, backend))


def spoil(file: Path, key: str, value: float = math.nan) -> None:
    """Put a number that is none into one tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[key] = tensors[key].clone()
    flat = tensors[key].view(-1)
    if flat.itemsize == 1:  # float8, which has no infinity
        flat.view(torch.uint8)[-1] = 0x7F
    else:
        flat[-1] = value
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_are_numbers_and_infinities_are_none(dtype: torch.dtype) -> None:
    """Even where a sum of them overflows, or two of them have none."""
    values = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    refuse_not_numbers([("large", values), ("none", values[:0]), ("code", torch.arange(9))])
    for wrong in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]):
        held = torch.ones(3, 1000, dtype=dtype)
        held[1, : len(wrong)] = torch.tensor(wrong, dtype=dtype)
        with pytest.raises(NumbersError, match="wrong holds values that are no numbers"):
            refuse_not_numbers([("large", values), ("wrong", held)])


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_what_is_stored_of_a_quantized_layer(backend: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(quantized(backend), folder)
    spoil(folder / "model.safetensors", f"{LAYER}.{name}")
    with pytest.raises(NumbersError, match=LAYER) as caught:
        qa.quantize(folder, backend, device="cpu")
    assert str(folder) in str(caught.value)
    with pytest.raises(NumbersError, match=LAYER):
        qa.load(folder, device="cpu")


def test_infinity_in_a_record_beside_the_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(quantized("bnb-nf4"), folder)
    tensors, key = load_file(folder / "model.safetensors"), f"{LAYER}.weight.quant_state"
    key = next(name for name in tensors if name.startswith(key))
    record = json.loads(bytes(tensors[key].tolist())) | {"nested_offset": math.inf}
    tensors[key] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumbersError, match=LAYER):
        qa.quantize(folder, "bnb-nf4", device="cpu")


@pytest.mark.parametrize("part", ["scale", "norm"])
def test_a_live_model_that_is_quantized_already(part: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model: Any = AutoModelForCausalLM.from_pretrained(
        small_model(), quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    layer = model.model.layers[1].mlp.up_proj
    norm = model.model.norm.weight
    (layer.weight.quant_state.absmax if part == "scale" else norm.data).view(-1)[0] = math.nan
    with pytest.raises(NumbersError, match=LAYER if part == "scale" else "model.norm"):
        qa.quantize(model, "bnb-nf4")


def test_every_tensor_of_a_layer_is_looked_at() -> None:
    from quantadapt.model.held import held_tensors

    model = qa.quantize(quantized("bnb-nf4"), "bnb-nf4", device="cpu")
    vendor = dict(facades(model))[LAYER].vendor
    names = {name for name, _ in held_tensors(vendor)}
    state = "weight.quant_state"
    assert {"weight", f"{state}.absmax", f"{state}.state2.absmax", f"{state}.offset"} <= names


def tuned(names: list[str]) -> Any:
    """Return a small model with adapters of these names, all active, that change it."""
    from peft import LoraConfig

    model = qa.attach(qa.quantize(small_model(), "none", device="cpu"), "lora", r=2)
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


CALLS = {
    "load": lambda saved, out: qa.load(saved, device="cpu"),
    "onto": lambda saved, out: qa.merge_onto(saved, str(small_model()), out, check=False),
}


# PEFT takes for missing in `b` whatever has a b in its name.
@pytest.mark.parametrize("name", ["b", "lora", "second"])
def test_adapters_of_any_name_are_read(name: str, tmp_path: Path) -> None:
    model = tuned(["default", name])
    qa.save(model, tmp_path)
    tokens = torch.arange(5, 25)[None]
    again = qa.load(tmp_path, device="cpu").eval()
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("nan", "lora_B"),
        ("pickle", "pickles"),
        ("pattern", "takes for ever"),
        ("method", "LOHA"),
        ("link", "leads out of the folder"),
        ("gone", "No such file"),
    ],
)
def test_the_second_adapter_is_looked_at_as_the_first(call, damage, said, tmp_path) -> None:
    qa.save(tuned(["default", "b"]), tmp_path / "saved")
    second = tmp_path / "saved" / "adapter" / "b"
    weights, config = second / "adapter_model.safetensors", second / "adapter_config.json"
    values = json.loads(config.read_text())
    if damage == "nan":
        spoil(weights, next(key for key in load_file(weights) if "lora_B" in key))
    elif damage == "pickle":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    elif damage == "link":
        weights.rename(tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "elsewhere.safetensors")
    elif damage == "gone":
        shutil.rmtree(second)
    else:
        change = {
            "pattern": {"target_modules": "(.+)+(.+)+(.+)+z"},
            "method": {"peft_type": "LOHA"},
        }
        config.write_text(json.dumps(values | change[damage]))
    with pytest.raises(ModelError, match=said):
        CALLS[call](tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out" / "merged").exists()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "value",
    [{"lora_alpha": math.nan}, {"alpha_pattern": {"q_proj": math.nan}}, {"lora_dropout": math.inf}],
)
def test_an_adapters_config(call: str, value: dict[str, Any], tmp_path: Path) -> None:
    qa.save(tuned(["default"]), tmp_path / "saved")
    config = tmp_path / "saved" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | value))
    with pytest.raises(ModelError, match=next(iter(value))):
        CALLS[call](tmp_path / "saved", tmp_path / "out")


MERGES = {
    "dense": lambda model, out: qa.merge(model, out),
    "onto": lambda model, out: qa.merge_onto(model, str(small_model()), out, check=False),
}


@pytest.mark.parametrize("kind", MERGES)
def test_an_adapter_that_is_too_large_for_its_base(kind: str, tmp_path: Path) -> None:
    model = tuned(["default"])
    for name, parameter in model.named_parameters():
        if "up_proj.lora_" in name:
            parameter.data.fill_(1e30)  # a number, but the product is none
    with pytest.raises(NumbersError, match="up_proj"):
        MERGES[kind](model, tmp_path)
    assert not (tmp_path / "merged").exists()


# --- models that answer NaN -----------------------------------------------------------------------

_MEASURED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "classification": ("sequence", [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}]),
    "rewards": ("sequence", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
    "preferences": ("", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
    "desirability": ("", [{"prompt": "a", "completion": "b", "label": n > 0} for n in range(2)]),
}


@pytest.mark.parametrize("name", _MEASURED)
def test_a_model_that_answers_nan_has_no_figures(name: str, tmp_path: Path) -> None:
    """Whatever is compared with NaN is false, so that shares look like those of a model."""
    head, rows = _MEASURED[name]
    labels = ("0", "1") if name == "classification" else ("score",) if head else ()
    model: Any = qa.quantize(str(small_model()), "none", head=head, labels=labels)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert qa.evaluate(model, file, evaluation=name)
    model.model.norm.weight.data[0] = math.inf
    with pytest.raises(NumbersError, match="no number"):
        qa.evaluate(model, file, evaluation=name)
