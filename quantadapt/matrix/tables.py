"""The matrix as tables: which rows and columns, which words; as Markdown for `docs/`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .declared import MAIN, MEANING, DeclaredCell, backend_title, footnotes
from .results import Verified, VerifiedCell

Words = Mapping[tuple[str, str], str]

EXPERTS = "experts"
"""The head of the column on stacks of experts."""
NUMBER = "The number is the relative error of the merged model's logits."
LARGE = (
    "It is large where a backend quantizes activations as well, which a dense model does not do."
)


def grid(cells: Sequence[DeclaredCell | VerifiedCell]) -> tuple[list[str], list[str]]:
    """Return the names of the backends, and of the adapters, the main ones first."""
    backends = dict.fromkeys(cell.backend for cell in cells)
    adapters = dict.fromkeys(cell.adapter for cell in cells)
    main = [name for name in MAIN if name in adapters]
    return list(backends), main + [name for name in adapters if name not in MAIN]


def plain(part: Verified) -> list[VerifiedCell]:
    """Return the cells for the tables: default options, and of several dtypes the first."""
    found: dict[tuple[str, str], VerifiedCell] = {}
    for cell in part.cells:
        if not cell.options:
            found.setdefault((cell.backend, cell.adapter), cell)
    return list(found.values())


def variants(part: Verified) -> dict[tuple[str, ...], list[VerifiedCell]]:
    """Return the other cells, by backend with its options, and dtype."""
    shown = {cell.key for cell in plain(part)}
    found: dict[tuple[str, ...], list[VerifiedCell]] = {}
    for cell in part.cells:
        if cell.key not in shown:
            title = backend_title(cell.backend, cell.options)
            found.setdefault((title, cell.dtype), []).append(cell)
    return found


def unwell(part: Verified) -> list[str]:
    """Return a line for each cell that failed, crashed or was not run, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for cell in part.cells:
        if cell.bad or cell.verified == "not run":
            title = backend_title(cell.backend, cell.options)
            found.setdefault((cell.verified, title, cell.detail), []).append(cell.adapter)
    return [
        f"{outcome}: {backend} x {', '.join(names)}" + (f": {detail}" if detail else "")
        for (outcome, backend, detail), names in found.items()
    ]


def summary(cells: Iterable[DeclaredCell], verified: Iterable[Verified]) -> list[list[str]]:
    """Return head and rows of the small table: what is declared, and where it was verified.

    A device on which a cell did not pass, or is declared to be something else, is named.
    """
    found: dict[str, dict[str, dict[str, VerifiedCell]]] = {}  # backend, adapter, device
    pieces = [piece for part in verified for piece in part.by_device()]
    for cell in (cell for piece in pieces for cell in plain(piece)):
        if cell.verified != "not run":
            device = cell.device.partition(":")[0].upper()
            found.setdefault(cell.backend, {}).setdefault(cell.adapter, {})[device] = cell
    rows: dict[str, list[str]] = {}
    experts: dict[str, str] = {}
    for declared in cells:
        results = found.get(declared.backend, {}).get(declared.adapter, {})
        row = rows.setdefault(declared.backend, [declared.backend])
        experts[declared.backend] = experts_word(declared.experts)
        row.append(", ".join([declared.word, *_exceptions(declared.word, results)]))
    for backend, row in rows.items():
        devices = dict.fromkeys(
            name for results in found.get(backend, {}).values() for name in results
        )
        row += [experts[backend], ", ".join(devices) or "nothing yet"]
    return [["backend", *MAIN, EXPERTS, "verified on"], *rows.values()]


def experts_word(quantized: bool) -> str:
    """Return what becomes of stacks of experts."""
    return "quantized" if quantized else "dense"


def experts_words(cells: Iterable[DeclaredCell | VerifiedCell]) -> dict[str, str]:
    """Return backend -> what becomes of stacks of experts; of verified cells the share of the
    weights that were quantized. Empty where nothing is known."""
    found = {}
    for cell in cells:
        if isinstance(cell, DeclaredCell):
            found[cell.backend] = experts_word(cell.experts)
        elif (share := cell.experts_share) is not None:
            found[cell.backend] = f"{share:.1%}" if share else experts_word(False)
    return found


