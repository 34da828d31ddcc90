"""What the functions of Python are given as data: names of files, which are still to be read as a
spec says, or a tokenized Dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distributed.world import world
from ..errors import QuantadaptError
from ..spec import Spec
from .held_out import needed

if TYPE_CHECKING:
    from datasets import Dataset

    from ..protocols import Task


def examples_of(
    data: Any,
    measured: Dataset | None,
    task: Task,
    spec: Spec,
    tokenizer: Any,
    note: Callable[[str], None],
) -> tuple[Dataset, Dataset | None]:
    """Return the examples to learn from, and those to measure on, if any: read as `spec` says
    where they are only named, else as they were given.

    Args:
        data: see `train`.
        measured: what is given to measure on, tokenized.
    """
    if not is_named(data):
        if spec.data.eval_path is None:
            return data, measured
        alone = spec.data.model_copy(update={"path": spec.data.eval_path})
        return data, task.read(alone, needed(tokenizer), seed=spec.seed).eval
    read = task.read_for(spec, needed(tokenizer), processes=world().size)
    if measured is not None:
        note(f"data: eval_data is measured on, and not the {len(read.eval):,} held out")
    for text in read.report.words():
        note(f"data: {text}")
    return read.train, read.eval if measured is None else measured


def is_named(data: Any) -> bool:
    """Say whether data are still to be read: the demo's (None), a name, a list of sources."""
    return data is None or isinstance(data, str | Path | list)


def named_in_spec(data: Any, max_length: int | None) -> dict[str, Any]:
    """Return what a spec says of data that are not tokenized yet."""
    given = {} if max_length is None else {"max_length": max_length}
    if isinstance(data, list):
        return {"sources": data, **given}
    return {"path": str(data), **given} if isinstance(data, str | Path) else given


def named_to_measure_on(eval_data: Any) -> dict[str, Any]:
    """Return what a spec says of held-out data that are not tokenized yet: all of them."""
    if not isinstance(eval_data, str | Path):
        return {}
    return {"eval_path": str(eval_data), "eval_examples": sys.maxsize}


def refuse_length(max_length: int | None, *data: Any) -> None:
    """Raise QuantadaptError where a longest example is given and none of `data` is read."""
    if max_length is None or any(map(is_named, data)):
        return
    what = "max_length has no effect on a Dataset that is tokenized already"
    fix = "leave it out, and cut the examples yourself: dataset.map(lambda e: {k: v[:n] ...})"
    raise QuantadaptError(what, fix=fix)


def refuse_unmeasured(spec: Spec, eval_data: Any) -> None:
    """Raise QuantadaptError where there is something to measure on, and nothing says when."""
    if eval_data is not None and spec.train.validates == "no":
        what = "eval_data has no effect where nothing says when to measure on it"
        raise QuantadaptError(what, fix="pass eval_steps=..., or eval_strategy='epoch'")
