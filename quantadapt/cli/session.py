"""What every built-in command runs in: consoles that reach the user, vendors kept quiet, and one
place where errors become sentences and exit codes.

    with session(as_json=json) as shown:
        shown.out.print("...")
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from ..errors import DataWarning
from ..showing.quietly import logged
from .commands import TRACEBACK
from .interrupts import HeardInterrupts
from .quiet import Quiet

if TYPE_CHECKING:
    from ..showing.screen import Screen

CANNOT: ContextVar[str] = ContextVar("CANNOT", default="")
"""What the command in hand cannot do where its options are wrong; empty: they are of a spec."""
INTERRUPTED = 130
_SPACE, _RIGHTS = "free space on that disk, or use another", "make it readable and writable"
_NAME, _OPEN = "use another name", "raise the limit of open files (ulimit -n)"
_OF_THE_SYSTEM = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), _NAME),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _OPEN),
    errno.EIO: "look whether the disk is whole",
}
"""What no command can do anything about -> what its user can."""
_PLAIN_WIDTH = 120


@dataclass
class Session:
    """What a command prints with.

    Attributes:
        out: stdout, for what the command is asked for.
        err: stderr, for everything else.
        as_json: one JSON document is wanted on `out`, and nothing else there.
    """

    out: Screen
    err: Screen
    as_json: bool
    quiet: Quiet

    @property
    def progress(self) -> Screen:
        """Where progress goes: never between the lines of a JSON document."""
        return self.err if self.as_json else self.out

    def note(self, text: str) -> None:
        """Tell the user something beside the results."""
        self.err.print(f"note: {text}", markup=False, soft_wrap=True)

    def warn(self, text: str, category: type[Warning]) -> None:
        """Show a warning of ours; one about the data stands out."""
        if category is DataWarning:
            self.err.print(f"warning: {text}", markup=False, soft_wrap=True, style="bold yellow")
        else:
            self.note(text)

    def print_json(self, value: object) -> None:
        """Print a JSON document; numbers that JSON cannot hold become null."""
        from ..showing.screen import visible_json

        text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)
        self.out.write(f"{visible_json(text)}\n")

    def move_log(self, path: Path) -> None:
        """Log into `path` from now on."""
        self.quiet.move_log(path)


class _Progress(logging.Handler):
    """Shows what a backend that takes long logs under "quantadapt" while it works."""

    def __init__(self, shown: Session) -> None:
        super().__init__(logging.INFO)
        self.shown, self.logger = shown, logging.getLogger("quantadapt")
        self.before = self.logger.level

    def start(self) -> None:
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)

    def stop(self) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)

    def emit(self, record: logging.LogRecord) -> None:
        self.shown.err.print(f"  {record.getMessage()}", style="dim", markup=False, soft_wrap=True)


@contextmanager
def session(*, as_json: bool = False) -> Iterator[Session]:
    """Run the body quietly. Whatever it raises ends in SystemExit with the right code."""
    quiet = Quiet(lambda text, category: shown.warn(text, category))
    quiet.start()
    shown = Session(_console(_of_main(quiet.out)), _console(quiet.err), as_json, quiet)
    progress = _Progress(shown)
    progress.start()
    code = 0
    try:
        with logged(), HeardInterrupts() as interrupts:
            yield shown
        code = interrupts.exit_code
        if code:
            shown.err.print("Interrupted too late: all was done, and what was written is whole.")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        code = _report(shown, _of_the_command(of_the_system(error)))
    finally:
        progress.stop()
        quiet.stop()
    if code:
        raise SystemExit(code)


def of_the_system(error: BaseException) -> BaseException:
    """Return what the system says no to as an error of ours; any other error as it is."""
    from ..errors import OutputError, QuantadaptError

    found: QuantadaptError | None = None
    if isinstance(error, MemoryError):
        fix = "use a smaller model or shorter examples, or a machine with more memory"
        found = QuantadaptError("the memory does not suffice", fix=fix)
    elif (number := _number(error)) in _OF_THE_SYSTEM:
        what = f"the system refuses it: {os.strerror(number).lower()}"
        found = OutputError(what, fix=_OF_THE_SYSTEM[number], where=_named(error))
    if found is None:
        return error
    found.__cause__ = error
    return found


def _of_the_command(error: BaseException) -> BaseException:
    """Let what is wrong with options begin with what the command cannot do: it takes no spec, or
    they are none of it."""
    from ..errors import SpecError

    if isinstance(error, SpecError) and (words := CANNOT.get()):
        error.begin_with(f"{words}, {{count}}:")
    return error


def _number(error: BaseException) -> int:
    """Return the system's number of an error; safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    return int(quoted[1]) if quoted else 0


