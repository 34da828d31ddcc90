"""Libraries kept quiet in calls of ours, and as they were afterwards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from ..errors import DataWarning, SlowerWarning

P = ParamSpec("P")
R = TypeVar("R")

LIBRARIES = (
    *("transformers", "peft", "datasets", "trl", "accelerate", "huggingface_hub", "torch"),
)
_logs = False
"""Whether what libraries say goes to a log, where it can be found."""


@contextmanager
def logged() -> Iterator[None]:
    """Let libraries say what they like, all of which goes to a log."""
    global _logs
    before, _logs = _logs, True
    try:
        yield
    finally:
        _logs = before


@contextmanager
def quietly() -> Iterator[None]:
    """Keep progress bars, log messages below errors, and warnings of the libraries off the screen:
    those of transformers and the like, and of what the installed backends need. Warnings of ours,
    and of anybody else, come through; where all goes to a log (`logged`), all but the bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import torch  # noqa: F401  # they set levels of their loggers while they are imported
        from transformers.utils import logging as of_transformers

    names = [] if _logs else sorted({*LIBRARIES, *_of_backends()})
    before = {name: logging.getLogger(name).level for name in names}
    bars = of_transformers.is_progress_bar_enabled()
    reading = not datasets.are_progress_bars_disabled()
    # Its own function would switch the hub's off as well, which show how a download gets on.
    of_transformers._tqdm_active = False
    datasets.disable_progress_bars()
    errors = _Errors()
    _set_levels({name: max(level, logging.ERROR) for name, level in before.items()})
    for name in names:
        logging.getLogger(name).addFilter(errors)
    try:
        with warnings.catch_warnings():
            if names:
                warnings.filterwarnings("ignore", module=rf"({'|'.join(names)})(\.|$)")
            for ours in (DataWarning, SlowerWarning):  # wherever they are raised
                warnings.simplefilter("default", ours)
            yield
    finally:
        _set_levels(before)
        for name in names:
            logging.getLogger(name).removeFilter(errors)
        of_transformers._tqdm_active = bars
        if reading:
            datasets.enable_progress_bars()


def _set_levels(levels: Mapping[str, int]) -> None:
    """Give loggers their levels, all at once, where they have others: at each `setLevel` a thousand
    loggers forget what they know."""
    others = {name: n for name, n in levels.items() if logging.getLogger(name).level != n}
    for name, level in others.items():
        logging.getLogger(name).level = level
    if others:
        logging.root.setLevel(logging.root.level)


class _Errors(logging.Filter):
    """Lets errors pass, also where a library sets its logger's level while it is imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, in which libraries are quiet."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with quietly():
            return function(*args, **kwargs)

    return call


def _of_backends() -> set[str]:
    """Return the top-level modules that the installed backends import, and what the loggers of
    some are called: auto_round's is `autoround`."""
    from ..registry.discovery import registry

    names = {name.partition(".")[0] for b in registry().backends() for name in b.imports}
    return names | {name.replace("_", "") for name in names}
