"""The examples that calibrating quantizers are shown: chosen, read, and checked.

Each is a mapping of what the model's forward takes; for language models
`{"input_ids": int64 tensor [1, length]}` on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import DataError, PlanRefused, Problem, warn
from ..planning.planned import Plan
from ..spec import Spec
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    Examples: TypeAlias = list[dict[str, Tensor]]
    Calibration: TypeAlias = str | Dataset | Examples | None

COUNT = 128
"""How many examples are used where nobody says."""
MIN_TOKENS = 64
"""Fewer tokens than that say nothing about a layer."""
_FIX = "pass a data file, or a list of {'input_ids': int64 tensor of shape [1, length]}"
_WHERE = "calibration"


class UnusedOptionWarning(UserWarning):
    """Something was given that has no effect."""


def examples_from(given: str | Dataset | Examples, tokenizer: Any) -> Examples:
    """Return examples from the name of a file, folder or hub id, a tokenized data set, or a list.

    Raises:
        DataError: there are none, too few, or they are something else.
    """
    if isinstance(given, str):
        from ..data.reading import load_everything

        if tokenizer is None:
            raise DataError("there is no tokenizer to read a file with", fix=_FIX, where=_WHERE)
        return choose(load_everything(given, tokenizer))
    return choose(given) if hasattr(given, "column_names") else checked(given)


def choose(data: Dataset, *, count: int = COUNT, seed: int = 0) -> Examples:
    """Return up to `count` examples of a tokenized data set, chosen by `seed`.

    Raises:
        DataError: there is no column `input_ids`, or too little data.
    """
    if "input_ids" not in getattr(data, "column_names", ["input_ids"]):
        raise DataError("the data set has no column input_ids", fix=_FIX, where=_WHERE)
    chosen = random.Random(seed).sample(range(len(data)), min(count, len(data)))
    return checked(_shown(data[index]) for index in chosen)


def _shown(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a model gets of a tokenized example, its pictures too."""
    import torch

    from ..data.pixels import pixels, types_of

    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, **types_of([row], ids.shape[1]), **pixels(row)}


def checked(examples: Any) -> Examples:
    """Return `examples` as a list. Raises DataError where they are no calibration data."""
    if isinstance(examples, (str, Mapping)) or not isinstance(examples, Iterable):
        what = f"calibration is {_kind(examples)}, not a list of examples"
        raise DataError(what, fix=_FIX, where=_WHERE)
    found = list(examples)
    if not found:
        raise DataError("there is no example in it", fix=_FIX, where=_WHERE)
    for index, example in enumerate(found):
        if problem := _problem(example):
            raise DataError(f"example {index} {problem}", fix=_FIX, where=_WHERE)
    ids = [example["input_ids"].numel() for example in found if "input_ids" in example]
    if ids and sum(ids) < MIN_TOKENS:
        what = f"{sum(ids)} tokens are too few to calibrate with"
        fix = f"give {MIN_TOKENS} tokens at the very least; a hundred examples are usual"
        raise DataError(what, fix=fix, where=_WHERE)
    return [dict(example) for example in found]


def check_vocabulary(examples: Examples, size: int | None) -> None:
    """Raise DataError where examples for a language model hold no token ids, or not its own.

    Args:
        examples: as `checked` returns them.
        size: how many token ids the model has, where that is known.
    """
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            what = f"example {index} has no input_ids, but {', '.join(map(repr, example))}"
            raise DataError(what, fix=_FIX, where=_WHERE)
        low, high = (int(bound) for bound in example["input_ids"].aminmax())
        if low < 0 or (size and high >= size):
            what = f"example {index} has the token id {low if low < 0 else high}"
            fix = f"tokenize it with the model's own tokenizer: its ids are 0 to {(size or 1) - 1}"
            raise DataError(what, fix=fix, where=_WHERE)


def _problem(example: Any) -> str:
    import torch

    if not isinstance(example, Mapping):
        return f"is {_kind(example)}, not a mapping of tensors"
    if not example or not any(isinstance(v, torch.Tensor) for v in example.values()):
        return "holds no tensor"
    ids = example.get("input_ids")
    if ids is None:
        return ""
    if not isinstance(ids, torch.Tensor):
        return f"has input_ids that are {_kind(ids)}, not a tensor"
    if ids.dtype not in (torch.int64, torch.int32):
        return f"has input_ids of {ids.dtype}, which are no token ids"
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.numel():
        return f"has input_ids of shape {list(ids.shape)}, expected [1, length]"
    return ""


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def calibration_examples(spec: Spec, tokenizer: Any, train: Callable[[], Dataset]) -> Examples:
    """Return what a run of `spec` shows a backend that calibrates; `train` gives its own data."""
    from ..data.reading import load_everything

    wanted = spec.data
    if wanted.calibration_path is None:
        source = train()
    else:
        source = load_everything(wanted.calibration_path, tokenizer, like=wanted)
    return choose(source, count=wanted.calibration_examples, seed=spec.seed)


def examples_for(plan: Plan, given: Calibration) -> Examples | None:
    """Return the calibration examples, checked, where the backend wants any."""
    from .. import demo

    if not plan.calibrates:
        if given is not None:
            needless = f"these options of {plan.backend.name} need no data"
            why = "the model is quantized already" if plan.adopt else needless
            warn(f"calibration is not used: {why}", UnusedOptionWarning, stacklevel=4)
        return None
    if given is None and plan.model == str(demo.MODEL_DIR):
        given = str(demo.TRAIN_FILE)
    if given is None:
        what = f"backend {plan.backend.name!r} calibrates, and there is no data to do it on"
        fix = "pass calibration=..., a data file or tokenized examples (--calibration FILE)"
        raise PlanRefused([Problem(what, fix, where="calibration")])
    tokenizer = load_tokenizer(plan.model) if isinstance(given, str) and plan.model else None
    examples = examples_from(given, tokenizer)
    vocabulary = (plan.config or {}).get("vocab_size")
    # A live module may be no language model, and one that is may be shown something else.
    if plan.model or (vocabulary and all("input_ids" in example for example in examples)):
        check_vocabulary(examples, vocabulary)
    return examples
