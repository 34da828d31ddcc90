"""Two processes train as one does with the same whole batch, and stop together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from few_rows import few_rows
from processes import in_processes, wants_two_gpus
from torch.distributed import ReduceOp

import quantadapt as qa
from quantadapt.distributed import PeerLost, World, as_launched, talking, world
from quantadapt.distributed.launching import launch
from quantadapt.folders.checkpoints import last_whole
from quantadapt.folders.run_folder import RunFolder
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model

STEPS = 4
GATHERED = "cpu, gathered"
"""A CPU that is said to have ample room, as GPUs have: a shared base stays gathered there."""
DEVICES = [
    "cpu",
    pytest.param(GATHERED, marks=pytest.mark.slow),
    pytest.param("cuda", marks=[pytest.mark.cuda, wants_two_gpus]),
]
ADAPTERS: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "adalora": {"init_r": 6, "target_r": 3}}


def train(
    adapter: str, parallel: str, batch: int, output: Path, device: str, **options: Any
) -> dict[str, Any]:
    """Train the model beside `output`; return what the run logged and noted, the adapter's weights,
    and what is measured with them afterwards. A run that ends early says so instead."""
    from quantadapt.errors import Interrupted
    from quantadapt.sharding import is_sharded, shard

    base = qa.quantize(str(output.parent / "model"), "bnb-nf4", device=device, dtype="float32")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, adapter, **ADAPTERS[adapter])
    logs: list[dict[str, Any]] = []
    notes: list[str] = []
    given = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3} | options
    try:
        qa.train(
            model,
            output.parent / "few.jsonl",
            output=output,
            on_log=logs.append,
            on_note=notes.append,
            per_device_train_batch_size=batch,
            **given,
        )
    except Interrupted as early:
        return {"early": str(early), "shared": is_sharded(model)}
    if world().is_main:
        qa.save(model, output, overwrite=True)
    weights = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    keys = ("step", "loss", "grad_norm", "tokens")
    after = qa.evaluate(model, output.parent / "few.jsonl", max_examples=8)
    return {
        "logs": [[log[key] for key in keys] for log in logs if "loss" in log],
        "validation": [log["eval_loss"] for log in logs if "eval_loss" in log],
        "weights": weights,
        "after": after["loss"],
        "shared": is_sharded(model),
        "gathered": any("stays gathered" in note for note in notes),
    }


ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
MEASURED = {"eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2}


def work(folder: Path, kind: str) -> dict[str, Any]:
    """Everything that the tests below look at, in one of two processes."""
    from quantadapt.distributed import start

    device = f"cuda:{world().local_rank}" if kind == "cuda" else "cpu"
    start(device)
    with ample_room() if kind == GATHERED else nullcontext():
        return runs(folder, device)


def ample_room() -> Any:
    """A patch: a CPU has room for a whole base."""
    from quantadapt.training import base_placement

    return patch.object(base_placement, "_room", lambda *_: 2.0**40)


def runs(folder: Path, device: str) -> dict[str, Any]:
    """The runs themselves, one after the other."""

    def run(adapter: str, parallel: str, name: str, **options: Any) -> dict[str, Any]:
        return train(adapter, parallel, 2, folder / name, device, **options)

    found: dict[str, Any] = {"mean": means(device), "mean-of-all": means_without_waiting(device)}
    found["ddp"] = run("lora", "ddp", "ddp")
    found["fsdp"] = run("lora", "fsdp", "fsdp", save_steps=2)
    found["fsdp-min"] = run("lora", "fsdp", "fsdp-min", memory="min")
    found["adalora"] = run("adalora", "fsdp", "adalora", **ACCUMULATED)
    if world().is_main:
        shutil.rmtree(folder / "fsdp" / "checkpoints" / f"checkpoint-{STEPS}")
    torch.distributed.barrier()
    found["resumed"] = run("lora", "fsdp", "fsdp", save_steps=2, resume=True)
    found["again"] = run("lora", "fsdp", "fsdp", save_steps=2, resume=True)  # nothing is left to do
    found["measured"] = run("lora", "fsdp", "measured", **MEASURED)
    found["early"] = run("lora", "fsdp", "early", max_time=1e-6)
    found["ended"] = run("lora", "fsdp", "early", resume=True)
    return found


def means(device: str) -> list[Any]:
    """Average gradients of which some are missing on one process, or on both."""
    from quantadapt.distributed import average_gradients

    weights = [torch.nn.Parameter(torch.zeros(3, device=device)) for _ in range(3)]
    weights[0].grad = torch.full_like(weights[0], 1.0 + 2 * world().rank)
    if world().is_main:
        weights[1].grad = torch.full_like(weights[1], 8.0)
    average_gradients(weights)
    return [None if weight.grad is None else weight.grad.tolist() for weight in weights]


def means_without_waiting(device: str) -> list[Any]:
    """Average gradients that are all there; on a GPU, nothing may wait for it."""
    from quantadapt.distributed import average_gradients

    weights = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in (2, 3)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1.0 + 2 * world().rank)
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    average_gradients(weights)
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("default")
    return [weight.grad.tolist() for weight in weights]  # type: ignore[union-attr]


CASES = ["ddp", "fsdp", "fsdp-min", "measured", "adalora"]


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device) -> Path:
    folder = tmp_path_factory.mktemp(device.partition(",")[0])
    shutil.copytree(small_model(), folder / "model")
    shutil.copy(few_rows(), folder)
    return folder


@pytest.fixture(scope="module")
def two(folder, device) -> list[dict[str, Any]]:
    return in_processes(2, work, folder, folder, device)


@pytest.fixture(scope="module")
def alone(folder, device) -> dict[str, Any]:
    on = "cuda" if device == "cuda" else "cpu"
    return {
        "lora": train("lora", "none", 4, folder / "alone", on),
        "measured": train("lora", "none", 4, folder / "alone-measured", on, **MEASURED),
        "adalora": train("adalora", "none", 4, folder / "alone-adalora", on, **ACCUMULATED),
    }


def close_weights(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two, alone, case) -> None:
    expected = alone[case if case in alone else "lora"]
    for found in two:
        logs, wanted = torch.tensor(found[case]["logs"]), torch.tensor(expected["logs"])
        torch.testing.assert_close(logs, wanted, rtol=1e-5, atol=1e-5)
        close_weights(found[case], expected, 1e-4)
        assert found[case]["validation"] == pytest.approx(expected["validation"], rel=1e-4)
        assert found[case]["after"] == pytest.approx(expected["after"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_base_stays_gathered_where_there_is_room_and_is_shared_again(two, device, case) -> None:
    for found in (rank[case] for rank in two):
        kept = device != "cpu" and case not in ("ddp", "fsdp-min")
        assert (found["gathered"], found["shared"]) == (kept, case != "ddp")


@pytest.mark.parametrize("case", CASES)
def test_all_processes_hold_the_same_adapter(two, case) -> None:
    one, other = (found[case]["weights"] for found in two)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_resumed_run_goes_on_exactly(two, device) -> None:
    """On a CPU to the bit: the first step of a resumed run rounded otherwise on a shared base."""
    near, apart = (1e-6, 1e-4) if device == "cuda" else (0, 0)
    for found in two:
        for resumed, log in zip(found["resumed"]["logs"], found["fsdp"]["logs"][2:], strict=True):
            assert resumed[:3] == pytest.approx(log[:3], rel=near, abs=0)
        close_weights(found["resumed"], found["fsdp"], apart)
        assert found["again"]["logs"] == []
        close_weights(found["again"], found["resumed"], 0)


def test_a_run_that_ends_early_goes_on_exactly(two, device) -> None:
    near, apart = (1e-6, 1e-4) if device == "cuda" else (0, 0)
    for found in two:
        assert re.search("after step 1 of 4; checkpoint-1 ", found["early"]["early"])
        assert found["early"]["shared"]
        for resumed, log in zip(found["ended"]["logs"], found["fsdp"]["logs"][1:], strict=True):
            assert resumed[:3] == pytest.approx(log[:3], rel=near, abs=0)
        close_weights(found["ended"], found["fsdp"], apart)


@pytest.mark.parametrize("case", ["ddp", "measured"])
def test_the_adapter_is_saved_whole(two, folder, case) -> None:
    loaded, weights = dict(qa.load(folder / case).named_parameters()), two[0][case]["weights"]
    assert weights
    for name, weight in weights.items():
        assert torch.equal(loaded[name].cpu(), weight)


def test_missing_gradients_count_as_zero_unless_missing_everywhere(two) -> None:
    assert [found["mean"] for found in two] == [[[2.0] * 3, [4.0] * 3, None]] * 2


def test_gradients_that_are_all_there_are_averaged_without_a_wait(two) -> None:
    assert [found["mean-of-all"] for found in two] == [[[2.0] * 2, [2.0] * 3]] * 2


def train_alone(output: Path) -> tuple[int, int]:
    """Train, and say how many steps there were, and how many passes through torch's wrapper."""
    from torch.nn.parallel import DistributedDataParallel

    wrapped: list[Any] = []
    forward = DistributedDataParallel.forward

    def seen(self: Any, *args: Any, **options: Any) -> Any:
        wrapped.append(self)
        return forward(self, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DistributedDataParallel, "forward", seen)
        steps = len(train("lora", "auto", 2, output, "cpu")["logs"])
    return steps, len(wrapped)


