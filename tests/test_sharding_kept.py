"""A sharded base that stays gathered while it trains computes what it did, and is shared again
afterwards."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from test_sharding import held, passes, tiny

assert tiny  # a fixture
BACKENDS = ("bnb-nf4", "hqq")
pytestmark = pytest.mark.slow


def trained(model: Any, notes: list[str], **options: Any) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    ids = torch.randint(0, 128, (12, 11), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": [[1] * 11] * 12})
    tuned = qa.attach(model, "lora", r=4)
    result = qa.train(
        tuned,
        data,
        tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
        on_note=notes.append,
        parallel="fsdp",
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        **options,
    )
    weights = {n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_" in n}
    return {"losses": result.losses, "weights": weights}


def live() -> int:
    """The bytes of all tensors of this process that torch's own objects do not only wrap."""
    gc.collect()
    found = {}
    for it in gc.get_objects():
        if type(it) in (torch.Tensor, torch.nn.Parameter):
            storage = it.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def tied() -> dict[str, Any]:
    """Two modules that share one sharded parameter."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from quantadapt.sharding import _mesh, gathered_bytes, kept_gathered

    rows = distribute_tensor(torch.ones(2048, 128), _mesh(), [Shard(0)])
    model = torch.nn.ModuleDict({n: torch.nn.Linear(1, 1, bias=False) for n in ("a", "b")})
    model["a"].weight = model["b"].weight = shared = torch.nn.Parameter(rows, requires_grad=False)
    before, told = live(), gathered_bytes(model)
    with kept_gathered(model):
        one = model["a"].weight is model["b"].weight
        more = live() - before
    after = model["a"].weight is shared and model["b"].weight is shared
    return {"one": one, "more": more, "told": told, "after": after}


def hooks(model: Any) -> dict[str, list[list[Any]]]:
    from quantadapt.sharding import HOOKS

    return {name: [[*getattr(m, name)] for m in model.modules()] for name in HOOKS}


def told_and_loaded(model: Any) -> list[int]:
    """Let all weights of a model be told and loaded; how many were, and how many are left over."""
    told = model.state_dict()
    norms = {name: weight for name, weight in told.items() if "norm" in name}
    found = model.load_state_dict(norms, strict=False)
    return [len(norms), len(found.unexpected_keys)]


def after_a_failure(folder: str) -> list[bool]:
    """Let a pass fail halfway, and the base stay gathered then: whether passes inside and after it
    are those of before, and what is held."""
    import quantadapt as qa
    from quantadapt.sharding import kept_gathered, reshard, shard

    model = shard(qa.quantize(folder, "hqq"))
    before, held_before = passes(model), held(model)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        passes(model)
    handle.remove()
    reshard(model)
    resharded = held(model) == held_before
    with kept_gathered(model):
        inside = passes(model)
    pairs = [pair for p in (inside, passes(model)) for pair in zip(before, p, strict=True)]
    return [resharded, held(model) == held_before, *(torch.equal(a, b) for a, b in pairs)]


def _count(hooks: list[list[Any]]) -> int:
    return sum(map(len, hooks))


def compared(folder: str) -> dict[str, Any]:
    import quantadapt as qa
    from quantadapt.distributed import start
    from quantadapt.sharding import gathered_bytes, is_sharded, kept_gathered, shard
    from quantadapt.training import base_placement

    models = {name: [qa.quantize(folder, name) for _ in range(3)] for name in BACKENDS}
    start("cpu")
    found: dict[str, Any] = {"tied": tied(), "failed": after_a_failure(folder)}
    for name, (model, other, third) in models.items():
        whole, size = passes(model), held(model)
        shard(model)
        passes(model)
        shared, there, whole_bytes = held(model), hooks(model), gathered_bytes(model)
        before = live()
        with kept_gathered(model):
            more = live() - before
            inside = [passes(model) for _ in range(2)]
            now = hooks(model)
            off = {kind: _count(of) - _count(now[kind]) for kind, of in there.items()}
            found[name] = {"is_sharded": is_sharded(model), "hooks off": off}
            found[name]["loaded"] = told_and_loaded(model)
            found[name] |= {"inside": held(model) / size, "left": gathered_bytes(model)}
            found[name]["more"] = (more, whole_bytes)
        pairs = [pair for p in (*inside, passes(model)) for pair in zip(whole, p, strict=True)]
        found[name]["equal"] = [torch.equal(a, b) for a, b in pairs]
        found[name]["shared"] = shared / size, held(model) / size
        found[name]["hooks"] = hooks(model) == there
        notes: list[str] = []
        found[name]["each time"] = trained(shard(other), notes)
        with patch.object(base_placement, "_room", lambda *_: 2.0**40):
            found[name]["once"] = trained(shard(third), notes)
            found[name]["after"] = is_sharded(third), held(third) / size
            found[name]["min"] = trained(model, found[name].setdefault("told", []), memory="min")
        found[name]["notes"] = [note for note in notes if note.startswith("fsdp")]
    return found


@pytest.fixture(scope="module")
def kept(tiny: str, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("kept")
    return in_processes(2, compared, folder, tiny)


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_are_the_same_bit_for_bit_without_fsdp(kept: Any, backend: str) -> None:
    for found in (rank[backend] for rank in kept):
        assert all(found["equal"])
        assert found["is_sharded"] is False
        off = found["hooks off"]  # of two blocks and the head, and for passes of the root
        assert off["_forward_pre_hooks"] == off["_forward_hooks"] == 4
        assert off["_load_state_dict_post_hooks"] == 3
        assert off["_state_dict_pre_hooks"] == off["_load_state_dict_pre_hooks"] == 3
        assert found["loaded"] == [5, 0]
        assert found["inside"] == pytest.approx(1, abs=0.05)
        assert found["left"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_gathered_is_there_beside_the_share_of_it(kept: Any, backend: str) -> None:
    """As many bytes as the sentence says, which is what a plan counts."""
    for found in (rank[backend] for rank in kept):
        more, told = found["more"]
        assert told > 2048 * 128 * 4 * 2  # embedding and head alone
        assert more == told


def test_a_pass_that_failed_is_forgotten(kept: Any) -> None:
    for found in kept:
        assert all(found["failed"])


def test_what_is_tied_is_gathered_once(kept: Any) -> None:
    for found in (rank["tied"] for rank in kept):
        assert found["one"]
        assert found["more"] == found["told"] == 2048 * 128 * 4
        assert found["after"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_afterwards_it_is_shared_again(kept: Any, backend: str) -> None:
    for found in (rank[backend] for rank in kept):
        assert found["shared"][0] == found["shared"][1] < 0.75
        assert found["hooks"]
        assert found["after"][0] is True
        assert found["after"][1] < 0.75


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_learns_the_same_and_says_what_it_does(kept: Any, backend: str) -> None:
    for found in (rank[backend] for rank in kept):
        for way in ("once", "min"):
            assert dict(found[way]["losses"]) == pytest.approx(
                dict(found["each time"]["losses"]), rel=1e-6
            )
        for name, weight in found["each time"]["weights"].items():
            torch.testing.assert_close(found["once"]["weights"][name], weight, rtol=0, atol=1e-4)
        assert not [note for note in found["told"] if "gathered" in note]
        (note,) = found["notes"]
        assert "stays gathered while it trains" in note
