"""Where data comes from: files, folders and hub data sets, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..inputs.documents import shown
from ..paths import is_local_path, path_problem
from ..spec import DataSpec
from .files import READERS, SUFFIXES, Row, arrow_rows, first_line
from .mistakes import each_done

HELD_OUT_NAMES = frozenset({"eval", "evaluation", "validation", "valid", "val", "dev", "test"})


def read(spec: DataSpec) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows); the latter may be empty."""
    own, named = each_done(
        [partial(_read_own, spec.path), partial(_read_named, spec.eval_path)],
    )
    return own[0], own[1] if spec.eval_path is None else named[0]


def _read_own(source: str | None) -> tuple[list[Row], list[Row]]:
    """Return what `read_source` does, of the demo where none is named."""
    if source is not None:
        return read_source(source)
    from ..demo import EVAL_FILE, TRAIN_FILE

    return _read_file(TRAIN_FILE), _read_file(EVAL_FILE)


def _read_named(source: str | None) -> tuple[list[Row], list[Row]]:
    """Return the rows of held-out data that are named, and none."""
    rows, held_out = ([], []) if source is None else read_source(source)
    return held_out or rows, []


def read_source(source: str) -> tuple[list[Row], list[Row]]:
    """Return the rows of a file, a folder or a hub id, and those that it holds out.

    Raises:
        DataError: it cannot be read, or holds nothing.
    """
    if problem := path_problem(source):
        raise DataError(f"it is no path: {problem}", fix="check the path", where=shown(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path), []
    if files := matching(source):
        return _read_files(files), []
    if is_local_path(source):
        fix = "check the spelling; a relative path starts at the current folder"
        raise DataError("there is no such file or folder", fix=fix, where=source)
    return _read_hub(source)


def _read_folder(folder: Path) -> tuple[list[Row], list[Row]]:
    train, held_out = _files_in(folder)
    train_rows, held_out_rows = each_done(partial(_read_files, part) for part in (train, held_out))
    return train_rows, held_out_rows


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder to train on and those that it holds out."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in READERS and f.is_file())
    if not files:
        what = "the folder holds no data files"
        raise DataError(what, fix=f"put files there that end in {SUFFIXES}", where=str(folder))
    held_out = [f for f in files if f.stem.lower() in HELD_OUT_NAMES]
    train = [f for f in files if f not in held_out]
    return (train, held_out) if train else (held_out, [])


def _read_files(files: Iterable[Path]) -> list[Row]:
    read = each_done(partial(_read_file, file) for file in files)
    return [row for rows in read for row in rows]


def _read_file(path: Path) -> list[Row]:
    rows = list(_rows_in(path))
    if not rows:
        fix = "write one example per line, or leave the file out"
        raise DataError("the file holds no examples", fix=fix, where=str(path))
    return rows


def _rows_in(path: Path) -> Iterator[Row]:
    """Yield the rows of a file as they are read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        ending = f"files ending in {path.suffix!r}" if path.suffix else "files without an ending"
        what = f"{ending} cannot be read"
        raise DataError(what, fix=f"use a file that ends in {SUFFIXES}", where=str(path))
    if not path.is_file():  # reading a pipe or a device may never end
        raise DataError("it is no file", fix="pass a file or a folder", where=str(path))
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror or error}", where=str(path)) from None


@dataclass(frozen=True)
class Rows:
    """The rows of a source, read anew by each call, one at a time.

    Attributes:
        train, held_out: yield them; `holds_out` says whether there are any of the latter.
        files: the local files among them; none of a hub id.
    """

    train: Callable[[], Iterator[Row]]
    held_out: Callable[[], Iterator[Row]]
    holds_out: bool = False
    files: tuple[Path, ...] = ()

    def held_out_or_all(self) -> Iterator[Row]:
        """Yield what is held out, or all where nothing is."""
        return self.held_out() if self.holds_out else self.train()


def rows_of(source: str | None) -> Rows:
    """Return the rows of a file, a folder, a pattern or a hub id; the demo's of None.

    Raises:
        DataError: there is no such thing.
    """
    if source is None:
        from ..demo import EVAL_FILE, TRAIN_FILE

        return _of_files([TRAIN_FILE], [EVAL_FILE])
    if problem := path_problem(source):
        raise DataError(f"it is no path: {problem}", fix="check the path", where=shown(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_files(*_files_in(path))
    if path.exists():
        return _of_files([path], [])
    if files := matching(source):
        return _of_files(files, [])
    if is_local_path(source) or has_magic(source):
        fix = "check the spelling; a relative path starts at the current folder"
        raise DataError("there is no such file or folder", fix=fix, where=source)
    return _of_hub(source)


def matching(source: str) -> list[Path]:
    """Return the files that a pattern such as `texts/*.jsonl` fits, by name."""
    if not has_magic(source):
        return []
    found = glob(str(Path(source).expanduser()), recursive=True)
    return sorted(path for path in map(Path, found) if path.is_file())


def _of_files(train: Iterable[Path], held_out: Iterable[Path]) -> Rows:
    train, held_out = tuple(train), tuple(held_out)

    def rows(files: Iterable[Path]) -> Iterator[Row]:
        for file in files:
            yield from _rows_in(file)

    return Rows(partial(rows, train), partial(rows, held_out), bool(held_out), (*train, *held_out))


def _of_hub(name: str) -> Rows:
    splits = _splits(name, streaming=True)
    held_out = _held_out_split(splits)

    def rows(split: str) -> Iterator[Row]:
        return _split_rows(splits[split], f"{name}[{split}]")

    return Rows(partial(rows, "train"), partial(rows, held_out or "train"), held_out is not None)


def _read_hub(name: str) -> tuple[list[Row], list[Row]]:
    splits = _splits(name)
    held_out = _held_out_split(splits)
    evaluation = _split_rows(splits[held_out], f"{name}[{held_out}]") if held_out else ()
    return [*_split_rows(splits["train"], f"{name}[train]")], [*evaluation]


def _splits(name: str, **options: Any) -> Any:
    """Return the splits of a data set of the hub, of which one is `train`. Raises DataError."""
    import datasets

    try:
        splits = datasets.load_dataset(name, **options)
    except Exception as error:  # the hub client raises errors of many libraries
        what = f"no such file or folder here, and not readable from the hub: {first_line(error)}"
        fix = "give the path of a local file, or check the hub id, the network and your access"
        raise DataError(what, fix=fix, where=name) from error
    if "train" not in splits:
        found = ", ".join(sorted(map(str, splits)))
        fix = "download the part that you want and give its path"
        raise DataError(f"the data set has no split 'train', only {found}", fix=fix, where=name)
    return splits


def _held_out_split(splits: Any) -> str | None:
    return next((split for split in ("validation", "test") if split in splits), None)


def _split_rows(split: Any, name: str) -> Iterator[Row]:
    """Yield the rows of a split; pictures in it are not decoded."""
    from datasets.features.features import require_decoding

    features = getattr(split, "features", None) or {}
    if any(map(require_decoding, features.values())):
        tables = split.with_format("arrow").iter(1000)
        return arrow_rows((row for table in tables for row in table.to_pylist()), name)
    return arrow_rows(split, name)


def local_files(spec: DataSpec) -> list[Path] | None:
    """Return the local files that `read` would read; None where a hub id is among them."""
    if spec.path is None and spec.eval_path is None:
        from ..demo import EVAL_FILE, TRAIN_FILE

        return [TRAIN_FILE, EVAL_FILE]
    paths = [Path(source).expanduser() for source in (spec.path, spec.eval_path) if source]
    if not all(path.exists() for path in paths):
        return None
    folders = [[*path.iterdir()] if path.is_dir() else [path] for path in paths]
    return [file for files in folders for file in files if file.suffix.lower() in READERS]