Uneven = tuple[list[str], int, list[tuple[int, float]]]


def uneven(folder: Path, rows: int, batch: int = 2, **options: Any) -> Uneven:
    """Train an epoch on so many rows of 10 tokens; return what was noted of rows, how many tokens
    all processes saw, and the losses."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from quantadapt import demo
    from quantadapt.distributed import start

    start("cpu")
    base = qa.quantize(str(folder / "model"), "none", device="cpu", dtype="float32")
    ids = [[3 + n + n * k for k in range(10)] for n in range(rows)]
    masks = [[int(k > n) for k in range(10)] for n in range(rows)]
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    tokenizer, notes = AutoTokenizer.from_pretrained(demo.MODEL_DIR), list[str]()
    given = {"learning_rate": 0.03, "logging_steps": 1, "num_train_epochs": 2} | options
    given |= {"per_device_train_batch_size": batch, "on_note": notes.append}
    result = qa.train(qa.attach(base, "lora", r=2), data, tokenizer=tokenizer, **given)
    return [n for n in notes if n.startswith("data:")], result.tokens, result.losses


def unevens(folder: Path, batch: int) -> list[Uneven]:
    accumulated = {"gradient_accumulation_steps": 2}
    return [
        *(uneven(folder, rows, batch, **accumulated) for rows in (8, 7, 6, 5)),
        *(uneven(folder, 6, batch, max_steps=steps) for steps in (1, 2)),
    ]


@pytest.mark.slow
def test_the_last_rows_of_an_epoch_are_shared_out_evenly(tmp_path) -> None:
    """Two processes of two rows each train as one of four, but where a single row is left."""
    shutil.copytree(small_model(), tmp_path / "model")
    alone = unevens(tmp_path, 4)
    assert [tokens for _, tokens, _ in alone] == [160, 140, 120, 100, 40, 60]
    for found in in_processes(2, unevens, tmp_path, tmp_path, 2):
        assert [tokens for _, tokens, _ in found] == [160, 140, 120, 120, 40, 60]
        told = [" ".join(notes) for notes, *_ in found]
        assert [bool(text) for text in told] == [False, False, False, True, False, False]
        assert "5 rows do not divide evenly among 2 processes" in told[3]
        assert "1 of them count again" in told[3]
        for case in (0, 1, 2, 4, 5):
            losses, wanted = torch.tensor(found[case][2]), torch.tensor(alone[case][2])
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)


def uneven_in_parts(folder: Path, batch: int) -> list[list[tuple[int, float]]]:
    """Train with a shared base in parts of one and of two rows; return the losses."""
    from quantadapt.memory.setting import Setting
    from quantadapt.sharding import shard
    from quantadapt.training.memory_fit import MemoryFit

    made, quantize = [], qa.quantize

    def shared(model: str, _: str, **options: Any) -> Any:
        base = quantize(model, "bnb-nf4", **options)
        return shard(base) if world().size > 1 else base

    for rows, size in ((7, 1), (5, 2)):
        with (
            patch.object(qa, "quantize", shared),
            patch.object(MemoryFit, "_given", lambda _, size=size: Setting(0, False, size)),
            patch.object(talking, "PATIENCE", timedelta(seconds=60)),
        ):
            made.append(uneven(folder, rows, batch, num_train_epochs=4, learning_rate=3e-3)[2])
    return made


@pytest.mark.slow
def test_who_has_fewer_rows_makes_as_many_passes_where_a_base_is_shared(tmp_path) -> None:
    """Four rows and three, or three and two: each waits for the other's share in all passes."""
    shutil.copytree(small_model(), tmp_path / "model")
    alone = uneven_in_parts(tmp_path, 8)
    assert all(losses[-1][1] < losses[0][1] for losses in alone)
    for found in in_processes(2, uneven_in_parts, tmp_path, tmp_path, 4):
        for losses, wanted in zip(map(torch.tensor, found), map(torch.tensor, alone), strict=True):
            torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_launcher_of_one_process_changes_nothing(tmp_path) -> None:
    shutil.copytree(small_model(), tmp_path / "model")
    shutil.copy(few_rows(), tmp_path)
    assert in_processes(1, train_alone, tmp_path, tmp_path / "run") == [(STEPS, 0)]


