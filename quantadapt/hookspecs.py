"""The hooks that a plugin may implement.

A plugin is a module, named by an entry point in the group `quantadapt`. Its hooks return typed
records; nothing heavy is imported until a record is asked to do its work.

    from quantadapt import hookimpl
    from quantadapt.records import Backend

    @hookimpl
    def quantadapt_backends():
        return [Backend(name="absmax", summary="...", quantizer=AbsMax)]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer

    from .records import Adapter, Backend

PROJECT = "quantadapt"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def quantadapt_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Return the backends that this plugin provides."""


@hookspec
def quantadapt_adapters() -> Iterable[Adapter]:  # type: ignore[empty-body]
    """Return the adapters that this plugin provides."""


@hookspec
def quantadapt_commands(app: typer.Typer) -> None:
    """Add commands to the `quantadapt` command line application."""


@hookspec
def quantadapt_stage_done(stage: str, value: Any) -> None:
    """Called after each stage of a run.

    Args:
        stage: "plan", "quantize", "attach", "train", "evaluate" or "export".
        value: what the stage returned; look at it, do not change it.
    """
