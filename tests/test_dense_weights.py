"""Dense weights that stay while a model trains, where there is room for them: the numbers are the
same, and they go where memory is wanted."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_grpo
import torch
from datasets import Dataset
from llama_sizes import LLAMA_8B
from processes import in_processes
from test_memory_fit import Notes, RunsOut, make_up_card, trained, weights
from torch import nn
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import TrainingError
from quantadapt.facade.dense_weights import DenseWeights
from quantadapt.machine import Machine
from quantadapt.memory.cards import GIB, size_words
from quantadapt.planning import plan
from quantadapt.spec import Spec, TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training import train
from quantadapt.training.memory_fit import MemoryFit
from quantadapt.training.recomputing import decoder_layers

STAY = "memory: there is room for dequantized weights, so they stay while it trains"


def tuned(backend: str = "bnb-nf4", adapter: str = "lora", dtype: str = "float32", **options: Any):
    torch.manual_seed(0)
    device = "cuda" if dtype == "bfloat16" else "cpu"
    calibrates = {"calibration": str(demo.TRAIN_FILE)} if backend == "gptq" else {}
    model = qa.quantize(str(small_model()), backend, device=device, dtype=dtype, **calibrates)
    model = qa.attach(model, adapter, target_modules="all-linear", **options)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def passed(model: Any) -> list[torch.Tensor]:
    """The loss of a batch, and the gradients of all that is trained."""
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    loss = model.train()(input_ids=ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def counted(dense: DenseWeights, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each weight that is dequantized."""
    seen: list[Any] = []
    for target in {layer.target for layer in dense.layers}:
        made = target.dequantize
        monkeypatch.setattr(
            target, "dequantize", lambda module, made=made: seen.append(module) or made(module)
        )
    return seen


@pytest.mark.parametrize(
    ("backend", "adapter"),
    [("bnb-nf4", "lora"), ("bnb-nf4", "dora"), ("hqq", "vera"), ("hqq", "ia3"), ("eetq", "lora")],
)
def test_passes_are_the_same_to_the_bit(backend, adapter, monkeypatch) -> None:
    model = tuned(backend, adapter)
    dense = DenseWeights(model)
    expected, seen = passed(model), counted(dense, monkeypatch)
    passed(model)
    assert len(seen) > len(dense.layers)
    dense.make()
    seen.clear()
    assert all(map(torch.equal, passed(model), expected))
    assert not seen
    assert dense.drop()
    assert not dense.drop()
    passed(model)
    assert seen


def test_nothing_but_training_reads_them() -> None:
    """What answers may be recorded in a graph, which would read them after they are dropped."""
    model = tuned()
    dense, ids = DenseWeights(model), torch.arange(5, 25)[None]
    assert dense.nbytes == sum(4 * n.weight.numel() for n in dense.layers)
    with torch.no_grad():
        answered, learnt = model.eval()(ids).logits, model.train()(ids).logits
    dense.make()
    for layer in dense.layers:
        layer.held_weight.zero_()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, answered)
        assert not torch.allclose(model.train()(ids).logits, learnt)
    assert float(dense.layers[0].dequantize().norm()) > 1  # the weight is that of the codes


def held(model: Any) -> list[torch.Tensor]:
    return [layer.held_weight for layer in DenseWeights(model).layers]


def rewritten(layer: Any, doubled: torch.Tensor) -> None:
    layer.weight = doubled


def requantized(layer: Any, doubled: torch.Tensor) -> None:
    layer.requantize(doubled)


def repacked(layer: Any, doubled: torch.Tensor) -> None:
    layer.repack(doubled)


def loaded(layer: Any, doubled: torch.Tensor) -> None:
    other = copy.deepcopy(layer)
    other.requantize(doubled)
    layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("change", [rewritten, requantized, repacked, loaded])
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq"])
def test_what_stays_follows_the_codes_in_its_place(backend, change) -> None:
    """Passes that were recorded read it there."""
    model = tuned(backend)
    dense = DenseWeights(model)
    dense.make()
    layer = dense.layers[0]
    there, before = layer.held_weight.data_ptr(), layer.dequantize().clone()
    change(layer, 2 * before)
    assert (layer.held_weight is not None, layer.held_weight.data_ptr()) == (True, there)
    expected = layer.target.dequantize(layer.vendor)
    assert torch.equal(layer.held_weight, expected)
    assert not torch.allclose(expected, before, rtol=0.1)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    product = nn.functional.linear(x, expected, layer.bias)
    assert torch.equal(layer.train()(x), product)


