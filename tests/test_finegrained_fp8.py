"""Fine-grained FP8: checkpoints as transformers writes them, with and without experts."""

# ruff: noqa: RUF012 (options are given as a plain dict)

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from merging import moved
from parameters import slow_but
from quantadapt_finegrained_fp8 import FineGrainedFP8
from safetensors.torch import load_file, save_file
from test_experts_backends import dense_model
from test_experts_merging import dense_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

import quantadapt as qa
from quantadapt.errors import QuantadaptError
from quantadapt.exporting.merging import merged_model
from quantadapt.facade import facades, linear_facades, stack_facades
from quantadapt.quantizing.state import state_of
from quantadapt.testing import BackendSuite, TargetSuite
from quantadapt.testing.bench import weight_bytes
from quantadapt.testing.tensors import relative

BACKEND = "finegrained-fp8"


class TestFineGrainedFP8(BackendSuite):
    backend = BACKEND


class TestPowersOfTwo(TargetSuite):
    backend = BACKEND
    options = {"scale_fmt": "ue8m0", "weight_block_size": (64, 32)}


class TestOneScale(TargetSuite):
    backend = BACKEND
    options = {"weight_block_size": None}


class TestBlocksLargerThanTheLayer(TargetSuite):
    backend = BACKEND
    options = {"weight_block_size": (10**6, 10**6)}


# Checkpoints of others ---------------------------------------------------------------------------

IDS = torch.arange(48).reshape(2, 24) + 3
HELD_OUT = Dataset.from_dict({"input_ids": IDS.tolist(), "completion_mask": [[1] * 24] * 2})
FORMATS: dict[str, dict[str, Any]] = {
    "128": {},
    "64 x 32": {"weight_block_size": [64, 32]},
    "powers": {"scale_fmt": "ue8m0"},
    "whole": {"weight_block_size": None},
    "static": {"activation_scheme": "static"},
    "static whole": {"activation_scheme": "static", "weight_block_size": None},
}


def tiny(hidden: int = 128, inner: int = 256, *, tied: bool = False, bias: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
    return model


def quantized_files(model: Any, folder: Path, **options: Any) -> Path:
    """Write a model as an FP8 checkpoint: codes and scales are made by transformers."""
    said = {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "float"}
    said |= options
    model.save_pretrained(folder)
    made = Fp8Quantize(SimpleNamespace(quantization_config=SimpleNamespace(**said)))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if ".layers." not in name or not name.endswith("_proj.weight"):
            continue
        found = made._quantize_one(name, tensor)
        scale = found[name + "_scale_inv"]
        if said["weight_block_size"] is None:
            found[name + "_scale_inv"] = scale.view(())
        if said["activation_scheme"] == "static":
            found[name.replace("weight", "activation_scale")] = torch.tensor(0.01)
        tensors |= found
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", **said}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adopted(folder: str | Path) -> Any:
    return qa.quantize(str(folder), BACKEND, device="cpu", dtype="float32")


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def stock(folder: str | Path) -> Any:
    """What transformers loads without a GPU: dense, and inputs are not rounded."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rounding_inputs(model: Any, width: int | None, *, powers: bool, static: bool) -> Any:
    """Round what goes into the layers of a dense model, as DeepSeek's kernel does."""

    def rounded(layer: Any, given: tuple[Tensor, ...]) -> Tensor:
        x = given[0]
        groups = x.reshape(*x.shape[:-1], -1, width or x.shape[-1])
        scale = groups.abs().amax(-1, keepdim=True) / 448
        scale = torch.exp2(torch.ceil(torch.log2(scale))) if powers else scale
        scale = torch.full_like(scale, 0.01) if static else scale
        codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.float() * scale).reshape(x.shape)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(rounded)
    return model


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checkpoint_is_adopted_as_it_is_served(kind: str, tmp_path: Path) -> None:
    said = FORMATS[kind]
    folder = quantized_files(tiny(), tmp_path / "base", **said)
    model, right = adopted(folder), stock(folder)
    for name, facade in linear_facades(model):
        assert torch.equal(facade.dequantize(), right.get_submodule(name).weight), name
    width = said.get("weight_block_size", [128, 128])
    rounding_inputs(
        right,
        width and width[1],
        powers="scale_fmt" in said,
        static="activation_scheme" in said,
    )
    assert relative(logits(model), logits(right)) < 1e-5
    files = load_file(folder / "model.safetensors")
    held = sum(t.nbytes for n, t in files.items() if "proj" in n and not n.endswith("bias"))
    assert held == sum(weight_bytes(facade) for _, facade in facades(model))
    qa.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == files.keys()
    for name, tensor in files.items():
        assert tensor.dtype == again[name].dtype, name
        assert tensor.shape == again[name].shape, name
        assert torch.equal(tensor.float(), again[name].float()), name


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    """Qwen's are. A merge rounds weights onto scales as they are stored."""
    folder = quantized_files(tiny(), tmp_path, weight_block_size=[64, 64])
    files = load_file(folder / "model.safetensors")
    for name in [n for n in files if n.endswith("scale_inv")]:
        files[name] = files[name].bfloat16()
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    model, right = adopted(folder), stock(folder)
    for name, facade in linear_facades(model):
        assert torch.equal(facade.dequantize(), right.get_submodule(name).weight), name
        weight = facade.dequantize() * 1.37
        made = facade.target.requantize(facade.vendor, weight)
        assert made.weight_scale_inv.dtype == torch.bfloat16
        codes = (weight / spread(made.weight_scale_inv.float(), 64)).clamp(-448, 448)
        assert torch.equal(made.weight.float(), codes.to(torch.float8_e4m3fn).float())


