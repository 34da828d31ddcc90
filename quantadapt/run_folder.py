"""The folder that a run leaves behind, and the way to write files and folders whole or not at all.

A run folder carries `quantadapt-run.json`. Without that marker a folder is somebody else's and is
never touched; with it, it is replaced only on request. Everything but the two logs appears
under its final name only when it is complete and on disk. It imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import OutputError
from .machine import installed_version

MARKER = "quantadapt-run.json"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
OTHER_OUTPUT = "choose another --output"

State = Literal["running", "finished", "failed", "interrupted"]
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunFolder:
    """One run's folder. Make it with `create`, read it with `open`.

    It holds `spec.yaml`, `plan.json`, `metrics.jsonl`, `metrics.json`, `environment.json`,
    `log.txt`, `report.html`, `adapter/`, `checkpoints/` and, where one was made, `merged/`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
    ) -> RunFolder:
        """Make the folder of a new run, or take up that of an earlier one.

        Args:
            path: where; missing parents are made, and an empty folder is taken as it is.
            overwrite: replace an earlier run. A folder without the marker is never replaced.
            resume: keep an earlier run and go on in it.
            inputs: what the run reads. An overwrite that would delete one of them is refused.

        Raises:
            OutputError: the folder cannot be used; nothing in it was touched.
        """
        folder = cls.check(path, overwrite=overwrite, resume=resume, inputs=inputs)
        with _in_words(folder.path):
            if resume:
                folder._take_up()
            else:
                folder._start(replace=not _is_free(folder.path))
        return folder

    @classmethod
    def check(
        cls,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
    ) -> RunFolder:
        """Raise what `create` would raise about the folder as it is; touches nothing."""
        folder = cls(Path(path).expanduser())
        if overwrite and resume:
            fix = "choose one: resume keeps the earlier run, overwrite deletes it"
            raise OutputError("overwrite and resume exclude each other", fix=fix)
        with _in_words(folder.path):
            if not resume and not _is_free(folder.path):
                folder._refuse_unless(overwrite, [Path(item) for item in inputs])
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the run folder at `path` for reading. Raises OutputError if it is none."""
        folder = cls(Path(path).expanduser())
        if not folder.marker:
            what = "there is no such folder" if not folder.path.exists() else "it is no run folder"
            fix = f"name a folder that holds {MARKER}; `quantadapt run` makes one"
            raise OutputError(what, fix=fix, where=str(path))
        return folder

    @property
    def marker(self) -> dict[str, Any]:
        """What the marker says: version, started, state. Empty if this is no run folder."""
        try:
            values = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) and "version" in values else {}

    def set_state(self, state: State) -> None:
        """Note in the marker how far the run got."""
        values = {**self.marker, "state": state}
        values.pop("ended", None)
        self.write_json(MARKER, values if state == "running" else {**values, "ended": _now()})

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the folder, whole or not at all."""
        path = self.path / name
        write_atomic(path, text)
        return path

    def write_json(self, name: str, value: object) -> Path:
        """Write a JSON file of the folder, whole or not at all; NaN and infinity become null."""
        return self.write_text(name, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the mapping in a JSON file of the folder; empty if there is no such file."""
        path = self.path / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"cannot read it: {error.strerror}", where=str(path)) from error
        except ValueError as error:
            fix = "restore the file, or delete it to go on without it"
            raise OutputError(f"not valid JSON: {error}", fix=fix, where=str(path)) from error
        return values if isinstance(values, dict) else {}

    def append_metric(self, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and flush it."""
        path = self.path / "metrics.jsonl"
        line = json.dumps(_plain(values), ensure_ascii=False) + "\n"
        with _in_words(path), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a line cut by a crash
            file.write(line.encode("utf-8", "backslashreplace"))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, without those that a resumed run went over again."""
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        kept: list[dict[str, Any]] = []
        for line in text.splitlines():
            values = _json_mapping(line)
            step = _step(values)
            if kept and step < _step(kept[-1]):
                kept = [earlier for earlier in kept if _step(earlier) < step]
            if values:
                kept.append(values)
        return kept

    def write_environment(self, distributions: Iterable[str] = ()) -> None:
        """Write `environment.json`; `distributions` are names or requirements, "hqq>=0.2.8"."""
        self.write_json("environment.json", environment(distributions))

    def _start(self, *, replace: bool) -> None:
        marker = {"version": installed_version("quantadapt"), "started": _now(), "state": "running"}
        if not replace and self.path.exists():  # empty, and perhaps a mount point: stay in place
            self.write_json(MARKER, marker)
            return
        with atomic_folder(self.path, overwrite=replace) as temporary:
            RunFolder(temporary).write_json(MARKER, marker)

    def _take_up(self) -> None:
        if not self.marker:
            what = "there is no earlier run to resume here"
            fix = "check --output, or start anew without resume"
            raise OutputError(what, fix=fix, where=str(self.path))
        for leftover in self.path.glob(".*.tmp"):  # of a run that was killed while writing
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        self.set_state("running")

    def _refuse_unless(self, overwrite: bool, inputs: list[Path]) -> None:
        """Raise unless this is an earlier run that may be replaced."""
        where = str(self.path)
        if not self.path.is_dir():
            raise OutputError("a file is in the way", fix=OTHER_OUTPUT, where=where)
        if not self.marker:
            what = "the folder is not empty and was not made by quantadapt"
            fix = f"{OTHER_OUTPUT}, or empty it yourself; --overwrite replaces only earlier runs"
            raise OutputError(what, fix=fix, where=where)
        if not overwrite:
            state, started = self.marker.get("state"), self.marker.get("started")
            what = f"the folder holds an earlier run ({state}, started {started})"
            fix = f"{OTHER_OUTPUT}, replace it with --overwrite, or go on with it: resume"
            raise OutputError(what, fix=fix, where=where)
        for used in [*inputs, Path.cwd()]:
            if used.expanduser().resolve().is_relative_to(self.path.resolve()):
                what = f"replacing the folder would delete {used}, which is in use"
                raise OutputError(what, fix=OTHER_OUTPUT, where=where)


class UnwrittenFolder(RunFolder):
    """The run folder as the processes see it that only help: they write nothing into it."""

    def write_text(self, name: str, text: str) -> Path:
        """Return where the first process writes it."""
        return self.path / name

    def append_metric(self, values: Mapping[str, Any]) -> None:
        """Leave it to the first process."""


@contextmanager
def atomic_folder(
    final: str | Path, *, overwrite: bool = False, needed: int | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` if the body succeeds, and is removed if not.

    Args:
        final: the folder to make. What is there stays untouched until the new one is on disk.
        overwrite: replace a folder that is not empty.
        needed: bytes that will be written, where known; refused at once if they do not fit.

    Raises:
        OutputError: `final` is taken, cannot be written, or the disk is full.
    """
    target = Path(final).expanduser().resolve()
    _refuse_occupied(target, overwrite)
    _refuse_if_too_small(target, needed)
    temporary = _beside(target, "tmp")
    try:
        with _in_words(target):
            temporary.mkdir(parents=True)
        yield temporary
        with _in_words(target):
            _sync_tree(temporary)
            _refuse_occupied(target, overwrite)
            _swap_in(temporary, target)
    except BaseException as error:
        full, written = _is_full(error, temporary), folder_size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if full and isinstance(error, Exception):
            raise _disk_full(target, written, needed) from error
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = _beside(path, "tmp")
    with _in_words(path):
        try:
            with temporary.open("xb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def folder_size(path: Path) -> int:
    """Return the bytes in all files below `path`; 0 if it does not exist."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def environment(distributions: Iterable[str] = ()) -> dict[str, Any]:
    """Return what this run depends on: machine, Python and versions; null is "not installed"."""
    names = [re.split(r"[^\w.-]", item.strip(), maxsplit=1)[0] for item in distributions]
    return {
        "quantadapt": installed_version("quantadapt"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "versions": {name: installed_version(name) for name in dict.fromkeys([*LIBRARIES, *names])},
    }


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # asked only if somebody has loaded it anyway
    if torch is not None:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(names.stdout.split("\n")).strip(", ") or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json_mapping(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:  # a line cut by a crash
        return {}
    return values if isinstance(values, dict) else {}


def _step(values: Mapping[str, Any]) -> float:
    step = values.get("step")
    return step if isinstance(step, (int, float)) else math.inf


def _plain(value: object) -> object:
    """Return `value` as something that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy and torch scalars
        return _plain(value.item())
    return str(value)


def _is_free(path: Path) -> bool:
    """Say whether nothing is at `path`, or only an empty folder."""
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def _beside(path: Path, ending: str) -> Path:
    """Return a new hidden name in the same folder, thus on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _refuse_occupied(final: Path, overwrite: bool) -> None:
    with _in_words(final):
        free = _is_free(final)
    if free or (overwrite and final.is_dir()):
        return
    if final.is_dir():
        what, fix = "the folder is not empty", "choose another folder, or let it be replaced"
    else:
        what, fix = "a file is in the way", "choose another folder"
    raise OutputError(what, fix=fix, where=str(final))


def _refuse_if_too_small(final: Path, needed: int | None) -> None:
    free = _free_space(final)
    if needed is not None and free is not None and needed > free:
        raise _disk_full(final, 0, needed)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder to disk, so that the rename cannot come before the contents."""
    for root, _, names in os.walk(folder, topdown=False):
        for file in (Path(root, name) for name in names):
            if not file.is_symlink():
                descriptor = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be flushed there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(new: Path, final: Path) -> None:
    """Put `new` at `final`; what was there is deleted last, or put back if that fails."""
    old = _beside(final, "old")
    try:
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        _sync_folder(final.parent)
    finally:
        if old.exists() and not new.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists() and not final.exists():
            os.rename(old, final)


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an OutputError."""
    try:
        yield
    except OSError as error:
        if _is_full(error, path):
            raise _disk_full(path, 0, None) from error
        reason = (error.strerror or str(error)).lower()
        fix = f"make {_existing(path)} writable, or {OTHER_OUTPUT}"
        raise OutputError(f"cannot write it: {reason}", fix=fix, where=str(path)) from error


def _is_full(error: BaseException | None, path: Path) -> bool:
    """Say whether a full disk or quota is behind `error`, whichever library reports it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error)  # safetensors quotes the system, torch.save says only that it failed
        if "No space left on device" in text or "os error 28" in text:
            return True
        if "inline_container.cc" in text and (_free_space(path) or 0) < 2**20:
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(path: Path, written: int, needed: int | None) -> OutputError:
    free = _free_space(path)
    facts = [
        f"{_bytes(needed)} are needed" if needed is not None else "",
        f"{_bytes(written)} had been written" if written else "",
        f"{_bytes(free)} are free" if free is not None else "",
    ]
    what = "not enough disk space: " + ", ".join(fact for fact in facts if fact)
    more = f"{_bytes(needed - (free or 0))} more" if needed and needed > (free or 0) else "space"
    fix = f"free {more} on the disk that holds {_existing(path)}, or {OTHER_OUTPUT}"
    return OutputError(what, fix=fix, where=str(path))


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    parents = path.absolute().parents
    return next((parent for parent in parents if os.path.isdir(parent)), parents[-1])


def _free_space(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _bytes(count: int) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(count) // 10), 4) if count > 0 else 0
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} bytes"
