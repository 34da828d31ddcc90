"""`quantadapt matrix`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import add
from .flags import JsonOption
from .matrix_view import show_matrix
from .session import Session, session

if TYPE_CHECKING:
    from ..records import Adapter, Backend

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
    parts = [part.only(lambda c: c.backend in names[0] and c.adapter in names[1]) for part in found]
    parts = [part for part in parts if part.cells]
    if shown.as_json:
        shown.print_json(results.to_json(cells, parts))
    elif markdown:
        from ..matrix.tables import to_markdown

        shown.out.write(to_markdown(cells, parts))
    else:
        where = f"{device}, {dtype or preferred_dtype(device)}"
        show_matrix(shown, cells, parts, where)
