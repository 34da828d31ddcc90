"""A base that is streamed from a file computes what one in CPU memory does; a disk that is full or
fails is told of, and nothing is lost."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_streaming import (
    FEW,
    LAYERS,
    base,
    gradients,
    held,
    llama,
    lora,
    on_card,
    passes,
    same,
    streamed,
    trained,
)
from test_streaming_plan import LLAMA_8B, card, notes, planned, refused

import quantadapt as qa
from quantadapt.errors import ModelError
from quantadapt.facade import facades
from quantadapt.memory.cards import GIB
from quantadapt.planning import streaming as planning_streaming
from quantadapt.streaming import bring_back, stream, streamer_of

assert planned  # a fixture


# What it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FEW)
def test_it_computes_the_same_bit_for_bit(backend: str, tmp_path: Path) -> None:
    model = base(backend)
    whole, before, weights = passes(model), held(model), [f.dequantize() for _, f in facades(model)]
    stream(model, folder=tmp_path)
    assert len(streamed(model).blocks) == LAYERS
    assert os.listdir(tmp_path) == []  # the file has no name: nobody has to take it away
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))
    read = [facade.dequantize() for _, facade in facades(model)]
    assert all(torch.equal(a, b) for a, b in zip(weights, read, strict=True))
    assert same(held(model), before)
    bring_back(model)
    assert streamer_of(model) is None
    assert same(held(model), before)


def test_training_learns_the_same_bit_for_bit(
    tokenizer: Any, random_data: Any, tmp_path: Path
) -> None:
    found = []
    for folder in (None, tmp_path):
        model = lora(base())
        stream(model, folder=folder)
        result = trained(model, random_data, tokenizer)
        found.append((result.losses, gradients(model)))
        assert result.streamed.gib > 0
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_the_next_block_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    model = base()
    stream(model, folder=tmp_path)
    passes(model)
    streamer = streamed(model)
    begun: list[Any] = []
    copy = streamer._rows.copy
    order = {block.row.data_ptr(): i for i, block in enumerate(streamer.blocks)}

    def seen(row: Any, *args: Any) -> Any:
        begun.append((order[row.data_ptr()], streamer.blocks.index(streamer._current)))
        return copy(row, *args)

    with patch.object(streamer._rows, "copy", seen):
        passes(model)
    ahead = [block for block, current in begun if current != block]
    assert len(ahead) >= 2 * (LAYERS - 2)


def test_the_space_comes_back_with_the_layers(tmp_path: Path) -> None:
    model = base()
    stream(model, folder=tmp_path)
    number = streamed(model)._rows._file.fileno()
    assert os.fstat(number).st_size >= streamed(model).nbytes
    bring_back(model)
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch\n"
        "from quantadapt.model.flat import laid_out\n"
        "from quantadapt.streaming import OnDisk\n"
        "leaves = laid_out([torch.nn.Linear(64, 64)])\n"
        "row = OnDisk(__import__('pathlib').Path(sys.argv[1])).keep(*leaves)\n"
        "os.kill(os.getpid(), signal.SIGKILL if row.any() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == []


# A disk that is full, or fails -----------------------------------------------------------------


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let the system refuse what goes beyond, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_full_disk_is_told_of_and_the_model_is_as_it_was(share: float, tmp_path: Path) -> None:
    model = base()
    before, whole = held(model), passes(model)
    size = sum(tensor.nbytes for tensor in before.values())
    with files_of_at_most(int(size * share)), pytest.raises(ModelError) as caught:
        stream(model, folder=tmp_path)
    text = str(caught.value)
    assert f"the streamed base cannot be kept in {tmp_path}" in text
    assert "File too large" in text
    assert "name a folder on another disk" in text
    assert streamer_of(model) is None
    assert same(held(model), before)
    assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))


def test_no_file_can_be_made(tmp_path: Path) -> None:
    model = base()
    with pytest.raises(ModelError, match=r"cannot be kept in .*: No such file or directory"):
        stream(model, folder=tmp_path / "nowhere")
    assert streamer_of(model) is None


def test_a_disk_that_fails_ends_the_pass_and_what_was_there_is_right_afterwards(
    tmp_path: Path,
) -> None:
    model = base()
    whole = passes(model)
    stream(model, folder=tmp_path)
    passes(model)
    rows = streamed(model)._rows
    file = rows._file

    class Failing:
        def readinto(self, _: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    for _ in range(2):  # what did not come is not taken for being there
        with patch.object(rows, "_file", Failing()), pytest.raises(ModelError) as caught:
            passes(model)
        assert "cannot be read in" in str(caught.value)
        assert "Input/output error" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))


def test_a_file_that_became_shorter_is_no_weight(tmp_path: Path) -> None:
    model = base()
    stream(model, folder=tmp_path)
    rows = streamed(model)._rows
    slot = torch.empty(streamed(model).blocks[0].nbytes, dtype=torch.uint8)
    with pytest.raises(ModelError, match="has become shorter"):
        rows._fill(slot, rows._end)


# What a plan says of it ------------------------------------------------------------------------


def test_a_plan_names_the_way_out_where_cpu_memory_does_not_suffice(
    planned: Any, tmp_path: Path
) -> None:
    machine = card(5, host=4)
    assert "train.stream_folder" in refused(planned, LLAMA_8B, machine, train={"stream": "all"})
    for way in ("all", "auto"):
        made = planned(LLAMA_8B, machine, train={"stream": way, "stream_folder": str(tmp_path)})
        assert made.stream == "all"
        assert "the base streamed from 3.35 GiB on disk" in notes(made)[0]
        work = made.memory.work
        assert work.streamed_bytes > 3 * GIB
        assert work.host_bytes == pytest.approx(work.streamed_bytes / 32, rel=0.01)


def test_a_disk_that_cannot_hold_it_is_refused_before_any_work(
    planned: Any, tmp_path: Path
) -> None:
    asked = {"train": {"stream": "all", "stream_folder": str(tmp_path)}}
    free = os.statvfs(tmp_path)
    usage = type("usage", (), {"free": 2 * GIB, "total": free.f_blocks, "used": 0})
    with patch.object(planning_streaming.shutil, "disk_usage", lambda _: usage):
        text = refused(planned, LLAMA_8B, card(5), **asked)
        assert "a streamed base takes 3.35 GiB, 2.00 GiB are free in" in text
        assert "[rule stream-needs-disk]" in text
        two = {"train": {**asked["train"], "parallel": "ddp"}}
        assert "takes 6.71 GiB" in refused(planned, LLAMA_8B, card(80, count=2), 2, **two)
        asked["train"]["stream"] = "none"
        told = planned(LLAMA_8B, card(80), **asked).notes
    assert [note for note in told if "train.stream_folder has no effect here" in note]


def test_a_folder_that_is_not_there_is_refused(planned: Any, tmp_path: Path) -> None:
    asked = {"train": {"stream": "all", "stream_folder": str(tmp_path / "no")}}
    assert f"there is no folder {tmp_path / 'no'}" in refused(planned, LLAMA_8B, card(5), **asked)


def test_quantize_plans_with_it(tmp_path: Path, capsys: Any) -> None:
    model = qa.quantize(llama(), "hqq", stream_folder=str(tmp_path), device="cpu", verbose=True)
    assert streamer_of(model) is None  # without a GPU
    assert "train.stream_folder has no effect here" in capsys.readouterr().err


def test_training_tells_that_a_folder_alone_has_no_effect(
    tokenizer: Any, random_data: Any, tmp_path: Path
) -> None:
    model = qa.attach(qa.quantize(llama(), "hqq", device="cpu"), "lora", r=2)
    told: list[str] = []
    options = {"max_steps": 1, "stream_folder": str(tmp_path)}
    qa.train(model, random_data, tokenizer=tokenizer, on_note=told.append, **options)
    assert len([note for note in told if "train.stream_folder has no effect here" in note]) == 1


# On a card -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq"])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"memory": "min"}])
def test_on_a_card_training_gives_the_same_losses(
    backend: str, options: Any, tokenizer: Any, random_data: Any, tmp_path: Path
) -> None:
    model = on_card(backend)
    before, losses = held(model), []
    for folder in (None, str(tmp_path)):
        torch.manual_seed(0)
        model = on_card(backend)
        found = trained(
            model, random_data, tokenizer, stream="all", stream_folder=folder, **options
        )
        losses.append(found.losses)
        assert found.streamed.gib > 0
        assert streamer_of(model) is None
        assert same(held(model), before)
    assert losses[0] == losses[1]


@pytest.mark.cuda
def test_on_a_card_it_computes_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = on_card("bnb-nf4").get_base_model()
    ids = torch.arange(64, device="cuda").reshape(2, 32)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        stream(model, folder=tmp_path)
        for _ in range(3):
            assert torch.equal(model(input_ids=ids).logits, whole)
    bring_back(model)
