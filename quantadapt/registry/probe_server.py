"""Runs pieces of Python code, each in a process of its own; a script that imports nothing of ours.

It imports what most of them need once, and is then copied (forked) for each. Told on stdin: JSON
with `preload`, `workers`, `timeout` and `probes`, each `[name, code, arguments]`. Told on stdout,
as they end: lines of JSON with `name`, `code` (the exit status as `subprocess` has it; None for one
that was stopped), `out` and `err`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import Any


def main() -> None:
    """Run the probes that stdin names."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    asked = json.load(sys.stdin)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for name in asked["preload"]:
        with contextlib.suppress(Exception):  # whoever needs it will say what is wrong
            importlib.import_module(name)
    waiting, running = list(asked["probes"]), dict[int, Any]()
    while waiting or running:
        while waiting and len(running) < asked["workers"]:
            name, code, arguments = waiting.pop(0)
            files = [_file(), _file()]
            if not (child := os.fork()):
                told.close()
                _run(code, arguments, [file.fileno() for file in files])
            running[child] = (name, files, time.monotonic() + asked["timeout"])
        time.sleep(0.01)
        for child in list(running):
            name, files, deadline = running[child]
            late = time.monotonic() > deadline
            if late:
                os.killpg(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if not ended:
                continue
            del running[child]
            exit_code = None if late else os.waitstatus_to_exitcode(status)
            out, err = (_text(file) for file in files)
            line = {"name": name, "code": exit_code, "out": out, "err": err}
            told.write(json.dumps(line) + "\n")
            told.flush()


def _run(code: str, arguments: list[str], outputs: list[int]) -> None:
    """Run the code in this process, and end it."""
    os.setsid()  # with all that it starts it can be stopped
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, descriptor)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<probe>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _file() -> Any:
    return tempfile.TemporaryFile()


def _text(file: Any) -> str:
    with file:
        file.seek(0)
        return str(file.read().decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
