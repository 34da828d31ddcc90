"""Fitting a run to the card: the search, the split batches, and giving way when memory runs out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from parameters import slow_but
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from processes import in_processes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantadapt import demo
from quantadapt.errors import TrainingError
from quantadapt.memory import GIB, LONG_ROWS, Setting, Workload
from quantadapt.memory.shape import Shape
from quantadapt.objectives.sft import SFT
from quantadapt.registry import registry
from quantadapt.spec import TrainSpec
from quantadapt.training import memory_fit, train
from quantadapt.training.memory_fit import MemoryFit
from quantadapt.training.recomputing import CpuInputs, Recomputer, decoder_layers
from quantadapt.training.setting_search import Probe, choose, lowered

LAYERS, VOCABULARY, BATCH = 4, 64, 4


class Card:
    """A model on a card, in numbers: what each setting would need and how long it would take."""

    def __init__(self, layers: int = 32, oom_above: float = math.inf, dequantize: float = 0.1):
        self.layers, self.oom_above, self.dequantize = layers, oom_above, dequantize
        self.tried: list[Setting] = []
        self.dear = 0.05  # what moving inputs to CPU memory takes
        self.host_room = True  # for what attention returned

    def peak(self, setting: Setting) -> int:
        kept = self.layers - setting.recomputed_layers
        inputs = 0.0625 * setting.recomputed_layers * (not setting.offload)
        inputs *= 1 + setting.attention
        return int((6 + setting.micro_batch / 4 * (kept * 1.0 + inputs + 1.0)) * GIB)

    def seconds(self, setting: Setting) -> float:
        again = 0.2 if setting.attention else 1 / 3
        slower = 1 + setting.recomputed_layers / self.layers * again + self.dear * setting.offload
        return self.dequantize + setting.micro_batch / 4 * slower

    def measure(self, setting: Setting) -> Probe | None:
        self.tried.append(setting)
        peak = self.peak(setting)
        away = setting.offload and setting.attention
        if peak > self.oom_above * GIB or (away and not self.host_room):
            return None
        return Probe(setting, peak, peak - GIB, self.seconds(setting))

    def choose(self, gib: float, batches: list[int], keeps: bool = False) -> Setting | None:
        rooms = (int(gib * GIB), None, keeps)
        found = choose(self.measure, self.layers - 1, self.layers, batches, *rooms)
        return found.setting if found else None


def test_a_large_card_recomputes_nothing() -> None:
    card = Card()
    assert card.choose(80, [4, 2, 1]) == Setting(0, False, 4)
    assert len(card.tried) == 3  # all, a few, none


@pytest.mark.parametrize("gib", [10, 14, 20, 30, 39])
def test_the_fewest_layers_that_fit_are_recomputed(gib) -> None:
    card = Card()
    found = card.choose(gib, [4])
    assert card.peak(found) <= gib * GIB
    assert not found.offload
    fewer = Setting(found.recomputed_layers - 1, False, 4)
    assert card.peak(fewer) > gib * GIB
    assert len(card.tried) <= 6


def test_the_inputs_leave_the_card_where_nothing_else_fits() -> None:
    card = Card()
    # The last layer, too: what it keeps would be there beside the loss.
    assert card.choose(8.5, [4]) == Setting(32, True, 4)
    assert card.choose(6.5, [4]) is None


def test_of_long_rows_attention_is_kept_first() -> None:
    card = Card()
    assert card.choose(80, [4], keeps=True) == Setting(0, False, 4)
    found = card.choose(14, [4], keeps=True)
    assert found.attention
    fewer = Setting(found.recomputed_layers - 1, False, 4, attention=True)
    assert card.peak(found) <= 14 * GIB < card.peak(fewer)
    # With attention on the card it takes 11.9; in CPU memory that saves more than two layers do.
    assert card.choose(10, [4], keeps=True) == Setting(32, True, 4, attention=True)
    card.dear = 0.2
    assert card.choose(10, [4], keeps=True) == Setting(31, False, 4)
    card.dear = 0.05
    assert card.choose(8.5, [4], keeps=True) == Setting(32, True, 4, attention=True)
    assert card.tried[-1] == Setting(32, True, 4, attention=True)  # nothing slower after it
    card.host_room = False
    assert card.choose(8.5, [4], keeps=True) == Setting(32, True, 4)
    assert lowered(Setting(31, False, 4, True), 31, 32, True) == Setting(31, False, 4)


def test_what_needs_the_least_may_have_more_of_the_card() -> None:
    """It is that or nothing, and its memory is a few large blocks."""
    card, budget, least = Card(), int(6.9 * GIB), int(7.1 * GIB)
    assert card.choose(6.9, [4]) is None
    found = choose(card.measure, 31, 32, [4], budget, least)
    assert found.setting == Setting(32, True, 4)
    assert budget < found.peak <= least
    assert choose(card.measure, 31, 32, [4], int(8.5 * GIB), int(80 * GIB)).setting.offload


def test_a_smaller_micro_batch_wins_where_dequantizing_is_cheap() -> None:
    assert Card(dequantize=0.0).choose(24, [4, 2, 1]) == Setting(0, False, 2)
    assert Card(dequantize=0.5).choose(24, [4, 2, 1]).micro_batch == 4


def test_a_setting_that_runs_out_of_memory_is_not_chosen() -> None:
    card = Card(oom_above=12)
    found = card.choose(80, [4])
    assert card.peak(found) <= 12 * GIB
    assert Card(oom_above=8.5).choose(80, [4]) == Setting(32, True, 4)


def test_a_model_that_cannot_recompute() -> None:
    card = Card(layers=1)
    assert card.choose(9, [4]) == Setting(0, False, 4)
    assert card.choose(7.6, [4, 2]) == Setting(0, False, 2)
    assert card.choose(6.1, [4, 2]) is None


def test_lowering_goes_through_every_stage() -> None:
    setting, seen = Setting(0, False, 4), []
    while setting := lowered(setting, 31, 32, True):
        seen.append((setting.recomputed_layers, setting.offload, setting.micro_batch))
    layers = [(n, False, 4) for n in (8, 16, 24, 31)]
    assert seen == [*layers, (32, True, 4), (32, True, 2), (32, True, 1)]
    assert lowered(Setting(32, True, 4), 31, 32, splits=False) is None
    assert lowered(Setting(0, False, 1), 0, 1, splits=True) is None
    # What attention returned goes once all layers are recomputed that may be.
    kept = [Setting(8, False, 4, True), Setting(16, False, 4, True), Setting(24, False, 4, True)]
    kept += [Setting(31, False, 4, True), Setting(31, False, 4), Setting(32, True, 4)]
    for higher, lower in pairwise(kept):
        assert lowered(higher, 31, 32, splits=True) == lower
    assert lowered(Setting(32, True, 4, True), 31, 32, splits=True) == Setting(32, True, 4)


# --- in training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(random_data) -> Dataset:
    return random_data.select(range(16))


def adapted(config: type = LoraConfig, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(base, config(task_type="CAUSAL_LM", target_modules=targets, **options))


class Notes(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def trained(model, tokenizer, data, folder, notes: Notes | None = None, **options):
    defaults = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": BATCH,
                "learning_rate": 1e-2}  # fmt: skip
    spec = TrainSpec(**{**defaults, **options})
    return train(model, tokenizer, data, spec, output=folder, seed=0, on_note=notes)


class RunsOut:
    """Raises out-of-memory errors in the last layer, in the calls that are named."""

    def __init__(self, model, *calls: int, when: Callable[[], bool] = lambda: True) -> None:
        self.calls, self.seen = calls, 0
        module = decoder_layers(model)[-1].mlp
        self.handle = module.register_forward_hook(self)
        self.when = when

    def __call__(self, *_) -> None:
        self.seen += 1
        if self.seen in self.calls and self.when():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}])
def test_running_out_of_memory_changes_no_number(options, tokenizer, data, tmp_path) -> None:
    """With dropout: the step that is repeated draws the same numbers again."""
    plain = adapted(lora_dropout=0.1)
    expected = trained(plain, tokenizer, data, tmp_path / "a", **options)
    model, notes = adapted(lora_dropout=0.1), Notes()
    RunsOut(model, 2, 5)
    found = trained(model, tokenizer, data, tmp_path / "b", notes, **options)
    assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-6)
    assert found.tokens == expected.tokens
    for name, weight in weights(plain).items():
        assert torch.allclose(weights(model)[name], weight, rtol=1e-5, atol=1e-7), name
    assert found.setting == Setting(2, False, BATCH)
    assert [note.partition(":")[0].rpartition(" ")[0] for note in notes] == [
        "out of memory at step"
    ] * 2
    assert "from here on 1 of 4 layers recomputed" in notes[0]


def test_what_is_told_is_what_comes(tokenizer, data, tmp_path, monkeypatch) -> None:
    """Not the setting that was asked for, where CPU memory has no room for it."""
    monkeypatch.setattr(memory_fit, "host_memory", lambda: 1000)
    model, notes = adapted(), Notes()
    RunsOut(model, 1, 2, 3, 4)
    found = trained(model, tokenizer, data, tmp_path, notes, max_steps=1)
    assert found.setting == Setting(LAYERS, True, BATCH, input_every=2)
    words = "4 of 4 layers recomputed, the input of every second one in CPU memory"
    assert notes[-1] == f"out of memory at step 1: from here on {words}"


def test_buffers_are_used_again_for_what_is_as_large() -> None:
    """Small ones for small tensors, in whatever order they were given back."""
    inputs, sizes = CpuInputs(), [64, 1, 64, 1]
    buffers = [inputs.take(torch.empty(size)) for size in sizes]
    for buffer in buffers:
        inputs.give(buffer)
    taken = [inputs.take(torch.empty(size)) for size in reversed(sizes)]
    assert [buffer.nbytes for buffer in taken] == [4 * size for size in reversed(sizes)]
    assert {b.data_ptr() for b in taken} == {b.data_ptr() for b in buffers}


def test_memory_that_never_suffices_is_told(tokenizer, data, tmp_path) -> None:
    model, notes = adapted(), Notes()
    RunsOut(model, *range(100))
    with pytest.raises(TrainingError, match=r"out of memory, with 4 of 4 layers .* of 1") as error:
        trained(model, tokenizer, data, tmp_path, notes)
    assert "paged_adamw_8bit" in error.value.problems[0].fix
    assert len(notes) == 6  # 1, 2, 3 layers, CPU memory, micro-batches of 2 and of 1
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_a_gradient_that_was_accumulated_survives(tokenizer, data, tmp_path) -> None:
    """Memory runs out in backward, when some gradients have been added already."""

    class Backward:
        calls = 0

        def __call__(self, *_) -> None:
            self.calls += 1
            if self.calls in (2, 3):  # the second part of an accumulated step, and again
                raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    plain, model = adapted(), adapted()
    expected = trained(plain, tokenizer, data, tmp_path / "a", **options)
    decoder_layers(model)[1].mlp.register_full_backward_hook(Backward())
    found = trained(model, tokenizer, data, tmp_path / "b", **options)
    assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-6)
    for name, weight in weights(plain).items():
        assert torch.allclose(weights(model)[name], weight, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("size", slow_but([1, 2, 3], 2))
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_split_batches_change_no_number(
    size, options, tokenizer, data, tmp_path, monkeypatch
) -> None:
    # AdamW makes much of tiny gradients, and so of rounding.
    options = options | {"optim": "sgd", "learning_rate": 0.5}
    plain, model = adapted(), adapted()
    expected = trained(plain, tokenizer, data, tmp_path / "a", **options)
    rows = []
    decoder_layers(model)[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, size))
    found = trained(model, tokenizer, data, tmp_path / "b", **options)
    assert set(rows) == {n for n in (size, BATCH % size) if n}
    assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-5)
    for name, weight in weights(plain).items():
        assert torch.allclose(weights(model)[name], weight, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", ["adalora", "packing"])
def test_what_does_not_add_up_is_not_split(kind, tokenizer, data, tmp_path, monkeypatch) -> None:
    """AdaLoRA adds a term to each loss; packed rows are one row."""
    config = {"init_r": 4, "target_r": 2, "total_step": 9} if kind == "adalora" else {}
    model = adapted(AdaLoraConfig if kind == "adalora" else LoraConfig, **config)
    rows = []
    decoder_layers(model)[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, 1))
    trained(model, tokenizer, data, tmp_path, packing=kind == "packing")
    assert set(rows) == ({BATCH} if kind == "adalora" else {1})


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({}, Setting(0, False, BATCH)),
        ({"memory": 3}, Setting(0, False, BATCH)),
        ({"memory": "min"}, Setting(LAYERS, False, BATCH)),
        ({"gradient_checkpointing": True}, Setting(LAYERS, False, BATCH)),
        ({"gradient_checkpointing": False}, Setting(0, False, BATCH)),
    ],
)
def test_what_the_spec_says_on_a_cpu(options, setting, tokenizer, data, tmp_path) -> None:
    found = trained(adapted(), tokenizer, data, tmp_path, max_steps=1, **options)
    assert (found.setting, found.layers) == (setting, LAYERS)


def make_up_card(monkeypatch, free: float, allocated: Callable[[], float]) -> None:
    """Let the probe run on the CPU and measure what `allocated` says, in GiB."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: int(allocated() * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: int(allocated() * GIB) + GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: 1.0)
    monkeypatch.setattr(MemoryFit, "_probes", True)