PLUGIN = """
import os, signal
from quantadapt.hookspecs import hookimpl

@hookimpl
def quantadapt_stage_done(stage, value):
    if stage == "attach" and os.environ.get("ROOM"):
        from quantadapt.training import base_placement
        base_placement._room = lambda *_: 2.0**40
    if stage == "attach" and os.environ.get("DIES") == os.environ["RANK"]:
        def die(*_):
            if os.path.isdir(os.environ["DIES_AFTER"]):
                if os.environ["DIES_BY"] == "signal":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ArithmeticError("out of luck")
        value.get_base_model().model.layers[0].register_forward_pre_hook(die)
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantadapt", "run", "--gpus", "2"]
    given = {
        "train": {"max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "parallel": "fsdp"},
        "evaluate": {"samples": 0, "max_examples": 4},
        "backend": "bnb-nf4",
    }
    (folder / "c.yaml").write_text(json.dumps(given), encoding="utf-8")
    command += [str(folder / "c.yaml"), "--output", str(folder / "run"), *arguments]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def install(folder: Path, plugin: str) -> None:
    """Let the runs of `run` find a plugin."""
    (folder / "unlucky.py").write_text(plugin, encoding="utf-8")
    info = folder / "unlucky-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unlucky\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantadapt]\nunlucky = unlucky\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("error", "plugin unlucky: it failed: ArithmeticError: out of luck"),
        ("signal", "it was killed by SIGKILL; the machine may have run out of memory"),
    ],
)
def test_a_process_that_dies_stops_the_others(tmp_path, kind, by, told) -> None:
    install(tmp_path, PLUGIN)
    folder = tmp_path / "run"
    first = folder / "checkpoints" / "checkpoint-2"
    device, room = ("cpu", "1") if kind == GATHERED else (kind, "")
    dies = {"DIES": "1", "DIES_AFTER": str(first), "DIES_BY": by, "ROOM": room}
    done = run(tmp_path, "--device", device, **dies)
    assert done.returncode == 1
    assert f"process 1 of 2 failed:\nError: {told}" in done.stderr
    assert "another process" not in done.stderr
    assert list((folder / "checkpoints").glob("checkpoint-*")) == [first]
    assert json.loads((folder / "quantadapt-run.json").read_text())["state"] == "failed"

    done = run(tmp_path, "--device", device, "--resume", DIES="", ROOM=room)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert ("stays gathered" in told) == (kind != "cpu"), told
    assert re.search(r"2 x .+ \(fsdp\)", done.stdout)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["resumed_from"] == 2
    assert (metrics["train"]["processes"], metrics["train"]["parallel"]) == (2, "fsdp")
    assert metrics["merge"]["refusals"][0]["rule"] == "fsdp-no-merge"


TOLD = """
import os, signal, time
from quantadapt.hookspecs import hookimpl

