"""Merged weights in 16 bits keep what an adapter adds, where stock PEFT rounds it away.

How much is kept of a change: its projection onto what was meant, in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_of
from merging import ADAPTERS, HELD_OUT, llama, saved_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.errors import NumbersError
from quantadapt.exporting.merging import merged_model
from quantadapt.model import half_precision
from quantadapt.model.half_precision import rounded_to

SMALL = 1 / 16
"""Of the distance of two neighbours in bfloat16: what an adapter adds to a weight, in the mean."""
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` around each number, as torch finds them."""
    nearest, infinity = exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)
    above = torch.where(nearest.double() >= exact, nearest, torch.nextafter(nearest, infinity))
    below = torch.where(nearest.double() <= exact, nearest, torch.nextafter(nearest, -infinity))
    return below, above


@HALF
def test_numbers_become_a_neighbour_and_stay_the_same_on_average(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-8, 4, 97)[:, None]  # in float16 the first ones are subnormal
    exact = torch.randn(97, 4096, generator=generator) * sizes
    found, (below, above) = rounded_to(dtype, exact), neighbours(exact, dtype)
    assert bool(((found == below) | (found == above)).all())
    off = (found.double() - exact) / (above.double() - below).clamp(min=1e-30)
    assert off.mean(1).abs().max() < 0.03  # 4 standard errors of such a mean
    assert torch.equal(rounded_to(dtype, found.float()), found)  # what is there already stays


@HALF
def test_around_zero_and_at_the_largest_number(dtype: torch.dtype) -> None:
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).float()
    largest = torch.finfo(dtype).max
    exact = torch.tensor([[0.0, -0.0, float(least) / 3, float(least) / -3] * 500])
    found = rounded_to(dtype, exact).float().view(500, 4) / least
    assert found[:, :2].abs().max() == 0
    assert {*found[:, 2].tolist()} == {0.0, 1.0}
    assert {*found[:, 3].tolist()} == {0.0, -1.0}
    assert found[:, 2:].abs().mean().item() == pytest.approx(1 / 3, abs=0.06)
    assert rounded_to(dtype, torch.full((1, 64), largest * 1.0001)).isfinite().all()


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(6, 10, 14, generator=torch.Generator().manual_seed(0))
    whole = rounded_to(torch.bfloat16, exact)
    for at_once in (300, 50):  # two rows of 140, or less than one
        monkeypatch.setattr(half_precision, "_AT_ONCE", {"cpu": at_once})
        assert torch.equal(rounded_to(torch.bfloat16, exact), whole)


def test_it_takes_little_beside_the_result() -> None:
    """Of experts, each of which is many numbers."""
    exact = torch.randn(2, 512, 4096)
    assert peak_of(lambda: rounded_to(torch.bfloat16, exact)) < exact.nbytes  # half is the result


def test_what_there_is_one_of_for_a_row_is_rounded_to_nearest() -> None:
    bias = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded_to(torch.bfloat16, bias), bias.bfloat16())


def kept(merged: Tensor, start: Tensor, change: Tensor) -> float:
    """The share of `change` that is in merged - start."""
    found, change = (merged.double() - start.double()).detach(), change.detach().double()
    return float((found * change).sum() / change.square().sum())


