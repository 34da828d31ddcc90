"""A run in a notebook: one line that changes, and below it what is done."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .display import GAP, RunDisplay

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 30


class NotebookDisplay(RunDisplay):
    """A `RunDisplay` without widgets, which many notebooks lack."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live = True
        self._handle: Any = None

    def _train_bar(self, step: int, most: int, numbers: list[tuple[int, str]]) -> None:
        filled = round(_BAR * step / max(most, 1))
        bar = "\N{FULL BLOCK}" * filled + "\N{LIGHT SHADE}" * (_BAR - filled)
        self._say(GAP.join([f"train {bar} {step}/{most}", *(text for _, text in numbers)]))

    def _wait(self, text: str) -> None:
        self._say(f"{text} ...")

    def _stop(self) -> None:
        if self._handle is not None:
            self._say("")

    def _say(self, text: str) -> None:
        """Put `text` in the place of what this line said before."""
        shown = {"text/plain": text}
        if self._handle is None:
            display = import_module("IPython.display").display
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