def _named(error: BaseException) -> str:
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    return " and ".join(repr(str(name)).strip("'") for name in names if name is not None)


class _Lines:
    """What is written to it is printed on a console, broken between words."""

    def __init__(self, console: Screen) -> None:
        self.console = console

    def write(self, text: str) -> None:
        self.console.print(text, end="", markup=False, soft_wrap=True)


def report_failure(
    error: BaseException, stream: IO[str] | _Lines, log: Callable[[], str] = str
) -> int:
    """Print what went wrong, as sentences, and return the exit code.

    Args:
        error: a QuantadaptError has its own words and code; anything else is a bug.
        stream: where to.
        log: returns the file that holds the traceback, if there is one, and keeps it.
    """
    from ..errors import Interrupted, OutputError, QuantadaptError
    from ..showing.screen import write

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room there; for temporary files, TMPDIR names another folder"
        error = OutputError("the disk is full", fix=fix, where=str(error.filename or "?"))
    elif isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        fix = "make room in one of them, or name another folder by TMPDIR"
        error = OutputError(f"no temporary file can be written: {error.strerror}", fix=fix)
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        write(stream, "".join(traceback.format_exception(error)))
    if isinstance(error, Interrupted):
        write(stream, f"Interrupted {error}.\n")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        stream.write("Interrupted.\n")
        return INTERRUPTED
    if isinstance(error, QuantadaptError):
        write(stream, f"Error: {error}\n")
        if error.exit_code == 1 and (kept := log()):
            write(stream, f"Details are in {kept}\n")
        return error.exit_code
    kept = log()
    place = f"the traceback is in {kept}" if kept else f"{TRACEBACK}=1 shows the traceback"
    reason = " ".join(str(error).split())[:300]
    write(
        stream,
        f"Error: {type(error).__name__}: {reason}\n"
        f"This was not expected; {place}. Please report it together with that file.\n",
    )
    return 1


def _report(shown: Session, error: BaseException) -> int:
    from ..errors import PluginError, QuantadaptError
    from ..registry.blame import blamed

    if isinstance(error, UnicodeDecodeError) and (torn := _torn()):
        error = PluginError(f"{torn}, which torch and others read", fix="install that again")
    elif not isinstance(error, KeyboardInterrupt | QuantadaptError):
        error = blamed(error) or error
    expected = isinstance(error, KeyboardInterrupt | QuantadaptError)
    if not expected or error.__cause__ is not None:
        shown.quiet.write_log("".join(traceback.format_exception(error)))
    code = report_failure(error, _Lines(shown.err), shown.quiet.kept_log)
    if shown.as_json:
        shown.print_json(_error_document(error, code))
    return code


def _torn() -> str:
    """Return which installed distribution spoils the list of all entry points, and why."""
    from ..registry.discovery import torn_distributions

    return next((f"{torn.provenance}: {torn.reason}" for torn in torn_distributions()), "")


def _error_document(error: BaseException, code: int) -> dict[str, Any]:
    problems = [vars(problem) for problem in getattr(error, "problems", ())]
    kind, text = type(error).__name__, str(error)
    return {"error": {"type": kind, "message": text, "problems": problems, "exit_code": code}}


def _of_main(stream: TextIO) -> TextIO:
    """Return `stream`, or of several processes, for all but the first, one that nobody sees."""
    from ..distributed.world import world

    return stream if world().is_main else open(os.devnull, "w")


def _console(stream: TextIO) -> Screen:
    from ..showing.screen import Screen

    return Screen(stream, _width(stream))


def _width(stream: TextIO) -> int | None:
    """Return the width to use, or None to follow the terminal."""
    if stream.isatty():
        return None if sys.stdin is not None and sys.stdin.isatty() else _terminal_width(stream)
    return int(os.environ.get("COLUMNS", "0") or 0) or _PLAIN_WIDTH


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