def small_steps(model: Any) -> Any:
    """A model whose LoRA adds SMALL of a distance to each weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if "default" in getattr(layer, "lora_B", ()):
                up = layer.lora_B["default"].weight
            elif "default" in getattr(layer, "lora_embedding_B", ()):
                up = layer.lora_embedding_B["default"]
                layer.lora_embedding_A["default"].normal_(generator=generator)
            else:
                continue
            up.normal_(generator=generator)
            change = layer.get_delta_weight("default").square().mean().sqrt()
            up *= 0.2 / 256 * SMALL / change  # weights are 0.2 in the mean
    return model


def base_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """A Llama in 16 bits."""
    from transformers import AutoTokenizer

    made = llama(folder / "float32", tied=False)
    AutoModelForCausalLM.from_pretrained(made, dtype=dtype).save_pretrained(folder / "half")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder / "half")
    return str(folder / "half")


@pytest.mark.parametrize(
    ("backend", "kind"), [("none", "dense"), ("none", "requantize"), ("hqq", "dense")]
)
def test_a_merge_keeps_small_changes(backend: str, kind: Any, tmp_path: Path) -> None:
    options = {"bits": 8, "group_size": 32} if backend == "hqq" else {}
    model = qa.quantize(base_of(tmp_path), backend, dtype="bfloat16", **options)
    model = small_steps(qa.attach(model, "lora", r=4))
    merged: Any = merged_model(model, kind)
    shares = []
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_B"):
            start, change = layer.base_layer.weight, layer.get_delta_weight("default")
            shares.append(kept(merged.get_submodule(name).weight, start, change))
    assert len(shares) == 14
    assert sum(shares) / 14 == pytest.approx(1, abs=0.15)
    # Which stock PEFT does not: half of what is added is gone.
    saved = qa.save(model, tmp_path / "adapter")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    layer = PeftModel.from_pretrained(stock, str(saved)).base_model.model.model.layers[0]
    part = layer.mlp.down_proj
    start, change = part.base_layer.weight.clone(), part.get_delta_weight("default")
    part.merge()
    assert kept(part.base_layer.weight, start, change) < 0.6


@pytest.mark.parametrize("name", ["embedding", "whole-head"])
def test_so_do_embeddings_and_what_is_trained_whole(name: str, tmp_path: Path) -> None:
    model: Any = qa.quantize(base_of(tmp_path), "none", dtype="bfloat16")
    model = small_steps(qa.attach(model, "lora", r=4, **ADAPTERS[name]))
    base = model.get_base_model()
    if name == "embedding":
        layer, key = base.model.embed_tokens, "model.embed_tokens"
        change = layer.get_delta_weight("default")
        start = layer.base_layer.weight
    else:
        layer, key, start = base.lm_head, "lm_head", base.lm_head.original_module.weight
        whole = layer.modules_to_save["default"].weight
        generator = torch.Generator().manual_seed(2)
        change = torch.randn(start.shape, generator=generator) * 0.2 / 256 * SMALL
        whole.data = start.float() + change
    merged: Any = merged_model(model, "dense")
    found = merged.get_submodule(key).weight
    assert found.dtype == torch.bfloat16
    assert kept(found, start, change) == pytest.approx(1, abs=0.1)
    assert torch.equal(merged.model.norm.weight, base.model.norm.weight)


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_so_do_experts(backend: str, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=2048, num_experts=4, **sizes, **heads)
    made = Qwen3MoeForCausalLM(config).bfloat16()
    options = {"bits": 8, "group_size": 32} if backend == "hqq" else {}
    base = qa.quantize(saved_model(made, tmp_path), backend, dtype="bfloat16", **options)
    model = qa.attach(base, "lora", r=4)
    start: Any = merged_model(model, "dense")  # B is 0: as it was
    small_steps(model)
    merged: Any = merged_model(model, "dense")
    shares = []
    for layer in model.modules():
        if (name := getattr(layer, "parameter_name", None)) and "default" in layer.lora_B:
            before, after = (m.model.layers[0].mlp.experts for m in (start, merged))
            change = layer.get_delta_weight("default")
            shares.append(kept(after.get_parameter(name), before.get_parameter(name), change))
    assert len(shares) == 2
    assert shares == pytest.approx([1, 1], abs=0.15)


def test_so_does_a_merge_onto_an_unquantized_base(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    model = small_steps(qa.attach(qa.quantize(base, "hqq", dtype="bfloat16"), "lora", r=4))
    saved = qa.save(model, tmp_path / "adapter")
    qa.merge_onto(saved, base, tmp_path / "onto", check=False)
    before: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    after: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "onto/merged", dtype=torch.bfloat16
    )
    shares = []
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_B"):
            start, found = (m.get_submodule(name).weight for m in (before, after))
            shares.append(kept(found, start, layer.get_delta_weight("default")))
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("numbers", ["bf16", "f16"])
def test_so_do_files_of_16_bits(numbers: Any, tmp_path: Path) -> None:
    import gguf

    from quantadapt.exporting.gguf.files import GGUFFile

    eps = {"bf16": 1 / 256, "f16": 1 / 2048}[numbers]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 256, generator=generator).bfloat16().float()
    change = torch.randn(64, 256, generator=generator) * start.abs() * eps * SMALL
    file = GGUFFile(tmp_path / "a.gguf", "llama", numbers)
    file.add("x", (64, 256), lambda: start + change)
    file.write()
    assert file.refuse_other() == 1
    (read,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    found = torch.tensor(gguf.quants.dequantize(read.data, read.tensor_type))
    assert kept(found, start, change) == pytest.approx(1, abs=0.15)


def test_too_large_for_float16_is_told(tmp_path: Path) -> None:
    model = qa.quantize(base_of(tmp_path, torch.float16), "none", dtype="float16")
    model = qa.attach(model, "lora", r=4, target_modules=["down_proj"])
    layer: nn.Module = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    layer.lora_A["default"].weight.data.fill_(100.0)
    layer.lora_B["default"].weight.data.fill_(1000.0)
    with pytest.raises(NumbersError, match=r"layers\.1\.mlp\.down_proj holds values that are no"):
        qa.merge(model, tmp_path / "merged", data=HELD_OUT)
    assert not (tmp_path / "merged").exists() or not [*(tmp_path / "merged").iterdir()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", ["down_proj", "embed_tokens"])
def test_onto_a_base_in_float16_it_is_told_before_anything_is_written(
    part: str, dtype: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path, torch.float16)
    model = qa.attach(qa.quantize(base, "none", dtype=dtype), "lora", r=4, target_modules=[part])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(200.0)
    saved = qa.save(model, tmp_path / "adapter")
    with pytest.raises(NumbersError, match=rf"{part}\.weight holds numbers .* large for float16"):
        qa.merge_onto(saved, base, tmp_path / "onto", check=False)
    assert not (tmp_path / "onto/merged").exists()
