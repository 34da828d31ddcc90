"""Builds the typer application: only the command that is asked for, or all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

import typer

from .commands import COMMANDS
from .session import CANNOT, report_failure


def run_app(arguments: Sequence[str]) -> None:
    """Run a command line. Ends in SystemExit."""
    wanted = arguments[0]
    CANNOT.set(COMMANDS[wanted].cannot if wanted in COMMANDS else "")
    app = build_app([wanted] if wanted in COMMANDS else COMMANDS)
    try:
        if wanted not in COMMANDS:
            add_plugin_commands(app)
        app(args=list(arguments), prog_name="quantadapt")
    except (Exception, KeyboardInterrupt) as error:  # of a plugin's command, or before ours began
        raise SystemExit(report_failure(error, sys.stderr)) from None


def build_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return an application with the built-in commands in `names`."""
    app = typer.Typer(
        name="quantadapt",
        help="Fine-tune any quantized language model with any adapter.",
        rich_markup_mode="rich",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_nothing)
    for name in names:
        import_module(f"{__package__}.{COMMANDS[name].module}").register(app, name)
    return app


def _nothing() -> None:
    """Fine-tune any quantized language model with any adapter."""


def add_plugin_commands(app: typer.Typer) -> None:
    """Let the installed plugins add theirs; one that fails is named and left out."""
    from ..registry.discovery import registry
    from ..showing.screen import write

    for implementation in registry().manager.hook.quantadapt_commands.get_hookimpls():
        try:
            implementation.function(*[app for _ in implementation.argnames])
        except (Exception, SystemExit) as error:
            text = f"plugin {implementation.plugin_name} could not add its commands: {error!r}"
            write(sys.stderr, f"{text}\n")
