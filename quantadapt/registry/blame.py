"""Whose code an error arose in: what plugins of others raise is told with the plugin's name."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import ParamSpec, TypeVar

from ..errors import PluginError, QuantadaptError
from ..hookspecs import PROJECT
from ..records import Record, kind_of
from .discovery import Provenance, registry

P = ParamSpec("P")
R = TypeVar("R")


def blamed(error: BaseException | None) -> PluginError | None:
    """Return an error that names the plugin in whose code this one arose, with this one as its
    cause; None where that is no plugin of others, or it is ours, or what the memory is too small
    for."""
    if error is None or isinstance(error, QuantadaptError) or not isinstance(error, Exception):
        return None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return None
    plugins = _by_package()
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = _package(frame)
        if package == PROJECT:
            return None
        if package in plugins and plugins[package].distribution != PROJECT:
            what = f"it failed: {type(error).__name__}: {error}"
            fix = f"tell its authors ({plugins[package]}): {frame.f_code.co_filename}:{line}"
            found = PluginError(what, fix=fix, where=f"plugin {plugins[package].plugin}")
            found.__cause__ = error
            return found
    return None


def blaming_plugins(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, out of which an error in a plugin's code comes as a PluginError."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except PluginError as error:
            if _failed_by_itself(error) or (found := blamed(error.__cause__)) is None:
                raise
            raise found from error.__cause__
        except Exception as error:
            if (found := blamed(error)) is None:
                raise
            raise found from error

    return call


@contextmanager
def blaming(record: Record, doing: str) -> Iterator[None]:
    """Turn what a plugin's code raises into a PluginError that says whose it is, and where."""
    import torch

    try:
        yield
    except (QuantadaptError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = str(error).strip().splitlines()
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"it failed while {doing}: {type(error).__name__}: {text[0] if text else ''}"
        origin = registry().provenance(record)
        fix = f"tell its authors ({origin}): {place.filename}:{place.lineno}"
        where = f"{kind_of(record)} {record.name}"
        raise PluginError(what, fix=fix, where=where) from error


def _failed_by_itself(error: PluginError) -> bool:
    """Whether what an error tells arose in the code of the very evaluation that it names: an
    evaluation meets what a backend of others raises, too."""
    if not error.problems[0].where.startswith("evaluation ") or error.__cause__ is None:
        return True
    called = [_package(frame) for frame, _ in traceback.walk_tb(error.__cause__.__traceback__)]
    return len(_by_package().keys() & set(called[1:])) < 2 and called[1:2] != [PROJECT]


def _by_package() -> dict[str, Provenance]:
    return {plugin.module.partition(".")[0]: plugin for plugin in registry().plugins.values()}


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
