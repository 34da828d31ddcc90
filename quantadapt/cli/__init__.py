"""The command line: `quantadapt ...`.

`quantadapt --help` and `--version` are answered here, from the table in `commands`, before typer
or anything else is imported; every other command imports its own module only. Commands that
plugins add are looked for when a command is none of ours, so plugins never slow ours down.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit with the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--traceback" in arguments:
        from .commands import TRACEBACK

        arguments.remove("--traceback")
        os.environ[TRACEBACK] = "1"
    if arguments in ([], ["--help"], ["-h"], ["help"]):
        from .commands import overview

        raise SystemExit(_write(overview()))
    if arguments in (["--version"], ["-V"]):
        from .. import __version__

        raise SystemExit(_write(f"quantadapt {__version__}\n"))
    # It reads every entry_points.txt there is, and one that is torn would end each command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from .app import run_app

    run_app(arguments)


def _write(text: str) -> int:
    """Write to stdout and return the exit code: 1, without words, where nobody reads any more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 1
    return 0
