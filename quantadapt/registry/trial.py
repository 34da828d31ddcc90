"""A plugin's first import: in a process of its own, which may crash, exit, hang or move away.

What came of it is remembered, by the plugin's version and the times of its files, so that a plugin
that works is imported here at once from then on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import OutputError, PluginError
from ..folders.atomic import write_atomic
from ..machine import run_python
from ..paths import cache_folder
from .checks import contents

IN_TRIAL = "QUANTADAPT_TRIAL"
"""Set in the process that tries a plugin: if that asks for plugins itself, none is tried again."""
KEPT = 3600.0
"""Seconds for which a verdict against a plugin is remembered: the cause may lie elsewhere."""
_PATIENCE = 60.0
"""Seconds for Python to start and import what a plugin is checked with."""
_CODE = """
import json, os, sys
sys.path[:], os.environ["QUANTADAPT_TRIAL"] = json.loads(sys.argv[1]), "1"
from quantadapt.registry.trial import attempt
attempt(*sys.argv[2:])
"""


@dataclass(frozen=True)
class Verdict:
    """What came of importing a plugin.

    Attributes:
        problem: why it must not be imported in this process; empty where it may.
        details: the traceback, or the stack where it hangs.
        remark: what its author should mend although it works.
        lasts: whether it depends on the plugin's files alone, and may be remembered.
        limit: the seconds that it had.
        when: the time of the trial, as of time.time().
    """

    problem: str = ""
    details: str = ""
    remark: str = ""
    lasts: bool = False
    limit: float = 0.0
    when: float = 0.0

    def holds(self, limit: float) -> bool:
        """Say whether it needs no new trial with `limit` seconds."""
        if not self.problem:
            return True
        return limit <= self.limit and 0 <= time.time() - self.when < KEPT


def hangs(limit: float) -> str:
    """Say that an import took more than `limit` seconds."""
    return f"its import did not finish within {limit:g} s"


def verdicts(points: Iterable[EntryPoint], limit: float) -> list[tuple[Verdict, bool]]:
    """Return for each plugin what is known of its import, and whether it was tried only now."""
    points = list(points)
    if not points or os.environ.get(IN_TRIAL):
        return [(Verdict(), False) for _ in points]
    keys = [_key(point) for point in points]
    known = {key: v for key, v in _remembered().items() if key in keys and v.holds(limit)}
    new = [index for index, key in enumerate(keys) if key not in known]
    with ThreadPoolExecutor(max_workers=4) as pool:
        tried = dict(zip(new, pool.map(lambda i: _tried(points[i], limit), new), strict=True))
    if lasting := {keys[index]: v for index, v in tried.items() if v.lasts}:
        _remember(lasting)
    return [(tried.get(i) or known[key], i in tried) for i, key in enumerate(keys)]


# In the process that waits ------------------------------------------------------------------------


def _tried(point: EntryPoint, limit: float) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="quantadapt-") as scratch:
        report, stack = Path(scratch, "report"), Path(scratch, "stack")
        where = [point.name, point.value, str(limit), str(report), str(stack)]
        found = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        ended, printed = run_python(_CODE, [found, *where], limit + _PATIENCE)
        told = read_json(report)
        if told is None:  # it never began: whatever the reason, it is not the plugin's
            return Verdict()
        made = _verdict(told, ended, stack, limit)
    remark = "it writes to stdout while it is imported" if printed.strip() else ""
    return Verdict(**{**asdict(made), "remark": remark, "limit": limit, "when": time.time()})


def _verdict(told: dict[str, Any], ended: str, stack: Path, limit: float) -> Verdict:
    """Return what the report and the end of the process come to."""
    if "problem" in told:
        return Verdict(told["problem"], told["details"], lasts=told["lasts"])
    where = stack.read_text(encoding="utf-8", errors="replace")
    if where.startswith("Timeout"):
        return Verdict(hangs(limit), where, lasts=True)
    crashed = ended.startswith("it crashes")
    what = ended.replace("it", "its import", 1) if crashed else "its import ends Python"
    return Verdict(what, where, lasts=True)


def _key(point: EntryPoint) -> str:
    """Return what a verdict depends on: the plugin, its version, its files and this Python."""
    top = point.value.partition(":")[0].strip().partition(".")[0]
    facts = [point.name, point.value, _version(point), sys.executable, sys.version, *files_of(top)]
    return hashlib.sha256("\0".join(facts).encode("utf-8", "replace")).hexdigest()


def _version(point: EntryPoint) -> str:
    """Return the folder of the distribution, which is called as it and its version are."""
    return str(getattr(point.dist, "_path", ""))


def files_of(module: str) -> Iterator[str]:
    """Yield the files of a module of the top level with their times and sizes; imports nothing."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [Path(spec.origin)] if spec.origin and not folders else []
    for folder in folders:
        files += sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".so", ".pyd"))
    for file in files:
        with contextlib.suppress(OSError):
            facts = file.stat()
            yield f"{file} {facts.st_mtime_ns} {facts.st_size}"


