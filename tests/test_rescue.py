"""Where a step fails for good, what was learnt before is saved and goes on to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from test_memory_fit import Notes, adapted, big, trained, weights
from transformers import AutoTokenizer
from typer.testing import CliRunner

import quantadapt as qa
from quantadapt import demo
from quantadapt.cli.app import build_app
from quantadapt.errors import DataError, ModelError, OutputError, TrainingError
from quantadapt.testing.small_demo import small_model
from quantadapt.training.loop import TrainingLoop
from quantadapt.training.memory_fit import MemoryFit


@pytest.fixture(scope="module")
def data(random_data: Any) -> Any:
    return random_data.select(range(16))


def fails_from(step: int, error: Exception, at: int = 1) -> Any:
    """A patch: passes of a step fail, all or from its pass number `at` on, and ever after."""
    done = MemoryFit._in_parts
    seen: list[int] = []

    def passes(self: Any, *args: Any) -> Any:
        now = self.trainer.state.global_step + 1
        seen.append(now)
        loss = done(self, *args)
        if now > step or (now == step and seen.count(now) >= at):
            raise error
        return loss

    return patch.object(MemoryFit, "_in_parts", passes)


LEFT = 2**26
"""Bytes of a card that are left to be taken."""
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("options", "at", "error"),
    [
        ({}, 1, FULL),
        ({"gradient_accumulation_steps": 2, "logging_steps": 2}, 2, FULL),
        ({}, 1, ModelError("the disk fails", fix="look at it")),
        ({}, 1, DataError("a picture is gone", fix="put it back")),
    ],
)
def test_what_was_learnt_is_saved_and_goes_on_to_the_same_numbers(
    options: Any, at: int, error: Exception, tokenizer: Any, data: Any, tmp_path: Path
) -> None:
    whole, notes = adapted(lora_dropout=0.1), Notes()
    expected = trained(whole, tokenizer, data, tmp_path / "whole", **options)
    broken = adapted(lora_dropout=0.1)
    told = TrainingError if error is FULL else type(error)
    with fails_from(3, error, at), pytest.raises(told):
        trained(broken, tokenizer, data, tmp_path / "broken", notes, **options)
    assert notes[-1] == "checkpoint-2 is saved, go on with --resume"
    again = adapted(lora_dropout=0.1)
    found = trained(again, tokenizer, data, tmp_path / "broken", resume=True, **options)
    assert found.resumed_from == 2
    assert found.losses == expected.losses
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name


def test_nothing_is_saved_before_the_first_step(tokenizer: Any, data: Any, tmp_path: Path) -> None:
    notes = Notes()
    with fails_from(1, FULL), pytest.raises(TrainingError):
        trained(adapted(), tokenizer, data, tmp_path, notes)
    assert not any("saved" in note for note in notes)
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_has_begun_to_change_the_weights_is_not_saved(
    tokenizer: Any, data: Any, tmp_path: Path
) -> None:
    notes, steps = Notes(), [0]

    def step(*_: Any, **__: Any) -> None:
        steps[0] += 1
        if steps[0] == 3:
            raise FULL

    with patch.object(torch.optim.AdamW, "step", step), pytest.raises(TrainingError):
        trained(adapted(), tokenizer, data, tmp_path, notes)
    assert steps[0] == 3
    assert not any("saved" in note for note in notes)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_is_there_is_not_written_again(
    tokenizer: Any, data: Any, tmp_path: Path
) -> None:
    notes, saves = Notes(), []
    save = TrainingLoop._save_checkpoint

    def counted(self: Any, *args: Any) -> None:
        saves.append(self.state.global_step)
        save(self, *args)

    counts = patch.object(TrainingLoop, "_save_checkpoint", counted)
    with counts, fails_from(3, FULL), pytest.raises(TrainingError):
        trained(adapted(), tokenizer, data, tmp_path, notes, save_steps=2)
    assert saves == [2]
    assert notes[-1] == "checkpoint-2 is saved, go on with --resume"


def test_a_disk_that_is_full_as_well_hides_no_error(
    tokenizer: Any, data: Any, tmp_path: Path
) -> None:
    notes = Notes()
    full = OutputError("there is no space left", fix="make room", where="checkpoints")
    save = patch.object(TrainingLoop, "_save_checkpoint", side_effect=full)
    with save, fails_from(3, FULL), pytest.raises(TrainingError, match="out of memory"):
        trained(adapted(), tokenizer, data, tmp_path, notes)
    assert "what was learnt in 2 steps could not be saved: " in notes[-1]
    assert "no space left" in notes[-1]


def test_a_model_in_memory_keeps_what_it_learnt(tmp_path: Path) -> None:
    """Where nothing outlives the call, nothing is said to be saved."""
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    notes = Notes()
    with fails_from(3, FULL), pytest.raises(TrainingError):
        qa.train(model, max_steps=4, per_device_train_batch_size=2, on_note=notes)
    assert not any("saved" in note for note in notes)
    assert any(
        weight.abs().max() > 0 for name, weight in weights(model).items() if "lora_B" in name
    )


def test_the_command_ends_with_a_sentence_and_can_be_resumed(tmp_path: Path) -> None:
    rows = ({"text": f"Line {i} of a text that says little. "} for i in range(12))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "model": str(small_model()),
        "backend": "hqq",
        "adapter": {"name": "lora", "r": 2},
        "data": {"path": str(tmp_path / "data.jsonl"), "max_length": 16},
        "train": {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
        "evaluate": {"samples": 0, "evaluations": [], "unquantized": False},
        "export": {"merge": "never"},
        "device": "cpu",
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(spec), encoding="utf-8")
    command = ["run", str(tmp_path / "c.yaml")]
    with fails_from(3, FULL):
        done = CliRunner().invoke(build_app(["run"]), command)
    assert done.exit_code == 1
    assert "checkpoint-2 is saved, go on with --resume" in done.output
    assert "the GPU has run out of memory" in done.output
    done = CliRunner().invoke(build_app(["run"]), [*command, "--resume"])
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["resumed_from"] == 2
    assert metrics["train"]["steps"] == 4


def fill() -> list[Any]:
    """Return tensors that leave nothing for this process to allocate, neither of the card nor of
    what its allocator holds already: large ones first, then as small as blocks are."""
    torch.cuda.empty_cache()
    total, held = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved()
    # A card may be large, and others may work on it: no more than this is taken.
    torch.cuda.set_per_process_memory_fraction((held + LEFT + 2**20) / total)
    taken: list[Any] = []
    size = LEFT
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


def filled(folder: Path) -> tuple[list[str], str, int, int]:
    """Train on a card that is full from the third step on, and go on when it is free again: what
    was noted, the error, the step that was gone on from, and the steps in all."""
    tokenizer, notes, taken = AutoTokenizer.from_pretrained(demo.MODEL_DIR), Notes(), []
    # No graphs, whose recording would be what fails first.
    options = {"max_steps": 4, "gradient_checkpointing": False, "cuda_graphs": False}
    model, data = big(layers=2)
    done = MemoryFit.step

    def step(self: Any, *args: Any) -> Any:
        if self.trainer.state.global_step == 2 and not taken:
            taken.extend(fill())
        return done(self, *args)

    with (
        patch.object(MemoryFit, "step", step),
        pytest.raises(TrainingError, match="run out of memory") as error,
    ):
        trained(model, tokenizer, data, folder, notes, **options)
    taken.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    model, data = big(layers=2)
    found = trained(model, tokenizer, data, folder, resume=True, **options)
    return list(notes), str(error.value), found.resumed_from, found.steps


@pytest.mark.cuda
def test_a_card_that_somebody_else_fills(tmp_path: Path) -> None:
    """From the third step on nothing of it is free. In a process of its own: what other tests have
    left free would be there to take."""
    ((notes, error, resumed_from, steps),) = in_processes(1, filled, tmp_path, tmp_path / "run")
    assert "layers recomputed, their inputs in CPU memory, micro-batches of 1" in error
    assert notes[-1] == "checkpoint-2 is saved, go on with --resume"
    assert (resumed_from, steps) == (2, 4)
