"""Keeps what vendors print off the screen and in a log file.

Quantization libraries print banners, warn, and show progress bars, from Python and from C++. While
`Quiet` is on, everything that is written to stdout or stderr goes to the log, at the level of file
descriptors; `out` and `err` still reach the user.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}


class Quiet:
    """Redirects stdout and stderr to a log file between `start` and `stop`.

    Attributes:
        out, err: streams that reach the user whatever is redirected.
        log: the log file, once `move_log` or `kept_log` has given it a name. Before that it has
            none, so that nothing stays behind, however the process ends.
    """

    log: Path | None = None

    def __init__(self, on_warning: Callable[[str, type[Warning]], None]) -> None:
        self.on_warning = on_warning

    def start(self) -> None:
        """Begin to redirect."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with tempfile.TemporaryFile() as file:
            self._log_file = os.dup(file.fileno())
        self._streams = sys.stdout, sys.stderr
        self._flush()
        self.out = _user_stream(self._streams[0], 1)
        self.err = _user_stream(self._streams[1], 2)
        self._saved = _duplicate(1), _duplicate(2)
        self._point_at_log()
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warn

    def stop(self) -> None:
        """Undo everything."""
        warnings.showwarning = self._show_warning
        self._flush()
        sys.stdout, sys.stderr = self._streams
        for descriptor, saved in zip((1, 2), self._saved, strict=True):
            if saved is None:
                os.close(descriptor)
            else:
                os.dup2(saved, descriptor)
                os.close(saved)
        os.close(self._log_file)

    def kept_log(self) -> str:
        """Return the path of the log; it gets one if it has none. Empty if nothing was logged."""
        if self.log is None and self._logged():
            with suppress(OSError):  # a full disk must not hide what the command has to tell
                number, path = tempfile.mkstemp(prefix="quantadapt-", suffix=".log")
                os.close(number)
                self.move_log(Path(path))
        return str(self.log) if self.log and self.log.stat().st_size else ""

    def _logged(self) -> bytes:
        """Return what is in a log that has no name."""
        self._flush()
        size = os.fstat(self._log_file).st_size
        found, at = b"", os.lseek(self._log_file, 0, os.SEEK_SET)
        while at < size and (part := os.read(self._log_file, size - at)):
            found, at = found + part, at + len(part)
        return found

    def move_log(self, path: Path) -> None:
        """Go on logging in `path`, with all that was logged so far at its end."""
        logged = self.log.read_bytes() if self.log else self._logged()
        moved = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            with os.fdopen(os.dup(moved), "wb") as file:
                file.write(logged)
        except OSError:  # then it stays where it is
            os.close(moved)
            raise
        os.close(self._log_file)
        self._log_file, self.log = moved, path
        self._point_at_log()

    def write_log(self, text: str) -> None:
        """Append to the log, where the system lets us: a full disk must not cost the command."""
        self._flush()
        with suppress(OSError):
            os.write(self._log_file, text.encode("utf-8", "backslashreplace"))

    def _point_at_log(self) -> None:
        for descriptor in (1, 2):
            os.dup2(self._log_file, descriptor)
        sys.stdout, sys.stderr = _log_stream(1), _log_stream(2)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr, *self._streams):  # libraries may have kept those
            if stream is not None:
                with suppress(OSError):  # into the log, on a full disk
                    stream.flush()

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Show the user our own warnings; everybody else's go to the log."""
        if category.__module__.partition(".")[0] == "quantadapt":
            self.on_warning(str(message), category)
        text = warnings.formatwarning(message, category, filename, lineno)
        self.write_log(text)


def _duplicate(descriptor: int) -> int | None:
    try:
        return os.dup(descriptor)
    except OSError:  # closed by whoever started us
        return None


def _writes_to(stream: TextIO | None, descriptor: int) -> bool:
    try:
        return stream is not None and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _user_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a way to the user that stays: a stand-in's stream, or a duplicate of the real one."""
    if stream is not None and not _writes_to(stream, descriptor):
        return stream
    duplicate = _duplicate(descriptor)
    if stream is None or duplicate is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    return os.fdopen(duplicate, "w", buffering=1, encoding=stream.encoding, errors="replace")


class _LogFile(io.FileIO):
    """Loses what a full disk has no room for: what a library prints must not cost the command."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _log_stream(descriptor: int) -> TextIO:
    raw = _LogFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
