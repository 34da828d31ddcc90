"""`quantadapt run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..distributed.talking import stop
from ..distributed.world import as_launched, world
from ..errors import ENDED_EARLY
from .commands import add
from .flags import GpusOption, JsonOption, SpecFlags, with_spec_flags
from .session import Session, report_failure, session

if TYPE_CHECKING:
    from ..pipeline import Listener, RunResult
    from ..planning.planned import Plan


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
        "quantadapt run config.yaml --gpus 2 --set train.parallel=fsdp",
    )


def run(flags: SpecFlags, json: JsonOption = False, gpus: GpusOption = 1) -> None:
    """Quantize, attach, train, evaluate and export, as one run.

    Without anything it fine-tunes the bundled demo model. The run folder gets the adapter, the
    merged model where the combination allows one, all figures and report.html. Flags win over
    the YAML file, --set wins over both.
    """
    if gpus > 1 and world().size == 1:
        _launch(flags, json, gpus)
        return
    with session(as_json=json) as shown:
        from ..planning.stage import plan
        from ..quantizing.stage import with_config

        made = with_config(plan(as_launched(flags.spec()), check_output=world().is_main))
        result = _watched(made, shown)
        stop()
        if json:
            document = {"folder": str(result.folder), "plan": made.to_dict()}
            shown.print_json(document | {"metrics": result.metrics})


def _launch(flags: SpecFlags, json: bool, gpus: int) -> None:
    """Plan here, so that nothing is started in vain, and run this command line in processes."""
    from ..distributed.launching import launch
    from ..showing.screen import write

    with session(as_json=json):
        from ..planning.stage import plan

        made = plan(flags.spec(), processes=gpus)
    try:
        failure = launch([sys.executable, "-m", "quantadapt", *sys.argv[1:]], gpus)
    except KeyboardInterrupt as error:
        raise SystemExit(report_failure(error, sys.stderr)) from None
    if failure is not None and failure.exit_code in ENDED_EARLY:
        raise SystemExit(failure.exit_code)  # the first process has said why
    if failure is not None:
        _note_failure(_folder(made))
        write(sys.stderr, f"process {failure.rank} of {gpus} failed:\n{failure.text}\n")
        raise SystemExit(failure.exit_code)


def _folder(made: Plan) -> Path:
    return Path(made.spec.output or ".").expanduser()


def _note_failure(folder: Path) -> None:
    """Mark a run as failed whose first process could not do so."""
    from ..folders.run_folder import RunFolder

    run_folder = RunFolder(folder)
    if run_folder.marker.get("state") == "running":
        run_folder.set_state("failed")


def _watched(made: Plan, shown: Session) -> RunResult:
    """Do the run and show it."""
    from .progress import RunDisplay, plan_lines, show_result

    for line in plan_lines(made):
        shown.progress.print(line, markup=False, soft_wrap=True)
    shown.progress.print()
    with RunDisplay(shown.progress) as display:
        from ..pipeline import run as run_pipeline

        command = shlex.join(["quantadapt", *sys.argv[1:]])
        listener: Listener = display
        if world().is_main:
            listener = _logging_to_folder(display, shown, _folder(made))
        result = run_pipeline(made, listener=listener, command=command)
    show_result(shown.progress, result.folder, result.metrics)
    return result


def _logging_to_folder(display: Listener, shown: Session, folder: Path) -> Listener:
    """Return `display`, which also moves the log into the run folder once that is there."""
    from ..folders.run_folder import MARKER

    marker = folder / MARKER
    before = marker.stat().st_mtime_ns if marker.exists() else None
    moved = False

    def listener(event: str, data: Mapping[str, Any]) -> None:
        nonlocal moved
        if not moved and marker.exists() and marker.stat().st_mtime_ns != before:
            shown.move_log(folder / "log.txt")
            moved = True
        if event in ("note", "warning"):
            shown.quiet.write_log(f"{event}: {data['text']}\n")
        display(event, data)

    return listener