def _remembered() -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for key, value in (read_json(_memory()) or {}).items():
        with contextlib.suppress(TypeError):
            found[key] = Verdict(**value)
    return found


def _remember(new: dict[str, Verdict]) -> None:
    """Write verdicts down; where that cannot be, they are found out again next time."""
    kept = {k: v for k, v in _remembered().items() if v.holds(0)} | new
    with contextlib.suppress(OSError, OutputError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_memory(), json.dumps({key: asdict(v) for key, v in kept.items()}))


def _memory() -> Path:
    return cache_folder() / "plugins.json"


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is none to be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# In the process that tries ------------------------------------------------------------------------


def attempt(name: str, value: str, limit: str, report: str, stack: str) -> None:
    """Import a plugin as `discovery` would, and write down what came of it. Ends the process."""
    before = os.getcwd()
    Path(report).write_text('{"began": true}', encoding="utf-8")
    with open(stack, "w", encoding="utf-8") as file:
        faulthandler.enable(file)
        seconds = min(float(limit), 1e6)
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        told = _outcome(lambda: contents(load(EntryPoint(name, value, "quantadapt")), name))
        faulthandler.cancel_dump_traceback_later()
        if told is None and os.getcwd() != before:
            told = {"problem": "its import changes the working directory", "lasts": True}
        ending = {"problem": "", "details": "", "lasts": True} | (told or {})
        Path(report).write_text(json.dumps(ending), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # whatever threads and handlers it has left


def _outcome(work: Callable[[], object]) -> dict[str, Any] | None:
    try:
        work()
    except BaseException as error:  # be it SystemExit: it is the plugin's
        details = "".join(traceback.format_exception(error))
        return {"problem": reason(error), "details": details, "lasts": False}
    return None


# Both ---------------------------------------------------------------------------------------------


def load(entry_point: EntryPoint) -> Any:
    """Import what an entry point names. Raises PluginError where it names no module."""
    if not EntryPoint.pattern.match(entry_point.value):
        what = f"its entry point is {entry_point.value!r}, which names no module"
        raise PluginError(what)
    return entry_point.load()


def reason(error: BaseException) -> str:
    """Say on one line what a plugin raised, and at which line of it."""
    text = " ".join(str(error).split())
    if isinstance(error, PluginError):
        return text
    name, place = type(error).__name__, _place(error)
    return f"{name}: {text}{place}" if text else f"{name}{place}"


def _place(error: BaseException) -> str:
    """Return the last line in the folder of the first file that is neither ours nor Python's."""
    ours = [
        f"{folder}{os.sep}"
        for folder in (Path(__file__).parents[1], Path(importlib.__file__).parent)
    ]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith((*ours, "<"))]
    folder = Path(theirs[0].filename).parent if theirs else Path()
    own = [frame for frame in theirs if Path(frame.filename).is_relative_to(folder)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
