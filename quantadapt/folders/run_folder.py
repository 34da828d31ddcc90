"""The folder that a run leaves behind.

A run folder carries `quantadapt-run.json`. Without that marker a folder is somebody else's and is
never touched; with it, it is replaced only on request, and only if nothing else lies in it
(`RunFolder.names`). Whoever makes or takes up a run has the folder alone (`lock`) until `release`.
Everything but the two logs appears under its final name only when it is complete and on disk
(`atomic`). It imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import Any, Literal

from ..errors import OutputError
from ..inputs.documents import parsed, read_object
from ..machine import installed_version
from .atomic import (
    OTHER_OUTPUT,
    clear_up,
    in_words,
    is_free,
    put_back,
    refuse_links_out,
    refuse_occupied,
    refuse_overlap,
    refuse_unwritable,
    tidy,
    unlocked_folder,
    write_atomic,
)
from .environment import environment
from .lock import Lock, refuse_in_use, take
from .written import Names, leftovers

MARKER = "quantadapt-run.json"

State = Literal["running", "finished", "failed", "interrupted"]

_FILES = (
    *(MARKER, "spec.yaml", "plan.json", "metrics.jsonl", "metrics.json", "environment.json"),
    *("log.txt", "report.html"),
)
_NAMES: Names = {
    **{name: {} for name in (*_FILES, "adapter", "base", "merged")},
    "checkpoints": {"checkpoint-*": {}},
    "runs": {"*": {"events.out.tfevents.*": {}}},
}
"""What a run writes; each folder has its own list. `runs` is tensorboard's."""


