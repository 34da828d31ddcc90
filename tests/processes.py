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

wants_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
"""NCCL wants one for each process."""


def in_processes(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return what `function(*args)` gives in each of the processes; raises what one raises."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.spawn(_work, (count, port, folder, function, args), nprocs=count)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _work(
    rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from quantadapt.distributed import stop

    made = function(*args)
    stop()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(made))
    # Once in some sixty times a process aborted while the interpreter was taken down ("terminate
    # called without an active exception"). All is done and told by here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
