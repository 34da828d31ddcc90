"""gpt-oss as it is released, its experts in MXFP4: dequantized for other backends, kept by mxfp4,
tuned, merged, and written again so that transformers reads it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rows import few_rows
from parameters import slow_but
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

import quantadapt as qa
from quantadapt import cli
from quantadapt.errors import QuantadaptError
from quantadapt.facade import QuantLinear, facades, stack_facades
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import calibration_examples, small_model

EXPERTS, HIDDEN, INNER = 4, 64, 96
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""As openai/gpt-oss-20b has it."""


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss whose experts are random codes, in several files; beside it, as `dense`, what they
    stand for."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=32,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    packed, dense = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor = torch.randn(tensor.shape, generator=generator) * 0.1
        if not re.search(r"experts\.\w+_proj$", name):
            packed[name] = dense[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        groups = experts, outputs, inputs // 32
        blocks = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, groups, generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        weight = FP4[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
        dense[name] = weight.flatten(-2).transpose(1, 2).contiguous()
    model.config.save_pretrained(folder / "dense")
    shutil.copytree(folder / "dense", folder / "released")
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    _in_two_files(packed, folder / "released")
    file = folder / "released" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": CONFIG}))
    for file in small_model().glob("*token*.json"):
        shutil.copy(file, folder / "released")
    return folder / "released"


def _in_two_files(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Blocks in one file and the rest in another: a weight is in both."""
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    where = {name: files[name.endswith("_blocks")] for name in tensors}
    for file in files:
        held = {name: t.clone() for name, t in tensors.items() if where[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


IDS = torch.arange(48).reshape(2, 24) + 100


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def stock(folder: Path) -> torch.Tensor:
    """What transformers itself answers; nothing in the files may be lost or left over."""
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    how |= {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model, report = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return logits(model.float())


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def kept(released: Path) -> Any:
    return qa.quantize(released, backend="mxfp4", dtype="float32")


# By other backends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options"),
    [("hqq", {}), ("bnb-nf4", {}), ("none", {}), ("gptq", {"group_size": 32}), ("nvfp4", {})],
)
def test_others_quantize_what_the_codes_stand_for(
    backend: str, options: Any, released: Path
) -> None:
    """They are quantized as those of the dense checkpoint that holds the same numbers."""
    shown = {"calibration": calibration_examples()[:2]} if backend == "gptq" else {}
    found = qa.quantize(released, backend=backend, **shown, **options)
    wanted = qa.quantize(released.parent / "dense", backend=backend, **shown, **options)
    assert torch.equal(logits(found), logits(wanted))
    assert not hasattr(found.config, "quantization_config")


def test_a_plan_says_which_backend_keeps_them(released: Path) -> None:
    data = {"path": str(qa.demo.TRAIN_FILE)}
    made = plan(Spec(model=str(released), data=data), check_output=False)
    assert not made.adopt
    assert "--backend mxfp4 keeps it" in " ".join(made.notes)
    spec = Spec(
        model=str(released), data={"path": str(qa.demo.TRAIN_FILE)}, backend={"name": "mxfp4"}
    )
    made = plan(spec, check_output=False)
    assert made.adopt
    assert "loaded as it is" in " ".join(made.notes)


def test_a_plan_counts_what_is_dense_in_the_release(tmp_path: Path) -> None:
    """gpt-oss-20b: experts at 4.25 bits, attention in bfloat16; all at 4.25 where all is quantized.
    All-linear is what is quantized."""
    sizes = {"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64}
    GptOssConfig(num_hidden_layers=24, **sizes).save_pretrained(tmp_path)
    attention = 2880 * (64 + 8 + 8 + 64) * 64
    experts = 32 * 3 * 2880 * 2880
    file = tmp_path / "config.json"
    held = json.loads(file.read_text()) | {"dtype": "bfloat16"}
    by_layer = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(24) for p in "qkvo"]
    lists = {"": [], "modules_to_not_convert": CONFIG["modules_to_not_convert"], "ignore": by_layer}
    for key, names in lists.items():
        config = held | ({"quantization_config": {**CONFIG, key: names}} if key else {})
        file.write_text(json.dumps(config))
        spec = Spec(
            model=str(tmp_path), backend={"name": "mxfp4"}, data={"path": str(qa.demo.TRAIN_FILE)}
        )
        made = plan(spec, check_output=False, cards=[80], weights=False)
        assert made.adopt == bool(key)
        work = made.memory.work
        bits = 16 if key else 4.25
        wanted = 24 * (attention * bits + experts * 4.25) / 8
        assert work.quantized_bytes == pytest.approx(wanted, rel=1e-3)
        assert ("q_proj" in work.targets) == (not key)


# By mxfp4 ----------------------------------------------------------------------------------------


def test_experts_are_kept_packed(released: Path) -> None:
    model, held = kept(released), tensors_of(released)
    stacks = dict(stack_facades(model))
    assert len(stacks) == 4
    assert not any(isinstance(facade, QuantLinear) for _, facade in facades(model))
    for name, stack in stacks.items():
        codes, scales = held[f"{name}_blocks"], held[f"{name}_scales"]
        assert torch.equal(stack.vendor.weight_packed.flatten(), codes.flatten())
        assert torch.equal(stack.vendor.weight_scale.flatten(), scales.flatten())
    assert apart(logits(model), stock(released)) < 1e-6
    assert apart(logits(model), stock(released.parent / "dense")) < 1e-6


def test_it_is_written_as_it_was(released: Path, tmp_path: Path) -> None:
    model = kept(released)
    qa.save(model, tmp_path / "saved")
    held, again = tensors_of(released), tensors_of(tmp_path / "saved")
    assert held.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in held.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "lm_head" in config["modules_to_not_convert"]
    assert torch.equal(stock(tmp_path / "saved"), stock(released))
    assert torch.equal(logits(qa.load(tmp_path / "saved")), logits(model))
    model.save_pretrained(tmp_path / "stock")  # transformers' own call
    assert torch.equal(stock(tmp_path / "stock"), stock(released))


def test_quantized_experts_alone_are_written_as_released(released: Path, tmp_path: Path) -> None:
    """A dense gpt-oss of which the experts alone are quantized; all of it has no such layout."""
    dense = released.parent / "dense"
    model = qa.quantize(
        dense, backend="mxfp4", skip_modules=["self_attn", "lm_head"], dtype="float32"
    )
    qa.save(model, tmp_path / "saved")
    assert apart(stock(tmp_path / "saved"), logits(model)) < 1e-6
    assert "model.layers.0.mlp.experts.down_proj_blocks" in tensors_of(tmp_path / "saved")
    whole = qa.quantize(dense, backend="mxfp4", dtype="float32")
    qa.save(whole, tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(qa.load(tmp_path / "whole")), logits(whole))


@pytest.mark.parametrize("adapter", slow_but(["lora", "dora"], "lora"))
def test_it_is_tuned_and_merged(adapter: str, released: Path, tmp_path: Path) -> None:
    """What is merged dense is what was tuned; quantized again it is what MXFP4 makes of that, in
    the layout of the release."""
    torch.manual_seed(0)
    tuned = qa.attach(kept(released), adapter, r=4, target_modules=["q_proj", "o_proj", "experts"])
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert any("self_attn.q_proj" in name for name in trained)
    assert any("experts" in name for name in trained)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    wanted = logits(tuned)
    assert apart(wanted, stock(released)) > 0.02
    qa.merge(tuned, tmp_path / "dense", kind="dense")
    assert apart(stock(tmp_path / "dense" / "merged"), wanted) < 1e-5
    given = {"kind": "requantize", "min_gain": 0, "rounding": "nearest"}
    qa.merge(tuned, tmp_path / "packed", **given)
    written = tmp_path / "packed" / "merged"
    assert tensors_of(written).keys() == tensors_of(released).keys()
    assert torch.equal(logits(tuned), wanted)
    again = kept(released)
    merged = tensors_of(tmp_path / "dense" / "merged")
    for name, stack in stack_facades(again):
        stack.weight = merged[name]
    for name, parameter in again.named_parameters():
        if name in merged:
            parameter.data = merged[name]
    assert apart(stock(written), logits(again)) < 1e-6
    assert apart(logits(qa.load(written)), logits(again)) < 1e-6


@pytest.mark.slow
def test_the_command_line_trains_it(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "model": released,
        "backend": "mxfp4",
        "adapter": "lora",
        "data": few_rows(),
        "output": tmp_path / "run",
        "max-steps": 2,
    }
    settings = {
        "adapter.target_modules": "[q_proj, experts]",
        "export.merge": "requantize",
        "export.min_gain": 0,
        "data.max_length": 48,
        "train.per_device_train_batch_size": 2,
        "evaluate.max_examples": 4,
    }
    given = [f"--{name}={value}" for name, value in arguments.items()]
    given += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *given])
    assert not ended.value.code, capsys.readouterr()
    written = tmp_path / "run" / "merged"
    assert tensors_of(written).keys() == tensors_of(released).keys()
    assert apart(stock(written), logits(qa.load(written))) < 1e-2  # it computes in bfloat16


# Files that are not whole ------------------------------------------------------------------------


def _changed(released: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(released, folder)
    tensors = tensors_of(folder)
    change(tensors)
    _in_two_files(tensors, folder)
    return folder


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), "weight_scale"),
        (lambda t: t.pop(f"{NAME}_blocks"), "weight_packed"),
        (lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"][:, :, :-1]}), "weight_scale"),
        (lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"][:-1]}), "down_proj"),
        (lambda t: t[f"{NAME}_scales"].fill_(255), "no numbers"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    change: Any, said: str, released: Path, tmp_path: Path
) -> None:
    folder = _changed(released, tmp_path / "changed", change)
    with pytest.raises(QuantadaptError, match=said) as error:
        qa.quantize(folder, backend="mxfp4")
    assert "layers.1.mlp.experts.down_proj" in str(error.value)


def test_experts_of_the_release_that_are_not_there(released: Path, tmp_path: Path) -> None:
    def without(tensors: Any) -> None:
        for name in [n for n in tensors if n.startswith(NAME) and not n.endswith("bias")]:
            del tensors[name]

    folder = _changed(released, tmp_path / "changed", without)
    with pytest.raises(QuantadaptError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        qa.quantize(folder, backend="mxfp4")
