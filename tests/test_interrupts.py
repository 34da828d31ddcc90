"""A Ctrl-C that comes where Python cannot raise it: in a callback of a weak reference."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time, weakref

from quantadapt.cli.session import session

class Key:
    pass

def gone(_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

signal.signal(signal.SIGINT, signal.default_int_handler)
with session(as_json="--json" in sys.argv) as shown:
    key = Key()
    kept = weakref.ref(key, gone)
    del key
    for _ in range(int(sys.argv[1])):
        time.sleep(0.1)
    shown.print_json("done")
"""


def found(*arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(given, capture_output=True, text=True, timeout=100, check=False)


def test_it_is_raised_again_where_it_is_heard() -> None:
    ended = found("600")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("json_too", [False, True])
def test_where_it_comes_too_late_that_is_told(json_too: bool) -> None:
    ended = found("0", *["--json"] * json_too)
    assert ended.returncode == 130
    assert json.loads(ended.stdout) == "done"
    assert ended.stderr.startswith("Interrupted too late: all was done")
