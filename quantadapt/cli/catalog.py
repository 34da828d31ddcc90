"""`quantadapt backends`, `quantadapt adapters`, ...: a list of each kind of record, and one record
with all its options. What is shown of a kind is one `_Kind` here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .commands import COMMANDS, epilog
from .flags import JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

    from ..capabilities import Rule
    from ..records import Adapter, Backend

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]


class _Kind(NamedTuple):
    """How a kind of record is listed and shown.

    Attributes:
        kind: its name in `records.KINDS`.
        example: one of its names, for the help.
        facts: makes JSON-ready facts of a record.
        columns: heads of the list, with what stands below each; the name comes first, the summary
            last.
        lines: what `show` says above the options.
    """

    kind: str
    example: str
    facts: Callable[[Any], dict[str, Any]]
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
    lines: Callable[[Mapping[str, Any]], Iterable[tuple[str, str]]]


def register(app: typer.Typer, name: str) -> None:
    """Add the command and its `show` to `app`."""
    shown, entry = _KINDS[name], COMMANDS[name]
    group = typer.Typer(rich_markup_mode="rich")
    group.callback(
        invoke_without_command=True,
        help=entry.help,
        epilog=epilog(f"quantadapt {name}", f"quantadapt {name} show {shown.example} --json"),
    )(_lister(name, shown))
    what = "options with types and defaults, what it needs, and its rules"
    article = "an" if shown.kind[0] in "aeiou" else "a"
    group.command("show", help=f"Show {article} {shown.kind}: {what}.")(_shower(shown))
    app.add_typer(group, name=name, rich_help_panel=entry.panel)


def _lister(name: str, shown: _Kind) -> Callable[..., None]:
    def lister(context: typer.Context, json: JsonOption = False) -> None:
        if context.invoked_subcommand:
            return
        with session(as_json=json) as screen:
            from ..records import KINDS
            from ..registry.discovery import registry

            facts = [shown.facts(record) for record in registry().records(KINDS[shown.kind])]
            if json:
                screen.print_json(facts)
                return
            cells = shown.columns.values()
            rows = [(f["name"], *(cell(f) for cell in cells), f["summary"]) for f in facts]
            heads = (shown.kind, *shown.columns, "")
            screen.out.print(_columns(heads, rows, screen.out.width))
            _after_list(screen, name)

    return lister


def _shower(shown: _Kind) -> Callable[..., None]:
    def shower(name: NameArgument, json: JsonOption = False) -> None:
        with session(as_json=json) as screen:
            from ..records import KINDS
            from ..registry.discovery import registry

            facts = shown.facts(registry().record(KINDS[shown.kind], name))
            if json:
                screen.print_json(facts)
                return
            _show(screen, facts, *shown.lines(facts))
            for problem in facts["missing"]:
                text = f"{problem['what']}\n    fix: {problem['fix']}"
                screen.out.print(f"\n{text}", markup=False, soft_wrap=True)

    return shower


def _facts(record: Any) -> dict[str, Any]:
    """Return what is told of every kind of record."""
    from ..dependencies import missing_requirements
    from ..registry.discovery import registry

    return {
        "name": record.name,
        "summary": record.summary,
        "plugin": str(registry().provenance(record)),
        "requires": list(record.requires),
        "missing": [vars(problem) for problem in missing_requirements(record)],
        "rules": [_rule(rule) for rule in record.rules],
    }


def _backend_facts(backend: Backend) -> dict[str, Any]:
    return _facts(backend) | {
        "extra": backend.extra,
        "devices": list(backend.devices),
        "dtypes": list(backend.dtypes),
        "calibration": backend.calibration,
        "experts": backend.quantizes_experts(),
        "merge": backend.merge.name.lower(),
        "options": options_of(backend.quantizer),
    }


def _plain_facts(record: Any) -> dict[str, Any]:
    """Return the facts of a record that has nothing but its options."""
    from ..records import OPTIONS, kind_of

    options = getattr(record, OPTIONS[kind_of(record)])
    return _facts(record) | {"extra": record.extra, "options": options_of(options)}


def _needs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    text = f"{', '.join(facts['requires'])} ({_state(facts)})" if facts["requires"] else "nothing"
    return [("needs", text)]


def _backend_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        *_needs(facts),
        ("devices", ", ".join(facts["devices"])),
        ("dtypes", ", ".join(facts["dtypes"])),
        ("calibration", "needs data" if facts["calibration"] else "needs no data"),
        ("experts", "quantizes them" if facts["experts"] else "leaves them dense"),
        ("merge", _merge_words(facts)),
    ]


def options_of(options: type[BaseModel]) -> list[dict[str, Any]]:
    """Return the fields of an options class as users set them, JSON-ready."""
    properties = options.model_json_schema().get("properties", {})
    return [
        {
            "name": name,
            "type": _type_text(schema),
            "default": schema.get("default"),
            "required": "default" not in schema,
            "description": schema.get("description", ""),
        }
        for name, schema in properties.items()
    ]


def _type_text(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema's type as users would write it: `1 | 2 | 4`, `integer >= 8 | null`."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type_text(part) for part in schema["anyOf"])
    limits = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}",
              "exclusiveMaximum": "< {}", "multipleOf": "multiple of {}"}  # fmt: skip
    found = [text.format(schema[key]) for key, text in limits.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(found)]).strip()


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    from ..planning.peft_options import peft_options

    return _facts(adapter) | {
        "peft_type": adapter.peft_type,
        "method": adapter.method,
        "experts": adapter.experts,
        "merge": adapter.merge.name.lower(),
        "start": str(adapter.start),
        "options": [
            {
                "name": option.name,
                "type": _annotation_text(option.annotation),
                "default": adapter.defaults.get(option.name, option.default),
                "description": option.help,
            }
            for option in peft_options(adapter).values()
        ],
    }


def _adapter_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("method", facts["method"] or f"PEFT's {facts['peft_type']}"),
        ("start", _START[facts["start"]]),
        ("experts", "goes onto them" if facts["experts"] else "goes onto layers alone"),
        ("merge", _merge_words(facts)),
    ]


def _merge_words(facts: Mapping[str, Any]) -> str:
    from ..capabilities import Merge

    return Merge[facts["merge"].upper()].words


def _annotation_text(annotation: str) -> str:
    """Return a Python annotation with its outermost Optional and Union written with bars."""
    text = annotation.replace("typing.", "")
    if text.startswith("Optional["):
        return f"{_annotation_text(text[9:-1])} | None"
    if text.startswith("Union[") and text.count("[") == 1 + text.count("list["):
        return text[6:-1].replace(", ", " | ")
    return text


def _rule(rule: Rule) -> dict[str, Any]:
    when = {name: list(values) for name, values in rule.when.items()}
    return {"id": rule.id, "when": when, "reason": rule.reason, "fix": rule.fix}


def _state(facts: Mapping[str, Any]) -> str:
    if not facts["requires"]:
        return "none needed"
    return "not installed" if facts["missing"] else "installed"


def _refused_word(facts: Mapping[str, Any]) -> str:
    name = facts["name"]
    always = any(r["when"] == {"adapter": [name]} for r in facts["rules"])
    return "refused" if always else str(facts["merge"])


def _after_list(shown: Session, name: str) -> None:
    from ..registry.discovery import registry

    for text in registry().clashes():
        shown.note(text)
    for broken in registry().broken:
        shown.note(f"plugin {broken.provenance} is broken: {broken.reason}")
    hint = f"\n`quantadapt {name} show NAME` shows options and rules."
    shown.err.print(hint, style="dim", markup=False, soft_wrap=True)


def _show(shown: Session, facts: Mapping[str, Any], *lines: tuple[str, str]) -> None:
    from rich.markup import escape

    name, summary = (escape(str(facts[key])) for key in ("name", "summary"))
    shown.out.print(f"[bold]{name}[/bold]  {summary}\n", soft_wrap=True)
    for key, value in (*lines, ("plugin", facts["plugin"])):
        shown.out.print(f"  {key:<12} {value}", markup=False, soft_wrap=True)
    options = facts["options"]
    shown.out.print("\n[bold]Options[/bold]" if options else "\nIt has no options.")
    rows = [(o["name"], o["type"], _default(o), o["description"]) for o in options]
    if rows:
        _print_options(shown, rows)
    if facts["rules"]:
        shown.out.print("\n[bold]Rules[/bold]")
    for rule in facts["rules"]:
        when = ", ".join(f"{k} {' or '.join(map(str, v))}" for k, v in rule["when"].items())
        text = f"  {rule['id']} (where {when}): {rule['reason']}\n      fix: {rule['fix']}"
        shown.out.print(text, markup=False, soft_wrap=True)


def _print_options(shown: Session, rows: list[tuple[str, str, str, str]]) -> None:
    """Print options as a table, or where that would break words, one below the other."""
    table = _columns(("name", "type", "default", ""), rows, shown.out.width)
    if sum(column.width or 0 for column in table.columns) + 6 <= shown.out.width:
        shown.out.print(table)
        return
    for name, type_, default, description in rows:
        shown.out.print(f"  {name} ({type_}), by default {default}", markup=False, soft_wrap=True)
        if description:
            shown.out.print(f"      {description}", markup=False, soft_wrap=True)


def _default(option: Mapping[str, Any]) -> str:
    if option.get("required"):
        return "(required)"
    return "null" if option["default"] is None else str(option["default"])


def _columns(heads: Iterable[str], rows: Iterable[Iterable[str]], width: int) -> Table:
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    cells = [[*heads], *([*row] for row in rows)]
    columns = [[*column] for column in zip(*cells, strict=True)]
    full = [max(map(cell_len, column)) for column in columns]
    words = [max(map(cell_len, " ".join(column).split()), default=0) for column in columns]
    spare = width - 2 * (len(columns) - 1)
    for head, size in zip(cells[0], _widths([full[0], *words[1:]], full, spare), strict=True):
        table.add_column(head, overflow="fold", width=size)
    for row in cells[1:]:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _widths(least: list[int], full: list[int], width: int) -> list[int]:
    """Return widths of columns that are at most `width` together where `least`, which breaks no
    word, lets them: what is left goes to the narrowest that is not yet `full`."""
    widths = [*least]
    for _ in range(width - sum(least)):
        growing = [index for index, size in enumerate(widths) if size < full[index]]
        if not growing:
            break
        widths[min(growing, key=widths.__getitem__)] += 1
    return widths


_START = {
    "zero": "outputs do not change when it is attached",
    "rounding": "outputs change by rounding only when it is attached",
    "changed": "outputs change when it is attached",
}
_KINDS = {
    "backends": _Kind(
        *("backend", "hqq", _backend_facts),
        {"libraries": _state, "devices": lambda f: ", ".join(f["devices"])},
        _backend_lines,
    ),
    "adapters": _Kind("adapter", "lora", _adapter_facts, {"merge": _refused_word}, _adapter_lines),
    "objectives": _Kind("objective", "sft", _plain_facts, {"libraries": _state}, _needs),
    "evaluations": _Kind("evaluation", "perplexity", _plain_facts, {"libraries": _state}, _needs),
    "exports": _Kind("export", "onto-base", _plain_facts, {"libraries": _state}, _needs),
}
