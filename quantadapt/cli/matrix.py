"""`quantadapt matrix`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import add
from .flags import JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from rich.table import Table

    from ..matrix import DeclaredCell, Verified, VerifiedCell

_STYLES = {"requantize": "green", "dense": "green", "never": "yellow", "refused": "red"}
_OUTCOMES = {"passed": "green", "refused": "yellow", "failed": "bold red", "not run": "dim"}
_SHORT = {"requantize": "requant"}


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        matrix,
        "quantadapt matrix --adapter lora --adapter dora",
        "quantadapt matrix --backend hqq --device cuda --dtype bfloat16",
        "quantadapt matrix --markdown > docs/matrix.md",
    )


def matrix(
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Only this one; repeatable.", show_default="all"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Only this one; repeatable.", show_default="all"),
    ] = None,
    device: Annotated[str, typer.Option(help="Declared for which device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Declared for which compute dtype.")] = "float32",
    verified: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Verified results to show below; repeatable.",
            show_default="those of this version",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    json: JsonOption = False,
) -> None:
    """Show which backend goes with which adapter.

    First what backends and adapters declare, which is what `plan` goes by; then, apart from it,
    what tests have verified, where, and with which versions.
    """
    with session(as_json=json) as shown:
        from .. import matrix as data
        from ..registry import registry

        known = registry()
        backends = [known.backend(n) for n in backend] if backend else known.backends()
        adapters = [known.adapter(n) for n in adapter] if adapter else known.adapters()
        cells = data.declared(backends, adapters, device=device, dtype=dtype)
        results = [data.read_verified(f) for f in verified] if verified else data.bundled()
        if json:
            shown.print_json(data.to_json(cells, results))
        elif markdown:
            shown.out.file.write(data.to_markdown(cells, results))
        else:
            _show(shown, cells, results, f"{device}, {dtype}")


def _show(
    shown: Session, cells: Sequence[DeclaredCell], results: Sequence[Verified], where: str
) -> None:
    from ..matrix import MEANING, footnotes

    notes = list(footnotes(cells))
    words = {(cell.backend, cell.adapter): _declared_word(cell, notes) for cell in cells}
    _print_tables(shown, f"Declared, for {where} and default options", cells, words)
    used = {cell.word for cell in cells}
    for word, meaning in MEANING.items():
        if word in used:
            shown.out.print(f"[{_STYLES[word]}]{_SHORT.get(word, word):<8}[/] {meaning}")
    for index, (rule, problem) in enumerate(footnotes(cells).items(), 1):
        fix = f"; {problem.fix}" if problem.fix else ""
        text = f"{index:>7}  {rule}: {problem.what}{fix}"
        shown.out.print(text, markup=False, soft_wrap=True)
    for part in results:
        _show_verified(shown, part)
    if not results:
        shown.out.print("\nVerified: no results at hand; --verified FILE shows some.")


def _show_verified(shown: Session, part: Verified) -> None:
    words = {(c.backend, c.adapter): f"[{_OUTCOMES[c.verified]}]{c.text()}[/]" for c in part.cells}
    shown.out.print()
    _print_tables(shown, f"Verified, on {part.origin}", part.cells, words)
    shown.out.print("The number is the relative error of the merged model's logits.", style="dim")
    for cell in part.cells:
        if cell.verified == "failed":
            text = f"failed: {cell.backend} x {cell.adapter}  {cell.detail}"
            shown.out.print(text.rstrip(), style="red", markup=False, soft_wrap=True)


def _declared_word(cell: DeclaredCell, notes: list[str]) -> str:
    style = _STYLES[cell.word]
    marks = ",".join(str(notes.index(rule) + 1) for rule in cell.rules)
    return f"[{style}]{_SHORT.get(cell.word, cell.word)}[/]" + (f" {marks}" if marks else "")


def _print_tables(
    shown: Session,
    title: str,
    cells: Sequence[DeclaredCell | VerifiedCell],
    words: Mapping[tuple[str, str], str],
) -> None:
    from ..matrix import grid

    backends, adapters = grid(cells)
    shown.out.print(title, style="bold", markup=False, soft_wrap=True)
    shown.out.print()
    for block in _blocks(backends, adapters, words, shown.out.width):
        shown.out.print(_table(block, adapters, words))
        shown.out.print()


def _blocks(
    backends: Sequence[str],
    adapters: Sequence[str],
    words: Mapping[tuple[str, str], str],
    width: int,
) -> Iterator[list[str]]:
    """Yield as many backends at a time as fit beside each other."""
    from rich.text import Text

    room = width - max((len(name) for name in adapters), default=0) - 2
    block: list[str] = []
    used = 0
    for backend in backends:
        texts = [words.get((backend, adapter), "") for adapter in adapters]
        widths = [len(part) for part in _head(backend).split("\n")]
        widths += [Text.from_markup(text).cell_len for text in texts]
        needed = max(widths) + 2
        if block and used + needed > room:
            yield block
            block, used = [], 0
        block.append(backend)
        used += needed
    if block:
        yield block


def _head(backend: str) -> str:
    """Return a column's head, on two lines where the name has a hyphen."""
    return backend.replace("-", "-\n", 1)


def _table(
    backends: Sequence[str], adapters: Sequence[str], words: Mapping[tuple[str, str], str]
) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for backend in backends:
        table.add_column(_head(backend), no_wrap=True)
    for adapter in adapters:
        table.add_row(adapter, *(words.get((backend, adapter), "") for backend in backends))
    return table
