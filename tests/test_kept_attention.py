"""Attention that recomputed layers do not compute again: the same numbers, fewer kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.memory import Setting, passes
from quantadapt.training.cpu_inputs import CpuInputs
from quantadapt.training.kept_attention import KERNELS
from quantadapt.training.lent import fast_attention, recomputed

LAYERS, LENGTH, HIDDEN = 4, 48, 32


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, **{**sizes, **heads, **options})
    return LlamaForCausalLM(config).to(dtype).train()


def quantized() -> Any:
    model = qa.quantize(llama(torch.float32), "torchao-int8", device="cpu")
    return qa.attach(model, "lora", r=4, init_lora_weights=False).train()


class Calls(TorchDispatchMode):
    """Counts kernels of attention, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in KERNELS:
            self.seen["attention"] += 1
        return function(*args, **(kwargs or {}))


def passed(model: Any, rows: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return the loss of a pass, all gradients, and how many kernels of attention ran forward."""
    ids = torch.arange(rows * LENGTH, device=model.device).view(rows, LENGTH) * 5 % 64
    with Calls() as calls:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found, calls.seen["attention"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make", [llama, quantized])
def test_the_numbers_are_the_same_and_attention_runs_once(make, offload) -> None:
    model = make()
    loss, expected, once = passed(model)
    assert once == LAYERS
    for attention, kernels in ((False, 2 * LAYERS), (True, LAYERS)):
        with recomputed(model, Setting(LAYERS, offload, 2, attention)):
            for _ in range(2):  # the second time, buffers are used again
                again, found, ran = passed(model)
                assert (again, ran) == (loss, kernels)
                assert found.keys() == expected.keys()
                for name, gradient in found.items():
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def test_long_rows_by_groups_of_heads(monkeypatch) -> None:
    monkeypatch.setattr(passes, "LEAST_TILE", 8)
    model = llama()
    loss, expected, _ = passed(model)
    with recomputed(model, Setting(LAYERS, True, 2, True)):
        again, found, ran = passed(model)
    assert again == pytest.approx(loss.item(), rel=1e-12)
    assert ran == 2 * LAYERS  # two groups
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


def test_dropout_of_attention_is_drawn_as_before() -> None:
    model = llama(attention_dropout=0.3)
    torch.manual_seed(1)
    loss, expected, _ = passed(model)
    with recomputed(model, Setting(LAYERS, False, 2, True)):
        torch.manual_seed(1)
        again, found, _ = passed(model)
    assert again == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_it_waits_in_cpu_memory_and_is_fetched_with_the_input(monkeypatch) -> None:
    order: list[tuple[str, tuple[int, ...]]] = []
    store, fetch = CpuInputs._store, None
    from quantadapt.training import cpu_inputs

    fetch = cpu_inputs.StoredTensor.fetch

    def stored(self: Any, tensor: torch.Tensor, begins: bool = True) -> Any:
        order.append(("store", tuple(tensor.shape)))
        return store(self, tensor, begins)

    def fetched(self: Any) -> None:
        if self.on_device is None:
            order.append(("fetch", tuple(self.shape)))
        fetch(self)

    monkeypatch.setattr(CpuInputs, "_store", stored)
    monkeypatch.setattr(cpu_inputs.StoredTensor, "fetch", fetched)
    model = llama()
    with recomputed(model, Setting(LAYERS, True, 2, True)) as recomputer:
        passed(model)
        assert len(recomputer.inputs._free) == 3 * LAYERS
    hidden, out, sums = (2, LENGTH, HIDDEN), (2, LENGTH, 4, HIDDEN // 4), (2, LENGTH, 4)
    stores = [shape for what, shape in order if what == "store"]
    fetches = [shape for what, shape in order if what == "fetch"]
    assert stores == [hidden, out, sums] * LAYERS
    # With a layer's input comes all of the layer before it; of the last layer, sums had not left.
    assert fetches[:5] == [hidden, sums, out, hidden, out]
    assert sorted(fetches) == sorted(stores[:-1])


def test_buffers_are_given_up_and_made_again() -> None:
    model = llama()
    with recomputed(model, Setting(LAYERS, True, 2, True)) as recomputer:
        loss, expected, _ = passed(model)
        recomputer.inputs.release()
        assert not recomputer.inputs._free
        again, found, _ = passed(model)
        assert len(recomputer.inputs._free) == 3 * LAYERS
    assert again == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_what_is_kept_is_let_go() -> None:
    model = llama()
    with recomputed(model, Setting(LAYERS, False, 2, True)) as recomputer:
        passed(model)
        assert recomputer.attention._mode is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.cuda
@pytest.mark.parametrize("offload", [False, True])
def test_kernels_of_a_gpu(offload) -> None:
    """cuDNN's where it is preferred, else flash's; their backward adds up in any order."""
    model = llama(torch.bfloat16, hidden_size=256, num_attention_heads=4).cuda()
    with fast_attention(model, torch.device("cuda")):
        passed(model)  # a shape that is new goes to flash attention
        loss, expected, once = passed(model)
        with recomputed(model, Setting(LAYERS, offload, 2, True)) as recomputer:
            again, found, ran = passed(model)
            assert recomputer.inputs.nbytes > 0 if offload else recomputer.inputs.nbytes == 0
            recomputer.inputs.release()
            assert recomputer.inputs.nbytes == 0
    assert ran == once == LAYERS
    assert again == pytest.approx(loss.item(), rel=1e-3)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name