def spread(scales: Tensor, block: int) -> Tensor:
    return scales.repeat_interleave(block, 0).repeat_interleave(block, 1)


@pytest.mark.parametrize("kind", ["128", "64 x 32", "powers", "whole"])
def test_a_weight_is_rounded_as_transformers_rounds_it(kind: str, tmp_path: Path) -> None:
    folder = quantized_files(tiny(), tmp_path, **FORMATS[kind])
    files, dense = load_file(folder / "model.safetensors"), tiny()
    quantizer = FineGrainedFP8(**FORMATS[kind])
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        made = quantizer.quantize_linear(dense.get_submodule(name))
        for key in ("weight", "weight_scale_inv"):
            theirs, ours = files[f"{name}.{key}"], getattr(made, key)
            assert theirs.dtype == ours.dtype
            close = 0.07 if key == "weight" else 1e-6  # they divide by 1 / scale: ties may differ
            assert relative(ours.float(), theirs.float()) < close * 0.01 + 1e-7


@pytest.mark.parametrize(("hidden", "inner"), [(96, 160), (128, 200)])
def test_blocks_that_are_cut_off(hidden: int, inner: int, tmp_path: Path) -> None:
    """128 divides neither rows nor columns, as in DeepSeek's kv_a_proj."""
    generator = torch.Generator().manual_seed(0)
    model = tiny(hidden, inner)
    model.save_pretrained(tmp_path)
    tensors, exact = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
        spread = torch.ones(rows, columns).double()
        for row in range(rows):
            for column in range(columns):
                spread[row, column] = scale[row // 128, column // 128]
        tensors[name] = (tensors[name] / spread).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        exact[name.removesuffix(".weight")] = tensors[name].double() * spread
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = adopted(tmp_path)
    for name, facade in linear_facades(model):
        assert relative(facade.dequantize(), exact[name]) < 1e-6
        grid = facade.target.grid(facade.vendor)
        assert torch.equal(grid.nearest(facade.dequantize()), facade.dequantize())
    assert logits(model).isfinite().all()
    merged = merged_model(moved(qa.attach(model, "lora")), "requantize")
    for _, facade in linear_facades(merged):
        assert facade.vendor.weight_scale_inv.shape == (
            -(-facade.out_features // 128),
            -(-facade.in_features // 128),
        )


@pytest.mark.parametrize("kind", ["128", "powers", "whole", "static"])
@pytest.mark.parametrize("adapter", slow_but(["lora", "dora", "vera", "ia3"], "dora"))
def test_an_adapter_is_trained_on_it_and_merged_into_its_format(
    adapter: str, kind: str, tmp_path: Path
) -> None:
    """The files merged are read by transformers as they are by us, and are in the base's format;
    dense they are what stock PEFT makes of the weights that transformers reads."""
    folder = quantized_files(tiny(), tmp_path / "base", **FORMATS[kind])
    model = moved(qa.attach(adopted(folder), adapter))
    qa.merge(model, tmp_path / "q", kind="requantize", data=HELD_OUT)
    merged = tmp_path / "q" / "merged"
    ours, theirs = adopted(merged), stock(merged)
    for name, facade in linear_facades(ours):
        assert torch.equal(facade.dequantize(), theirs.get_submodule(name).weight), name
    before, after = (load_file(at / "model.safetensors") for at in (folder, merged))
    kinds = [{n: (t.dtype, t.shape) for n, t in files.items()} for files in (before, after)]
    assert kinds[0] == kinds[1]
    if adapter == "lora":
        qa.merge(model, tmp_path / "dense", kind="dense", data=HELD_OUT)
        right = dense_lora(stock(folder), model).merge_and_unload().state_dict()
        found = stock(tmp_path / "dense" / "merged").state_dict()
        assert found.keys() == right.keys()
        assert max(relative(found[n], t) for n, t in right.items()) < 1e-6


# Experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral", "DeepSeek-V3"])
@pytest.mark.parametrize("block", slow_but([[64, 64], [32, 64], [128, 128]], [32, 64]))
def test_experts_that_are_packed_one_by_one(family: str, block: list[int], tmp_path: Path) -> None:
    """They become stacks, are adapted, and are written one by one again."""
    folder = quantized_experts(family, block, tmp_path / "base")
    model = adopted(folder)
    assert len(dict(stack_facades(model))) == 2
    dense = dense_model(family).state_dict()
    ids = IDS % 120
    for name, facade in stack_facades(model):
        assert relative(facade.weight.clone(), dense[name]) < 0.03
        assert not torch.equal(facade.weight.clone(), dense[name])
    qa.save(model, tmp_path / "again")
    files, again = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "again"))
    assert files.keys() == again.keys()
    assert [n for n, t in files.items() if not torch.equal(t.float(), again[n].float())] == []
    tuned = moved(qa.attach(model, "lora", r=2, target_modules="all-linear"))
    merged: Any = merged_model(tuned, "requantize")
    state_of(tuned).quantizer.save(merged, tmp_path / "merged")
    kinds = load_file(tmp_path / "merged" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in kinds.items()} == {
        n: (t.dtype, t.shape) for n, t in files.items()
    }
    assert relative(logits(adopted(tmp_path / "merged"), ids), logits(merged, ids)) < 1e-6


def quantized_experts(family: str, block: list[int], folder: Path) -> Path:
    """Write the experts of a mixture in FP8, each by itself; blocks may be larger than experts."""
    dense_model(family).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
        rows, columns = tensors[name].shape
        high, wide = min(block[0], rows), min(block[1], columns)
        blocks = tensors[name].view(rows // high, high, columns // wide, wide)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        tensors[name] = codes.view(rows, columns)
        tensors[name + "_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Bad input ---------------------------------------------------------------------------------------


def _lost(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name + "_scale_inv"]


def _nan(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_scale_inv"][0] = float("nan")


def _short(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name + "_scale_inv"] = tensors[name + "_scale_inv"][:, :1].contiguous()


def _nan_code(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(torch.uint8)[3, 5] = 0x7F


def _wide(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float().bfloat16()


@pytest.mark.parametrize("damage", [_lost, _nan, _short, _nan_code, _wide])
def test_damaged_tensors_are_refused_by_name(damage: Any, tmp_path: Path) -> None:
    folder = quantized_files(tiny(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, "model.layers.0.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantadaptError, match=r"model\.layers\.0\.mlp\.down_proj"):
        adopted(folder)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
        ({"activation_scheme": "sometimes"}, "activation_scheme"),
        ({"expert_dtype": "fp4"}, "fp4"),
        ({"modules_to_convert": ["embed_tokens"]}, "embeddings"),
        ({"fmt": "e5m2"}, "e5m2"),
    ],
)
def test_configs_that_are_not_read_are_refused(
    said: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = quantized_files(tiny(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantadaptError, match=told):
        adopted(folder)
