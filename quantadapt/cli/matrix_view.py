"""How the matrix is printed: tables, footnotes, and what became of the cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from .session import Session

if TYPE_CHECKING:
    from rich.table import Table

    from ..matrix.declared import DeclaredCell
    from ..matrix.results import Verified, VerifiedCell

_STYLES = {"requantize": "green", "dense": "green", "never": "yellow", "refused": "red"}
OUTCOMES = {
    "passed": "green",
    "refused": "yellow",
    "failed": "bold red",
    "crashed": "bold red",
    "not run": "dim",
}
_SHORT = {"requantize": "requant"}
_NARROW = 100
"""Below so many columns, one blank between them has to do."""


def show_matrix(
    shown: Session, cells: Sequence[DeclaredCell], results: Sequence[Verified], where: str
) -> None:
    """Print the declared matrix, and below it what was verified."""
    from ..matrix.declared import MEANING, footnotes
    from ..matrix.tables import experts_words
    from ..registry.discovery import registry

    notes = list(footnotes(cells))
    words = {(cell.backend, cell.adapter): _declared_word(cell, notes) for cell in cells}
    experts = experts_words(cells)
    title = f"Declared, for {where} and default options"
    _print_tables(shown, title, cells, words | _column(experts))
    used = {cell.word for cell in cells}
    for word, meaning in MEANING.items():
        if word in used:
            shown.out.print(f"[{_STYLES[word]}]{_SHORT.get(word, word):<8}[/] {meaning}")
    for index, (rule, problem) in enumerate(footnotes(cells).items(), 1):
        fix = f"; {problem.fix}" if problem.fix else ""
        text = f"{index:>7}  {rule}: {problem.what}{fix}"
        shown.out.print(text, markup=False, soft_wrap=True)
    for part in results:
        for piece in part.by_device():
            show_verified(shown, piece)
    if not results:
        shown.out.print("\nVerified: no results at hand; --verify makes some.")
    if others := len(registry().adapters()) - len({cell.adapter for cell in cells}):
        text = f"{others} more adapters: --all-adapters shows them."
        shown.out.print(f"\n{text}", style="dim")


def show_verified(shown: Session, part: Verified) -> None:
    """Print one file of verified results."""
    from ..matrix.tables import NUMBER, experts_words, plain, unwell, variants

    cells = plain(part)
    words = {(cell.backend, cell.adapter): _verified_word(cell) for cell in cells}
    shown.out.print()
    title = f"Verified, on {part.origin}"
    _print_tables(shown, title, cells, words | _column(experts_words(cells)))
    for (title, dtype), group in variants(part).items():
        texts = ", ".join(f"{escape(cell.adapter)} {_verified_word(cell)}" for cell in group)
        shown.out.print(f"{escape(title)} in {dtype}: {texts}", soft_wrap=True)
    shown.out.print(NUMBER, style="dim")
    for line in unwell(part):
        style = "dim" if line.startswith("not run") else "red"
        shown.out.print(line, style=style, markup=False, soft_wrap=True)


def _declared_word(cell: DeclaredCell, notes: list[str]) -> str:
    style = _STYLES[cell.word]
    marks = ",".join(str(notes.index(rule) + 1) for rule in cell.rules)
    return f"[{style}]{_SHORT.get(cell.word, cell.word)}[/]" + (f" {marks}" if marks else "")


def _column(experts: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return what becomes of stacks of experts as words of a column of its own."""
    from ..matrix.tables import EXPERTS

    return {(backend, EXPERTS): word for backend, word in experts.items()}


def _verified_word(cell: VerifiedCell) -> str:
    return f"[{OUTCOMES[cell.verified]}]{cell.text()}[/]"


def _print_tables(
    shown: Session,
    title: str,
    cells: Sequence[DeclaredCell | VerifiedCell],
    words: Mapping[tuple[str, str], str],
) -> None:
    from ..matrix.tables import grid

    backends, adapters = grid(cells)
    heads = [*adapters, *dict.fromkeys(name for _, name in words if name not in adapters)]
    shown.out.print(title, style="bold", markup=False, soft_wrap=True)
    shown.out.print()
    gap = 1 if shown.out.width < _NARROW else 2
    for block in _blocks(backends, heads, words, shown.out.width, gap):
        shown.out.print(_table(backends, block, words, gap))
        shown.out.print()


def _blocks(
    backends: Sequence[str],
    adapters: Sequence[str],
    words: Mapping[tuple[str, str], str],
    width: int,
    gap: int,
) -> Iterator[list[str]]:
    """Yield as many adapters at a time as fit beside each other."""
    from rich.text import Text

    room = width - max((len(name) for name in backends), default=0)
    block: list[str] = []
    used = 0
    for adapter in adapters:
        texts = [words.get((backend, adapter), "") for backend in backends]
        needed = gap + max(len(adapter), *(Text.from_markup(text).cell_len for text in texts))
        if block and used + needed > room:
            yield block
            block, used = [], 0
        block.append(adapter)
        used += needed
    if block:
        yield block


def _table(
    backends: Sequence[str],
    adapters: Sequence[str],
    words: Mapping[tuple[str, str], str],
    gap: int,
) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for head in ("", *adapters):
        table.add_column(escape(head), no_wrap=True)
    for backend in backends:
        row = [words.get((backend, adapter), "") for adapter in adapters]
        if any(row):
            table.add_row(escape(backend), *row)
    return table