def test_moves_that_move_nothing_leave_them_and_casts_take_them() -> None:
    model = tuned()
    dense, given = DenseWeights(model), passed(model)
    dense.make()
    there = [weight.data_ptr() for weight in held(model)]
    model.to("cpu")
    adapter = {n: p for n, p in model.state_dict().items() if "lora_" in n}
    assert not model.load_state_dict(adapter, strict=False).unexpected_keys
    assert [weight.data_ptr() for weight in held(model)] == there
    assert all(map(torch.equal, passed(model), given))
    model.to(torch.bfloat16)
    assert not any(weight is not None for weight in held(model))
    found, cast = passed(model), tuned().to(torch.bfloat16)
    assert all(map(torch.equal, found, passed(cast)))


def test_merging_while_they_stay_changes_no_number_afterwards() -> None:
    model = tuned()
    dense, given = DenseWeights(model), passed(model)
    dense.make()
    model.merge_adapter()
    model.to("cpu")  # takes up the layers while they are merged
    model.unmerge_adapter()
    passed(model)  # finds that nothing is merged any more
    assert all(map(torch.equal, passed(model), given))


def test_copies_and_pickles_have_none() -> None:
    """Nobody would take them away there."""
    model = tuned()
    size = len(pickle.dumps(model))
    dense = DenseWeights(model)
    dense.make()
    assert len(pickle.dumps(model)) == pytest.approx(size, rel=1e-3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert held(copied) == [None] * len(dense.layers)
        assert all(map(torch.equal, passed(copied), passed(model)))
    assert all(weight is not None for weight in held(model))


def test_a_base_that_is_dense_as_it_is_needs_none(tmp_path) -> None:
    assert DenseWeights(tuned("none")).nbytes == 0
    (card,) = planned(tmp_path, [141], backend="none").memory.cards
    assert card.setting.recomputed_layers == 0
    assert not card.keeps_dense


def test_what_stays_is_not_counted_as_dequantized(
    tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    """Of the time of training; all of it is, in this case."""
    data, found = random_data.select(range(4)), {}
    make_up_card(monkeypatch, 20, lambda: 8)
    for room in (9.001, 15.0):
        options = {"max_steps": 2, "memory": room}
        run = trained(tuned(r=2), tokenizer, data, tmp_path / str(room), **options)
        found[room] = run.dequantize_share
    assert found[15.0] < 0.05 * found[9.001]


def validated(model: Any, tokenizer, data, folder: Path, notes: Notes, **options: Any) -> Any:
    spec = TrainSpec(max_steps=3, logging_steps=1, eval_steps=1, learning_rate=1e-2, **options)
    given = (model, tokenizer, data.select(range(8)), spec)
    held_out = data.select(range(8, 11))
    return train(*given, output=folder, seed=0, held_out=held_out, on_note=notes)


def running_out(model: Any, raised: list[Any]) -> Any:
    """Between steps, while they are there."""
    first = DenseWeights(model).layers[0]

    def run_out(module: Any, _: Any) -> None:
        if not module.training and first.held_weight is not None:
            raised.append(module)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return run_out


def test_they_go_where_validation_wants_the_room(
    tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    """It was not probed."""
    make_up_card(monkeypatch, 20, lambda: 8)
    plain = tuned(r=2)
    expected = validated(plain, tokenizer, random_data, tmp_path / "a", Notes(), memory=9.001)
    model, notes, raised = tuned(r=2), Notes(), []
    decoder_layers(model)[-1].mlp.register_forward_pre_hook(running_out(model, raised))
    found = validated(model, tokenizer, random_data, tmp_path / "b", notes)
    assert len(raised) == 1
    assert notes[-1] == "out of memory in validation: from here on without dense weights"
    assert found.validation == expected.validation
    assert found.losses == expected.losses
    assert all(map(torch.equal, weights(model).values(), weights(plain).values()))


def wanting_room_in_one(folder: Path, source: str, rows: Any, full: bool) -> tuple[Any, ...]:
    from quantadapt.distributed import start, world

    start("cpu")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, notes, raised = qa.quantize(source, "bnb-nf4", device="cpu"), Notes(), []
    model = qa.attach(model, "lora", r=2)
    if full and world().rank == 1:
        decoder_layers(model)[-1].mlp.register_forward_pre_hook(running_out(model, raised))
    with pytest.MonkeyPatch.context() as patched:
        make_up_card(patched, 20, lambda: 8)
        found = validated(model, tokenizer, Dataset.from_dict(rows), folder, notes)
    return found.validation, list(notes), len(raised)


def with_room_and_without(folder: Path, *given: Any) -> list[tuple[Any, ...]]:
    return [wanting_room_in_one(folder / str(full), *given, full) for full in (False, True)]


def test_they_go_in_the_process_that_wants_the_room_and_the_user_is_told(
    random_data, tmp_path
) -> None:
    """Nobody waits within the pass, so the others need not know."""
    first, second = in_processes(
        2, with_room_and_without, tmp_path, tmp_path, str(small_model()), random_data.to_dict()
    )
    (expected, notes, _), (found, more, raised) = first
    assert found == expected == second[0][0] == second[1][0]
    assert (raised, second[1][2]) == (0, 1)
    text = "out of memory in validation: from here on without dense weights"
    assert not [note for note in notes if "out of memory" in note]
    assert more[-1] == f"{text} (process 1)"
    assert second[1][1][-1] == text


def asked(folder: Path) -> Any:
    return test_grpo.read(test_grpo.written(folder)).train


def test_they_go_where_answers_want_the_room(tmp_path, monkeypatch) -> None:
    """Of a model that learns from them: they are drawn again, and are the same."""
    make_up_card(monkeypatch, 20, lambda: 8)
    functions, found = tmp_path / "some.py", {}
    functions.write_text("def long(completions, **_):\n    return [len(c) for c in completions]\n")
    for full in (False, True):
        model, raised = tuned(r=2), []
        if full:
            mlp = decoder_layers(model)[-1].mlp
            mlp.register_forward_pre_hook(running_out(model, raised))
        objective = {"name": "grpo", "beta": 0.1, "rewards": [f"{functions}:long"]}
        logs, learnt = test_grpo.trained(model, asked(tmp_path), objective, max_steps=2)
        assert len(raised) == full
        found[full] = [[log["loss"] for log in logs], *learnt.values()]
    assert found[True][0] == found[False][0]
    assert any(found[True][0])
    assert all(map(torch.equal, found[True][1:], found[False][1:]))


def test_training_goes_without_where_the_room_is_gone(
    tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    make_up_card(monkeypatch, 20, lambda: 8)
    model, notes = tuned(r=2), Notes()
    last = DenseWeights(model).layers[-1]

    def full() -> torch.Tensor:
        if DenseWeights(model).layers[0].held_weight is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return type(last).dequantize(last)

    monkeypatch.setitem(vars(last), "dequantize", full)
    trained(model, tokenizer, random_data.select(range(4)), tmp_path, notes, max_steps=1)
    assert held(model) == [None] * len(held(model))
    assert len(notes) == 1  # what was found


def test_no_pass_that_others_wait_in_is_begun_again(
    tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    """They would wait for its end for ever; that others are there is made up."""
    make_up_card(monkeypatch, 20, lambda: 8)
    monkeypatch.setattr(MemoryFit, "together", True)
    model, notes = tuned(r=2), Notes()
    weights = DenseWeights(model).layers
    out = RunsOut(model, 4, when=lambda: any(n.held_weight is not None for n in weights))
    with pytest.raises(TrainingError, match="the GPU has run out of memory"):
        trained(model, tokenizer, random_data.select(range(8)), tmp_path, notes, max_steps=3)
    assert out.seen == 4
    assert held(model) == [None] * len(weights)


def test_they_go_where_memory_runs_out(tokenizer, random_data, tmp_path, monkeypatch) -> None:
    """On a card that is made up, of 20 GiB, of which a step needs 9."""
    data, options = random_data.select(range(8)), {"memory": 15.0, "max_steps": 3}
    plain = tuned(r=2)
    expected = trained(plain, tokenizer, data, tmp_path / "a", **options)
    make_up_card(monkeypatch, 20, lambda: 8)
    model, notes = tuned(r=2), Notes()
    layers = DenseWeights(model).layers
    out = RunsOut(model, 4, when=lambda: any(n.held_weight is not None for n in layers))
    found = trained(model, tokenizer, data, tmp_path / "b", notes, **options)
    assert out.seen > 4
    assert notes[1].startswith(f"{STAY} ({size_words(DenseWeights(model).nbytes)} more;")
    assert notes[2].startswith("out of memory at step ")
    assert notes[2].endswith("from here on without dense weights")
    assert found.setting.recomputed_layers == 0
    assert all(n.held_weight is None for n in layers)
    assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-6)
    assert all(map(torch.equal, weights(model).values(), weights(plain).values()))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "min"},
        {"merge_aware": True},
        {"gradient_checkpointing": False},
        {"memory": 9.001},
    ],
    ids=str,
)
def test_they_are_not_kept(options, tokenizer, random_data, tmp_path, monkeypatch) -> None:
    make_up_card(monkeypatch, 20, lambda: 8)
    model, notes = tuned(r=2), Notes()
    trained(model, tokenizer, random_data.select(range(4)), tmp_path, notes, max_steps=1, **options)
    assert not [note for note in notes if note.startswith(STAY)]


def planned(folder: Path, cards: list[int], backend: str = "bnb-nf4", **train: Any) -> Any:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(LLAMA_8B))
    spec = Spec(
        model=str(folder / "model"),
        backend=backend,
        train={"per_device_train_batch_size": 4, **train},
        data={"path": str(demo.TRAIN_FILE), "max_length": 2048},
        evaluate={"unquantized": False},
        output=str(folder / "run"),
    )
    there = Machine(cuda=((9, 0),), memory=(cards[0] * GIB,))
    return plan(spec, machine=there, weights=False, cards=cards[1:] and cards)


