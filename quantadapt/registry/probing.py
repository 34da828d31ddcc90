"""Tries Python code in processes of its own, so that what crashes or hangs harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from ..machine import ending, run_python

GRACE = 5.0
"""Seconds beyond a probe's limit that its process may take to say so."""


@dataclass(frozen=True)
class Probe:
    """A piece of code, with what stands in `sys.argv[1:]`."""

    name: str
    code: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What became of a probe: what went wrong, or nothing, and what it wrote to stdout."""

    name: str
    problem: str
    output: str


def probe_all(
    probes: Sequence[Probe], timeout: float, preload: Sequence[str] = ()
) -> Iterator[Answer]:
    """Yield what becomes of the probes, as they end.

    Args:
        timeout: seconds that each of them may take.
        preload: modules that most of them import; loaded once, where processes can be copied.
    """
    left = {probe.name: probe for probe in probes}
    if hasattr(os, "fork"):
        for answer in _served(probes, timeout, preload):
            del left[answer.name]
            yield answer
    for probe in left.values():  # no fork here, or what was to be loaded first has crashed
        yield Answer(probe.name, *run_python(probe.code, probe.arguments, timeout))


def _served(probes: Sequence[Probe], timeout: float, preload: Sequence[str]) -> Iterator[Answer]:
    """Yield the answers of one server of probes; not all, where it ends early."""
    server = Path(__file__).with_name("probe_server.py")
    asked = {
        "preload": list(preload),
        "workers": os.cpu_count() or 1,
        "timeout": timeout,
        "probes": [(probe.name, probe.code, probe.arguments) for probe in probes],
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(server)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
    except OSError:
        return
    try:
        yield from _answers(process, asked, timeout, {probe.name for probe in probes})
    finally:
        process.kill()
        process.wait()


def _answers(
    process: Any, asked: dict[str, Any], timeout: float, waiting: set[str]
) -> Iterator[Answer]:
    lines: Queue[str | None] = Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        with process.stdin as stream:
            json.dump(asked, stream)
    except OSError:
        return
    while waiting:
        try:
            line = lines.get(timeout=2 * timeout + GRACE)  # what is preloaded takes a while, too
        except Empty:
            yield from (Answer(name, f"no end after {timeout:g} s", "") for name in waiting)
            return
        if line is None:
            return
        found = json.loads(line)
        waiting.discard(found["name"])
        late = found["code"] is None
        problem = f"no end after {timeout:g} s" if late else ending(found["code"], found["err"])
        yield Answer(found["name"], problem, found["out"])