def test_the_probe(tokenizer, data, tmp_path, monkeypatch) -> None:
    """On a card that is made up: it needs a GiB per layer and example that are kept."""
    expected = trained(adapted(), tokenizer, data, tmp_path / "a")
    model, notes = adapted(), Notes()
    layers = decoder_layers(model)
    seen: list[tuple[int, int]] = []
    layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    kept = lambda: sum(not layer.gradient_checkpointing for layer in layers)  # noqa: E731
    make_up_card(monkeypatch, 20, lambda: 1 + kept() * seen[-1][0])
    found = trained(model, tokenizer, data, tmp_path / "b", notes, memory=11)
    # Of 11 GiB, one is taken and one comes in backward: two layers keep what four examples need.
    assert found.setting in (Setting(2, False, 4), Setting(0, False, 2))
    assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-4)
    longest = max(map(len, data["input_ids"]))
    assert seen[0] == (4, longest)
    assert len(notes) == 1
    assert notes[0].startswith("memory: ")
    assert "of 11.0 GiB (found in " in notes[0]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_probe_finds_the_gradients_that_a_step_finds(
    accumulated, tokenizer, data, tmp_path, monkeypatch
) -> None:
    """None, where a whole batch is one pass; else those of the passes before."""
    model, probed = adapted(), MemoryFit._probed
    layers, weight = decoder_layers(model), next(p for p in model.parameters() if p.requires_grad)
    seen: dict[int, set[bool]] = {}
    hook = layers[0].register_forward_pre_hook(
        lambda _, args: seen.setdefault(len(args[0]), set()).add(weight.grad is not None)
    )

    def watched(fit: MemoryFit) -> Setting:
        try:
            return probed(fit)
        finally:
            hook.remove()
            assert weight.grad is None

    monkeypatch.setattr(MemoryFit, "_probed", watched)
    kept = lambda: sum(not layer.gradient_checkpointing for layer in layers)  # noqa: E731
    make_up_card(monkeypatch, 20, lambda: 1 + kept() * 2)
    options = {"gradient_accumulation_steps": accumulated, "max_steps": 1}
    trained(model, tokenizer, data, tmp_path, memory=6, **options)
    assert seen == {BATCH: {accumulated > 1}, BATCH // 2: {True}, BATCH // 4: {True}}


def fitting_of(model, accepts: bool = True, **options) -> MemoryFit:
    """A memory_fit whose trainer is all that it asks before a run."""
    trainer = SimpleNamespace(
        model=model,
        model_accepts_loss_kwargs=accepts,
        optimizer=SimpleNamespace(state={}),
        task=SFT(),
    )
    return MemoryFit(trainer, Recomputer(model), TrainSpec(**options))


def test_the_budget_is_what_is_free_less_what_is_still_to_come(monkeypatch) -> None:
    make_up_card(monkeypatch, 20, lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2 * GIB)  # ours already
    model = adapted()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adamw, accumulated = (fitting_of(model, gradient_accumulation_steps=n) for n in (1, 2))
    free = int(22 * GIB * 0.95)
    assert adamw.budget() == free - 8 * count
    assert accumulated.budget() == free - (8 + 4) * count
    assert fitting_of(model, optim="paged_adamw_8bit").budget() == free
    assert adamw.budget(LONG_ROWS) == int(22 * GIB * 0.98) - 8 * count
    assert fitting_of(model, memory=3).budget() == 3 * GIB - 8 * count
    assert fitting_of(model, memory=3).budget(LONG_ROWS) == 3 * GIB - 8 * count
    adamw.trainer.optimizer.state = {"there": "already"}
    assert adamw.budget() == free
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: 0.2)
    assert adamw.budget() == int(16 * GIB * 0.95)


