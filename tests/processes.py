"""Runs a function in processes of a launcher's."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

# Forked from a process that has imported torch and trl; CUDA does not survive a fork.
START = "spawn" if torch.cuda.is_available() else "forkserver"
multiprocessing.set_forkserver_preload(["trl.trainer.sft_trainer", "quantadapt"])

wants_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
"""NCCL wants one for each process."""


def in_processes(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return what `function(*args)` gives in each of the processes; raises what one raises."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launched = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    given = ({**os.environ, **launched}, folder, function, args)
    multiprocessing.start_processes(_work, given, nprocs=count, start_method=START)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _work(
    rank: int, given: dict[str, str], folder: Path, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(given, RANK=str(rank), LOCAL_RANK=str(rank))
    from quantadapt.distributed import stop

    made = function(*args)
    stop()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(made))
    # Once in some sixty times a process aborted while the interpreter was taken down ("terminate
    # called without an active exception"). All is done and told by here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