def _exceptions(word: str, results: Mapping[str, VerifiedCell]) -> Iterator[str]:
    for device, cell in results.items():
        if cell.bad:
            yield f"{cell.verified} on {device}"
        elif cell.declared != word:
            yield f"{cell.declared} on {device}"


# Markdown --------------------------------------------------------------------------------------


def to_markdown(cells: Sequence[DeclaredCell], verified: Sequence[Verified]) -> str:
    """Return both parts as Markdown."""
    columns = {EXPERTS: experts_words(cells)}
    tables = _tables(*grid(cells), _declared_words(cells), columns)
    parts = ["### Declared", "", *tables, *_legend(cells)]
    for piece in [piece for part in verified for piece in part.by_device()]:
        parts += ["", f"### Verified on {piece.where()}", "", *_verified(piece)]
    if not verified:
        parts += ["", "### Verified", "", "No results at hand."]
    return "\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in cells]


def _tables(
    backends: Sequence[str],
    adapters: Sequence[str],
    words: Words,
    columns: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Return a table of backends by main adapters, and one of all others by backends.

    Args:
        columns: what else there is in the first, by head and backend; empty ones are left out.
    """
    main = [name for name in adapters if name in MAIN] or list(adapters)
    more = {head: column for head, column in columns.items() if any(column.values())}
    head = ["backend", *main, *more]
    rows = [
        [
            backend,
            *(words.get((backend, name), "") for name in main),
            *(column.get(backend, "") for column in more.values()),
        ]
        for backend in backends
    ]
    lines = [*markdown_table(head, rows), ""]
    if others := [name for name in adapters if name not in main]:
        shown = [b for b in backends if any((b, name) in words for name in others)]
        rows = [[name, *(words.get((b, name), "") for b in shown)] for name in others]
        lines += [*markdown_table(["adapter", *shown], rows), ""]
    return lines


def _declared_words(cells: Sequence[DeclaredCell]) -> Words:
    notes = list(footnotes(cells))
    words = {}
    for cell in cells:
        marks = [f"[{notes.index(rule) + 1}]" for rule in cell.rules]
        words[cell.backend, cell.adapter] = " ".join([cell.word, *marks])
    return words


def _verified(part: Verified) -> list[str]:
    cells = plain(part)
    words = {(cell.backend, cell.adapter): cell.text() for cell in cells}
    lines = [f"On {part.origin}. {NUMBER} {LARGE}", ""]
    columns = {EXPERTS: experts_words(cells), "library": _libraries(part)}
    lines += _tables(*grid(cells), words, columns)
    if found := variants(part):
        rows = [
            [title, dtype, ", ".join(f"{cell.adapter} {cell.text()}" for cell in group)]
            for (title, dtype), group in found.items()
        ]
        lines += [
            "With other options:",
            "",
            *markdown_table(["backend", "dtype", "adapters"], rows),
        ]
        lines.append("")
    lines += [f"- {line}" for line in unwell(part)]
    return lines[:-1] if lines[-1] == "" else lines


def _libraries(part: Verified) -> dict[str, str]:
    """Return backend -> versions of what it needs beyond what all cells have in common."""
    common = part.generated.get("versions") or {}
    found: dict[str, str] = {}
    for cell in part.cells:
        versions = cell.origin.get("versions") or {}
        own = [f"{n} {v}" for n, v in versions.items() if n not in common and v]
        found.setdefault(cell.backend, ", ".join(own))
    return found


def _legend(cells: Sequence[DeclaredCell]) -> list[str]:
    used = {cell.word for cell in cells}
    lines = [f"- `{word}`: {text}" for word, text in MEANING.items() if word in used]
    for index, (rule, problem) in enumerate(footnotes(cells).items(), 1):
        way_out = f" Instead: {problem.fix}." if problem.fix else ""
        lines.append(f"- [{index}] `{rule}`: {problem.what}.{way_out}")
    return lines
