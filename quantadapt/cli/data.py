"""`quantadapt data`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, PlanRefused, Problem, SpecError
from ..remote_code import code_problems, trusting
from .commands import add
from .flags import JsonOption, TrustOption
from .session import Session, session

if TYPE_CHECKING:
    from ..data.looking import Shown
    from ..data.report import DataReport
    from ..spec import Spec

_OPTIONS = {
    "data.format": "--format",
    "data.max_length": "--max-length",
    "data.path": "FILE",
}
"""Keys of a spec -> what this command calls them."""


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        data,
        "quantadapt data train.jsonl --model ORG/NAME",
        "quantadapt data train.csv --column prompt=question --column completion=answer",
        "quantadapt data pairs.jsonl --objective dpo",
        "quantadapt data train.jsonl --max-length 2048 --limit 1 --json",
    )


def data(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A data file, a folder of those, or a hub id.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Whose tokenizer and chat template.", show_default="the demo's"
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(help="As what it is read: a name from `quantadapt objectives`."),
    ] = "sft",
    max_length: Annotated[int, typer.Option(min=8, help="Longest example in tokens.")] = 512,
    limit: Annotated[int, typer.Option(min=0, help="Print so many examples.")] = 5,
    format: Annotated[str | None, typer.Option(help="As data.format.", show_default="auto")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=YOURS", help="As data.columns, e.g. prompt=question. May be repeated."
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show what is learnt of a data file, and what is cut or dropped.

    Examples are printed as the model will see them; what is learnt is green, and stands behind the
    word learnt, what is to be avoided behind the word avoid. Then come the counts.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from .. import demo
        from .models import waiting

        with _as_options():
            spec = _spec(file, objective, max_length, format, column or [])
        if problems := code_problems(model or ""):
            raise PlanRefused(problems)
        with waiting(shown, "reading"), _as_options():
            from ..objectives.surveying import looked_at
            from ..quantizing.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(model or str(demo.MODEL_DIR))
            found, report = looked_at(spec, tokenizer, limit)
        if json:
            shown.print_json(_document(found, report, tokenizer))
            return
        for example in found:
            _print_example(shown, example, tokenizer)
        for words in report.words():
            shown.out.print(words, markup=False, soft_wrap=True)
        for words in _warnings(report):
            shown.err.print(f"warning: {words}", markup=False, soft_wrap=True, style="bold yellow")


def _spec(
    file: str, objective: str, max_length: int, format: str | None, columns: list[str]
) -> Spec:
    from ..spec import Spec, apply_overrides

    values: dict[str, Any] = {"path": file, "max_length": max_length, "format": format or "auto"}
    values["columns"] = apply_overrides({}, columns)
    return Spec(data=values, objective=objective)


@contextmanager
def _as_options() -> Iterator[None]:
    """Let errors name the options of this command, not the keys of a spec."""
    try:
        yield
    except (DataError, SpecError, PlanRefused) as error:
        said = [
            Problem(in_options(p.what), in_options(p.fix), in_options(p.where))
            for p in error.problems
        ]
        if isinstance(error, DataError):
            raise type(error).of(said) from error
        raise type(error)(said) from error


def in_options(text: str) -> str:
    """Return what is said of a spec's data in the words of this command, e.g. `--column prompt=q`
    for `data.columns: {prompt: q}`."""

    def options(found: re.Match[str]) -> str:
        pairs = (pair.split(": ") for pair in found[2].split(", "))
        named = " ".join(f"--column {ours}={yours}" for ours, yours in pairs)
        return f"--column, e.g. {named}" if found[1] else named

    text = re.sub(r"data\.columns(?:: |(, e\.g\. ))\{([^{}]*)\}", options, text)
    text = re.sub(r"data\.columns\.(\w+)", r"--column \1", text.replace("data.columns", "--column"))
    for key, option in _OPTIONS.items():
        text = re.sub(rf"\b{re.escape(key)}\b:?", option, text)
    return re.sub(r"\bobjective(?::|\Z)", "--objective", text)


def _warnings(report: DataReport) -> list[str]:
    length = f"--max-length is {report.max_length}"
    return [f"{text}; {length}" for _, text in report.warnings()]


def _document(found: list[Shown], report: DataReport, tokenizer: Any) -> dict[str, Any]:
    examples = [
        {
            "where": one.where,
            "title": one.title,
            "tokens": [tokenizer.decode([token]) for token in one.ids],
            "input_ids": one.ids,
            "completion_mask": one.mask,
            "avoid": one.against,
            "cut": one.cut,
            "note": one.note,
        }
        for one in found
    ]
    return {"examples": examples, **report.to_dict(), "warnings": _warnings(report)}


def _print_example(shown: Session, example: Shown, tokenizer: Any) -> None:
    """Print the text of an example in stretches that are learnt and stretches that are not, and
    what is cut off behind it."""
    from rich.text import Text

    place = f"{example.where} {example.title}".rstrip()
    shown.out.print(Text(f"{place}   {example.words}", style="bold"), soft_wrap=True)
    counts, colour = ("avoid", "red") if example.against else ("learnt", "green")
    for learnt, text in example.stretches(tokenizer):
        for index, line in enumerate(text.split("\n")):
            label = "" if index else counts if learnt else "given"
            style = colour if learnt else "dim"
            printed = Text(f"  {label:<6} | ", style="dim") + Text(line, style=style)
            shown.out.print(printed, soft_wrap=True)
    if cut := example.cut:
        shown.out.print(Text(f"  cut    | {cut:,} more tokens", style="yellow"), soft_wrap=True)
    shown.out.print()