def test_a_plan_counts_them_and_says_so(tmp_path) -> None:
    made = planned(tmp_path, [141])
    (card,) = made.memory.cards
    size = 2 * 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert card.keeps_dense
    assert card.setting.recomputed_layers == 0
    parts = made.to_dict()["memory"]["cards"][0]["parts_gib"]
    assert parts["dequantized"] == pytest.approx(size / GIB, rel=1e-9)
    told = size_words(size)
    assert f"dequantized weights kept ({told})" in made.memory.words()[0]
    assert card.needed == made.memory.work_on(card).peak(card.setting)
    least = planned(tmp_path, [141], memory="min")
    assert not least.memory.cards[0].keeps_dense
    assert "dequantized" not in least.memory.words()[0]


def test_they_never_cost_a_layer_its_inputs(tmp_path) -> None:
    """A card's setting is what it was without them, and there is as much room again."""
    cards = list(range(8, 142, 4))
    made = planned(tmp_path, cards).memory
    never = replace(made, may_keep_dense=False).with_cards([gib * GIB for gib in cards])
    without = [card.setting for card in never.cards]
    size = made.work.dequantized_bytes
    for card, setting in zip(made.cards, without, strict=True):
        assert card.setting == setting
        assert not card.keeps_dense or card.needed + size <= card.budget
    assert not made.cards[0].keeps_dense
    assert made.cards[-1].keeps_dense