@hookimpl
def quantadapt_stage_done(stage, value):
    if stage != "attach":
        return
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    elif os.environ["WORKS"]:
        time.sleep(150)
"""


@pytest.mark.slow
@pytest.mark.parametrize("works", [True, False])
def test_one_that_is_told_to_end_outside_of_training_interrupts_all(tmp_path, works) -> None:
    """The first process, which writes down the state, works on, or waits for the one that ends."""
    install(tmp_path, TOLD)
    done = run(tmp_path, "--device", "cpu", WORKS="1" if works else "")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Interrupted by SIGTERM" in done.stderr
    assert "failed" not in done.stderr
    assert RunFolder.open(tmp_path / "run").marker["state"] == "interrupted"


@pytest.fixture
def endless(tmp_path) -> list[str]:
    """The command line of a run on two processes that takes for ever."""
    spec = {
        "train": {"max_steps": 100000, "logging_steps": 1, "per_device_train_batch_size": 1},
        "evaluate": {"samples": 0, "evaluations": [], "unquantized": False},
        "backend": "none",
        "adapter": {"name": "lora", "r": 2},
        "data": {"path": str(tmp_path / "data.jsonl"), "max_length": 16},
        "device": "cpu",
        "model": str(small_model()),
        "output": str(tmp_path / "run"),
    }
    rows = ({"text": f"Line {i}. "} for i in range(12))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(json.dumps(spec), encoding="utf-8")
    return [sys.executable, "-m", "quantadapt", "run", str(tmp_path / "c.yaml"), "--gpus", "2"]


def processes_of(launcher: int) -> list[int]:
    """Return the processes of a launcher, by their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        for value in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if value.startswith(b"RANK="):
                found[int(value[5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGTERM, "launcher"), (signal.SIGHUP, "last")]
)
def test_all_processes_end_early_with_one_checkpoint(tmp_path, endless, number, told) -> None:
    run = tmp_path / "run"
    started = subprocess.Popen(endless, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    assert started.poll() is None, started.communicate()[1].decode()
    os.kill(started.pid if told == "launcher" else processes_of(started.pid)[-1], number)
    text = started.communicate(timeout=200)[1].decode()
    assert started.returncode == 128 + number, text
    ended = re.findall(rf"Interrupted by {number.name} after step \d+ of 100000; (\S+) is", text)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ended
    assert "failed" not in text
    assert RunFolder.open(run).marker["state"] == "interrupted"
    step = last_whole(run).step

    over = ["--resume", "--max-time", "0.0001"]
    done = subprocess.run([*endless, *over], capture_output=True, text=True, check=False)
    assert done.returncode == 124, done.stderr
    what = rf"Interrupted by train.max_time, 0.0001 minutes after step {step + 1} of"
    assert len(re.findall(what, done.stderr)) == 1
    assert "failed" not in done.stderr
    assert RunFolder.open(run).marker["state"] == "interrupted"
    assert last_whole(run).step == step + 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_one_that_dies_of_what_it_is_told_at_its_end_has_ended_early() -> None:
    """It was about to leave with that exit code, and did not listen any more."""
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(129); time.sleep(60)"
    failure = launch([sys.executable, "-c", program], 2)
    assert failure is not None
    assert failure.exit_code == 129


def test_a_refused_run_starts_no_process(tmp_path) -> None:
    done = run(tmp_path, "--device", "cpu", "--merge", "dense")
    assert done.returncode == 2
    assert "[rule fsdp-no-merge]" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_environment_says_who_is_who(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World()
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World(rank=3, local_rank=1, size=4, local_size=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert world() == World(rank=3, local_rank=1, size=4, local_size=2)

    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world() == World()


def test_gradients_are_sent_in_buckets_of_one_dtype(monkeypatch) -> None:
    monkeypatch.setattr(talking, "BUCKET", 4)
    single, half = torch.float32, torch.bfloat16
    given = [(3, single), (3, single), (3, single), (1, half), (5, half), (1, single)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in given]
    buckets = list(talking._buckets(tensors))
    assert [[(len(t), t.dtype) for t in bucket] for bucket in buckets] == [
        given[:2],
        given[2:3],
        given[3:5],
        given[5:],
    ]
    sent = [tensor for bucket in buckets for tensor in bucket]
    assert all(a is b for a, b in zip(tensors, sent, strict=True))


def test_figures_of_all_processes_are_added_or_the_largest_is_taken(monkeypatch) -> None:
    theirs = {ReduceOp.SUM: lambda tensor: tensor.add_(4), ReduceOp.MAX: lambda t: t.clamp_(min=4)}
    monkeypatch.setattr(talking, "world", lambda: World(size=2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, how: theirs[how](t))
    cpu = torch.device("cpu")
    assert [talking.reduced(2.5, cpu, how) for how in ("sum", "max")] == [6.5, 4.0]


def test_only_what_a_lost_peer_causes_is_called_so(monkeypatch) -> None:
    for text, size, expected in (
        ("Connection closed by peer", 2, PeerLost),
        ("Connection closed by peer", 1, RuntimeError),
        ("mat1 and mat2 shapes cannot be multiplied", 2, RuntimeError),
    ):
        monkeypatch.setattr(talking, "world", lambda size=size: World(size=size))
        with pytest.raises((PeerLost, RuntimeError)) as caught, talking.peers_in_words():
            raise RuntimeError(text)
        assert caught.type is expected


def test_accelerate_can_ask_for_sharding(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert as_launched(Spec()).train.parallel == "fsdp"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert as_launched(Spec()).train.parallel == "auto"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert as_launched(Spec(train={"parallel": "ddp"})).train.parallel == "ddp"
