"""`quantadapt plugin`: for those who write one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .commands import COMMANDS, epilog, unwrapped
from .session import session


def register(app: typer.Typer, name: str) -> None:
    """Add the command and its `new` to `app`."""
    group = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
    examples = epilog(
        "quantadapt plugin new mymethod",
        "quantadapt plugin new mymethod --adapter --output ~/src/mymethod",
    )
    group.callback(help=COMMANDS[name].help, epilog=examples)(_nothing)
    group.command("new", help=unwrapped(new.__doc__ or ""), epilog=examples)(new)
    app.add_typer(group, name=name, rich_help_panel=COMMANDS[name].panel)


def _nothing() -> None:
    """With a callback, typer keeps `new` a command of its own."""


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What it is to be called: a-z, 0-9 and hyphens.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A new or empty folder.", show_default="quantadapt-NAME"
        ),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="An adapter, no backend.")] = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="A backend that looks at calibration data.")
    ] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="A backend that quantizes activations, too.")
    ] = False,
) -> None:
    """Write a distribution with a backend, or an adapter, that works, for you to change.

    The backend holds int8 weights and passes the conformance suite as it is; so do the other kinds.
    There is a test of a few lines, a README and a workflow for CI.
    """
    with session() as shown:
        from ..errors import PlanRefused, Problem
        from ..scaffold import PLUGINS, PREFIX, Kind, write

        flags: dict[Kind, bool] = {
            "adapter": adapter, "calibrated": calibrated, "activations": activations
        }  # fmt: skip
        kinds = [kind for kind, wanted in flags.items() if wanted] or ["backend"]
        if len(kinds) > 1:
            given = " and ".join(f"--{kind}" for kind in kinds)
            raise PlanRefused([Problem(f"{given} are two plugins", "leave all but one out")])
        folder = output or Path(f"{PREFIX}{name}")
        files = write(name, folder, kinds[0])
        record = PLUGINS[kinds[0]].record
        for line in (
            f"{folder}: the {record} {name!r}, in {len(files)} files. Next:\n",
            f"  cd {shlex.quote(str(folder))}",
            "  pip install -e '.[test]'",
            "  pytest",
            f"  quantadapt run --{record} {name}",
            "\nThen put your own method into these:\n",
            *(f"  {file}" for file in files if file.startswith("src/")),
        ):
            shown.out.print(line, markup=False, soft_wrap=True)
