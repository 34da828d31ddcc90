"""What a sharded base takes in each of two processes, against the plan's arithmetic."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from allocations import peak_of
from processes import in_processes

from quantadapt import demo
from quantadapt.distributed import start
from quantadapt.memory import GIB, WORKSPACE, Setting, Workload, size_words
from quantadapt.memory.shape import Shape
from quantadapt.sharding import PACKED, shard
from quantadapt.training.base_placement import one_block_at_a_time
from quantadapt.training.lent import recomputed
from quantadapt.training.lent_to_trainers import add_head_loss

LAYERS, TOKENS = 4, 16
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(TOKENS)[None]


def workload(words: int, tied: bool) -> Workload:
    """A Llama in float32 on backend `none`, with LoRA of rank 2 on `q_proj`."""
    config = SIZES | HEADS | {"vocab_size": words, "tie_word_embeddings": tied}
    shape = Shape.of(config | {"model_type": "llama", "rms_norm_eps": 1e-6})
    assert shape is not None
    bits = dict.fromkeys(shape.linears, 32.0)
    return Workload(shape, bits, ("q_proj",), 2, "sgd", 4, 1, TOKENS, shards=2)


def model_of(words: int, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    import quantadapt as qa

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=words, tie_word_embeddings=tied, **SIZES, **HEADS)
    return shard(qa.quantize(LlamaForCausalLM(config), "none"))


def held(model: Any) -> dict[str, int]:
    """Bytes in this process's memory: of quantized layers, and of all else."""
    found = {"quantized": 0, "dense": 0}
    seen = set()
    for name, parameter in model.named_parameters():
        mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        storage = mine.untyped_storage()
        if storage._cdata not in seen:
            found["quantized" if name.split(".")[-1] == PACKED else "dense"] += storage.nbytes()
        seen.add(storage._cdata)
    return found


def peak(tuned: Any, one_at_a_time: bool) -> int:
    """Return what a backward pass takes beside what is there before it: the least of some, as
    gloo's threads let go of memory when they please."""
    found: list[int] = []
    losses: list[Any] = []

    def forward() -> None:
        given = {"labels": IDS, "num_items_in_batch": None, "fused_lm_head": True}
        losses.append(tuned(input_ids=IDS, use_cache=False, **given).loss)

    alone = one_block_at_a_time(tuned.get_base_model()) if one_at_a_time else nullcontext()
    with alone, recomputed(tuned, Setting(LAYERS, False, 1)):
        for _ in range(4):
            peak_of(forward)  # measuring gives gloo time to let go of its copies
            found.append(peak_of(lambda: losses.pop().backward()))
    return min(found)


