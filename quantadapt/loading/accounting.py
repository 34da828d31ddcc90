"""Every tensor of a checkpoint is accounted for: what transformers says of a load is read.

A tensor that the model wants and no file holds would start at random: refused by name, unless it
is of a module that was asked to be new. A tensor that no module takes is told, or refused where it
shows that files and config are not of one model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, Problem, ProblemsError, warn
from ..model.modules import is_skipped
from .heads import head_names, new_modules, wants_head

if TYPE_CHECKING:
    from torch import nn

_new: ContextVar[tuple[str, ...]] = ContextVar("new", default=())
_unused: ContextVar[tuple[str, ...]] = ContextVar("unused", default=())
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)
_TOLD = 3
"""So many names of a kind are told; the rest is counted."""
_AGAIN = "download it again, or check that config.json and the weights belong together"


class UnusedTensorsWarning(UserWarning):
    """A checkpoint holds tensors that the model has no place for."""


class WrongTensors(ProblemsError, ModelError):
    """The tensors of a checkpoint are not those of the model, or not all of them."""

    heading = "the checkpoint does not fit its model, {count}:"


@contextmanager
def expecting(new: Iterable[str] = (), unused: Iterable[str] = ()) -> Iterator[list[str]]:
    """Inside, modules named in `new` may be missing in a checkpoint, too, and those in `unused` be
    there without a place in the model. Names are as in `skip_modules`. What is told of others is
    in the list that is yielded, too."""
    notes: list[str] = []
    tokens = _new.set((*_new.get(), *new)), _unused.set((*_unused.get(), *unused))
    told = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(told)
        _new.reset(tokens[0])
        _unused.reset(tokens[1])


class OwnReport:
    """Inside, transformers does not log its table of tensors: `account` tells what is in it.

    Attributes:
        broken: names of those that could not be made of what the files hold.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.logger = logging.getLogger("transformers.modeling_utils")

    def __enter__(self) -> None:
        self.before, self.shown = self.logger.level, self.logger.getEffectiveLevel()
        self.logger.addFilter(self._wanted)
        self.logger.setLevel(min(self.shown, logging.WARNING))

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.before)
        self.logger.removeFilter(self._wanted)

    def _wanted(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        self.broken += re.findall(r"^(\S+)\s*\|.*CONVERSION", text, re.MULTILINE)
        told = "LOAD REPORT" not in text or bool(self.broken)  # then it has the reasons
        return told and record.levelno >= self.shown


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, what starts at random does so alike each time; the process's own state is kept."""
    import torch

    if not (_new.get() or wants_head()):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def account(
    model: nn.Module,
    source: str,
    info: Mapping[str, Any],
    consumed: Collection[str] = (),
    lacking: Callable[[Collection[str]], tuple[Collection[str], list[str]]] | None = None,
) -> None:
    """Raise WrongTensors, or warn, where the tensors of `source` are not those of `model`.

    Args:
        model: as transformers loaded it.
        source: folder or hub id.
        info: transformers' `output_loading_info`.
        consumed: names that transformers found no place for, but somebody else has used.
        lacking: returns which parameters of another shape are made of tensors that are not all
            there, and says what is lacking.
    """
    new, unused = _new.get(), _unused.get()
    unexpected = sorted(set(info["unexpected_keys"]) - set(consumed))
    unexpected = [key for key in unexpected if not is_skipped(key, unused)]
    if wants_head():
        new = (*new, *head_names(model))
        unexpected = _without_old_head(model, unexpected)
    random = [key for key in info["missing_keys"] if is_skipped(key, new)]
    model.begun_at_random = new_modules(random)  # type: ignore[assignment]
    missing = sorted(key for key in info["missing_keys"] if not is_skipped(key, new))
    mismatched = sorted(info["mismatched_keys"])
    problems = [_missing(missing, unexpected)] if missing else []
    cut, words = lacking([name for name, *_ in mismatched]) if lacking else ((), [])
    problems += [Problem(what, _AGAIN) for what in words[:_TOLD]]
    if further := len(words[_TOLD:]):
        problems.append(Problem(f"so it is with {further} more", _AGAIN))
    other = [entry for entry in mismatched if entry[0] not in cut]
    problems += [_mismatch(*entry) for entry in other[:_TOLD]]
    more = _further(model, unexpected)
    if more and not missing:
        problems.append(_of_more(more))
    if beside := _beside(model, unexpected):
        problems.append(_without_place(beside))
    if problems:
        raise WrongTensors([_at(problem, source) for problem in problems])
    if unexpected:
        text = f"{source} holds tensors that the model does not use: {listed(unexpected)}"
        warn(text, UnusedTensorsWarning, stacklevel=2)
        if (notes := _notes.get()) is not None:
            notes.append(text)


def _without_old_head(model: nn.Module, unexpected: list[str]) -> list[str]:
    """Return the names of tensors that no module takes, without those of the head that the
    checkpoint has in place of the one that is wanted; those are told."""
    inside = f"{getattr(model, 'base_model_prefix', '')}."
    old = [name for name in unexpected if not name.startswith(inside)]
    if old and (notes := _notes.get()) is not None:
        notes.append(f"the checkpoint's own head is left out: {listed(old)}")
    return [name for name in unexpected if name not in old]


def account_for(model: nn.Module, source: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Do what `account` does for a model that is not read through transformers, but for what is
    missing.

    Args:
        model: all of it, on whatever device.
        source: folder or hub id.
        shapes: of the tensors in its files, under the names of the model.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    info: dict[str, list[Any]] = {
        "unexpected_keys": [
            name
            for name in shapes
            if name not in wanted and not any(re.search(pattern, name) for pattern in ignored)
        ],
        "missing_keys": [],
        "mismatched_keys": [
            (name, shape, wanted[name])
            for name, shape in shapes.items()
            if name in wanted and shape != wanted[name]
        ],
    }
    account(model, source, info)


def without_tensors(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules of `model` with parameters of their own for which none of `names`, those
    of the tensors in the files, is there: for loads that broke without a word on it."""
    split = [name.split(".") for name in names]
    held = {".".join(parts[:n]) for parts in split for n in range(len(parts))}
    tied = {name.rpartition(".")[0] for name in getattr(model, "all_tied_weights_keys", ())}
    own = [name for name, module in model.named_modules() if name and module._parameters]
    found = [name for name in own if name not in held and name not in tied]
    return found if len(found) < len(own) / 2 else []  # or the names are others altogether


_EXPERT = re.compile(r"(.*?\.(\d+)\..*?experts\.(\d+)\.).+")
"""A tensor of one expert: up to its part, with its layer and its number."""


def lacks(lost: Iterable[str], there: Collection[str], kind: str = "") -> list[str]:
    """Say which tensors a checkpoint lacks, expert by expert where experts are stored one by one.

    Args:
        lost: the names of those tensors.
        there: the names of those that it has.
        kind: what stands before the names.
    """
    by_expert: dict[tuple[str, ...], list[str]] = {}
    for name in lost:
        found = _EXPERT.fullmatch(name)
        by_expert.setdefault(found.groups() if found else (), []).append(name)
    words = []
    for of, names in by_expert.items():
        said = f"it has no {kind}{listed(names)}"
        if of:
            cut = any(name.startswith(of[0]) for name in there)
            state = "is not whole" if cut else "is missing"
            said = f"expert {of[2]} of layer {of[1]} {state}: {said}"
        words.append(said)
    return words


def listed(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    first = ", ".join(list(names)[:_TOLD])
    return f"{first} and {len(names) - _TOLD} more" if len(names) > _TOLD else first


def _at(problem: Problem, source: str) -> Problem:
    return Problem(problem.what, problem.fix, where=source)


def _missing(missing: list[str], unexpected: list[str]) -> Problem:
    what = f"it has no {listed(missing)}, which would start at random"
    ending = next((k for k in unexpected if k.endswith(tuple(f".{m}" for m in missing))), None)
    if ending:
        name = next(m for m in missing if ending.endswith(f".{m}"))
        what += f"; its names begin with {ending.removesuffix(name)!r}"
        fix = "save it again without that prefix, e.g. the base model and not a wrapper around it"
        return Problem(what, fix)
    modules = sorted({name.rpartition(".")[0] or name for name in missing})
    if len(modules) <= _TOLD:
        fix = f"download it again; or, if they shall be new, new_modules: [{', '.join(modules)}]"
    else:
        fix = _AGAIN
    return Problem(what, fix)


def _mismatch(name: str, has: Iterable[int], wanted: Iterable[int]) -> Problem:
    what = f"its {name} has the shape {list(has)}, its config wants {list(wanted)}"
    return Problem(what, "check that config.json and the weights belong together")


def _further(model: nn.Module, unexpected: list[str]) -> list[str]:
    """Return names that differ from names of the model in a number alone: of further layers."""
    if not unexpected:
        return []
    known = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    return [name for name in unexpected if re.sub(r"\d+", "0", name) in known]


def _beside(model: nn.Module, unexpected: list[str]) -> list[str]:
    """Return weights and biases of layers that the model has, but without them."""
    modules = dict(model.named_modules()) if unexpected else {}
    split = [(name, *name.rpartition(".")[::2]) for name in unexpected]
    return [
        name
        for name, parent, part in split
        if part in ("weight", "bias") and parent in modules and modules[parent]._parameters
    ]


def _without_place(names: list[str]) -> Problem:
    what = f"its config makes layers without what it holds for them: {listed(names)}"
    return Problem(what, "check that config.json and the weights belong together")


def _of_more(further: list[str]) -> Problem:
    what = f"it holds more layers than its config has: {listed(further)}"
    module = re.match(r".*?\.\d+(?=\.)|[^.]+", further[0])
    named = module.group() if module else further[0]
    fix = "check that config.json and the weights belong together"
    return Problem(what, f"{fix}; or, to leave them out, unused_modules: [{named}, ...]")
