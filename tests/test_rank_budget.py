"""What AdaLoRA does once a step, for all layers together, against PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, AdaLoraModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator, SVDLinear
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting import rank_budget
from quantadapt.adapting.rank_budget import joint_ranks, not_orthogonal
from quantadapt.testing.small_demo import small_model

SIZES = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
STEPS = 8


def tuned(layers: int = 3, orth_reg_weight: float = 0.3):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).double()
    config = AdaLoraConfig(
        init_r=5,
        target_r=2,
        tinit=1,
        tfinal=2,
        deltaT=2,
        total_step=STEPS,
        target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        orth_reg_weight=orth_reg_weight,
    )
    made = get_peft_model(model, config).double().train()
    for name, parameter in made.named_parameters():
        if "lora_E" in name:
            parameter.data.normal_()
    return made


def steps(made) -> tuple[list[float], list[dict]]:
    """The losses of some steps, and all of the adapter after each."""
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.3)
    ids = torch.arange(24).view(2, 12)
    losses, states = [], []
    for step in range(1, STEPS + 1):
        loss = made(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        made.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        pattern = copy.deepcopy(made.peft_config["default"].rank_pattern)
        allocator = made.base_model.rankallocator
        states.append(
            {
                "pattern": pattern,
                "weights": {n: p.detach().clone() for n, p in made.named_parameters()},
                "ipt": copy.deepcopy(allocator.ipt),
                "mean": copy.deepcopy(allocator.exp_avg_ipt),
                "uncertain": copy.deepcopy(allocator.exp_avg_unc),
            }
        )
    return losses, states


@pytest.mark.parametrize("stacked", [2**24, 300])
def test_steps_are_pefts(stacked, monkeypatch) -> None:
    """Losses, importances, which directions go, and all weights."""
    monkeypatch.setattr(rank_budget, "STACKED", stacked)
    expected_losses, expected = steps(tuned())
    ours = tuned()
    with joint_ranks(ours), patch.object(RankAllocator, "update_ipt", side_effect=AssertionError):
        losses, states = steps(ours)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for found, wanted in zip(states, expected, strict=True):
        assert found["pattern"] == wanted["pattern"]
        assert list(found["pattern"] or ()) == list(wanted["pattern"] or ())
        for part in ("weights", "ipt", "mean", "uncertain"):
            assert found[part].keys() == wanted[part].keys()
            for name, value in wanted[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-9, atol=1e-14)
    kept = [sum(map(sum, s["pattern"].values())) for s in states if s["pattern"]]
    assert kept[0] > kept[-1] == 2 * 12
    zeros = [p == 0 for n, p in states[-1]["weights"].items() if "lora_E" in n]
    assert sum(map(torch.sum, zeros)) == (5 - 2) * 12


def test_without_a_loss_on_its_factors_nothing_is_computed_for_it() -> None:
    expected_losses, expected = steps(tuned(orth_reg_weight=0.0))
    ours = tuned(orth_reg_weight=0.0)
    with (
        joint_ranks(ours),
        patch.object(AdaLoraModel, "forward", side_effect=AssertionError),
        patch.object(rank_budget, "not_orthogonal", side_effect=AssertionError),
    ):
        losses, states = steps(ours)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert states[-1]["pattern"] == expected[-1]["pattern"]
    for name, value in expected[-1]["weights"].items():
        torch.testing.assert_close(states[-1]["weights"][name], value, rtol=1e-9, atol=1e-14)


def test_a_pattern_may_lack_the_adapters_name() -> None:
    """As PEFT's has it once the adapter was saved."""
    made, stock = tuned(), tuned()
    steps(stock)
    pattern = {
        name.replace(".default", ""): keeps
        for name, keeps in stock.peft_config["default"].rank_pattern.items()
    }
    stock = tuned()
    for one, lent in ((made, joint_ranks), (stock, None)):
        allocator = one.base_model.rankallocator
        if lent is None:
            allocator.mask_using_rank_pattern(one.base_model.model, pattern)
        else:
            with lent(one):
                allocator.mask_using_rank_pattern(one.base_model.model, pattern)
    expected = dict(stock.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in made.named_parameters())


def test_all_is_given_back() -> None:
    made = tuned()
    tuner = made.base_model
    with joint_ranks(made):
        assert "forward" in vars(tuner)
    assert "forward" not in vars(tuner)
    assert not {"update_ipt", "mask_to_budget"} & vars(tuner.rankallocator).keys()


def stock_term(factors: list[torch.Tensor]) -> torch.Tensor:
    grams = [p.T @ p if i % 2 else p @ p.T for i, p in enumerate(factors)]
    return sum((g - torch.eye(len(g))).norm() for g in grams) / len(factors)


