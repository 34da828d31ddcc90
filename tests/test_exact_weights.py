"""What is trained in 16 bits, modules trained whole and biases, learns as in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from quantadapt.model.half_precision import rounded_to
from quantadapt.spec import TrainSpec
from quantadapt.training import train
from quantadapt.training.exact_weights import FILE

CASES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "biases": {"bias": "all"},
}
SMALL = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def adapted(dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, tie_word_embeddings=False, **sizes, **heads))
    base = base.bfloat16().to(dtype)  # the same numbers in both
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def whole(model: Any) -> dict[str, torch.Tensor]:
    """What is trained of the base, as it is now."""
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad and "lora_" not in n}


def run(model: Any, tokenizer: Any, data: Dataset, folder: Path, **options: Any) -> Any:
    steps = {"max_steps": 40, "logging_steps": 1, "per_device_train_batch_size": 4}
    on_log = options.pop("on_log", None)
    spec = TrainSpec(**{**steps, **SMALL, **options})
    return train(model, tokenizer, data, spec, output=folder, seed=0, on_log=on_log)


@pytest.mark.parametrize("case", CASES)
def test_small_changes_are_learnt(case, tokenizer, random_data, tmp_path) -> None:
    """Rounded after each step, a head kept a quarter of what it learnt at this rate."""
    moved, losses = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype, **CASES[case])
        before = whole(model)
        losses[dtype] = run(model, tokenizer, random_data, tmp_path / str(dtype)).losses
        after = whole(model)
        assert {weight.dtype for weight in after.values()} == {dtype}
        names = [name for name in before if "k_proj" not in name]  # softmax sees none: noise
        moved[dtype] = [(after[n].double() - before[n].double()).flatten() for n in names]
    for wanted, got in zip(*moved.values(), strict=True):
        assert got.abs().mean() == pytest.approx(float(wanted.abs().mean()), rel=0.05)
        assert float(got @ wanted / wanted.norm() ** 2) == pytest.approx(1, abs=0.05)
    first, second = (found[-1][1] for found in losses.values())
    assert second == pytest.approx(first, abs=0.02)


def test_norms_change_at_all(tokenizer, random_data, tmp_path) -> None:
    """Near one, a number of bfloat16 and the next are further apart than any step."""
    model = adapted(torch.bfloat16, modules_to_save=["norm"])
    before = whole(model)
    run(model, tokenizer, random_data, tmp_path, learning_rate=2e-4, max_steps=60)
    changed = [float((whole(model)[n] != w).float().mean()) for n, w in before.items()]
    assert sum(changed) / len(changed) > 0.1


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adamw_8bit"])
def test_a_resumed_run_is_the_same_bit_by_bit(optim, tokenizer, random_data, tmp_path) -> None:
    options = {"optim": optim, "save_steps": 4, "max_steps": 8}
    model = adapted(torch.bfloat16, **CASES["head"])
    done = run(model, tokenizer, random_data, tmp_path / "whole", **options)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 6:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(adapted(torch.bfloat16, **CASES["head"]), tokenizer, random_data, cut, on_log=stop,
            **options)  # fmt: skip
    again = adapted(torch.bfloat16, **CASES["head"])
    resumed = run(again, tokenizer, random_data, cut, resume=True, **options)
    assert resumed.resumed_from == 4
    assert resumed.losses == done.losses
    assert all(weight.equal(whole(again)[name]) for name, weight in whole(model).items())


def test_the_model_has_what_the_optimizer_keeps_rounded(tokenizer, random_data, tmp_path) -> None:
    from safetensors.torch import load_file

    model = adapted(torch.bfloat16, **CASES["head"])
    run(model, tokenizer, random_data, tmp_path, save_steps=5, max_steps=5)
    (name, weight), *_ = whole(model).items()
    exact = load_file(tmp_path / "checkpoints" / "checkpoint-5" / FILE)[name]
    assert exact.dtype == torch.float32
    assert not exact.equal(exact.bfloat16().float())
    assert weight.equal(rounded_to(torch.bfloat16, exact))


def test_a_step_that_fails_leaves_the_model_usable(tokenizer, random_data, tmp_path) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more memory")

    model = adapted(torch.bfloat16, **CASES["head"])
    before = whole(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "_init_group", failing)
        with pytest.raises(RuntimeError, match="no more memory"):
            run(model, tokenizer, random_data, tmp_path)
    assert all(weight.equal(before[name]) for name, weight in whole(model).items())
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


def test_float32_needs_none(tokenizer, random_data, tmp_path) -> None:
    model = adapted(torch.float32, **CASES["head"])
    run(model, tokenizer, random_data, tmp_path, save_steps=2, max_steps=2)
    assert not (tmp_path / "checkpoints" / "checkpoint-2" / FILE).exists()
