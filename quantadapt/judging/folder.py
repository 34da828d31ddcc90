"""The folder that a comparison by a judge leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..folders.atomic import (
    in_words,
    is_free,
    locked,
    refuse_links_out,
    refuse_overlap,
    write_atomic,
)
from ..inputs.documents import read_object
from .judge import JUDGEMENTS
from .pairs import PAIRS

ANSWERS = ("answers-a.jsonl", "answers-b.jsonl")
_SETTINGS = "settings.json"


@contextmanager
def own_folder(
    folder: Path,
    made_with: Mapping[str, Any],
    judged_by: Mapping[str, Any] | None,
    *,
    inputs: Iterable[str | None],
    overwrite: bool,
) -> Iterator[None]:
    """Be the one who writes `folder`: a new one, or one that was begun with the same.

    Args:
        made_with: what the pairs depend on.
        judged_by: what the verdicts depend on; None where there will be none.
        inputs: what is read; none of it may lie in the folder, nor the folder in it.
        overwrite: remove what was made with something else.

    Raises:
        OutputError: it holds something else. FolderInUse: somebody is at work there.
    """
    file, wanted = folder / _SETTINGS, {"pairs": made_with, "judge": judged_by}
    refuse_overlap(folder, inputs)
    with locked(folder), in_words(folder):
        refuse_links_out(folder)
        if not file.exists() and not is_free(folder):
            fix = "choose another --output"
            raise OutputError("there is something else in it", fix=fix, where=str(folder))
        folder.mkdir(exist_ok=True)
        before = _read(file) or wanted
        same_pairs = before["pairs"] == wanted["pairs"]
        same_judge = None in (before["judge"], judged_by) or before["judge"] == judged_by
        if overwrite:
            _remove(folder, (JUDGEMENTS,) if same_pairs else (*ANSWERS, PAIRS, JUDGEMENTS))
        elif not (same_pairs and same_judge):
            other = "another judge" if same_pairs else "other models, questions or options"
            fix = "choose another --output, or pass --overwrite"
            raise OutputError(f"it was begun with {other}", fix=fix, where=str(folder))
        kept = before["judge"] if judged_by is None and not overwrite else judged_by
        write_json(file, {"pairs": made_with, "judge": kept})
        yield


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomic(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    if not os.path.lexists(file):
        return None
    fix = "choose another --output"
    found = read_object(file, OutputError, fix=fix)
    if not {"pairs", "judge"} <= found.keys():
        raise OutputError("it is damaged, or not ours", fix=fix, where=str(file))
    return {"pairs": found["pairs"], "judge": found["judge"]}


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        for ending in ("", ".partial"):
            (folder / f"{name}{ending}").unlink(missing_ok=True)
