"""How large each adapter is foreseen to be, against the tensors that PEFT makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import left_by
from llama_sizes import LLAMA_8B
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.low_rank import low_rank_layers
from quantadapt.dependencies import missing_requirements
from quantadapt.machine import Machine
from quantadapt.memory import GIB, Workload
from quantadapt.memory.adapters import Layer, Method
from quantadapt.memory.shape import Shape
from quantadapt.planning import plan
from quantadapt.registry import registry
from quantadapt.spec import Spec

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SMALL = {"adamss": {"r": 16}, "c3a": {"block_size": 32}, "vblora": {"vector_length": 32}}
"""What the defaults are too large for."""
CHANGED = [
    ("adalora", {"init_r": 5, "target_r": 3}),
    ("adamss", {"r": 16, "num_subspaces": 3, "subspace_rank": 2}),
    ("boft", {"boft_block_size": 0, "boft_block_num": 8}),
    ("dora", {"r": 3}),
    ("gralora", {"r": 8, "hybrid_r": 4}),
    ("ia3", {"feedforward_modules": ["down_proj"]}),
    ("lily", {"stride_A": 2, "num_B": 3, "r": 4}),
    ("lokr", {"decompose_both": True, "r": 2}),
    ("lokr", {"decompose_factor": 8}),
    ("lora", {"r": 4, "lora_bias": True}),
    ("miss", {"init_weights": "mini", "mini_r": 8}),
    ("oft", {"r": 8, "oft_block_size": 0}),
    ("oft", {"oft_block_size": 48, "block_share": True}),
    ("osf", {"effective_rank": 0.25}),
    ("osf", {"effective_rank": 7}),
    ("peanut", {"depth": 2, "r": 8}),
    ("psoft", {"psoft_orth": False, "psoft_mag_a": False, "r": 8}),
    ("pvera", {"r": 16}),
    ("randlora", {"r": 24}),
    ("road", {"variant": "road_4"}),
    ("supertuning", {"r": 4, "sparsity": 0.9}),
    ("tinylora", {"weight_tying": 0.5, "u": 8}),
    ("lora", {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("lora", {"r": 4, "modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}),
    ("lora", {"r": 4, "rank_pattern": {"[qk]_proj": 9, "down_proj": 2}}),
    ("dora", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    ("lora", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    ("unilora", {"theta_d_length": 32}),
    ("vera", {"r": 16}),
    ("vera", {"r": 16, "target_modules": ["q_proj", "v_proj"]}),
]


def usable(name: str) -> bool:
    record = next(a for a in registry().adapters() if a.name == name)
    refused = any(rule.id == f"{name}-not-supported" for rule in record.rules)
    return not refused and not missing_requirements(record)


ALL = [(a.name, SMALL.get(a.name, {})) for a in registry().adapters() if usable(a.name)]
REWRITES = ("loftq", "pissa")
"""Put other numbers into the base, in other tensors than before."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(made)
    return made


def tensors(module: torch.nn.Module, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors that a module holds, wherever it does, its base's layers left out."""
    if id(module) in seen or type(module).__name__ == "QuantLinear":
        return
    seen.add(id(module))
    held: list[Any] = [vars(module)]
    while held:
        value = held.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, torch.nn.Module):
            yield from tensors(value, seen)
        elif isinstance(value, dict):
            held += value.values()
        elif isinstance(value, list | tuple):
            held += value


def storages(model: torch.nn.Module) -> dict[int, int]:
    found = [tensor.untyped_storage() for tensor in tensors(model, set())]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


@pytest.mark.parametrize(("name", "options"), [*ALL, *CHANGED])
@pytest.mark.filterwarnings("ignore")
def test_it_is_as_large_as_was_foreseen(name: str, options: dict[str, Any], folder: Path) -> None:
    spec = Spec(
        model=str(folder),
        backend="none",
        dtype="float32",
        adapter={"name": name, **options},
        data={"path": str(demo.TRAIN_FILE)},
        output=str(folder.parent / "run"),
    )
    card = Machine(cuda=((9, 0),), memory=(80 * GIB,))
    work = plan(spec, machine=card).memory.work
    model = qa.quantize(str(folder), "none", device="cpu", dtype="float32")
    before = storages(model)
    torch.manual_seed(0)
    tuned = qa.attach(model, name, **options)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert work.trained + work.whole == sum(p.numel() for p in trained)
    if name in REWRITES:
        return
    found = sum(nbytes for key, nbytes in storages(tuned).items() if key not in before)
    assert found == pytest.approx(work.held_bytes, rel=0.01)


def test_what_vera_shares_is_there_once_and_as_large_as_the_largest_layer() -> None:
    """By hand, for Llama-3-8B: A and B of its rank in float32, and two vectors a layer."""
    assert (LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]) == (4096, 14336)
    layers = [Layer("q_proj", 4096, 4096, blocks=32), Layer("down_proj", 14336, 4096, blocks=32)]
    trained, fixed = Method("VERA", {"r": 256}).size(layers, 2)
    assert trained == 32 * (256 + 4096 + 256 + 4096)
    assert fixed == 4 * 256 * (14336 + 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("vera", {"r": 64}), ("adalora", {"init_r": 64, "target_r": 32, "total_step": 9})],
)
def test_what_a_pass_keeps_is_what_was_foreseen(name: str, options: Any, dtype: str) -> None:
    """As a run computes them: factors that are made in a pass, and no copies of inputs."""
    config = LlamaConfig(**(SIZES | {"hidden_size": 256, "intermediate_size": 512}))
    torch.manual_seed(0)
    base = qa.quantize(LlamaForCausalLM(config), "none", dtype=dtype)
    tuned = qa.attach(base, name, **options).train()
    shape = Shape.of(config.to_dict())
    work = Workload(
        *(shape, {}, tuple(shape.linears), 0, "sgd", 4 if dtype == "float32" else 2, 1, 1),
        fused_adapter=False,
        fused_kernels=False,
        method=Method(name.upper(), options),
    )
    ids = torch.arange(512)[None] % 64
    held: list[Any] = []

    def forward() -> None:
        held.append(tuned(input_ids=ids, use_cache=False).logits.sum())

    with low_rank_layers(tuned):
        forward()
        held.clear()
        found = left_by(forward)
    assert found == pytest.approx(3 * work.kept_bytes(512), rel=0.05)
    few = 2 * 64 - 1  # as PEFT has it
    assert work.kept_bytes(few) == replace(work, method=None).kept_bytes(few)


def test_a_method_of_a_plugin_counts_as_lora_of_its_rank() -> None:
    layers = [Layer("q_proj", 8, 4, blocks=3)]
    assert Method("OWN", {"r": 2}).size(layers, 4) == Method("LORA", {"r": 2}).size(layers, 4)
    assert Method("OWN").size(layers, 4).trained == 3 * 12