def allocated() -> int:
    """What the GPU holds, but for the workspaces of cuBLAS, which stay in a process."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq", "gptq", "torchao-int4"])
def test_on_a_gpu_losses_are_the_same(
    backend, tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    """With CUDA graphs: what is recorded reads what stays."""
    # It logs errors, and pytest keeps those, with all that their frames hold: the first pass, too.
    monkeypatch.setattr(logging.getLogger("liger_kernel.backends.registry"), "disabled", True)
    found = {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr("quantadapt.memory.rules.stays_dense", lambda *_: False)
        model, notes = tuned(backend, dtype="bfloat16", r=4), Notes()
        before = allocated()
        run = trained(model, tokenizer, random_data, tmp_path / str(kept), notes, max_steps=8)
        assert len([note for note in notes if note.startswith(STAY)]) == kept, notes
        assert not [note for note in notes if "CUDA graphs" in note]
        assert allocated() <= before + 2**20  # given back
        found[kept] = [run.losses, *weights(model).values()]
    assert found[True][0] == found[False][0]
    assert all(map(torch.equal, found[True][1:], found[False][1:]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_base_that_is_loaded_again_meanwhile_changes_no_number(
    device, tokenizer, random_data, tmp_path, monkeypatch
) -> None:
    """On a GPU, passes that were recorded before go on reading where it is."""
    if device == "cpu":
        make_up_card(monkeypatch, 20, lambda: 8)
    found = {}
    for again in (False, True):
        model, notes = tuned(dtype="bfloat16" if device == "cuda" else "float32", r=4), Notes()
        spec = TrainSpec(max_steps=8, logging_steps=1, learning_rate=1e-2)
        base = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
        layers, there = DenseWeights(model).layers, []

        def load(_: Any, model=model, base=base, layers=layers, there=there, again=again) -> None:
            there.append([layer.held_weight.data_ptr() for layer in layers])
            if again:
                model.load_state_dict(base, strict=False)

        given = (model, tokenizer, random_data.select(range(8)), spec)
        run = train(*given, output=tmp_path / str(again), seed=0, on_log=load, on_note=notes)
        assert len(there) == 8
        assert there == 8 * there[:1]
        found[again] = [run.losses, *weights(model).values()]
    assert found[True][0] == found[False][0]
    assert all(map(torch.equal, found[True][1:], found[False][1:]))
