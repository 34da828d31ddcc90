"""Kills commands at their changes of the disk, and looks at what is left each time.

    python benchmarks/kills.py                 every change of every command
    python benchmarks/kills.py --every 10      every tenth
    python benchmarks/kills.py --only run --only quantize-overwrite

A command runs in a forked process with an audit hook that counts what changes files below its
folder (open for writing, rename, remove, mkdir, ...) and sends SIGKILL before the n-th. After each
kill: every file that has its final name is whole, and once the command has been called again
(`--resume` for a run), the result is that of a command that nobody killed: the same losses, bit by
bit, the same tensors, and no hidden file left. On Linux, with a tiny random model, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
LIMIT = 120.0
"""Seconds that a command may take."""


# Counting and killing ----------------------------------------------------------------------------


def changed_path(event: str, args: tuple[Any, ...]) -> str | None:
    """Return the path that an audit event changes, or None."""
    if event == "open":
        path, _, flags = args
        return path if isinstance(path, str) and flags & WRITES else None
    if event not in CHANGES:
        return None
    path, folder = os.fsdecode(args[0]) if not isinstance(args[0], int) else "", args[-1]
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return path


def watch(root: Path, kill_at: int, report: int) -> None:
    """Count the changes below `root` from now on; die before number `kill_at`, if that is not 0;
    write each to the pipe `report`."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        path = changed_path(event, args)
        if path is None or not os.path.abspath(path).startswith(f"{root}{os.sep}"):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(report, f"{event} {os.path.relpath(path, root)}\n".encode())

    sys.addaudithook(hook)


@dataclass
class Ended:
    """How a command ended: exit code (negative: a signal), what it changed, what it printed."""

    code: int
    changes: list[str]
    text: str


def call(arguments: list[str], root: Path, kill_at: int = 0) -> Ended:
    """Run a command line in a forked process, killed before its change number `kill_at`."""
    reading, writing = os.pipe()
    output = root.parent / f"{root.name}.txt"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            watch(root, kill_at, writing)
            code = command(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        changes = pipe.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, changes, output.read_text(errors="replace"))


def command(arguments: list[str]) -> int:
    """Run a command line here; return its exit code."""
    from quantadapt import cli

    try:
        cli.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


# Cases -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A command that is killed.

    Attributes:
        name: what it is called here.
        arguments: its command line.
        output: the folder that it writes, in the root that is watched.
        before: makes what is there before it.
        again: the command lines to try afterwards, the first that is not refused counts.
        result: what a folder holds that was written to its end, to be compared.
    """

    name: str
    arguments: list[str]
    output: Path
    before: Callable[[], None]
    again: list[list[str]]
    result: Callable[[Path], Any]
    earlier: Any = None
    expected: Any = None
    changes: list[str] = field(default_factory=list)


def losses(run: Path) -> Any:
    """Return the losses of a run, and its adapter's tensors."""
    from quantadapt.folders.run_folder import RunFolder

    folder = RunFolder.open(run)
    steps = {line["step"]: line["loss"] for line in folder.read_metrics()}
    return folder.marker["state"], steps, tensors(run / "adapter")


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the contents of the safetensors files, each of which has to be whole."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as opened:
            assert list(opened.keys())
        found[file.name] = file.read_bytes()
    return found


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a random Llama with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from quantadapt import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(file: Path) -> None:
    """Write a dozen short texts."""
    rows = ({"text": f"Line {i}: " + "say it again. " * (1 + i % 3)} for i in range(12))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cases(inputs: Path, root: Path) -> Iterator[Case]:
    """Yield every case; `inputs` gets what the commands read, `root` is watched."""
    model, data = str(inputs / "model"), str(inputs / "data.jsonl")
    make_model(inputs / "model")
    make_data(inputs / "data.jsonl")
    out = root / "out"
    options = ["backend.group_size=32", "train.per_device_train_batch_size=2", "train.save_steps=2"]
    options += ["train.logging_steps=1", "evaluate.evaluations=[]", "evaluate.samples=0"]
    options += ["evaluate.unquantized=false", "adapter.r=2", "data.max_length=32"]
    settings = [part for option in options for part in ("--set", option)]
    run = ["run", "--model", model, "--data", data, "--max-steps", "4", "--device", "cpu"]
    run += ["--output", str(out), *settings]
    quantize = ["quantize", model, "--output", str(out), "--device", "cpu"]
    quantize += ["--set", "group_size=32"]
    trained = inputs / "run"

    def a_run() -> None:
        shutil.copytree(trained, out)

    def an_earlier_run() -> None:
        shutil.copytree(inputs / "earlier-run", out)

    def a_model() -> None:
        shutil.copytree(inputs / "earlier-model", out)

    def an_earlier_merge() -> None:
        shutil.copytree(inputs / "earlier-merge", out / "merged")

    def nothing() -> None:
        pass

    assert command([*run[: -len(settings) - 1], str(trained), *settings, "--merge", "never"]) == 0
    other = ["--seed", "1", "--merge", "never"]
    earlier = [*run[: -len(settings) - 1], str(inputs / "earlier-run"), *settings, *other]
    assert command(earlier) == 0
    earlier_model = [
        "quantize",
        model,
        "--output",
        str(inputs / "earlier-model"),
        "--device",
        "cpu",
    ]
    assert command([*earlier_model, "--set", "group_size=16"]) == 0
    assert command(["merge", str(inputs / "earlier-run"), "--output", str(inputs / "m"),
                    "--data", data, "--device", "cpu"]) == 0  # fmt: skip
    shutil.move(inputs / "m" / "merged", inputs / "earlier-merge")
    yield Case("run", run, out, nothing, [[*run, "--resume"], run], losses)
    over = [*run, "--overwrite"]
    again = [[*run, "--resume"], over]
    yield Case("run-overwrite", over, out, an_earlier_run, again, losses)
    over = [*quantize, "--overwrite"]
    yield Case("quantize", quantize, out, nothing, [quantize, over], tensors)
    yield Case("quantize-overwrite", over, out, a_model, [over], tensors)
    merge = ["merge", str(trained), "--output", str(out), "--data", data, "--device", "cpu"]
    onto = [*merge, "--onto", model]
    for name, line in (("merge", merge), ("onto", onto)):
        over = [*line, "--overwrite"]
        yield Case(name, line, out / "merged", nothing, [line, over], tensors)
        yield Case(f"{name}-overwrite", over, out / "merged", an_earlier_merge, [over], tensors)