class RunFolder:
    """One run's folder. Make it with `create`, read it with `open`.

    It holds `spec.yaml`, `plan.json`, `metrics.jsonl`, `metrics.json`, `environment.json`,
    `log.txt`, `report.html`, `adapter/`, `checkpoints/` and, where one was made, `base/` and
    `merged/`.
    """

    _lock: Lock | None = None

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
            inputs: what the run reads. None may lie in the folder, nor the folder in one of them.

        Raises:
            OutputError: the folder cannot be used; nothing in it was touched.
            FolderInUse: another process has it.
        """
        folder = cls.check(path, overwrite=overwrite, resume=resume, inputs=inputs)
        with in_words(folder.path):
            target = folder.path.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            folder._lock = take(target)
            try:
                clear_up(target)
                for inner in (target, target / "checkpoints"):
                    for name in {name for name, _, _ in leftovers(inner)}:
                        tidy(inner / name)
                cls.check(path, overwrite=overwrite, resume=resume, inputs=inputs, locked=True)
                if resume and folder.marker:
                    folder.set_state("running")
                else:
                    folder._start(replace=not is_free(folder.path))
            except BaseException:
                folder.release()
                raise
        return folder

    @classmethod
    def check(
        cls,
        path: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
        locked: bool = False,
    ) -> RunFolder:
        """Raise what `create` would raise about the folder as it is; touches nothing, but for what
        a process left that died while it replaced the folder.

        Args:
            locked: the caller has the folder's lock.
        """
        folder = cls(Path(path).expanduser())
        if overwrite and resume:
            fix = "choose one: resume keeps the earlier run, overwrite deletes it"
            raise OutputError("overwrite and resume exclude each other", fix=fix)
        if not locked:
            refuse_in_use(folder.path)
        begun = locked or folder._was_begun
        put_back(folder.path)
        if resume and not folder.marker and not (begun and is_free(folder.path)):
            what = "there is no earlier run to resume here"
            fix = "check --output, or start anew without resume"
            raise OutputError(what, fix=fix, where=str(folder.path))
        with in_words(folder.path):
            if resume:
                folder._refuse_changed()
            elif not is_free(folder.path):
                folder._refuse_unless(overwrite)
            refuse_unwritable(folder.path)
        if not resume:
            refuse_overlap(folder.path, inputs)
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the run folder at `path` for reading. Raises OutputError if it is none."""
        folder = cls(put_back(Path(path)))
        if not folder.marker:
            what = "there is no such folder" if not folder.path.exists() else "it is no run folder"
            fix = f"name a folder that holds {MARKER}; `quantadapt run` makes one"
            raise OutputError(what, fix=fix, where=str(path))
        return folder

    @property
    def marker(self) -> dict[str, Any]:
        """What the marker says: version, started, state. Empty if this is no run folder."""
        try:
            values = read_object(self.path / MARKER, OutputError)
        except OutputError:
            return {}
        return values if "version" in values else {}

    @property
    def _was_begun(self) -> bool:
        """Whether a process died here before there was a marker."""
        above = self.path.resolve()
        return any(name == above.name for name, _, _ in leftovers(above.parent)) or any(
            name == MARKER for name, _, _ in leftovers(above)
        )

    @property
    def names(self) -> Names:
        """What in the folder is the run's: `spec.yaml`, `adapter/`, its exports, and so on."""
        given = self.marker.get("exports")
        exports = given if isinstance(given, list) else []
        # The marker may come from elsewhere: what it names is a folder of a plain name, which has
        # a list of its own.
        folders = [
            name for name in exports if isinstance(name, str) and _is_folder(self.path, name)
        ]
        return {**_NAMES, **{escape(name): {} for name in folders}}

    def note_exports(self, names: Iterable[str]) -> None:
        """Note the folders that exports will write, so that they are the run's."""
        self.write_json(MARKER, {**self.marker, "exports": sorted(names)})

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
        return self.write_text(
            name, json.dumps(json_ready(value), indent=2, ensure_ascii=False) + "\n"
        )

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the mapping in a JSON file of the folder; empty if there is no such file."""
        path = self.path / name
        if not os.path.lexists(path):
            return {}
        fix = "restore the file, or delete it to go on without it"
        return read_object(path, OutputError, fix=fix)

    def append_metric(self, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and flush it."""
        path = self.path / "metrics.jsonl"
        line = json.dumps(json_ready(values), ensure_ascii=False) + "\n"
        with in_words(path), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a line cut by a crash
            file.write(line.encode("utf-8", "backslashreplace"))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, without those that a resumed run went over again."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
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
        with unlocked_folder(self.path.resolve()) as temporary:
            RunFolder(temporary).write_json(MARKER, marker)

    def _refuse_changed(self) -> None:
        """Raise where a resumed run would replace what somebody put into its folders, or write to
        another place: a run folder may come from elsewhere, with links in it."""
        refuse_links_out(self.path, "checkpoints")
        for name in self.names:
            if name not in ("checkpoints", "runs") and (self.path / name).is_dir():
                refuse_occupied(self.path / name, overwrite=True)

    def _refuse_unless(self, overwrite: bool) -> None:
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
            fix = f"{OTHER_OUTPUT}, replace it with --overwrite, or go on with it with --resume"
            raise OutputError(what, fix=fix, where=where)
        refuse_occupied(self.path, overwrite, self.names)


class UnwrittenFolder(RunFolder):
    """The run folder as the processes see it that only help: they write nothing into it."""

    def write_text(self, name: str, text: str) -> Path:
        """Return where the first process writes it."""
        return self.path / name

    def append_metric(self, values: Mapping[str, Any]) -> None:
        """Leave it to the first process."""


def _is_folder(folder: Path, name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and (folder / name).is_dir()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json_mapping(line: str) -> dict[str, Any]:
    try:
        values = parsed(line)
    except ValueError:  # a line cut by a crash
        return {}
    return values if isinstance(values, dict) else {}


def _step(values: Mapping[str, Any]) -> float:
    step = values.get("step")
    return step if isinstance(step, (int, float)) else math.inf


def json_ready(value: object) -> object:
    """Return `value` as something that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_ready(dataclasses.asdict(value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy and torch scalars
        return json_ready(value.item())
    return str(value)
