"""What a case is: files made from healthy ones, one command line, and what has to come of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL, RUN, QUANTIZED, DATA = "model", "run", "quantized", "data.jsonl"
"""What lies in the folder of a case before it is damaged: a checkpoint, a run of it (hqq and LoRA,
two steps), the checkpoint quantized (hqq), and 24 texts."""

_FEW = ("--set", "evaluate.max_examples=2", "--set", "evaluate.samples=0")
PLAN = ("plan", "--model", MODEL, "--data", DATA, "--output", "out")
TRAIN = ("run", "--model", MODEL, "--data", DATA, "--output", "out", "--max-steps", "1", *_FEW)
QUANTIZE = ("quantize", MODEL, "--output", "out")
EVAL = ("eval", RUN, "--data", DATA, "--max-examples", "2")
EVAL_MODEL = ("eval", MODEL, "--data", DATA, "--max-examples", "2")
EVAL_QUANTIZED = ("eval", QUANTIZED, "--data", DATA, "--max-examples", "2")
GENERATE = ("generate", RUN, "--prompt", "Hello", "--max-new-tokens", "1")
MERGE = ("merge", RUN, "--output", "out", "--data", DATA)
ONTO = ("merge", RUN, "--onto", MODEL, "--output", "out", "--data", DATA)
RESUME = ("run", f"{RUN}/spec.yaml", "--resume")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        kind: what is bad, by file or option.
        name: how it is bad.
        arguments: the command line.
        damage: makes it bad; gets the folder, in which the command runs.
        wanted: "refused", or "works" where it is odd and right; "either" where both are.
        told: where it works, this has to stand in what is printed.
        before: run in the child process before the command, for limits and faults of the system.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    damage: Callable[[Path], object] = lambda folder: None
    wanted: str = "refused"
    told: str = ""
    before: Callable[[Path], object] = field(default=lambda folder: None)

    @property
    def title(self) -> str:
        """What tells it apart from all others."""
        return f"{self.kind}: {self.name} [{' '.join(self.arguments[:2])[:40]}]"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def documents() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield (name, what damages a file) for files that should hold one JSON object."""
    texts = {
        "empty": "",
        "a list": "[]",
        "null": "null",
        "no object inside": "{}",
        "an object, deeply nested": '{"a": ' + nested(200_000) + "}",
        "a number of 6000 digits": '{"a": ' + "9" * 6000 + "}",
    }
    for name, text in texts.items():
        yield name, lambda file, text=text: file.write_text(text)
    raws = {
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "random bytes": bytes(range(256)) * 8,
    }
    for name, raw in raws.items():
        yield name, lambda file, raw=raw: file.write_bytes(raw)
    yield (
        "cut in half",
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    )
    yield "a folder", as_folder
    yield "a link to itself", lambda file: (file.unlink(), file.symlink_to(file.name))
    yield "missing", lambda file: file.unlink()


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


MISSING = object()
WRONG: tuple[Any, ...] = (
    *(MISSING, None, True, "text", 3.5, -1, 10**12, 10**400, float("nan"), [1], {"a": 1}),
)


def words(value: Any) -> str:
    """Name a value of `WRONG`."""
    if value is MISSING:
        return "missing"
    if isinstance(value, int) and value > 10**100:
        return "a number of 401 digits"
    text = repr(value)
    return text if len(text) < 40 else f"a text of {len(text) - 2} characters"


def with_value(file: str, key: str, value: Any) -> Callable[[Path], object]:
    """Return what sets a key of a JSON file, or takes it out."""

    def damage(folder: Path) -> None:
        path = folder / file
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop(key, None)
        if value is not MISSING:
            values[key] = value
        path.write_text(json.dumps(values), encoding="utf-8")

    return damage


def written(file: str, content: str | bytes) -> Callable[[Path], object]:
    """Return what writes a file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        )

    return damage


def at(file: str, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what damages a file of the folder."""
    return lambda folder: damage(folder / file)


def all_of(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


def with_tensors(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return what changes the tensors of a safetensors file."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = dict(load_file(folder / file))
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Return what changes the header of a safetensors file and leaves its data."""

    def damage(file: Path) -> None:
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        changed = change(values)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or values).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def limited(name: str, value: int) -> Callable[[Path], object]:
    """Return what limits a resource of the process, e.g. FSIZE, the size of files."""

    def before(folder: Path) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))

    return before


def failing(function: str, code: int, *, after: int = 0) -> Callable[[Path], object]:
    """Return what lets a function of `os` fail with an errno, from the n-th call that is about
    the output on."""

    def before(folder: Path) -> None:
        real, calls = getattr(os, function), []

        def fake(path: Any, *args: Any, **kwargs: Any) -> Any:
            if "out" in str(path):
                calls.append(path)
                if len(calls) > after:
                    raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)

        setattr(os, function, fake)

    return before
