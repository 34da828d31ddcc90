"""`quantadapt plan` and `quantadapt schema`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import add
from .flags import GpusOption, JsonOption, SpecFlags, with_spec_flags
from .session import session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel
    from rich.table import Table

    from ..data.report import DataReport
    from ..planning.planned import Plan

CardOption = Annotated[
    list[float] | None,
    typer.Option(
        metavar="GIB",
        min=0.1,
        help="Does it fit a GPU of so many GiB, and with which settings? May be repeated.",
    ),
]

_EXAMPLES = {
    "plan": (
        "quantadapt plan --backend torchao-int4 --adapter vera",
        "quantadapt plan config.yaml --merge requantize --json",
        "quantadapt plan qlora --model PATH --card 16 --card 24",
    ),
    "schema": (
        "quantadapt schema > quantadapt.schema.json",
        "# and as the first line of config.yaml:",
        "# yaml-language-server: $schema=quantadapt.schema.json",
    ),
}


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(app, name, with_spec_flags(plan) if name == "plan" else schema, *_EXAMPLES[name])


def plan(
    flags: SpecFlags,
    json: JsonOption = False,
    gpus: GpusOption = 1,
    card: CardOption = None,
) -> None:
    """Show what a run would do, or why it is refused; does nothing.

    Takes the same flags as `run`. All mistakes are reported at once, each with the way out. The
    memory that training needs is predicted from the model's config.json; weights may be missing.
    """
    with session(as_json=json) as shown:
        from ..errors import PlanRefused, Problem
        from ..objectives.surveying import surveyed
        from ..planning.stage import plan as make_plan
        from ..planning.words import plan_remarks

        if odd := [size for size in card or () if not math.isfinite(size)]:
            what, fix = f"{odd[0]} is no size in GiB", "use e.g. --card 24"
            raise PlanRefused([Problem(what, fix, where="--card")])
        made = make_plan(
            flags.spec(), processes=gpus, cards=card or (), weights=False, check_output=not card
        )
        data = surveyed(made)
        if json:
            document = made.to_dict() | {"spec": made.spec.model_dump(mode="json")}
            shown.print_json(document | {"data": data.to_dict() if data else None})
            return
        shown.out.print(_table(made, data))
        for text in plan_remarks(made):
            shown.out.print(f"\n{text}", markup=False, soft_wrap=True)


def schema() -> None:
    """Print the JSON schema of a run's YAML file, for editors.

    It knows the options of the backends, objectives, evaluations and exports that are installed
    here.
    """
    with session() as shown:
        shown.print_json(spec_schema())


def _table(made: Plan, data: DataReport | None) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from ..planning.words import plan_rows

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in plan_rows(made, data):
        table.add_row(key, escape(value))
    return table


def spec_schema() -> dict[str, Any]:
    """Return the JSON schema of `Spec`, with the options of what is known here."""
    from ..records import KINDS, OPTIONS
    from ..registry.discovery import registry
    from ..spec import Spec

    made = Spec.model_json_schema()
    made["title"] = "quantadapt run"
    parts = {"backend": "BackendSpec", "objective": "ObjectiveSpec", "evaluation": "EvaluationSpec",
             "export": "FormatSpec"}  # fmt: skip
    definitions = made["$defs"]
    for kind, part in parts.items():
        known = registry().records(KINDS[kind])
        _add_options(definitions[part], {r.name: getattr(r, OPTIONS[kind]) for r in known})
    for key in ("backend", "adapter", "objective"):
        made["properties"][key] = _or_name(made["properties"][key])
    for part, key in (("ExportSpec", "formats"), ("EvaluateSpec", "evaluations")):
        named = definitions[part]["properties"][key]
        named["items"] = _or_name(named["items"])
    return made


def _add_options(named: dict[str, Any], known: Mapping[str, type[BaseModel]]) -> None:
    """Say in the schema of a named record what names there are, and which options each has."""
    named["properties"]["name"]["examples"] = sorted(known)
    named["allOf"] = [
        {
            "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
            "then": {"properties": options.model_json_schema().get("properties", {})},
        }
        for name, options in sorted(known.items())
    ]


def _or_name(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a named record; a bare name is as good."""
    return {"anyOf": [{"type": "string"}, schema]}
