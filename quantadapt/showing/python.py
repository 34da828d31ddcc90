"""Progress of calls from Python: shown where somebody looks, on a terminal or in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..distributed.world import world
from .quietly import quietly

Listener = Callable[[str, Mapping[str, Any]], None]


@contextmanager
def display(verbose: bool | None) -> Iterator[Listener]:
    """Yield a listener that shows progress.

    Args:
        verbose: whether it does; None: on a terminal and in a notebook. Elsewhere, with True, come
            plain lines. Terminals and plain lines are those of stderr.
    """
    shows = somebody_looks() if verbose is None else verbose
    if not shows or not world().is_main:
        yield lambda event, data: None
        return
    from .display import RunDisplay
    from .notebook import NotebookDisplay
    from .screen import Screen

    kind, file = (NotebookDisplay, sys.stdout) if _is_notebook() else (RunDisplay, sys.stderr)
    plain: dict[str, Any] = {"force_terminal": False} if kind is NotebookDisplay else {}
    with kind(Screen(file, force_jupyter=False, **plain)) as shown:
        yield shown


@contextmanager
def stage(name: str, verbose: bool | None) -> Iterator[Listener]:
    """Show one stage by itself, with libraries kept quiet; yield a listener for what it tells."""
    with display(verbose) as tell, quietly():
        started = time.perf_counter()
        tell("stage", {"name": name, "state": "start"})
        yield tell
        seconds = time.perf_counter() - started
        tell("stage", {"name": name, "state": "done", "seconds": seconds})


def somebody_looks() -> bool:
    """Say whether this is a notebook, or stderr a terminal."""
    return _is_notebook() or bool(getattr(sys.stderr, "isatty", lambda: False)())


def _is_notebook() -> bool:
    """Say whether a notebook's kernel runs this; IPython on a terminal is none."""
    python = sys.modules.get("IPython")
    shell = getattr(python, "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