@pytest.mark.parametrize(
    ("accepts", "router", "packing", "splits"),
    [
        (True, False, False, True),
        (False, False, False, False),  # its loss is a mean over the batch
        (True, True, False, False),  # experts are balanced over the batch
        (True, False, True, False),
    ],
)
def test_what_adds_up_is_split(accepts, router, packing, splits) -> None:
    model = adapted()
    model.config.output_router_logits = router
    assert fitting_of(model, accepts, packing=packing).splits == splits


def test_a_card_that_is_too_small_is_told(tokenizer, data, tmp_path, monkeypatch) -> None:
    make_up_card(monkeypatch, 2, lambda: 3)
    with pytest.raises(TrainingError, match=r"no setting fits 1\.96 GiB"):
        trained(adapted(), tokenizer, data, tmp_path)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_of_qlora(optim, tokenizer, data, tmp_path) -> None:
    """Tensors as small as these keep states of 32 bits, so the losses are AdamW's."""
    expected = trained(adapted(), tokenizer, data, tmp_path / "a")
    found = trained(adapted(), tokenizer, data, tmp_path / "b", optim=optim)
    assert dict(found.losses) == pytest.approx(dict(expected.losses), abs=1e-3)


def test_lengths_are_those_of_the_examples(data) -> None:
    expected = list(map(len, data["input_ids"]))
    assert SFT().lengths(data) == expected
    assert SFT().lengths(data.select([3, 1])) == [expected[3], expected[1]]


