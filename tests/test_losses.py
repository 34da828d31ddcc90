"""The loss from hidden states against torch's own, over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantadapt import losses

TOKENS, HIDDEN, WORDS = 300, 24, 1000


def case(dtype: torch.dtype, bias: bool, device: str = "cpu"):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, WORDS, bias=bias).to(device, dtype).requires_grad_(False)
    hidden = torch.randn(TOKENS, HIDDEN, device=device).to(dtype)
    return head, hidden, torch.randint(WORDS, (TOKENS,), device=device)


def of_torch(head, hidden, labels, softcap):
    hidden = hidden.clone().requires_grad_()
    logits = head(hidden).float() if hidden.dtype != torch.float64 else head(hidden)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    (loss * 0.25).backward()
    return loss.detach(), hidden.grad


def of_ours(head, hidden, labels, softcap):
    hidden = hidden.clone().requires_grad_()
    loss = losses.head_loss(hidden, labels, head, softcap=softcap)
    (loss * 0.25).backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_torchs(bias, softcap, monkeypatch) -> None:
    monkeypatch.setattr(losses, "HEAD_CHUNK", 128 * WORDS * 4)  # three chunks, one cut short
    made = case(torch.float32, bias)
    (found, grad), (expected, expected_grad) = of_ours(*made, softcap), of_torch(*made, softcap)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert float((grad - expected_grad).norm() / expected_grad.norm()) < 1e-5


def test_no_tokens_are_a_loss_of_zero_with_a_gradient() -> None:
    head, hidden, labels = case(torch.float32, False)
    hidden.requires_grad_()
    none = torch.zeros(TOKENS, dtype=torch.bool)
    loss = losses.head_loss(hidden[none], labels[none], head)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.cuda
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_gives_the_same(dtype, softcap) -> None:
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    made = case(dtype, True, "cuda")
    (found, grad), (expected, expected_grad) = of_ours(*made, softcap), of_torch(*made, softcap)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found, expected, rtol=1e-3)
    error = (grad.float() - expected_grad.float()).norm() / expected_grad.float().norm()
    assert float(error) < limit
