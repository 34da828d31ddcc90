"""What displays of long work share: they are told events, and show a bar for each part that is
under way, on a terminal alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rich.console import Console


class Bars:
    """A listener; use it as a context manager. A subclass handles an event in `on_EVENT`.

    Args:
        console: what it writes to.
        before: columns before the others.
    """

    def __init__(self, console: Console, *before: ProgressColumn) -> None:
        self.console = console
        self._live = Progress(
            *before,
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Show one event; those it does not know are passed over."""
        handler = getattr(self, f"on_{event}", None)
        if handler is not None:
            handler(facts)
