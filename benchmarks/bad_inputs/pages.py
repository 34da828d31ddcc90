"""What `init`, `demo`, `studio`, `serve` and `eval --tasks` are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .cases import DATA, MODEL, RUN, Case, written

_ESCAPE = "\x1b[31m\x1b]0;mine\x07"
_PATHS = ("a" * 300, f"{DATA}/x", _ESCAPE, "mo\udcffdel", "loop", "pipe")


def cases() -> Iterator[Case]:
    yield from _init()
    yield from _pages()
    yield from _tasks()


def _init() -> Iterator[Case]:
    for use in ("odd", "", _ESCAPE, "../qlora", "qlora.yaml", "a" * 5000):
        yield Case("init", f"use {use[:20]!r}", ("init", use, "-o", "out"))
    for path in (*_PATHS, MODEL, DATA, "/dev/null", "/dev/full"):
        arguments = ("init", "demo", "--output", path)
        yield Case("init", f"into {path[:20]!r}", arguments, _odd, _into(path))
    yield Case("init", "over a folder", ("init", "demo", "--output", MODEL, "--overwrite"))
    for value in ("model=\x1b[31m", "x=1", "train.learning_rate=nan", "train=[1]", "adapter.r=-1"):
        yield Case("init", f"--set {value!r}", ("init", "demo", "-o", "out", "--set", value))


def _odd(folder: Path) -> None:
    import os

    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def _into(path: str) -> str:
    return "either" if path in (_ESCAPE, "mo\udcffdel") else "refused"


def _pages() -> Iterator[Case]:
    for name in ("demo", "serve", "chat"):
        for path in (*_PATHS, "nowhere", DATA, ""):
            yield Case("pages", f"{name} of {path[:20]!r}", (name, path), _odd)
    for path in (*_PATHS[:2], DATA, "loop", "pipe"):
        arguments = ("studio", path, "--host", "0.0.0.0")
        yield Case("pages", f"studio of {path[:20]!r}", arguments, _odd)
    for name, given in (("demo", RUN), ("studio", "out"), ("serve", RUN)):
        for flag, value in (("--host", "0.0.0.0"), ("--host", _ESCAPE), ("--host", "a" * 300),
                            ("--host", ""), ("--port", "-1"), ("--port", "65536"),
                            ("--port", "x"), ("--port", "1.5")):  # fmt: skip
            yield Case("pages", f"{name} {flag} {value[:20]!r}", (name, given, flag, value))
    for text in ("", "[1]\n", '{"x": 1}\n', '{"prompt": 3, "completion": 4}\n', "\x00"):
        arguments = ("demo", RUN, "--questions", DATA, "--host", "0.0.0.0")
        yield Case("pages", f"demo asks {text!r}", arguments, written(DATA, text))


def _tasks() -> Iterator[Case]:
    texts = {
        "a function": "task: mine\ndoc_to_text: !function mine.run\n",
        "a class": "task: mine\nclass: !function mine.Task\n",
        "a template": "task: mine\ndataset_path: json\ndoc_to_text: '{{ cycler.__init__.__globals__ }}'\n",
        "a python object": "task: !!python/object/apply:os.system [true]\n",
        "itself": "task: mine\ninclude: mine.yaml\n",
        "a file of the system": "task: mine\ninclude: /etc/passwd\n",
        "deep nesting": "task: " + "[" * 20_000,
        "binary": "\x00\x01",
        "a group of itself": "group: mine\ntask: [mine]\n",
    }
    eval_ = ("eval", MODEL, "--data", DATA, "--include-path", ".", "--tasks")
    for name, text in texts.items():
        made = written("mine.yaml", text)
        yield Case("tasks", f"a file with {name}", (*eval_, "mine"), made)
        trusted = (*eval_, "mine", "--trust-remote-code")
        wanted = "refused" if name not in ("a template",) else "either"
        yield Case("tasks", f"a trusted file with {name}", trusted, made, wanted)
    for words in ("", ",", _ESCAPE, "../mine", "a" * 5000, "*"):
        arguments = ("eval", MODEL, "--data", DATA, "--tasks", words)
        yield Case("tasks", f"named {words[:20]!r}", arguments)
    for flag, value in (("--limit", "nan"), ("--limit", "0"), ("--limit", "inf"),
                        ("--num-fewshot", "-1"), ("--include-path", "a" * 300),
                        ("--include-path", DATA), ("--include-path", "loop")):  # fmt: skip
        arguments = ("eval", MODEL, "--data", DATA, "--tasks", "mine", flag, value)
        yield Case("tasks", f"{flag} {value[:20]}", (*arguments, "--trust-remote-code"), _odd)
