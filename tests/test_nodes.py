"""Several nodes, as two groups of processes on this host that meet over the loopback device."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from processes import in_processes
from test_docs import commands, parse

from quantadapt.errors import OutputError
from quantadapt.spec import TrainSpec

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "how-to" / "cluster.md"


def sees(mine: list[Path], options: dict[str, object]) -> str:
    """Say what a process is told that writes to its own of `mine`."""
    import torch

    from quantadapt.distributed import start, world
    from quantadapt.training.checkpoints import refuse_unshared

    start("cpu")
    folder = mine[world().rank]
    try:
        refuse_unshared(folder, TrainSpec(**options), torch.device("cpu"))
    except OutputError as error:
        return str(error)
    torch.distributed.barrier()  # the first process has taken its file away
    return ", ".join(file.name for file in folder.iterdir()) if folder.exists() else "nothing"


@pytest.mark.slow
def test_checkpoints_want_a_folder_that_all_nodes_see(tmp_path: Path) -> None:
    """On another node the run would begin anew, and wait for ever for the one that goes on."""
    apart, both = [tmp_path / "a", tmp_path / "b"], [tmp_path / "both"] * 2
    told = in_processes(2, sees, tmp_path, apart, {"save_steps": 1})
    assert all("1 of 2 processes do not see this folder" in text for text in told)
    assert in_processes(2, sees, tmp_path, apart, {}) == ["", "nothing"]
    assert in_processes(2, sees, tmp_path, both, {"resume": True}) == ["", ""]


# The files beside the page ------------------------------------------------------------------------

FILES = ROOT / "docs" / "how-to" / "cluster"


def test_the_batch_file_is_bash_that_asks_for_what_the_command_has() -> None:
    file = FILES / "slurm.sbatch"
    subprocess.run(["bash", "-n", file], check=True)
    text = file.read_text(encoding="utf-8")
    given = text.partition("' bash ")[2].partition(" ||")[0].replace('"$@"', "")
    given = given.replace('${resume:+"$resume"}', "--resume").replace("\\\n", " ")
    parse(["run", *shlex.split(given)])
    told = re.search(r"--max-time (\d+)", text), re.search(r"--time=(\d+):", text)
    assert told[0]
    assert told[1]
    assert int(told[0][1]) == 60 * int(told[1][1]) - 15
    words = subprocess.run(["bash", file], capture_output=True, text=True, check=False)
    assert "usage: sbatch slurm.sbatch CONFIG FOLDER" in words.stderr


SCHEDULER = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$ASKED"; fi',
    "srun": 'shift; exec "$@"',
    # torchrun --nnodes N --node-rank N --nproc-per-node N --master-addr A --master-port N -m ...
    "torchrun": f'shift 10; exec {shlex.quote(sys.executable)} "$@"',
}
"""What stands for commands of a cluster, which is not here: one node with one process."""


@pytest.mark.slow
def test_the_batch_file_begins_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    """The first job has nothing to resume, and --resume is refused then."""
    for name, does in SCHEDULER.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    asked = tmp_path / "asked"
    given = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
             "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1", "ASKED": str(asked),
             "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    job = ["bash", FILES / "slurm.sbatch", "config.yaml", "run", *shlex.split(SMALL)]

    def submitted(*more: str) -> str:
        done = subprocess.run(
            [*job, *more], cwd=tmp_path, env={**os.environ, **given}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        state: str = json.loads((tmp_path / "run" / "quantadapt-run.json").read_text())["state"]
        return state

    assert submitted("--max-time", "0.0001") == "interrupted"
    assert asked.read_text() == "requeue 7\n"
    assert submitted() == "finished"
    assert asked.read_text() == "requeue 7\n"
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]
    assert (trained["resumed_from"], trained["steps"]) == (1, 2)


def test_the_task_of_skypilot_runs_commands_that_there_are() -> None:
    task = yaml.safe_load((FILES / "sky.yaml").read_text(encoding="utf-8"))
    (line,) = [
        words for words in commands(task["run"].replace("\\\n", " ")) if "quantadapt" in words[0]
    ]
    assert line[-1] == "$resume"
    parse([*line[1:-1], "--resume"])
    folder = line[line.index("--output") + 1]
    assert any(folder.startswith(f"{mount}/") for mount in task["file_mounts"])
    assert f"if [ -e {folder}/quantadapt-run.json ]; then resume=--resume; fi" in task["run"]
    (install,) = [words for words in commands(task["setup"]) if words[0].endswith("pip")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = install[-1].removeprefix(".[").removesuffix("]").split(",")
    assert set(asked) <= set(extras["optional-dependencies"])


def command_of_the_page() -> str:
    (line,) = re.findall(r"^torchrun --nnodes .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return line


SMALL = "--device cpu --max-steps 2 --merge never --set train.save_steps=1"
SMALL += " --set evaluate.unquantized=false --set evaluate.samples=0 --set train.logging_steps=1"
SMALL += " --set evaluate.max_examples=4 --set train.per_device_train_batch_size=1"
SMALL += " --set backend=none --set data.max_length=64 --set data.max_examples=16"


def losses_of(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


TWO_HOSTS = """
# Runs $1 and $2 as on two hosts: in network namespaces of their own, joined by a cable.
set -e
ip link set lo up
unshare --net sleep 1000 & other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add cable0 type veth peer name cable1 netns $other
ip addr add 10.9.0.1/24 dev cable0
ip link set cable0 up
there() { nsenter --target $other --net "$@"; }
there ip link set lo up
there ip addr add 10.9.0.2/24 dev cable1
there ip link set cable1 up
GLOO_SOCKET_IFNAME=cable0 sh -c "$1" & first=$!
GLOO_SOCKET_IFNAME=cable1 there sh -c "$2" & second=$!
wait $first
wait $second
"""


def on_loopback(commands: list[str], folder: Path) -> None:
    started = [subprocess.Popen(["sh", "-c", command], cwd=folder) for command in commands]
    assert [process.wait(timeout=600) for process in started] == [0, 0]


def on_two_hosts(commands: list[str], folder: Path) -> None:
    if shutil.which("ip") is None or subprocess.run(["unshare", "-rn", "true"]).returncode:
        pytest.skip("network namespaces are not allowed here")
    command = ["unshare", "-rn", "bash", "-c", TWO_HOSTS, "two-hosts", *commands]
    subprocess.run(command, cwd=folder, check=True, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("share", "first_node", "start"), [(1, "127.0.0.1", on_loopback), (2, "10.9.0.1", on_two_hosts)]
)
def test_the_command_of_the_page_trains_on_two_nodes_as_on_one(
    tmp_path: Path, share: int, first_node: str, start: Callable[[list[str], Path], None]
) -> None:
    """With whole rows, and with rows of which each node has a half."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    small = f"{SMALL} --set train.context_parallel_size={share}"
    commands = []
    for rank in range(2):
        given = {"RANK_OF_THIS_NODE": str(rank), "FIRST_NODE": first_node, "PORT": port}
        given["GPUS"] = "1"
        line = re.sub(r"\$(\w+)", lambda found, given=given: given[found[1]], command_of_the_page())
        words = shlex.split(line.replace("config.yaml", "demo"))
        assert words[0] == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *small.split()]
        commands.append(f"{shlex.join(command)} --output run > {rank}.out 2> {rank}.err")
    start(commands, tmp_path)
    told = [(tmp_path / f"{rank}.out").read_text() for rank in range(2)]
    assert "2 x cpu (ddp" in told[0]
    assert told[1] == ""  # one writes and speaks
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["processes"] == 2
    assert metrics["train"]["steps"] == 2
    whole = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= whole

    one = [sys.executable, "-m", "quantadapt", "run", "demo", "--gpus", "2", "--output", "one"]
    subprocess.run([*one, *small.split()], cwd=tmp_path, check=True, capture_output=True)
    assert len(losses_of(tmp_path / "run")) == 2
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "one")
