"""Are the libraries of a backend or adapter there, new enough, and do they import? And what keeps
the state that they share in a process in order."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from traceback import walk_tb
from types import TracebackType
from typing import Any, TypeVar

from packaging.requirements import Requirement

from .errors import MissingDependency, Problem, TrainingError
from .inputs.likely_names import did_you_mean
from .machine import installed_version
from .records import Backend, Record, kind_of


def missing_requirements(record: Record) -> list[Problem]:
    """Return a problem for each distribution that is missing or too old. Imports nothing."""
    kind, extra = kind_of(record), getattr(record, "extra", "")
    problems = []
    for text in record.requires:
        requirement = Requirement(text)
        found = installed_version(requirement.name)
        if found is None:
            what = f"{kind} {record.name!r} needs {requirement.name}, which is not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            what = f"{kind} {record.name!r} needs {text}, but {found} is installed"
        else:
            continue
        problems.append(Problem(what, f"pip install '{extra or text}'", where=kind))
    return problems


_OF_BITSANDBYTES = ("bnb", "paged", "8bit", "lion", "ademamix")
_OF_OTHERS = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
}
"""How transformers' names of optimizers begin -> the library that it takes them from."""


def missing_for_optimizer(name: str) -> list[Problem]:
    """Return a problem if the optimizer that transformers calls `name` lacks its library."""
    library = next((of for begin, of in _OF_OTHERS.items() if name.startswith(begin)), "")
    if not library and name.startswith("adamw_torch_") and "bit" in name:
        library = "torchao"
    elif not library and any(part in name for part in _OF_BITSANDBYTES):
        library = "bitsandbytes"
    if not library or installed_version(library) is not None:
        return []
    what = f"the optimizer {name!r} needs {library}, which is not installed"
    return [Problem(what, f"pip install {library}, or use adamw_torch", "train.optim")]


TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{
        name: (name,) for name in ("trackio", "wandb", "mlflow", "codecarbon", "clearml", "dagshub")
    },
    **{name: (name,) for name in ("comet_ml", "dvclive", "kubeflow", "neptune", "swanlab")},
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
}
"""What transformers calls a tracker -> modules of which it needs one."""


def tracker_problems(wanted: Iterable[str]) -> list[Problem]:
    """Return which trackers there are not, or lack their library. `all` is those that are here."""
    found, where = [], "train.report_to"
    for name in wanted:
        if name in ("all", "none"):
            continue
        if name not in TRACKERS:
            found.append(Problem(f"there is no {name!r}", did_you_mean(name, TRACKERS), where))
        elif not any(map(find_spec, TRACKERS[name])):
            fix = f"pip install {name.replace('_', '-')}, or leave it out"
            found.append(Problem(f"{name} is not installed", fix, where))
    return found


def in_words(*libraries: str) -> str:
    """Return the libraries with their versions, e.g. `transformers 5.23.0 or trl 1.16.0`."""
    return " or ".join(f"{name} {installed_version(name) or ''}".rstrip() for name in libraries)


def moved(libraries: tuple[str, ...], what: str, otherwise: str) -> TrainingError:
    """Return the error for a library that does not do what is expected of it any more.

    Args:
        libraries: whose releases might have changed it.
        what: they no longer do, e.g. `does not call Trainer.training_step`.
        otherwise: what would have happened in silence.
    """
    names = " and ".join(libraries)
    fix = (
        f"install the {names} of constraints.txt, which this was tested with, or a newer quantadapt"
    )
    return TrainingError(f"{in_words(*libraries)} {what}: {otherwise}", fix=fix, where="train")


Function = TypeVar("Function", bound=Callable[..., Any])
_TURN = threading.RLock()


def in_turn(function: Function) -> Function:
    """Let threads that call `function`, or others that are marked so, take turns.

    While transformers loads and PEFT attaches, initializers and the default dtype are others for
    the whole process; all draw from one random state. A call within a call goes on at once.
    """

    @wraps(function)
    def turn(*args: Any, **kwargs: Any) -> Any:
        with _TURN:
            return function(*args, **kwargs)

    return turn  # type: ignore[return-value]


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Undo what libraries do to the whole process while they are imported: new variables in the
    environment, which other processes inherit, filters of warnings, a root logger that prints;
    frames that they keep. What they write to stdout is dropped."""
    environment, root = set(os.environ), logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with _no_frames_kept(), warnings.catch_warnings(), redirect_stdout(StringIO()):
            yield
    finally:
        for name in os.environ.keys() - environment:
            del os.environ[name]
        root.setLevel(level)
        root.handlers[:] = handlers


@contextmanager
def _no_frames_kept() -> Iterator[None]:
    """Take their traceback from errors that modules keep which were imported inside.

    Some keep why an optional import failed, to tell it later. With the traceback they would keep
    each frame that led there, up to the caller's, and with those the models that it works on.
    """
    before = set(sys.modules)
    yield
    if new := set(sys.modules) - before:
        for error in gc.get_objects():
            # by the type: `isinstance` asks some objects what they are
            if issubclass(type(error), Exception) and _passed(error.__traceback__, new):
                error.__traceback__ = None


def _passed(traceback: TracebackType | None, modules: set[str]) -> bool:
    frames = (frame for frame, _ in walk_tb(traceback))
    return any(frame.f_globals.get("__name__") in modules for frame in frames)


def import_requirements(backend: Backend) -> None:
    """Import what the backend needs. Raises MissingDependency with the reason if that fails."""
    for name in backend.imports:
        try:
            with _no_frames_kept(), redirect_stdout(StringIO()):  # some print a banner
                import_module(name)
        except Exception as error:
            fix = f"reinstall it: pip install --force-reinstall '{backend.extra or name}'"
            what = f"backend {backend.name!r} needs {name}, which fails to import: {error!r}"
            raise MissingDependency(what, fix=fix, where="backend") from error


@contextmanager
def errors_only(library: str) -> Iterator[None]:
    """Keep the advice that a library logs off the screen, but for errors."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
