"""bitsandbytes: checkpoints in which other layers than usual are dense."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.facade import facades
from quantadapt.registry import registry
from quantadapt.testing.small_demo import demo_tokens, small_model
from quantadapt.testing.tensors import relative


def untied() -> Any:
    """A model whose head can be quantized."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=demo_tokens()).logits.float()
    return found


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-int8"])
@pytest.mark.parametrize("skip", [[], ["o_proj"], ["lm_head", "layers.0.mlp"]], ids=str)
def test_a_checkpoint_tells_which_layers_are_dense(backend, skip, tmp_path) -> None:
    """transformers quantizes each layer that is not named, and by default all but the head."""
    model = qa.quantize(untied(), backend, device="cpu", dtype="float32", skip_modules=skip)
    quantized = {name for name, _ in facades(model)}
    assert ("lm_head" in quantized) is ("lm_head" not in skip)
    folder = qa.save(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = config["llm_int8_skip_modules"]
    assert not quantized & set(dense)
    for file in small_model().glob("*token*"):
        shutil.copy(file, folder)
    assert relative(logits(qa.load(folder, device="cpu")), logits(model)) < 1e-2
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative(logits(theirs), logits(model)) < 2e-2
    for name in dense:
        assert type(theirs.get_submodule(name)) is torch.nn.Linear


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_dense_in_a_checkpoint_gets_the_dtype_that_is_asked_for(
    options, stored, tmp_path
) -> None:
    """transformers leaves it as it was stored, so that all went on in that between the layers."""
    untied().save_pretrained(tmp_path / "dense")
    how = BitsAndBytesConfig(**options)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=how, dtype=stored
    )
    theirs.save_pretrained(tmp_path / "packed")
    held = load_file(tmp_path / "packed" / "model.safetensors")
    dense = {name: held[name] for name in held if "norm" in name or "embed" in name}
    assert {tensor.dtype for tensor in dense.values()} == {stored}
    backend = "bnb-nf4" if "load_in_4bit" in options else "bnb-int8"
    if backend == "bnb-nf4" and how.bnb_4bit_quant_type == "fp4":
        backend = "bnb-fp4"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model: Any = qa.quantize(str(tmp_path / "packed"), backend, device="cpu", dtype=name)
        found = dict(model.named_parameters())
        assert len(dense) == 4
        for key, tensor in dense.items():
            assert torch.equal(found[key], tensor.to(dtype)), key
        seen = model.model(input_ids=demo_tokens()).last_hidden_state
        assert seen.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_are_bitsandbytes_own(dtype) -> None:
    from bitsandbytes.nn import Int8Params

    linear = torch.nn.Linear(256, 96, dtype=dtype).requires_grad_(False)
    theirs = Int8Params(linear.weight.data.clone(), requires_grad=False).to("cpu")
    ours: Any = registry().backend("bnb-int8").quantizer().quantize_linear(linear)  # type: ignore[union-attr]
    assert torch.equal(ours.weight.data, theirs.data)
    assert torch.equal(ours.weight.SCB, theirs.SCB)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_weights_are_quantized_after_what_makes_them(backend: str) -> None:
    """Also on a stream of their own, on which a GPU comes to them late."""
    quantizer = registry().backend(backend).quantizer()
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16, device="cuda")
    linear.weight.data.copy_(weight)
    expected = quantizer.target.dequantize(quantizer.quantize_linear(linear)).cpu()
    with torch.cuda.stream(torch.cuda.Stream()):
        linear.weight.data.zero_()
        torch.cuda._sleep(10**8)  # clock ticks: some hundredths of a second
        linear.weight.data.copy_(weight.cuda())
        found = quantizer.target.dequantize(quantizer.quantize_linear(linear)).cpu()
    assert relative(expected, weight) < 0.15
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-fp4"])
@pytest.mark.parametrize("sizes", [(64, 32), (64, 96), (10, 24), (3, 5)])
def test_blocks_that_go_on_in_the_next_row_have_their_own_scale(backend, sizes) -> None:
    """As codes and scales say in float64; on CPUs with AVX-512 the vendor's kernel takes others."""
    from bitsandbytes.functional import dequantize_blockwise

    rows, columns = sizes
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, bias=True)
    quantizer: Any = registry().backend(backend).quantizer()
    made = quantizer.quantize_linear(linear.requires_grad_(False))
    packed = made.weight
    state, count = packed.quant_state, rows * columns
    both = packed.data.flatten()
    codes = torch.stack([both >> 4, both & 15], 1).flatten()[:count].long()
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = scales.double().repeat_interleave(state.blocksize)[:count]
    expected = (state.code.double()[codes] * scales).view(rows, columns)
    target = quantizer.target
    assert relative(target.dequantize(made).double(), expected) < 1e-6
    x = torch.randn(7, columns)
    product = x.double() @ expected.T + linear.bias.double()
    assert relative(target.forward(made, x).double(), product) < 1e-6
    half = target.dequantize_rows(made, 0, rows // 2).double()
    assert relative(half, expected[: rows // 2]) < 1e-6


@pytest.mark.parametrize(
    ("backend", "given"),
    [("bnb-nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
     ("bnb-int8", {"load_in_8bit": True})],
)  # fmt: skip
@pytest.mark.parametrize("adapter", ["lora", "adalora"])
def test_a_live_module_learns_and_is_merged_as_a_model_that_is_read(
    backend, given, adapter, tmp_path
) -> None:
    """By the marks that transformers leaves on what it has loaded, TRL trains adapters in bfloat16,
    and what is merged into dense weights would say that it is packed."""
    folder = str(small_model())
    options: dict[str, Any] = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    marked = BitsAndBytesConfig(**given)
    live = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=marked, dtype=torch.float32
    )
    single = {"double_quant": False} if backend == "bnb-nf4" else {}
    ours = qa.quantize(folder, backend, dtype="float32", device="cpu", **single)
    other, model = (qa.attach(base, adapter, seed=0) for base in (qa.quantize(live, backend), ours))
    found = []
    for each in (other, model):
        qa.train(each, max_length=64, tokenizer=ours.quantadapt.tokenizer, **options)
        found.append({n: p for n, p in each.named_parameters() if p.requires_grad})
    assert {weight.dtype for weight in found[0].values()} == {torch.float32}
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    tuned = logits(model)
    assert torch.equal(logits(other), tuned)
    qa.merge(other, tmp_path, tokenizer=ours.quantadapt.tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(merged), tuned) < (2e-6 if backend == "bnb-nf4" else 3e-2)
