"""Runs the cases, each in a process forked from one that has the libraries loaded, and judges."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .cases import DATA, MODEL, QUANTIZED, RUN, Case

BAD = ("unexpected", "silent", "hung", "harmed", "wrongly refused")
"""Outcomes that must not be."""
SECONDS = 10.0
"""No command may take longer for a bad input, in seconds of the processor; waiting counts, too, but
not that others use the machine."""
_WALL = 6
_MEMORY = 6 * 2**30


@dataclass(frozen=True)
class Result:
    """What came of a case: outcome ("refused", "worked", or one of `BAD`), what was printed, and
    how long it took in seconds."""

    case: Case
    outcome: str
    output: str
    seconds: float


def healthy(folder: Path) -> Path:
    """Make what all cases start from, and return where it is."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:  # the libraries start threads, and what has threads must not be forked
        code = 1
        try:
            _make_model(folder)
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    lines = [f'{{"text": "Line {n} says that {n} and {n} are {2 * n}."}}\n' for n in range(24)]
    (folder / DATA).write_text("".join(lines))
    few = ("--max-steps", "2", "--set", "train.save_steps=1", "--set", "evaluate.samples=0")
    made = ("run", "--model", MODEL, "--data", DATA, "--output", RUN, "--merge", "never", *few)
    for arguments in (made, ("quantize", MODEL, "--output", QUANTIZED)):
        code, output, _ = command(arguments, folder)
        if code:
            raise RuntimeError(output)
    return folder


def _make_model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from quantadapt import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


def load_libraries() -> None:
    """Import what the commands will, once for all forks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("QUANTADAPT_PLUGIN_TIMEOUT", "3")
    import datasets  # noqa: F401
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    for library, names in ((transformers, "AutoTokenizer LlamaForCausalLM Trainer"),
                           (trl, "SFTTrainer"), (peft, "PeftModel")):  # fmt: skip
        for name in names.split():
            getattr(library, name)
    from quantadapt.registry import registry

    registry()


def command(
    arguments: Iterable[str], folder: Path, case: Case | None = None
) -> tuple[int | None, str, float]:
    """Run a command line in a fork; return its exit code (None: it took too long, or below 0: the
    signal that ended it), what it printed, and the seconds."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _be_the_command(list(arguments), folder, case, writing)
        finally:
            os._exit(70)  # whatever happens, it must not go on as its parent
    os.close(writing)
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as stream:
        printed: list[bytes] = []
        code = _wait(child, started, lambda: printed.append(stream.read() or b""))
    output = b"".join(printed).decode("utf-8", "replace")
    return code, output, time.monotonic() - started


def _be_the_command(arguments: list[str], folder: Path, case: Case | None, stream: int) -> None:
    from quantadapt.cli import main

    os.setsid()
    os.chdir(folder)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    code = 70
    try:
        if case is not None:
            case.before(folder)
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, started: float, read: Callable[[], object]) -> int | None:
    """Wait for a process, reading what it prints; return its exit code, or None if it took too
    long and was ended."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        read()
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if _used(child) > SECONDS or passed > _WALL * SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)


def _used(child: int) -> float:
    """Return the seconds of processor time that a process has used."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree(folder: Path) -> dict[str, str]:
    """Return path -> what is there, of all that a command must leave as it is."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            if relative == "out" or relative.startswith(("out/", "tmp", "quantadapt-", ".out.")):
                continue
            if path.is_symlink():
                found[relative] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[relative] = "another kind of file"
    return found


def judged(case: Case, code: int | None, output: str, harmed: bool) -> str:
    """Return the outcome."""
    if harmed:
        return "harmed"
    if code is None:
        return "hung"
    if "This was not expected" in output or "Traceback (most recent" in output:
        return "unexpected"
    if code == 0 or "Interrupted by train.max_time" in output:
        told = bool(case.told) and case.told.lower() in output.lower()
        return "silent" if case.wanted == "refused" and not told else "worked"
    if code not in (1, 2) or not ("Error" in output or "Usage" in output):
        return "unexpected"
    return "wrongly refused" if case.wanted == "works" else "refused"


def run(case: Case, start: Path, scratch: Path) -> Result:
    """Run one case in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copytree(start, folder, dirs_exist_ok=True)
    case.damage(folder)
    before = tree(folder)
    code, output, seconds = command(case.arguments, folder, case)
    after = tree(folder)
    resumes = "--resume" in case.arguments  # which works in the folder that was damaged
    harmed = not resumes and any(after.get(name) != what for name, what in before.items())
    shutil.rmtree(folder, ignore_errors=True)
    return Result(case, judged(case, code, output, harmed), output, seconds)


def campaign(cases: Iterable[Case], scratch: Path) -> Iterator[Result]:
    """Run all `cases`, one after the other."""
    load_libraries()
    start = healthy(scratch / "healthy")
    for case in cases:
        yield run(case, start, scratch)