def gathers(tuned: Any, one_at_a_time: bool) -> list[str]:
    """Return the order in which forward and backward of a step gather blocks, and compute them."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    base = tuned.get_base_model()
    names = {id(block): f"{at}" for at, block in enumerate(base.model.layers)}
    told: list[str] = []
    unshard = FSDPParamGroup.unshard

    def seen(self: Any, *args: Any, **options: Any) -> Any:
        there = self._all_gather_result is not None or self.is_unsharded
        name = names.get(id(self.modules[0]))
        if name is not None and not there:
            told.append(f"gather {name}")
        return unshard(self, *args, **options)

    hooks = [
        block.self_attn.register_forward_pre_hook(lambda *_, at=at: told.append(f"compute {at}"))
        for at, block in enumerate(base.model.layers)
    ]
    alone = one_block_at_a_time(base) if one_at_a_time else nullcontext()
    with (
        alone,
        recomputed(tuned, Setting(LAYERS, False, 1)),
        patch.object(FSDPParamGroup, "unshard", seen),
    ):
        given = {"labels": IDS, "num_items_in_batch": None, "fused_lm_head": True}
        tuned(input_ids=IDS, use_cache=False, **given).loss.backward()
    for hook in hooks:
        hook.remove()
    return told


CASES = {"few words": (512, False), "tied": (512, True), "many words": (16384, False)}


def measured() -> dict[str, Any]:
    """Everything that the tests below look at, in one of two processes."""
    import quantadapt as qa

    start("cpu")
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = model_of(*case)
        found[name] = held(model)
        tuned: Any = qa.attach(model, "lora", r=2, target_modules=["q_proj"]).train()
        add_head_loss(tuned.get_base_model())
        found[name] |= {"ahead": peak(tuned, False), "alone": peak(tuned, True)}
        if name == "few words":
            found["order"] = {"ahead": gathers(tuned, False), "alone": gathers(tuned, True)}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return in_processes(2, measured, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shares_are_as_large_as_predicted(two, case) -> None:
    work = workload(*CASES[case])
    for found in two:
        assert found[case]["quantized"] == work.quantized_bytes
        assert found[case]["dense"] == work.dense_bytes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_backward_gathers_a_block_and_the_next(two, case) -> None:
    work = workload(*CASES[case])
    block = work.block_bytes
    # What comes from the others is there twice with gloo, and when it is put in place.
    for found in two:
        assert found[case]["ahead"] == pytest.approx(3 * block, rel=0.05)
        assert found[case]["alone"] == pytest.approx(2 * block, rel=0.05)


@pytest.mark.slow
def test_a_block_is_gathered_twice_a_step_while_the_one_before_it_computes(two) -> None:
    """For forward, and for backward, which computes it again."""
    up, down = list(range(LAYERS)), list(range(LAYERS))[::-1]
    for found in two:
        told = found["order"]
        for order in told.values():
            gathered = [line for line in order if line.startswith("gather")]
            assert gathered == [f"gather {at}" for at in (*up, *down)]
            assert [x for x in order if "compute" in x] == [f"compute {at}" for at in (*up, *down)]
        assert told["ahead"][:3] == ["gather 0", "gather 1", "compute 0"]
        assert told["ahead"][-3:] == ["gather 0", "compute 1", "compute 0"]
        assert told["alone"][:3] == ["gather 0", "compute 0", "gather 1"]
        assert told["alone"][-3:] == ["compute 1", "gather 0", "compute 0"]


def test_the_prediction_counts_what_is_gathered() -> None:
    work, setting = workload(*CASES["many words"]), Setting(LAYERS, False, 1)
    assert work.peak(setting) - work.quantized_bytes > work.table_bytes
    few = workload(*CASES["few words"])
    saved = few.peak(setting) - replace(few, prefetches=False).peak(setting)
    assert saved == few.block_bytes
    rotary = few.shared_bytes(setting)
    working = few.parts(setting)["working"] - rotary - 2 * WORKSPACE
    assert working == 3 * few.block_bytes  # as was measured


# --- a base that stays gathered ------------------------------------------------------------------


def test_a_base_that_stays_gathered_is_there_beside_the_share_of_it() -> None:
    """By hand: the blocks and both tables, in float32, are whole; none is gathered in a pass."""
    for words, tied in CASES.values():
        shared, setting = workload(words, tied), Setting(LAYERS, False, 1)
        block = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
        table = 0 if tied else 4 * 2 * words * 256
        whole = replace(shared, gathered=True)
        assert whole.gathered_bytes == LAYERS * block + table
        parts = whole.parts(setting)
        assert parts["gathered"] == LAYERS * block + table
        assert parts["quantized"] + parts["dense"] == shared.quantized_bytes + shared.dense_bytes
        alone = replace(shared, shards=1).parts(setting)
        for name in ("adapter", "inputs", "activations", "working"):
            assert parts[name] == alone[name]


def test_it_stays_so_where_it_takes_a_tenth_of_what_is_free() -> None:
    shared = workload(512, False)
    beside = shared.quantized_bytes + shared.dense_bytes + 4 * shared.trained
    just = beside + 10 * shared.gathered_bytes
    assert shared.kept_in(just).gathered
    assert not shared.kept_in(just - 10).gathered
    assert not replace(shared, prefetches=False).kept_in(2**50).gathered
    assert not replace(shared, shards=1).kept_in(2**50).gathered
    recorded = replace(shared, graphs=True)  # as a base that is not shared
    gained = replace(recorded, gathered=True).parts(Setting(0, False, 1))
    assert gained["working"] == replace(recorded, shards=1).parts(Setting(0, False, 1))["working"]


def test_a_plan_counts_it_and_says_so(tmp_path: Path) -> None:
    from llama_sizes import LLAMA_8B

    from quantadapt.machine import Machine
    from quantadapt.planning import plan
    from quantadapt.spec import Spec

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_8B))

    def planned(**train: Any) -> Any:
        spec = Spec(
            model=str(tmp_path / "model"),
            backend="bnb-nf4",
            train={"parallel": "fsdp", **train},
            data={"path": str(demo.TRAIN_FILE)},
            evaluate={"unquantized": False},
            output=str(tmp_path / "run"),
        )
        there = Machine(cuda=((9, 0),) * 2, memory=(141 * GIB,) * 2)
        return plan(spec, machine=there, processes=2, weights=False)

    made, saving = planned(), planned(memory="min")
    (card,), (other,) = made.memory.cards, saving.memory.cards
    size = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) * 4.127 / 8 + 2 * 2 * 128256 * 4096
    assert made.memory.work_on(card).gathered_bytes == pytest.approx(size, rel=1e-3)
    told = size_words(size)
    (note,) = [note for note in made.notes if "stays gathered while it trains" in note]
    assert f"({told} more; train.memory: min shares it at all times)" in note
    assert f"the base gathered while it trains ({told})" in made.memory.words()[0]
    assert made.to_dict()["memory"]["cards"][0]["parts_gib"]["gathered"] == pytest.approx(
        size / GIB, rel=1e-3
    )
    predicted = made.memory.peak_gib(card.setting, made.memory.work.length)
    assert predicted * GIB == card.needed
    assert not other.gathered
    assert not [note for note in saving.notes if "gathered" in note]