# The campaign ------------------------------------------------------------------------------------


def fresh(case: Case, root: Path) -> None:
    """Make the folder that is watched anew, with what was there before the command."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    case.before()
    if case.earlier is None and case.output.exists():
        case.earlier = case.result(case.output)


def measure(case: Case, root: Path) -> None:
    """Let the command run to its end, and note its changes and its result."""
    fresh(case, root)
    ended = call(case.arguments, root)
    assert ended.code == 0, ended.text
    case.expected, case.changes = case.result(case.output), ended.changes


def broken(root: Path) -> list[str]:
    """Return the files with a final name that are not whole."""
    from quantadapt.folders.checkpoints import last_whole
    from quantadapt.folders.written import is_leftover, read_list

    found = []
    for file in sorted(root.rglob("*")):
        if any(is_leftover(part) for part in file.relative_to(root).parts) or not file.is_file():
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            if file.suffix == ".safetensors":
                tensors(file.parent)
        except Exception as error:
            found.append(f"{file.relative_to(root)}: {error!r}")
        for name, facts in (read_list(file.parent) or {}).items():
            listed = file.parent / name
            if not listed.exists() or listed.stat().st_size != facts["size"]:
                found.append(f"{listed.relative_to(root)} is not as listed")
    if (root / "out" / "checkpoints").is_dir():
        last_whole(root / "out")
    return found


def kill(case: Case, root: Path, at: int) -> list[str]:
    """Kill the command before its change number `at`; return what is wrong afterwards."""
    fresh(case, root)
    ended = call(case.arguments, root, at)
    if ended.code != -signal.SIGKILL:
        return [f"it ended with {ended.code} before it was killed: {ended.text[-300:]}"]
    wrong = broken(root)
    if case.earlier is not None and not case.output.exists():
        from quantadapt.folders.atomic import put_back

        put_back(case.output)
        if not case.output.exists():
            wrong.append("what was there before is gone")
    for line in case.again:
        ended = call(line, root)
        if ended.code != 2:
            break
    if ended.code:
        return [*wrong, f"called again it ends with {ended.code}: {ended.text[-600:]}"]
    found = case.result(case.output)
    if found != case.expected and found != case.earlier:
        wrong.append("the result is another one")
    if "--resume" not in line and found != case.expected:
        wrong.append("the result is still the earlier one")
    left = [str(p.relative_to(root)) for p in root.rglob(".*") if ".log" not in p.suffix]
    return wrong + [f"{name} is left" for name in left]


@contextmanager
def campaign(only: list[str] | None = None) -> Iterator[tuple[Path, list[Case]]]:
    """Yield the folder that is watched and the cases, measured."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="quantadapt-kills-") as scratch:
        inputs, root = Path(scratch) / "inputs", Path(scratch) / "root"
        inputs.mkdir()
        chosen = [case for case in cases(inputs, root) if not only or case.name in only]
        for case in chosen:
            measure(case, root)
        yield root, chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="of the changes, every so many")
    parser.add_argument("--only", action="append", help="a case; may be repeated")
    given = parser.parse_args()
    started, counts, failed = time.perf_counter(), Counter[str](), 0
    with campaign(given.only) as (root, chosen):
        for case in chosen:
            for at in range(1, len(case.changes) + 1, given.every):
                wrong = kill(case, root, at)
                counts[case.name] += 1
                failed += bool(wrong)
                for text in wrong:
                    print(f"{case.name} at {at} ({case.changes[at - 1]}): {text}", flush=True)
            print(f"{case.name}: {counts[case.name]} of {len(case.changes)} changes", flush=True)
    seconds = time.perf_counter() - started
    print(f"{counts.total()} kills, {failed} with something wrong, {seconds:.0f} s")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
