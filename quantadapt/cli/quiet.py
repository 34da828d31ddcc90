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
from pathlib import Path
from typing import TextIO

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
        log: the log file; a temporary one until `move_log` puts it where it belongs.
    """

    def __init__(self, on_warning: Callable[[str, type[Warning]], None]) -> None:
        self.on_warning = on_warning
        self._temporary = True

    def start(self) -> None:
        """Begin to redirect."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        number, path = tempfile.mkstemp(prefix="quantadapt-", suffix=".log")
        self.log, self._log_file = Path(path), number
        self._streams = sys.stdout, sys.stderr
        self._flush()
        self.out = _user_stream(self._streams[0], 1)
        self.err = _user_stream(self._streams[1], 2)
        self._saved = _duplicate(1), _duplicate(2)
        self._point_at_log()
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warn

    def stop(self, *, keep_log: bool) -> None:
        """Undo everything. A temporary log goes, unless it is to be kept and holds something."""
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
        if self._temporary and not (keep_log and self.log.stat().st_size):
            self.log.unlink(missing_ok=True)

    def move_log(self, path: Path) -> None:
        """Go on logging in `path`, with all that was logged so far at its end."""
        self._flush()
        with path.open("ab") as file:
            file.write(self.log.read_bytes())
        if self._temporary:
            self.log.unlink(missing_ok=True)
        os.close(self._log_file)
        self._log_file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.log, self._temporary = path, False
        self._point_at_log()

    def write_log(self, text: str) -> None:
        """Append to the log."""
        self._flush()
        os.write(self._log_file, text.encode("utf-8", "backslashreplace"))

    def _point_at_log(self) -> None:
        for descriptor in (1, 2):
            os.dup2(self._log_file, descriptor)
        if not _writes_to(self._streams[0], 1):
            sys.stdout = _log_stream(1)
        if not _writes_to(self._streams[1], 2):
            sys.stderr = _log_stream(2)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
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


def _log_stream(descriptor: int) -> TextIO:
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