# --- on a GPU ------------------------------------------------------------------------------------


def big(layers: int = 8, length: int = 512):
    """A model whose activations outweigh it, so that memory shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8)
    ids = torch.randint(3, VOCABULARY, (16, length)).tolist()
    rows = {"input_ids": ids, "completion_mask": [[1] * length for _ in ids]}
    return get_peft_model(base, lora), Dataset.from_dict(rows)


@pytest.mark.cuda
def test_cpu_memory_holds_the_inputs_on_cuda() -> None:
    from quantadapt.training.lent import recomputed

    model, rows = big(layers=16, length=1024)
    ids = torch.tensor(rows["input_ids"][:8], device="cuda")
    model.train()

    def measured(offload: bool) -> tuple[int, dict[str, torch.Tensor]]:
        with recomputed(model, Setting(15, offload, 8)):
            for _ in range(2):
                model.zero_grad()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                held = torch.cuda.memory_allocated()
                loss.backward()
        torch.cuda.synchronize()
        return held, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain, expected = measured(False)
    held, found = measured(True)
    inputs = 15 * 8 * 1024 * 512 * 2
    assert plain - held > 0.9 * inputs - 8 * 1024 * 512 * 2  # the last copy may be under way
    for name, gradient in found.items():
        off = (gradient - expected[name]).norm()
        assert off <= 0.01 * expected[name].norm(), name


@pytest.mark.cuda
def test_the_probe_uses_the_card_that_it_has(tokenizer, tmp_path) -> None:
    model, data = big()
    notes = Notes()
    large = trained(model, tokenizer, data, tmp_path / "a", notes, max_steps=2)
    assert large.setting == Setting(0, False, BATCH)
    assert "no layer recomputed" in notes[0]
    small = large.peak_memory_gib * 0.6
    model, data = big()
    found = trained(model, tokenizer, data, tmp_path / "b", notes, max_steps=2, memory=small)
    assert found.setting != large.setting
    assert found.peak_memory_gib <= small
    assert dict(found.losses) == pytest.approx(dict(large.losses), rel=0.02)


def trained_twice(folder: Path) -> tuple[list[str], int, list[Any], list[Any]]:
    """Without a cap on memory, and with one that the first step meets: what was noted, how many
    layers are recomputed at the end, and the losses of both."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    model, data = big()
    free = trained(model, tokenizer, data, folder / "a", gradient_checkpointing=False)
    model, data = big()
    notes = Notes()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.75 * free.peak_memory_gib * GIB / total)
    found = trained(model, tokenizer, data, folder / "b", notes, gradient_checkpointing=False)
    return list(notes), found.setting.recomputed_layers, found.losses, free.losses


