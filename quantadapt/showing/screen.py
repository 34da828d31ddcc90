"""Where text goes out to a terminal: what data, names and errors hold is shown, and never obeyed,
and lines end between words.

Escape sequences could move the cursor, set the title or hide text; characters that turn the
direction of writing could show it in another order. Both are spelled out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import OBEYED, visible

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


def visible_json(text: str) -> str:
    """Return a JSON document with such characters as JSON escapes; it says the same."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Screen(Console):
    """A console that prints all text through `visible`, in tables and progress bars as well. Its
    lines end between words; what is no terminal gets them whole. Those of tables end with what is
    in their last cell, and not with blanks up to its width."""

    def __init__(self, file: TextIO, width: int | None = None, **options: Any) -> None:
        super().__init__(file=file, highlight=False, width=width, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As a Console does. Text that wraps softly is broken between words on a terminal."""
        if options.get("soft_wrap") and self.is_terminal:
            objects = tuple(self._broken(text, options.get("markup", True)) for text in objects)
        super().print(*(Trimmed(o) if isinstance(o, Table) else o for o in objects), **options)

    def write(self, text: str) -> None:
        """Write text as it is. Where nobody reads any more (`| head`), end as `print` does: with
        SystemExit and no words."""
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """As a Console does, also for a stream that is not `sys.stdout`: Python flushes it once
        more."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        super().on_broken_pipe()

    def _broken(self, text: Any, markup: bool) -> Any:
        text = self.render_str(text, markup=markup) if isinstance(text, str) else text
        return between_words(text, self.width) if isinstance(text, Text) else text

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of `renderable`; those that rich itself controls the screen with are
        left alone."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


class Trimmed:
    """What is printed without the blanks at the ends of its lines."""

    def __init__(self, printed: RenderableType) -> None:
        self.printed = printed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        """Yield the segments of its lines, without blanks at the ends."""
        for line in Segment.split_lines(console.render(self.printed, options)):
            while line and not line[-1].control and not line[-1].text.rstrip():
                line.pop()
            if line and not line[-1].control:
                text, style, _ = line.pop()
                line.append(Segment(text.rstrip(), style))
            yield from (*line, Segment.line())


def write(stream: Any, text: str) -> None:
    """Write lines of plain text to a stream that is no console."""
    stream.write(visible(text))


def between_words(text: Text, width: int) -> Text:
    """Return `text` in lines of at most `width` that end between words and begin as far in as the
    line that they come from. A word that is longer, such as a path, is a line of its own."""
    made: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        indent = len(line.plain) - len(line.plain.lstrip())
        starts, begin = list[int](), 0
        for word in re.finditer(r"\S+", line.plain):
            room = width - (indent if starts else 0)
            if word.end() - begin > room and word.start() > max(begin, indent):
                starts.append(begin := word.start())
        first, *others = line.divide(starts)
        made += [first, *(Text(" " * indent) + other for other in others)]
    for line in made:
        line.rstrip()
    return Text("\n").join(made)
