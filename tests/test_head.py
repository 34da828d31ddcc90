"""The loss from hidden states against torch's own, over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.model.head import Head, head_losses
from quantadapt.objectives.sft import SFT, _fuse_head, _whose_head
from quantadapt.testing.small_demo import small_model
from quantadapt.training.lent_to_trainers import add_head_loss

TOKENS, HIDDEN, WORDS = 300, 24, 1000
WEIGHTS = torch.linspace(-0.5, 1, TOKENS)
"""Each token's loss counts as it should: some objectives make an answer less likely."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""TRL takes its kernel where there is a GPU, whatever the tensors are on."""
NEAR = 1e-6 if DEVICE == "cpu" else 1e-5


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
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = (losses * WEIGHTS.to(losses)).sum()
    loss.backward()
    return loss.detach(), hidden.grad


def of_ours(head, hidden, labels, softcap):
    hidden = hidden.clone().requires_grad_()
    losses = head_losses(hidden, labels, head, softcap=softcap)
    loss = (losses * WEIGHTS.to(losses)).sum()
    loss.backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_torchs(bias, softcap, monkeypatch) -> None:
    # three chunks, one cut short
    monkeypatch.setattr(
        "quantadapt.model.head.HEAD_CHUNK", 128 * WORDS * 4
    )  # three chunks, one cut short
    made = case(torch.float32, bias)
    (found, grad), (expected, expected_grad) = of_ours(*made, softcap), of_torch(*made, softcap)
    assert torch.allclose(found, expected, rtol=1e-6)
    assert float((grad - expected_grad).norm() / expected_grad.norm()) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_head_is_as_precise_as_its_logits(autocast) -> None:
    """The softmax of bfloat16 logits is float32; hidden states may be of another dtype."""
    head, hidden, labels = case(torch.bfloat16, False)
    expected, expected_grad = of_torch(head, hidden, labels, None)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        for dtype in (torch.bfloat16, torch.float32):
            found, grad = of_ours(head, hidden.to(dtype), labels, None)
            assert torch.allclose(found, expected, rtol=1e-6)
            assert grad.dtype == dtype
            error = (grad - expected_grad).float().norm() / expected_grad.float().norm()
            assert float(error) < 1e-2


def test_a_projection_has_the_bias_of_its_head() -> None:
    head, hidden, _ = case(torch.float32, True)
    assert torch.equal(Head(head).projection()(hidden), head(hidden))


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes, **options)
    return LlamaForCausalLM(config).requires_grad_(False)


