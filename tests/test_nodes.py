"""Several nodes, as two groups of processes on this host that meet over the loopback device."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
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
    parse(["run", *shlex.split(given)])
    told = re.search(r"--max-time (\d+)", text), re.search(r"--time=(\d+):", text)
    assert told[0]
    assert told[1]
    assert int(told[0][1]) == 60 * int(told[1][1]) - 15
    words = subprocess.run(["bash", file], capture_output=True, text=True, check=False)
    assert "usage: sbatch slurm.sbatch CONFIG FOLDER" in words.stderr


def test_the_task_of_skypilot_runs_commands_that_there_are() -> None:
    task = yaml.safe_load((FILES / "sky.yaml").read_text(encoding="utf-8"))
    (line,) = [
        words for words in commands(task["run"].replace("\\\n", " ")) if "quantadapt" in words[0]
    ]
    parse(line[1:])
    folder = line[line.index("--output") + 1]
    assert any(folder.startswith(f"{mount}/") for mount in task["file_mounts"])
    assert "--resume" in line
    (install,) = [words for words in commands(task["setup"]) if words[0].endswith("pip")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = install[-1].removeprefix(".[").removesuffix("]").split(",")
    assert set(asked) <= set(extras["optional-dependencies"])


def command_of_the_page() -> str:
    (line,) = re.findall(r"^torchrun --nnodes .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_of_the_page_trains_on_two_nodes(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    small = "--device cpu --max-steps 2 --merge never --output run --set train.save_steps=1"
    small += " --set evaluate.unquantized=false --set evaluate.samples=0"
    small += " --set evaluate.max_examples=4 --set train.per_device_train_batch_size=1"
    for option in ("backend=none", "data.max_length=64", "data.max_examples=16"):
        small += f" --set {option}"
    nodes = []
    for rank in range(2):
        given = {"RANK_OF_THIS_NODE": str(rank), "FIRST_NODE": "127.0.0.1", "PORT": port}
        given["GPUS"] = "1"
        line = re.sub(r"\$(\w+)", lambda found, given=given: given[found[1]], command_of_the_page())
        words = shlex.split(line.replace("config.yaml", "demo"))
        assert words[0] == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *small.split()]
        nodes.append(
            subprocess.Popen(
                command, cwd=tmp_path, env={**os.environ}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    told = [node.communicate(timeout=500) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "2 x cpu (ddp)" in told[0][0]
    assert told[1][0] == ""  # one writes and speaks
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["processes"] == 2
    assert metrics["train"]["steps"] == 2
    whole = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= whole
