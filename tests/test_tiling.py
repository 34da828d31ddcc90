"""MLPs that go through long rows tile by tile: the same numbers, and less kept."""

from __future__ import annotations

import gc
import math
from collections import Counter
from typing import Any

import pytest
import torch
from allocations import peak_of
from parameters import slow_but
from peft import LoHaConfig, LoKrConfig, LoraConfig, PveraConfig, get_peft_model
from processes import in_processes
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import quantadapt as qa
from quantadapt.distributed.talking import start
from quantadapt.memory import Setting, Workload, passes
from quantadapt.memory.shape import Shape
from quantadapt.spec import TrainSpec
from quantadapt.streaming import bring_back, stream, streamer_of
from quantadapt.testing.small_demo import small_model
from quantadapt.training import train
from quantadapt.training.lent import fused_kernels, fused_layers, recomputed
from quantadapt.training.memory_fit import MemoryFit
from quantadapt.training.recomputing import Recomputer

LAYERS, HIDDEN, TOKENS = 3, 32, 150
TILE = 40
"""Tokens; of 150, the last of four tiles has 30."""
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OFFLOADED = Setting(LAYERS, True, 3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "LEAST_TILE", TILE)


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def gemma() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16))


def phi() -> Any:
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def gpt2() -> Any:
    off = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, **off))


