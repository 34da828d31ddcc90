"""Whose code an error arose in: what plugins of others raise is told with the plugin's name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from ..errors import PluginError, QuantadaptError
from ..hookspecs import PROJECT
from .discovery import registry

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
    plugins = {plugin.module.partition(".")[0]: plugin for plugin in registry().plugins.values()}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
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
        except PluginError as error:  # of an evaluation, which only met what a backend raised
            if (found := blamed(error.__cause__)) and error.problems[0].where.startswith(
                "evaluation "
            ):
                raise found from error.__cause__
            raise
        except Exception as error:
            if (found := blamed(error)) is None:
                raise
            raise found from error

    return call
