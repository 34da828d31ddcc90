"""Which libraries were imported well in a process of their own, so that the doctor need not import
all of them each time.

It is known by what is installed, by the files of the libraries themselves, and by this Python, its
environment and its GPUs: where any of these has changed, it is tried again. What fails is tried
each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import OutputError
from ..folders.atomic import write_atomic
from ..machine import this_machine
from ..paths import cache_folder
from .trial import files_of, read_json

KEPT = 7 * 24 * 3600.0
"""Seconds for which that is remembered."""
_ENVIRONMENT = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")
_DISTRIBUTIONS = (".dist-info", ".egg-info", ".egg-link", ".pth")


class Imported:
    """What is remembered, as it is when this is made."""

    def __init__(self) -> None:
        self.here = "\0".join(_surroundings())
        self.times = read_json(_memory()) or {}

    def key(self, modules: Sequence[str]) -> str:
        """Return what a good import of `modules` depends on; empty where one is not found."""
        tops = sorted({module.partition(".")[0] for module in modules})
        files = [list(files_of(top)) for top in tops]
        if not all(files):
            return ""
        facts = [self.here, *modules, *(file for found in files for file in found)]
        return hashlib.sha256("\0".join(facts).encode("utf-8", "replace")).hexdigest()

    def knows(self, key: str) -> bool:
        """Say whether that was tried lately, and well."""
        when = self.times.get(key)
        return isinstance(when, int | float) and 0 <= time.time() - when < KEPT

    def remember(self, keys: Iterable[str]) -> None:
        """Write down that these were imported well; where that cannot be, they are tried again."""
        kept = {key: self.times[key] for key in self.times if self.knows(key)}
        kept |= dict.fromkeys(filter(None, keys), time.time())
        with contextlib.suppress(OSError, OutputError):
            _memory().parent.mkdir(parents=True, exist_ok=True)
            write_atomic(_memory(), json.dumps(kept))


def _surroundings() -> Iterator[str]:
    """Yield what decides how any library is imported: Python, its environment, the GPUs, and all
    that is installed, by name and time."""
    yield from (sys.executable, sys.version, repr(this_machine().cuda))
    yield from (f"{name}={os.environ.get(name)}" for name in _ENVIRONMENT)
    for folder in sys.path:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            found = [entry for entry in entries if entry.name.endswith(_DISTRIBUTIONS)]
            for entry in sorted(found, key=lambda entry: entry.name):
                yield f"{entry.path} {entry.stat().st_mtime_ns}"


def _memory() -> Path:
    return cache_folder() / "imported.json"
