"""`quantadapt run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .commands import add
from .flags import JsonOption, SpecFlags, with_spec_flags
from .session import Session, session

if TYPE_CHECKING:
    from ..pipeline import Listener, RunResult
    from ..planning import Plan


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_spec_flags(run),
        "quantadapt run",
        "quantadapt run --backend hqq --set backend.bits=3 --adapter dora --max-steps 100",
        "quantadapt run --model ORG/NAME --data train.jsonl --output runs/mine",
        "quantadapt run config.yaml --resume",
    )


def run(flags: SpecFlags, json: JsonOption = False) -> None:
    """Quantize, attach, train, evaluate and export, as one run.

    Without anything it fine-tunes the bundled demo model. The run folder gets the adapter, the
    merged model where the combination allows one, all figures and report.html. Flags win over
    the YAML file, --set wins over both.
    """
    with session(as_json=json) as shown:
        from ..planning import plan

        made = plan(flags.spec())
        result = _watched(made, shown)
        if json:
            document = {"folder": str(result.folder), "plan": made.to_dict()}
            shown.print_json(document | {"metrics": result.metrics})


def _watched(made: Plan, shown: Session) -> RunResult:
    """Do the run and show it."""
    from .progress import RunDisplay, plan_lines, show_result

    for line in plan_lines(made):
        shown.progress.print(line, markup=False, soft_wrap=True)
    shown.progress.print()
    with RunDisplay(shown.progress) as display:
        from ..pipeline import run as run_pipeline

        command = shlex.join(["quantadapt", *sys.argv[1:]])
        listener = _logging_to_folder(display, shown, Path(made.spec.output or "."))
        result = run_pipeline(made.spec, listener=listener, command=command)
    show_result(shown.progress, result.folder, result.metrics)
    return result


def _logging_to_folder(display: Listener, shown: Session, folder: Path) -> Listener:
    """Return `display`, which also moves the log into the run folder once that is there."""
    from ..run_folder import MARKER

    marker = folder / MARKER
    before = marker.stat().st_mtime_ns if marker.exists() else None
    moved = False

    def listener(event: str, data: Mapping[str, Any]) -> None:
        nonlocal moved
        if not moved and marker.exists() and marker.stat().st_mtime_ns != before:
            shown.move_log(folder / "log.txt")
            moved = True
        display(event, data)

    return listener
