"""One process of the conformance suite: started, watched, and ended if it falls silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from ..records import Backend
from .declared import backend_title
from .results import VerifiedCell, verified_cell

_POLL = 0.1

Tell = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One backend with its options on one device, and the adapters to verify it with."""

    backend: Backend
    adapters: tuple[str, ...]
    options: Mapping[str, Any]
    device: str
    dtype: str

    @property
    def title(self) -> str:
        """How to name it."""
        return backend_title(self.backend.name, self.options)

    def arguments(self) -> list[str]:
        """Return what follows `pytest` on the command line."""
        given = [f"{name}={json.dumps(value)}" for name, value in self.options.items()]
        return [
            *("--pyargs", "quantadapt.testing", "--backend", self.backend.name),
            *("--adapter", ",".join(self.adapters)),
            *("--device", self.device, "--dtype", self.dtype),
            *(argument for text in given for argument in ("--backend-options", text)),
        ]


@dataclass
class Ending:
    """How a process ended.

    Attributes:
        cells: what it found.
        died: why it did not end as it should; empty if it did.
        part: what it died of: an adapter, "base", "rest" (several adapters), or "" (the start).
    """

    cells: list[VerifiedCell] = field(default_factory=list)
    died: str = ""
    part: str = ""


@dataclass(frozen=True)
class Processes:
    """Runs jobs, each in a process of its own.

    Attributes:
        timeout: seconds without any sign of life after which a process counts as hanging.
        tell: told "job", "test" and "ended" with their facts.
        stop: ends them all once it is set.
        start: gives the command that verifies a job.
    """

    timeout: float
    tell: Tell
    stop: Event
    start: Callable[[Job], list[str]]

    def run(self, job: Job) -> Ending:
        """Run the suite in a process of its own, and wait for its end or for silence."""
        self.tell("job", {"job": job})
        with tempfile.TemporaryDirectory(prefix="quantadapt-verify-") as name:
            folder = Path(name)
            (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
            log = folder / "log.txt"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    self.start(job),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(folder),
                    start_new_session=True,
                )
                try:
                    silence = self._wait(process, folder / "progress.jsonl", job)
                finally:
                    _kill(process)
                    self.tell("ended", {"job": job})
            return self._ending(folder, process.returncode, silence)

    def _wait(self, process: subprocess.Popen[bytes], progress: Path, job: Job) -> bool:
        """Wait for the end, telling of each test. Returns whether it fell silent before."""
        size, last = 0, time.monotonic()
        while process.poll() is None:
            if self.stop.wait(_POLL):
                return False
            now = progress.stat().st_size if progress.exists() else 0
            if now != size:
                size, last = now, time.monotonic()
                self.tell("test", {"job": job, **_last_line(progress)})
            elif time.monotonic() - last > self.timeout:
                _ask_where(process)
                return True
        return False

    def _ending(self, folder: Path, code: int, silent: bool) -> Ending:
        results = folder / "results.json"
        if results.exists() and not silent and code in (0, 1):
            values = json.loads(results.read_text(encoding="utf-8"))["cells"]
            return Ending([verified_cell(cell) for cell in values])
        last = _last_line(folder / "progress.jsonl")
        if silent:
            how = f"no sign of life for {self.timeout:g} s"
        elif code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        where = f" in {last['test']}" if last else ""
        words = _last_words((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
        return Ending(died=f"{how}{where}{words}", part=str(last.get("part", "")))


def pytest_command(job: Job) -> list[str]:
    """Return the command that verifies a job."""
    options = ("-q", "--noconftest", "--capture=no", "--tb=short", "-p", "no:cacheprovider")
    plugin = ("-p", "quantadapt.testing.plugin")
    return [sys.executable, "-m", "pytest", *options, *plugin, *job.arguments()]


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process: no foreign plugins, one thread, every test strict."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {
        "OMP_NUM_THREADS": "1",  # tiny matrices: a second thread costs more than it brings
        "TOKENIZERS_PARALLELISM": "false",
        **kept,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": f"-c '{folder / 'pytest.ini'}' --rootdir '{folder}'",
        "PYTHONFAULTHANDLER": "1",
        "QUANTADAPT_STRICT": "1",
        "QUANTADAPT_CACHE": str(folder / "cache"),  # backends are to work, not to remember
        "QUANTADAPT_RESULTS": str(folder / "results.json"),
        "QUANTADAPT_PROGRESS": str(folder / "progress.jsonl"),
    }


def _ask_where(process: subprocess.Popen[bytes]) -> None:
    """Have a hanging process write down where it is."""
    if os.name != "nt":
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    with suppress(OSError):  # it has ended already
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(progress: Path) -> dict[str, Any]:
    """Return the last whole line of a file of JSON lines."""
    if not progress.exists():
        return {}
    lines = progress.read_text(encoding="utf-8").split("\n")[:-1]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def _last_words(log: str) -> str:
    """Return what a process that died said last: of a crash of Python, what and where."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python")), None)
    if crash is not None:
        frame = next((line for line in lines[crash:] if line.startswith("File ")), "")
        return f": {lines[crash]} {frame}".rstrip()
    return f": {' | '.join(lines[-2:])[-300:]}" if lines else ""
