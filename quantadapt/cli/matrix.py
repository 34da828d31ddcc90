"""`quantadapt matrix`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import add
from .flags import JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from rich.table import Table

    from ..matrix.declared import DeclaredCell
    from ..matrix.results import Verified, VerifiedCell
    from ..records import Adapter, Backend

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
_VERIFY = "With --verify"
OUTPUT = Path("matrix.json")


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        matrix,
        "quantadapt matrix --adapter lora --adapter dora",
        "quantadapt matrix --backend hqq --all-adapters --device cuda",
        "quantadapt matrix --markdown > matrix.md",
        "quantadapt matrix --verify --backend hqq --adapter lora",
        "quantadapt matrix --verify --all-adapters --device cuda --output matrix-cuda.json",
    )


def matrix(
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Only this one; repeatable.", show_default="all"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", help="Only this one; repeatable.", show_default="the main five"
        ),
    ] = None,
    all_adapters: Annotated[
        bool, typer.Option("--all-adapters", help="With every adapter that is registered.")
    ] = False,
    device: Annotated[str, typer.Option(help="On which device.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="In which compute dtype.",
            show_default="float32, on cuda bfloat16",
        ),
    ] = None,
    verified: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Verified results to show below; repeatable.",
            show_default="those of this version",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Run the conformance suite, one process for each backend.",
            rich_help_panel=_VERIFY,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where results are kept; what it holds already is not verified again.",
            show_default=str(OUTPUT),
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    backend_options: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A=B",
            help="Options of the backend, e.g. bits=3,group_size=32; repeatable.",
            show_default="its defaults",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds that one test may take before its process counts as hanging.",
            show_default="900",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at a time.", show_default="1", rich_help_panel=_VERIFY),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Verify again what has a result with the same versions.",
            rich_help_panel=_VERIFY,
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show which backend goes with which adapter, or verify it.

    First what backends and adapters declare, which is what `plan` goes by; then, apart from it,
    what tests have verified, where, and with which versions.

    With --verify the conformance suite runs. A backend that crashes or hangs is noted, and stops no
    other; after an interruption the same command goes on. It exits with 1 if a cell failed or
    crashed.
    """
    with session(as_json=json) as shown:
        backends, adapters = _named(backend, adapter, all_adapters)
        if verify:
            from .verifying import verify_cells

            verify_cells(
                shown,
                backends,
                adapters,
                output=output or OUTPUT,
                backend_options=backend_options or (),
                device=device,
                dtype=dtype,
                timeout=timeout,
                jobs=jobs or 1,
                fresh=fresh,
            )
            return
        _refuse_without_verify(output, backend_options, timeout, jobs, fresh)
        _print_matrix(shown, backends, adapters, verified or (), device, dtype, markdown=markdown)


def _named(
    backend: Sequence[str] | None, adapter: Sequence[str] | None, all_adapters: bool
) -> tuple[list[Backend], list[Adapter]]:
    from ..matrix.declared import MAIN, main_first
    from ..registry.discovery import registry

    known = registry()
    backends = [known.backend(name) for name in dict.fromkeys(backend or ())] or known.backends()
    if all_adapters:
        return backends, main_first(known.adapters())
    return backends, [known.adapter(name) for name in dict.fromkeys(adapter or MAIN)]


def _refuse_without_verify(*given: Any) -> None:
    from ..errors import Problem, SpecError

    names = ("--output", "--backend-options", "--timeout", "--jobs", "--fresh")
    if wrong := [name for name, value in zip(names, given, strict=True) if value]:
        what = f"{', '.join(wrong)} without --verify"
        raise SpecError([Problem(what, "add --verify to run the suite", where="matrix")])


def _print_matrix(
    shown: Session,
    backends: Sequence[Backend],
    adapters: Sequence[Adapter],
    files: Sequence[Path],
    device: str,
    dtype: str | None,
    *,
    markdown: bool,
) -> None:
    from ..matrix import results
    from ..matrix.declared import declared, preferred_dtype

    cells = declared(backends, adapters, device=device, dtype=dtype)
    names = {b.name for b in backends}, {a.name for a in adapters}
    found = [results.read_verified(file) for file in files] if files else results.bundled()
    results = [
        part.only(lambda c: c.backend in names[0] and c.adapter in names[1]) for part in found
    ]
    results = [part for part in results if part.cells]
    if shown.as_json:
        shown.print_json(results.to_json(cells, results))
    elif markdown:
        from ..matrix.tables import to_markdown

        shown.out.file.write(to_markdown(cells, results))
    else:
        where = f"{device}, {dtype or preferred_dtype(device)}"
        _show(shown, cells, results, where)


def _show(
    shown: Session, cells: Sequence[DeclaredCell], results: Sequence[Verified], where: str
) -> None:
    from ..matrix.declared import MEANING, footnotes
    from ..registry.discovery import registry

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
        for piece in part.by_device():
            show_verified(shown, piece)
    if not results:
        shown.out.print("\nVerified: no results at hand; --verify makes some.")
    if others := len(registry().adapters()) - len({cell.adapter for cell in cells}):
        text = f"{others} more adapters: --all-adapters shows them."
        shown.out.print(f"\n{text}", style="dim")


def show_verified(shown: Session, part: Verified) -> None:
    """Print one file of verified results."""
    from ..matrix.tables import NUMBER, plain, unwell, variants

    cells = plain(part)
    words = {(cell.backend, cell.adapter): _verified_word(cell) for cell in cells}
    shown.out.print()
    _print_tables(shown, f"Verified, on {part.origin}", cells, words)
    for (title, dtype), group in variants(part).items():
        texts = ", ".join(f"{cell.adapter} {_verified_word(cell)}" for cell in group)
        shown.out.print(f"{title} in {dtype}: {texts}", soft_wrap=True)
    shown.out.print(NUMBER, style="dim")
    for line in unwell(part):
        style = "dim" if line.startswith("not run") else "red"
        shown.out.print(line, style=style, markup=False, soft_wrap=True)


def _declared_word(cell: DeclaredCell, notes: list[str]) -> str:
    style = _STYLES[cell.word]
    marks = ",".join(str(notes.index(rule) + 1) for rule in cell.rules)
    return f"[{style}]{_SHORT.get(cell.word, cell.word)}[/]" + (f" {marks}" if marks else "")


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
    shown.out.print(title, style="bold", markup=False, soft_wrap=True)
    shown.out.print()
    gap = 1 if shown.out.width < _NARROW else 2
    for block in _blocks(backends, adapters, words, shown.out.width, gap):
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
        table.add_column(head, no_wrap=True)
    for backend in backends:
        row = [words.get((backend, adapter), "") for adapter in adapters]
        if any(row):
            table.add_row(backend, *row)
    return table
