"""`quantadapt backends` and `quantadapt adapters`: lists, and one with all its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import COMMANDS, epilog, unwrapped
from .flags import JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from rich.table import Table

    from ..capabilities import Rule
    from ..records import Adapter, Backend

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]


def register(app: typer.Typer, name: str) -> None:
    """Add the command and its `show` to `app`."""
    lister, shower = (backends, show_backend) if name == "backends" else (adapters, show_adapter)
    example = "hqq" if name == "backends" else "lora"
    group = typer.Typer(rich_markup_mode="rich")
    group.callback(
        invoke_without_command=True,
        help=unwrapped(lister.__doc__ or ""),
        epilog=epilog(f"quantadapt {name}", f"quantadapt {name} show {example} --json"),
    )(lister)
    group.command("show", help=unwrapped(shower.__doc__ or ""))(shower)
    app.add_typer(group, name=name, rich_help_panel=COMMANDS[name].panel)


def backends(context: typer.Context, json: JsonOption = False) -> None:
    """List the ways to quantize, or show one with its options."""
    if context.invoked_subcommand:
        return
    with session(as_json=json) as shown:
        from ..registry.discovery import registry

        facts = [_backend_facts(backend) for backend in registry().backends()]
        if json:
            shown.print_json(facts)
            return
        rows = [(f["name"], _state(f), "/".join(f["devices"]), f["summary"]) for f in facts]
        shown.out.print(_columns(("backend", "libraries", "devices", ""), rows))
        _after_list(shown, "backends")


def show_backend(name: NameArgument, json: JsonOption = False) -> None:
    """Show a backend: options with types and defaults, what it needs, and its rules."""
    with session(as_json=json) as shown:
        from ..registry.discovery import registry

        facts = _backend_facts(registry().backend(name))
        if json:
            shown.print_json(facts)
            return
        needs = (
            f"{', '.join(facts['requires'])} ({_state(facts)})" if facts["requires"] else "nothing"
        )
        _show(
            shown,
            facts,
            ("needs", needs),
            ("devices", ", ".join(facts["devices"])),
            ("dtypes", ", ".join(facts["dtypes"])),
            ("calibration", "needs data" if facts["calibration"] else "needs no data"),
        )
        for problem in facts["missing"]:
            text = f"{problem['what']}\n    fix: {problem['fix']}"
            shown.out.print(f"\n{text}", markup=False, soft_wrap=True)


def adapters(context: typer.Context, json: JsonOption = False) -> None:
    """List the adapters, or show one with its options."""
    if context.invoked_subcommand:
        return
    with session(as_json=json) as shown:
        from ..registry.discovery import registry

        facts = [_adapter_facts(adapter) for adapter in registry().adapters()]
        if json:
            shown.print_json(facts)
            return
        rows = [(f["name"], _refused_word(f), f["summary"]) for f in facts]
        shown.out.print(_columns(("adapter", "merge", ""), rows))
        _after_list(shown, "adapters")


def show_adapter(name: NameArgument, json: JsonOption = False) -> None:
    """Show an adapter: options of its PEFT config, defaults, and its rules."""
    with session(as_json=json) as shown:
        from ..registry.discovery import registry

        facts = _adapter_facts(registry().adapter(name))
        if json:
            shown.print_json(facts)
            return
        start = {
            "zero": "outputs do not change when it is attached",
            "rounding": "outputs change by rounding only when it is attached",
            "changed": "outputs change when it is attached",
        }
        _show(shown, facts, ("PEFT method", facts["peft_type"]), ("start", start[facts["start"]]))


def _backend_facts(backend: Backend) -> dict[str, Any]:
    from ..dependencies import missing_requirements
    from ..registry.discovery import registry

    return {
        "name": backend.name,
        "summary": backend.summary,
        "plugin": str(registry().provenance(backend)),
        "requires": list(backend.requires),
        "missing": [vars(problem) for problem in missing_requirements(backend)],
        "extra": backend.extra,
        "devices": list(backend.devices),
        "dtypes": list(backend.dtypes),
        "calibration": backend.calibration,
        "merge": backend.merge.name.lower(),
        "options": _quantizer_options(backend),
        "rules": [_rule(rule) for rule in backend.rules],
    }


def _quantizer_options(backend: Backend) -> list[dict[str, Any]]:
    properties = backend.quantizer.model_json_schema().get("properties", {})
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
    from ..registry.discovery import registry

    options = peft_options(adapter.peft_type).values()
    return {
        "name": adapter.name,
        "summary": adapter.summary,
        "plugin": str(registry().provenance(adapter)),
        "peft_type": adapter.peft_type,
        "merge": adapter.merge.name.lower(),
        "start": str(adapter.start),
        "options": [
            {
                "name": option.name,
                "type": _annotation_text(option.annotation),
                "default": adapter.defaults.get(option.name, option.default),
                "description": option.help,
            }
            for option in options
        ],
        "rules": [_rule(rule) for rule in adapter.rules],
    }


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
    shown.out.print(f"[bold]{facts['name']}[/bold]  {facts['summary']}\n", soft_wrap=True)
    merge = {
        "never": "never, the adapter stays beside the base",
        "dense": "into dense weights",
        "requantize": "into dense weights, or quantized again",
    }
    for key, value in (*lines, ("merge", merge[facts["merge"]]), ("plugin", facts["plugin"])):
        shown.out.print(f"  {key:<12} {value}", markup=False, soft_wrap=True)
    options = facts["options"]
    shown.out.print("\n[bold]Options[/bold]" if options else "\nIt has no options.")
    rows = [(o["name"], o["type"], _default(o), o["description"]) for o in options]
    if rows:
        shown.out.print(_columns(("name", "type", "default", ""), rows))
    if facts["rules"]:
        shown.out.print("\n[bold]Rules[/bold]")
    for rule in facts["rules"]:
        when = ", ".join(f"{k} {' or '.join(map(str, v))}" for k, v in rule["when"].items())
        text = f"  {rule['id']} (where {when}): {rule['reason']}\n      fix: {rule['fix']}"
        shown.out.print(text, markup=False, soft_wrap=True)


def _default(option: Mapping[str, Any]) -> str:
    if option.get("required"):
        return "(required)"
    return "null" if option["default"] is None else str(option["default"])


def _columns(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head in ("backend", "adapter", "name"))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
