"""Experts as one function of autograd, against transformers' own experts on dense weights."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from interpreted import cuda_tests_interpreted
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation

import quantadapt as qa
from quantadapt.facade import (
    densify,
    expert_stack,
    expert_steps,
    read_in_parts,
    single_stack_lora,
    stack_facades,
    stack_wrappers,
)
from quantadapt.facade.expert_steps import (
    Added,
    Gate,
    _gates,
    add,
    combined,
    gated,
    gated_backward,
)
from quantadapt.facade.grouped import Routing, StackLora, grouped, grouped_outer
from quantadapt.model.experts import set_dense

EXPERTS, K, TOKENS = 4, 2, 19
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
    **{"num_experts_per_tok": K, "pad_token_id": 0},
}
KINDS = {
    "silu": MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=EXPERTS),
    "gelu": MixtralConfig(
        **SIZES, intermediate_size=128, num_local_experts=EXPERTS, hidden_act="gelu"
    ),
    "many small": Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=EXPERTS),
    "clamped, biases, transposed": GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=EXPERTS, swiglu_limit=0.5
    ),
}


def rel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def model(config: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    return qa.quantize(made, "hqq", bits=4, group_size=64, dtype="float32")


def experts_of(model: Any) -> Any:
    return next(m for m in model.modules() if hasattr(m, "has_gate"))


def inputs(none: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the experts of each token, of which one is never chosen, and their weights."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(K).indices
    if none:
        index[::3, 1] = EXPERTS  # no expert
    hidden = torch.randn(TOKENS, 64, generator=generator).requires_grad_()
    return hidden, index, torch.rand(TOKENS, K, generator=generator).requires_grad_()


def results(run: Any, given: tuple[torch.Tensor, ...], trained: Any = ()) -> list[torch.Tensor]:
    """The output, and the gradients of the hidden states, the routing weights, and others."""
    hidden, index, weights = given
    y = run(hidden, index, weights)
    seed = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).cos()
    return [y.detach(), *torch.autograd.grad((y * seed).sum(), [hidden, weights, *trained])]


def own_forward(experts: Any) -> Any:
    """The loop over experts of the model's own class."""

    def run(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
        weights = weights * (index < EXPERTS)  # not every class knows what none is
        index = index.clamp(max=EXPERTS - 1)
        return type(experts).forward.__wrapped__(experts, hidden, index, weights)

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("none", [False, True])
def test_frozen_experts_are_transformers_own(kind, none) -> None:
    quantized = model(KINDS[kind])
    dense = experts_of(densify(copy.deepcopy(quantized)))
    expected = results(own_forward(dense), inputs(none))
    for found, right in zip(results(experts_of(quantized), inputs(none)), expected, strict=True):
        assert rel(found, right) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("recomputed", "tokens", "block"),
    [(False, TOKENS, None), (True, TOKENS, None), (False, TOKENS, 1200), (False, 1, None)],
)
def test_lora_is_pefts_on_the_dense_experts(kind, recomputed, tokens, block, monkeypatch) -> None:
    """In float64; also where a row or two are computed at a time, and of a single token."""
    from peft import LoraConfig, get_peft_model

    if block is not None:
        monkeypatch.setattr("quantadapt.facade.expert_steps.BLOCK", {False: block, True: block})

    def some(dtype: torch.dtype) -> Any:
        hidden, index, weights = (given.detach()[:tokens] for given in inputs())
        return hidden.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()

    quantized = model(KINDS[kind])
    dense = densify(copy.deepcopy(quantized))
    ours = qa.attach(quantized, "lora", r=4, lora_alpha=12)
    targets = ours.peft_config["default"].target_parameters
    assert targets
    config = LoraConfig(r=4, lora_alpha=12, target_parameters=targets, target_modules=[])
    theirs = get_peft_model(dense, config)
    generator = torch.Generator().manual_seed(2)
    both = []
    for of in (ours, theirs):
        layer = next(m for n, m in of.named_modules() if n.endswith(("mlp.experts", "moe.experts")))
        of_stacks = {n: p for n, p in layer.named_parameters() if "lora_" in n}
        both.append((layer, dict(sorted(of_stacks.items()))))
    for name, parameter in both[0][1].items():
        parameter.data.normal_(0, 0.2, generator=generator)
        both[1][1][name].data.copy_(parameter.data)
    theirs.double()
    (layer, weights), (reference, their_weights) = both
    assert weights.keys() == their_weights.keys()
    assert len(weights) == 4
    reference.get_base_layer().config._experts_implementation = "eager"
    expected = results(reference, some(torch.float64), their_weights.values())

    def run(*given: torch.Tensor) -> Any:
        return checkpoint(layer, *given, use_reentrant=False) if recomputed else layer(*given)

    found = results(run, some(torch.float32), weights.values())
    for made, right in zip(found, expected, strict=True):
        assert rel(made, right) < 1e-6
    with torch.no_grad():
        assert rel(layer(*some(torch.float32)), expected[0]) < 1e-6