@pytest.mark.cuda
def test_a_real_cap_on_memory_is_survived(tmp_path) -> None:
    """In a process of its own: what other tests leave, or free meanwhile, would count."""
    ((notes, layers, found, expected),) = in_processes(1, trained_twice, tmp_path, tmp_path)
    assert notes
    assert notes[0].startswith("out of memory at step 1: from here on ")
    assert layers > 0
    assert dict(found) == pytest.approx(dict(expected), rel=0.02)


@pytest.mark.cuda
def test_pinned_buffers_are_used_again() -> None:
    inputs = CpuInputs()
    tensor = torch.randn(1024, 64, device="cuda", requires_grad=True)
    addresses = set()
    for _ in range(3):
        with inputs.saving(tensor):
            out = tensor.sin()
        out.sum().backward()
        del out
        (buffer,) = inputs._free
        assert buffer.is_pinned()
        addresses.add(buffer.data_ptr())
    assert len(addresses) == 1
    assert torch.equal(tensor.grad, 3 * tensor.detach().cos())


@pytest.mark.cuda
@pytest.mark.parametrize(
    "setting",
    [*(Setting(count, False, BATCH) for count in (0, 4, 7, 8)), Setting(8, True, BATCH)],
)
@pytest.mark.parametrize("family", ["llama", "phi3", "glm4"])
def test_the_peak_is_as_predicted(family, setting, tokenizer, tmp_path, monkeypatch) -> None:
    """A model that is small but no toy: its activations outweigh what is not counted."""
    import quantadapt as qa

    sizes = {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
    }  # fmt: skip
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of other tests, which would be used again
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() / GIB  # other tests'
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, head_dim=64, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    tuned = qa.attach(qa.quantize(model, "bnb-nf4", device="cuda", dtype="bfloat16"), "lora", r=16)
    del model
    ids = torch.randint(3, 32000, (16, 1024)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": [[1] * 1024] * 16})
    monkeypatch.setattr(MemoryFit, "_given", lambda self: setting)
    monkeypatch.setattr(MemoryFit, "_probes", False)
    gc.collect()
    torch.cuda.empty_cache()
    found = trained(tuned, tokenizer, data, tmp_path, max_steps=3)
    shape = Shape.of(config.to_dict())
    quantizer = registry().backend("bnb-nf4").quantizer()
    bits = {
        name: quantizer.bits_per_weight(*size, device="cuda", dtype="bfloat16")
        for name, size in shape.linears.items()
    }
    fused = find_spec("liger_kernel") is not None
    work = Workload(
        *(shape, bits, tuple(bits), 16, "adamw_torch", 2, BATCH, 1024),
        fused_kernels=fused,
        graphs=True,
    )
    assert found.peak_memory_gib - before == pytest.approx(work.peak(setting) / GIB, rel=0.1)


@pytest.mark.parametrize(("share", "every"), [(0, 1), (1.12, 1), (1.1, 2)])
def test_every_second_input_is_kept_where_cpu_memory_is_short(share, every) -> None:
    fit = fitting_of(adapted(), memory="min", per_device_train_batch_size=2)
    fit.lengths = [60, 100, 80]
    needed = 4 * 2 * 100 * fit.recomputer.base.config.hidden_size * 4
    fit.host_room = int(share * needed)
    assert 4 * fit.input_bytes(Setting(4, True, 2)) == needed
    assert fit.hosted(Setting(4, True, 2)) == Setting(4, True, 2, input_every=every)
    assert fit.hosted(Setting(4, False, 2)) == Setting(4, False, 2)
    assert fit.hosted(Setting(4, True, 2, attention=True)).input_every == 1