def test_orthogonality_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8), (10, 3), (3, 8), (6, 3), (2, 8), (10, 2), (0, 8), (10, 0)]
    factors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    factors[2] = torch.eye(3, 8, dtype=torch.float64)  # nothing is wrong with it: a slope of 0
    for factor in factors:
        factor.requires_grad_()
    found = gradients(not_orthogonal, factors)
    for value, expected in zip(found, gradients(stock_term, factors), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def gradients(function: Callable, factors: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = function(factors)
    return [loss.detach(), *torch.autograd.grad(loss * 3, factors)]


def operations(layers: int) -> int:
    """How many a step takes beside the model's passes and what looks at parts of tensors."""
    made = tuned(layers)
    tuner, ids = made.base_model, torch.arange(24).view(2, 12)
    with joint_ranks(made):
        made(input_ids=ids, labels=ids).loss.backward()
        loss = torch.zeros((), requires_grad=True)
        with (
            patch.object(tuner.model, "forward", return_value=Mock(loss=loss)),
            torch.profiler.profile() as seen,
        ):
            tuner().loss.backward()
            tuner.update_and_allocate(4)
    found = {event.key: event.count for event in seen.key_averages()}
    names = ("mm", "bmm", "linalg_vector_norm", "mean", "kthvalue", "eye", "_local_scalar_dense",
             "_foreach_abs_", "_foreach_mul_", "_foreach_add_")  # fmt: skip
    assert found["aten::bmm"] >= 8
    return sum(found.get(f"aten::{name}", 0) for name in names)


def test_more_layers_take_no_more_kernels_and_one_wait() -> None:
    assert operations(6) == operations(2)


def test_what_is_saved_in_16_bits_is_what_was_trained(tmp_path: Path) -> None:
    """PEFT by itself would train the number of ranks there, by which it divides, and not save it,
    and round what it loads. From the file by hand, in float64."""
    base = qa.quantize(str(small_model()), "none", dtype="bfloat16")
    made = qa.attach(base, "adalora", init_r=4, target_r=2)
    qa.train(made, max_steps=8, learning_rate=5e-2, per_device_train_batch_size=2)
    saved = qa.save(made, tmp_path / "run")
    held = load_file(saved / "adapter_model.safetensors")
    loaded = qa.load(saved)
    names = {n: m for n, m in made.named_modules() if isinstance(m, SVDLinear)}
    kept = [len(held[f"{name}.lora_E"]) for name in names]
    assert sum(kept) == 2 * len(names) == 28
    for name, layer in names.items():
        a, b, e = (held[f"{name}.lora_{part}"].double() for part in "ABE")
        expected = b @ (a * e) * layer.scaling["default"] / (4 + 1e-5)
        for found in (layer, loaded.get_submodule(name)):
            change = found.get_delta_weight("default").detach().double()
            torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-9)


def in_16_bits(dtype: torch.dtype) -> Any:
    """An AdaLoRA that somebody has made and cast, on a float32 base; values have 8 bits."""
    config = AdaLoraConfig(
        **{"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": STEPS},
        target_modules=["q_proj", "down_proj"],
        lora_dropout=0.0,
        orth_reg_weight=0.3,
    )
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    made = get_peft_model(qa.quantize(base, "none", device="cpu", dtype="float32"), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data = values.bfloat16().to(dtype)
    return made


def test_what_is_in_16_bits_itself_loses_the_same_directions(tmp_path: Path) -> None:
    """It ended in `TypeError: expected Tensor as element 0 in argument 1, but got NoneType`: the
    gradients were gone. What the optimizer keeps in float32 loses them, too, or they come back."""
    ids = torch.arange(24).view(2, 12)
    stock = in_16_bits(torch.float32).train()
    start = {n: p.detach().clone() for n, p in stock.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad],
                                  lr=1e-2, weight_decay=0.0)  # fmt: skip
    for step in range(1, STEPS + 1):
        stock(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in stock.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        stock.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    made = in_16_bits(torch.bfloat16)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "completion_mask": [[1] * 12] * 2})
    options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    options |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": STEPS}
    options |= {"optim": "adamw_torch", "weight_decay": 0.0, "output": tmp_path}
    qa.train(made, data, tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR), **options)
    wanted = stock.peft_config["default"].rank_pattern
    found = made.peft_config["default"].rank_pattern  # once saved, without the adapter's name
    assert found == {name.replace(".default", ""): kept for name, kept in wanted.items()}
    exact = load_file(tmp_path / f"checkpoints/checkpoint-{STEPS}/exact_weights.safetensors")
    expected = dict(stock.named_parameters())
    for name, weight in made.named_parameters():
        if not weight.requires_grad:
            continue
        assert weight.dtype == torch.bfloat16
        moved = float((expected[name] - start[name]).norm())
        assert float((exact[name] - expected[name]).norm()) < 0.05 * moved, name
        if "lora_E" in name:
            assert torch.equal(weight == 0, expected[name] == 0)
            assert torch.equal(exact[name] == 0, expected[name] == 0)
    alive = sum(int((w != 0).sum()) for name, w in exact.items() if "lora_E" in name)
    assert alive == 2 * 4
    importances = made.base_model.rankallocator.exp_avg_ipt
    assert {one.dtype for one in importances.values()} <= {torch.float32}