class WithoutGate(nn.Module):
    """Experts as Nemotron-H has them: no gate, a square for an activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim = EXPERTS, 64
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, 128, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 64, 128) / 8)
        self.act_fn = lambda x: x.relu().square()

    def forward(self, hidden: Any, index: Any, weights: Any) -> Any:
        y = 0
        for j in range(index.shape[1]):
            x = self.act_fn(torch.einsum("th,tih->ti", hidden, self.up_proj[index[:, j]]))
            x = torch.einsum("ti,thi->th", x, self.down_proj[index[:, j]])
            y = y + x * weights[:, j, None]
        return y


def test_experts_without_a_gate_and_of_which_one_stack_is_dense() -> None:
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS["silu"]), dtype=torch.float32)
    owner = next(m for m in made.modules() if hasattr(m, "experts"))
    kind: Any = use_experts_implementation(has_gate=False)(WithoutGate)
    owner.experts = kind(made.config)
    quantized = qa.quantize(made, "hqq", bits=4, group_size=64, dtype="float32")
    name, facade = list(stack_facades(quantized))[1]
    set_dense(quantized, facade.stack._replace(name=name), facade.dense())
    experts = experts_of(quantized)
    assert list(experts.quantized_stacks) == ["up_proj"]
    dense = experts_of(densify(copy.deepcopy(quantized)))
    found, expected = results(experts, inputs()), results(own_forward(dense), inputs())
    for made, right in zip(found, expected, strict=True):
        assert rel(made, right) < 1e-6


def test_only_inputs_are_saved_and_nothing_is_made_again_to_save_them(monkeypatch) -> None:
    experts, saved, products = experts_of(model(KINDS["silu"])), [], []

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        products.append(x.shape)
        return grouped(x, *rest)

    monkeypatch.setattr(expert_stack, "grouped", counted)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    hidden, index, weights = inputs()
    with hooks:
        y = experts(hidden, index, weights)
    largest = hidden.numel()  # a token's rows are K times that
    assert saved
    assert max(t.numel() for t in saved) == largest
    assert len(products) == 2
    y.sum().backward()
    assert len(products) == 2 + 3  # the first once more, and one backward through each
    products.clear()
    y = checkpoint(experts, hidden, index, weights, use_reentrant=False)
    y.sum().backward()
    assert len(products) == 2 + 3  # a recomputation ends before the first product


@pytest.mark.parametrize("recomputed", [False, True])
def test_what_a_makes_of_rows_is_made_once(recomputed: bool, monkeypatch) -> None:
    """And again where memory is short."""
    tuned, products = qa.attach(model(KINDS["silu"]), "lora", r=4), []
    layer = next(m for n, m in tuned.named_modules() if n.endswith(("mlp.experts", "moe.experts")))

    def counted(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        products.append(weight.shape[1:])
        return grouped(x, weight, ends)

    monkeypatch.setattr(expert_stack, "grouped", counted)
    for short in (False, True):
        read_in_parts(tuned, short)
        y = checkpoint(layer, *inputs(), use_reentrant=False) if recomputed else layer(*inputs())
        y.sum().backward(retain_graph=not recomputed)
        low = [shape for shape in products if 4 in shape]
        assert len(low) == 2 + 2 + 2 * short  # A in forward, B in backward
        products.clear()
        if not recomputed:
            y.sum().backward()  # given away the first time
            assert len([shape for shape in products if 4 in shape]) == 2 + 2
            products.clear()


def test_gates_are_known_by_what_they_do() -> None:
    modules = {name: experts_of(model(config)) for name, config in KINDS.items()}
    found = {name: Gate.of(module) for name, module in modules.items()}
    inf, clamped = float("inf"), "clamped, biases, transposed"
    assert found["silu"] == found["many small"] == Gate(False, 1.0, inf, 0.0)
    assert found["gelu"] is None
    assert found[clamped] == Gate(True, 1.702, modules[clamped].limit, 1.0)


def test_products_by_group() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x, weight, y = torch.randn(9, 5), torch.randn(3, 5, 4), torch.randn(9, 4)
    group = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    expected = torch.einsum("rn,rnm->rm", x[:7], weight[group])
    made = grouped(x, weight, ends)
    assert torch.allclose(made[:7], expected, atol=1e-5)
    assert not made[7:].any()
    outer = grouped_outer(y, x, ends)
    assert torch.allclose(outer[0], y[:3].T @ x[:3], atol=1e-5)
    assert not outer[1].any()
    assert torch.allclose(outer[2], y[3:7].T @ x[3:7], atol=1e-5)


def test_lora_of_a_stack_by_expert_and_back() -> None:
    torch.manual_seed(0)
    lora = StackLora(torch.randn(EXPERTS * 3, 10), torch.randn(7, 3 * EXPERTS), 2.0, EXPERTS)
    a, b = lora.by_expert(torch.float64)
    for expert in range(EXPERTS):
        assert torch.equal(a[expert], lora.a[3 * expert : 3 * expert + 3].double())
        assert torch.equal(b[expert], lora.b[:, expert::EXPERTS].double())
    da, db = lora.gradients(a, b)
    assert torch.equal(da, lora.a)
    assert torch.equal(db, lora.b)


def test_plain_lora_on_stacks_is_known() -> None:
    peft_model = qa.attach(model(KINDS["silu"]), "lora", r=4)
    wrappers = list(stack_wrappers(peft_model))
    assert len(wrappers) == 2
    assert all(single_stack_lora(wrapper) is not None for wrapper in wrappers)
    with peft_model.disable_adapter():
        assert all(single_stack_lora(wrapper) is None for wrapper in wrappers)


class OnGpu:
    has_gate = True


@pytest.mark.cuda
@pytest.mark.parametrize("ranks", [(16, 16), (8, 0), (0, 64)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernels_are_plain_torchs(ranks, bias, interleaved, monkeypatch) -> None:
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    # The interpreter multiplies no matrices of bfloat16.
    kind, tolerance = (torch.bfloat16, 3e-3) if DEVICE == "cuda" else (torch.float32, 1e-5)
    monkeypatch.setattr(expert_steps, "_kernels", lambda y, *_: y.dtype is kind)
    torch.manual_seed(0)
    experts, count, k, width = OnGpu(), 6, 3, 100
    tokens = 203 if DEVICE == "cuda" else 19
    inf = float("inf")
    _gates[experts] = Gate(True, 1.7, 7.0, 1.0) if interleaved else Gate(False, 1.0, inf, 0.0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    index = torch.rand(tokens, count + 2, device=DEVICE).topk(k).indices
    index[index == 2] = 1
    routing, rows = Routing.of(index, count), tokens * k
    y, dz, share = random(rows, 2 * width), random(rows, width), random(rows).sigmoid()
    of_bias = random(count, 2 * width) if bias else None
    r, dr = ranks
    added = Added(random(rows, r), random(count, 2 * width, r)) if r else None
    d_added = Added(random(rows, dr), random(count, dr, width).transpose(1, 2)) if dr else None

    def run(kind: torch.dtype) -> list[torch.Tensor]:
        def to(given: Any) -> Any:
            if isinstance(given, Added):
                return Added(*map(to, given))
            return None if given is None else given.to(kind, copy=True)

        made = [gated(experts, to(y), to(of_bias), to(added), to(share), routing)]
        made += gated_backward(
            experts, to(y), to(of_bias), to(added), to(share), routing, to(dz), to(d_added)
        )
        made += [torch.where(routing.is_routed(), add(to(y), to(added), routing), 0)]
        return [*made, combined(to(y), routing)]

    for found, expected in zip(run(kind), run(torch.float64), strict=True):
        assert rel(found, expected) < tolerance


@pytest.mark.slow
def test_kernels_are_plain_torchs_where_they_are_interpreted() -> None:
    said = cuda_tests_interpreted(__file__, "plain_torchs")
    assert "12 passed" in said, said[-3000:]


@pytest.mark.cuda
def test_groups_without_rows_get_zeros_on_cuda() -> None:
    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([40, 40, 64], dtype=torch.int32, device="cuda")
    poison = torch.full((3, 32, 32), float("nan"), device="cuda", dtype=torch.bfloat16)
    del poison
    made = grouped_outer(x, x, ends)
    assert not made[1].any()
    assert rel(made[2], x[40:].float().T @ x[40:].float()) < 3e-3


@pytest.mark.cuda
def test_losses_in_bfloat16_are_the_dense_models_within_noise() -> None:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=EXPERTS)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    quantized = qa.quantize(dense, "hqq", bits=4, group_size=64, dtype="bfloat16", device="cuda")
    reference = densify(copy.deepcopy(quantized)).float()
    ids = torch.randint(0, 64, (2, 32), device="cuda")
    loss = quantized(input_ids=ids, labels=ids).loss
    expected = reference(input_ids=ids, labels=ids).loss
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