def peft(make: Any = llama, targets: Any = "all-linear", **options: Any) -> Any:
    """PEFT's own adapter, in float64."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=targets, **options
    )
    return get_peft_model(make().double(), config).double().train()


def ours(backend: str, adapter: str = "lora", make: Any = llama, **options: Any) -> Any:
    torch.manual_seed(0)
    model = qa.quantize(make(), backend, device="cpu", dtype="float32")
    return qa.attach(model, adapter, **options).train()


MODELS = {
    "lora": peft,
    "dropout": lambda: peft(targets=["q_proj"], lora_dropout=0.2),
    "mlp alone": lambda: peft(targets=["gate_proj", "down_proj"]),
    "attention alone": lambda: peft(targets=["q_proj"]),
    "biases": lambda: peft(lambda: llama(mlp_bias=True), bias="all"),
    "dora": lambda: peft(use_dora=True),
    "gemma": lambda: peft(gemma),
    "phi": lambda: peft(phi),
    "gpt2": lambda: peft(gpt2, targets=["c_fc", "c_proj"]),
}


def passed(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and all gradients of one pass over three rows of 50 tokens."""
    ids = torch.arange(TOKENS).view(3, -1) * 7 % 64
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often an MLP has computed so many tokens."""
    from quantadapt.training import tiling

    seen: Counter[int] = Counter()
    before = tiling.Tiles._forward

    def counted(self: Any, mlp: Any, whole: Any) -> Any:
        def count(x: torch.Tensor, *args: Any) -> torch.Tensor:
            seen[x.numel() // x.shape[-1]] += 1
            return whole(x, *args)

        return before(self, mlp, count)

    monkeypatch.setattr(tiling.Tiles, "_forward", counted)
    return seen


@pytest.mark.parametrize(("layers", "reentrant"), [(0, False), (LAYERS, False), (LAYERS, True)])
@pytest.mark.parametrize("name", slow_but(MODELS, "dropout", "biases", "gpt2", "mlp alone"))
def test_loss_and_gradients_are_those_of_the_whole(name, layers, reentrant, calls) -> None:
    model = MODELS[name]()
    loss, expected = passed(model)
    with recomputed(model, Setting(layers, True, 3), reentrant):
        again, found = passed(model)
    # Once forward and once for backward, recomputed or not; only the reentrant kind does not stop.
    times = (3 if reentrant else 2) * LAYERS
    # What the first layer gets has no gradient then, and is saved when its MLP is done.
    times += name == "mlp alone" and layers > 0 and not reentrant
    # Gemma's norm behind the MLP wants what that makes.
    times += LAYERS * (name == "gemma" and layers > 0 and not reentrant)
    assert calls == {TILE: 3 * times, TOKENS - 3 * TILE: times}
    assert again == pytest.approx(loss, rel=1e-9)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10)
    assert not any("forward" in vars(module) for module in model.modules())


DRAWING: dict[str, Any] = {
    "lokr": lambda **given: LoKrConfig(r=4, rank_dropout=0.5, **given),
    "loha": lambda **given: LoHaConfig(r=4, module_dropout=0.5, **given),
    "pvera": lambda **given: PveraConfig(r=4, **given),
}


@pytest.mark.parametrize("name", slow_but(DRAWING, "lokr"))
def test_what_adapters_draw_is_drawn_again_for_backward(name, calls) -> None:
    torch.manual_seed(0)
    config = DRAWING[name](task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(llama().double(), config).double().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    ways = [torch.randn_like(weight) for weight in weights]
    for weight in weights:
        weight.data += 0.05 * torch.randn_like(weight)
    ids = torch.arange(TOKENS)[None] * 7 % 64

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    def at(distance: float) -> float:
        for weight, way in zip(weights, ways, strict=True):
            weight.data += distance * way
        return loss().item()

    with recomputed(model, OFFLOADED):
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        slope = (at(1e-4) - at(-2e-4)) / 2e-4
    assert TILE in calls
    pairs = zip(gradients, ways, strict=True)
    expected = sum(float((g * way).sum()) for g, way in pairs if g is not None)
    assert slope == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera"])
@pytest.mark.parametrize("backend", slow_but(["torchao-int8", "bnb-nf4", "hqq", "none"], "hqq"))
def test_facades_and_fused_layers(backend, adapter, calls) -> None:
    make = lambda: llama(hidden_size=64, intermediate_size=128)  # noqa: E731
    model = ours(backend, adapter, make)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    with fused_layers(model):
        passed(model)
        loss, expected = passed(model)
        with recomputed(model, OFFLOADED):
            for _ in range(2):
                again, found = passed(model)
    assert calls[64] > 0
    assert again == pytest.approx(loss, rel=1e-6)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_a_streamed_base_is_copied_no_more_often() -> None:
    model = ours("hqq", make=lambda: llama(hidden_size=64, intermediate_size=128))
    with fused_layers(model), recomputed(model, OFFLOADED) as recomputer:
        passed(model)
        recomputer.tiles.turn(False)
        loss, expected = passed(model)
        stream(model)
        streamer = streamer_of(model)
        passed(model)  # shows the order
        before = streamer.traffic.nbytes
        passed(model)
        whole = streamer.traffic.nbytes - before
        recomputer.tiles.turn(True)
        again, found = passed(model)
        assert streamer.traffic.nbytes - before == 2 * whole
    bring_back(model)
    assert again == pytest.approx(loss, rel=1e-6)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


def test_autocast_is_that_of_the_forward() -> None:
    model = peft().float()

    def casted() -> tuple[float, dict[str, torch.Tensor]]:
        ids = torch.arange(TOKENS).view(3, -1) % 64
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.item(), found

    loss, expected = casted()
    with recomputed(model, OFFLOADED):
        again, found = casted()
    assert again == pytest.approx(loss, rel=1e-5)
    for key, gradient in expected.items():
        error = (found[key] - gradient).norm() / gradient.norm()
        assert error < 0.02, key  # the same roundings to bfloat16, in sums of other lengths


@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (6, 1)], ids=str)
@pytest.mark.parametrize("layers", [0, LAYERS])
def test_attention_by_groups_of_heads(heads, layers, monkeypatch) -> None:
    seen: list[tuple[int, ...]] = []
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(query.shape[:3]))
        return before(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counted)
    queries, keys = heads
    size = {"hidden_size": 48, "num_attention_heads": queries, "num_key_value_heads": keys}
    model = peft(lambda: llama(**size, head_dim=8))
    loss, expected = passed(model)
    seen.clear()
    with recomputed(model, Setting(layers, True, 3)):
        again, found = passed(model)
        groups = math.gcd(keys, 8)
        assert set(seen) == {(3, queries // groups, TOKENS // 3)}
        assert len(seen) == groups * LAYERS * (2 if layers else 1)
        seen.clear()
        with torch.no_grad():
            ids = torch.ones(2, 10, dtype=torch.long)
            model(input_ids=ids, attention_mask=ids.tril())  # short, and with a mask
        assert set(seen) == {(2, queries, 10)}
    assert again == pytest.approx(loss, rel=1e-12)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10)
    assert model.config._attn_implementation == "sdpa"


def test_what_stays_whole(calls) -> None:
    model = peft()
    with recomputed(model, Setting(LAYERS, False, 3)):  # inputs on the device
        passed(model)
        assert model.config._attn_implementation == "sdpa"
    assert calls == {TOKENS: 2 * LAYERS}
    for drawing in (peft(lora_dropout=0.2), peft(targets=["down_proj"], lora_dropout=0.1)):
        calls.clear()
        with recomputed(drawing, OFFLOADED):
            passed(drawing)
        assert set(calls) == {TOKENS}
    calls.clear()
    short = torch.arange(2 * TILE)[None] % 64
    with recomputed(model, OFFLOADED), torch.no_grad():
        calls.clear()
        model(input_ids=short)
        assert calls == {2 * TILE: LAYERS}
        calls.clear()
        model(input_ids=torch.arange(TOKENS)[None] % 64)  # a validation, or a reentrant forward
        assert calls == {TILE: 3 * LAYERS, TOKENS - 3 * TILE: LAYERS}
    masked = torch.ones(3, TOKENS, dtype=torch.long)
    masked[0, :20] = 0  # padding in front, so that attention has a mask, of all heads
    loss = model(input_ids=masked, attention_mask=masked).logits
    with recomputed(model, OFFLOADED), torch.no_grad():
        again = model(input_ids=masked, attention_mask=masked).logits
    torch.testing.assert_close(again, loss)
    experts = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    assert Recomputer(experts).tiles.mlps == []


@pytest.mark.slow
def test_a_training_has_the_losses_of_one_without(
    tokenizer, random_data, tmp_path, monkeypatch, calls
) -> None:
    losses = {}
    for offload in (False, True):
        monkeypatch.setattr(passes, "LEAST_TILE", 8)
        monkeypatch.setattr(
            MemoryFit, "_given", lambda self, on=offload: Setting(self.recomputer.count, on, 4)
        )
        torch.manual_seed(0)
        model = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), "lora", seed=0)
        spec = TrainSpec(max_steps=3, per_device_train_batch_size=4, logging_steps=1)
        result = train(model, tokenizer, random_data, spec, output=tmp_path / str(offload), seed=0)
        losses[offload] = [loss for _, loss in result.losses]
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


def test_the_peak_is_that_which_is_predicted() -> None:
    """Of the MLP on a CPU in float32, without Liger."""
    tokens, inside = 2048, 512
    model = ours("none", make=lambda: llama(intermediate_size=inside, num_hidden_layers=1), r=2)
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    dy = torch.randn(1, tokens, HIDDEN)

    weights = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(mlp(x), weights, dy)

    with fused_layers(model), recomputed(model, Setting(0, False, 1)) as recomputer:
        run()
        gc.collect()  # what earlier tests have left is not to be freed meanwhile
        whole = peak_of(run)
        recomputer.apply(Setting(0, True, 1))
        run()
        tiled = peak_of(run)
    shape = Shape.of(model.config.to_dict())
    names = tuple(shape.linears)
    work = Workload(
        shape,
        dict.fromkeys(names, 32.0),
        names,
        2,
        "sgd",
        4,
        1,
        tokens,
        fused_kernels=False,
        packed=True,
    )
    assert work.tiles(Setting(0, True, 1), tokens)
    assert not work.tiles(Setting(0, False, 1), tokens)
    assert not work.tiles(Setting(0, True, 1), 2 * TILE)
    kept = work.kept_bytes(tokens) - work.kept_bytes(tokens, tiled=True)
    assert kept == 4 * 4 * inside * tokens  # what gate and up give, activation and product
    assert whole == pytest.approx(kept + work.backward_bytes(tokens), rel=0.1)
    # `dy` was there before, and here what the MLP returns is until the end.
    assert tiled == pytest.approx(work.tiled_mlp_bytes(tokens), rel=0.1)
    assert tiled < whole / 5


def sharded() -> dict[str, Any]:
    """Losses and gradients of a base that two processes share, whole and tiled, in one of them."""
    from test_memory_sharded import model_of

    start("cpu")
    model = qa.attach(model_of(512, False), "lora", r=2).train()
    passes.LEAST_TILE, found = 8, {}
    ids = torch.arange(600)[None] % 512
    with fused_layers(model), recomputed(model, Setting(LAYERS + 1, True, 1)) as recomputer:
        assert recomputer.tiles.is_long(600)
        for name, on in (("learns", False), ("whole", False), ("tiled", True)):
            recomputer.tiles.turn(on)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            weights = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
            found[name] = loss.item(), {n: p.grad.norm().item() for n, p in weights}
            model.zero_grad()
    return found


@pytest.mark.slow
def test_a_base_that_processes_share(tmp_path) -> None:
    for found in in_processes(2, sharded, tmp_path):
        assert found["tiled"][0] == pytest.approx(found["whole"][0], rel=1e-6)
        assert found["tiled"][1] == pytest.approx(found["whole"][1], rel=1e-4)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_a_gpu_less_is_held_for_the_same_numbers(monkeypatch) -> None:
    monkeypatch.setattr(passes, "LEAST_TILE", 512)
    tokens, inside = 16384, 2048
    size = {"hidden_size": 512, "intermediate_size": inside, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = qa.quantize(llama(**size, **heads), "bnb-nf4", device="cuda", dtype="bfloat16")
    model = qa.attach(model, "lora", r=8).train()
    ids = torch.arange(tokens, device="cuda")[None] * 7 % 64

    def measured() -> tuple[int, dict[str, torch.Tensor]]:
        for _ in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        weights = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        return torch.cuda.max_memory_allocated(), {n: p.grad.clone() for n, p in weights}

    kernels = fused_kernels(model, print)
    with kernels, fused_layers(model), recomputed(model, Setting(4, True, 1)) as recomputer:
        assert recomputer.tiles.is_long(tokens)
        tiled, found = measured()
        recomputer.tiles.turn(False)
        whole, expected = measured()
    assert whole - tiled > 2 * 2 * inside * tokens  # of three in an MLP; attention takes less, too
    for name, gradient in expected.items():
        off = (found[name] - gradient).norm()
        assert off <= 0.02 * gradient.norm() + 1e-6, name
