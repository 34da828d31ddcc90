"""Reward functions by name: `file.py:function`, `module:function`, or the name of an entry point.

Their code is run because the user names it. Before any work starts a file is only parsed.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import Problem, RewardError
from ..inputs.configs import FOLDER
from ..inputs.documents import reason
from ..inputs.likely_names import did_you_mean
from ..inputs.patience import TooLate, in_main_thread, within

Function = Callable[..., Any]
GROUP = "quantadapt.rewards"
"""The group of entry points that reward functions of other packages are in."""
_FORMS = "name it as file.py:function, module:function, or by an entry point of a package"


def located(name: str) -> Path:
    """Return the file that a name means; one that is not here may be among the shipped configs."""
    path = Path(name).expanduser()
    beside = FOLDER / name
    return beside if not path.exists() and path.name == name and beside.is_file() else path


def problems(names: Sequence[str], where: str) -> list[Problem]:
    """Return what is wrong with the names of reward functions; runs no code of theirs."""
    found = []
    for name in names:
        file, _, function = name.rpartition(":")
        what = ""
        if not file:
            known = [entry.name for entry in _entry_points()]
            if name not in known:
                what, fix = f"there is no reward function {name!r}", did_you_mean(name, known)
                found.append(Problem(what, fix if known else _FORMS, where))
            continue
        if file.endswith(".py"):
            what = _wrong_with(located(file), function)
        elif not all(part.isidentifier() for part in (*file.split("."), function)):
            what = f"{name!r} is no reward function"
        elif not _is_there(module := file.partition(".")[0]):
            what = f"there is no module {module!r}"
        found += [Problem(what, _FORMS, where)] if what else []
    return found


def _is_there(module: str) -> bool:
    # A script, `__main__`, and what is made by hand are there without a spec.
    return module in sys.modules or find_spec(module) is not None


def _wrong_with(path: Path, function: str) -> str:
    if not path.is_file():
        return f"there is no file {path}"
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        return f"{path} cannot be read as Python: {reason(error)}"
    there = set[str]()
    for node in ast.walk(tree):  # also what is defined below an if or a try, assigned or imported
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            there.add(node.name)
        elif isinstance(node, ast.Name):
            there.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            there |= {one.asname or one.name for one in node.names}
    if any(isinstance(n, ast.AsyncFunctionDef) and n.name == function for n in ast.walk(tree)):
        return f"{function} in {path} is asynchronous"
    return "" if function in there else f"there is no function {function!r} in {path}"


def functions_of(names: Sequence[str], seconds: float) -> dict[str, Function]:
    """Import reward functions; by what they are called in figures.

    Args:
        seconds: that the import of each may take.

    Raises:
        RewardError: one cannot be imported, or not in time, or is no function.
    """
    found: dict[str, Function] = {}
    for name in names:
        try:
            function = limited(partial(_imported, name), seconds, f"import of {name}")
        except KeyboardInterrupt:
            raise
        except TooLate:
            what = f"the reward function has not been imported after {seconds:g} s"
            fix = "do less where its file is imported, or raise reward_timeout"
            raise RewardError(what, fix=fix, where=name) from None
        except BaseException as error:  # sys.exit in its file, too
            what = f"the reward function cannot be imported: {type(error).__name__}: {error}"
            raise RewardError(" ".join(what.split()), fix="mend it", where=name) from error
        if not callable(function):
            raise RewardError("it is no function", fix=_FORMS, where=name)
        label = name.rpartition(":")[2]
        found[label if label not in found else name] = function
    return found


def _imported(name: str) -> Any:
    file, _, function = name.rpartition(":")
    if not file:
        return next(entry for entry in _entry_points() if entry.name == name).load()
    if not file.endswith(".py"):
        return getattr(importlib.import_module(file), function)
    path = located(file).resolve()
    return getattr(_module(path, path.stat().st_mtime_ns), function)


@lru_cache(maxsize=64)
def _module(path: Path, _: int) -> ModuleType:
    """Return the module in a file, which is run once, and again when it has changed."""
    spec = spec_from_file_location(f"quantadapt_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, for one, look their module up
    spec.loader.exec_module(module)
    return module


def limited(call: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what code of the user returns. Raises TooLate.

    In the main thread it may use signals, as math-verify does, and a search of `re` is ended. In
    others it runs in a thread of its own, called `what`: one that hangs cannot be ended, but left
    behind.
    """
    if in_main_thread():
        process = os.getpid()
        try:
            return within(seconds, call)
        finally:
            if os.getpid() != process:  # it forked, and this is not the run
                os._exit(0)
    return _beside(call, seconds, what)


def _beside(call: Callable[[], Any], seconds: float, what: str) -> Any:
    result: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # sys.exit, too, would end the thread alone
            failed.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not result:
        raise TooLate
    return result[0]


def _entry_points() -> list[EntryPoint]:
    return [*entry_points(group=GROUP)]