class Scaled(nn.Linear):
    """A head of its own kind."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("counted", [None, 7])
def test_a_model_gives_the_loss_of_its_own_forward(counted) -> None:
    model = llama()
    ids = torch.arange(10)[None]
    labels = ids.masked_fill(ids < 3, -100)
    expected = model(input_ids=ids, labels=labels).loss
    assert add_head_loss(model)
    given = {"input_ids": ids, "fused_lm_head": True, "counted": counted}
    mean = model(**given, labels=labels, num_items_in_batch=None).loss
    of_fourteen = model(**given, labels=labels, num_items_in_batch=14).loss
    assert [mean.item(), 2 * of_fourteen.item()] == pytest.approx([expected.item()] * 2, rel=1e-6)
    nothing = model(**given | {"counted": None}, labels=labels * 0 - 100, num_items_in_batch=None)
    assert nothing.loss.item() == 0.0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.requires_grad_(True),  # it would get no gradient
        lambda model: setattr(model.lm_head, "forward", lambda hidden: hidden),
        lambda model: setattr(model, "lm_head", Scaled(16, 64).requires_grad_(False)),
        lambda model: setattr(model.config, "output_router_logits", True),  # more than a loss
    ],
    ids=["trained", "patched", "subclass", "router"],
)
def test_a_head_that_is_not_plain_and_frozen_keeps_the_models_forward(change) -> None:
    model = llama()
    change(model)
    assert not add_head_loss(model)
    assert "forward" not in vars(model)


def test_no_tokens_are_a_loss_of_zero_with_a_gradient() -> None:
    head, hidden, labels = case(torch.float32, False)
    hidden.requires_grad_()
    none = torch.zeros(TOKENS, dtype=torch.bool)
    loss = head_losses(hidden[none], labels[none], head).sum()
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


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"trainable_token_indices": [3, 5]},  # the head is tied to the embedding
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_what_is_trained_of_a_head_counts(options, monkeypatch) -> None:
    """With what a GPU is lent: TRL's loss takes the head's weight alone."""
    model = qa.quantize(str(small_model()), "none", device="cpu")
    model = qa.attach(model, "lora", r=2, **options).to(DEVICE)
    torch.manual_seed(0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05 * torch.randn_like(weight))
    ids = torch.randint(8, 60, (2, 16), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids.clone()}
    expected = model(**batch).loss
    gradients = torch.autograd.grad(expected, list(trained.values()))
    monkeypatch.setattr(
        "quantadapt.training.figures.adapter_device", lambda _: torch.device("cuda")
    )
    _fuse_head(model)
    loss = SFT().loss(model, dict(batch), None)
    assert float(loss) == pytest.approx(float(expected), rel=NEAR)
    found = torch.autograd.grad(loss, list(trained.values()))
    for made, wanted in zip(found, gradients, strict=True):
        assert float((made - wanted).norm()) <= 10 * NEAR * float(wanted.norm())


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTERS = {**_EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("family", "options", "whose"),
    [
        # more layers in front of the head
        ("bert", {"is_decoder": True}, "logits"),
        ("roberta", {"is_decoder": True}, "logits"),
        ("modernbert-decoder", {}, "logits"),
        # logits are scaled or capped, as TRL knows or does not: of whole ones
        ("granite", {"logits_scaling": 3.0}, "trl"),
        ("cohere", {"logit_scale": 0.3}, "trl"),
        ("recurrent_gemma", {"logits_soft_cap": 0.5, "lru_width": 16}, "logits"),
        # more than the tokens' loss: as Mixtral's, or of experts with other names
        ("mixtral", _ROUTERS, "trl"),
        ("granitemoe", _ROUTERS, None),
        ("phimoe", _ROUTERS, None),
        ("bamba", {"z_loss_coefficient": 0.1, "mamba_n_heads": 4, "mamba_d_head": 8}, None),
    ],
)
def test_on_a_gpu_the_loss_is_the_models(family, options, whose, monkeypatch) -> None:
    """Not every model computes what TRL's loss does, of the decoder's hidden states alone."""
    monkeypatch.setattr(
        "quantadapt.training.figures.adapter_device", lambda _: torch.device("cuda")
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_SIZES, **options)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    with torch.no_grad():
        for weight in model.requires_grad_(False).parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    weight = next(p for n, p in model.named_parameters() if p.ndim == 2 and "layer" in n)
    weight.requires_grad_(True)
    model.get_base_model = lambda: model
    ids = torch.randint(3, 64, (2, 16), device=DEVICE)
    labels = ids.masked_fill(ids < 16, -100)
    batch = {"input_ids": ids, "labels": labels}
    try:
        expected = model(**batch, attention_mask=torch.ones_like(ids), use_cache=False).loss
    except AttributeError as error:
        if family != "granitemoe":
            raise
        pytest.skip(f"the model's own loss fails, as in transformers 5.17: {error}")
    (wanted,) = torch.autograd.grad(expected, weight)
    _fuse_head(model)
    assert _whose_head(model) == whose
    loss = SFT().loss(model, {**batch, "attention_mask": torch.ones_like(ids)}, None)
    (made,) = torch.autograd.grad(loss, weight)
    assert float(loss) == pytest.approx(float(expected), rel=NEAR)
    assert float((made - wanted).norm()) <= 10 * NEAR * float(wanted.norm())
