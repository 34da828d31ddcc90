"""What the commands that let a model answer share: the flags of `Sampling`, and the open model."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer

from ..generation.sampling import Sampling

if TYPE_CHECKING:
    from torch import nn

    from ..data.files import Row
    from ..generation.files import AnswerFile
    from ..generation.prompts import Layout, PromptWriter
    from .session import Session

_PANEL = "How to answer"

LayoutOption = Annotated[
    str | None,
    typer.Option(
        metavar="LAYOUT",
        help="How a prompt is written: chat (by the chat template), instruction (alpaca's "
        "layout) or text (as it stands).",
        show_default="as the run learnt",
        rich_help_panel=_PANEL,
    ),
]
BareOption = Annotated[
    bool,
    typer.Option("--base", help="Leave the adapter out.", rich_help_panel=_PANEL),
]


def with_sampling_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Sampling` as flags; it takes them in the parameter `answers`,
    a dict of those that were given."""
    hints = get_type_hints(function, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
        if p.name != "answers"
    ]
    flags = [_flag(name) for name in Sampling.model_fields]

    def command(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in flags}
        answers = {name: value for name, value in given.items() if value not in (None, [])}
        function(**values, answers=answers)

    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def _flag(name: str) -> inspect.Parameter:
    field = Sampling.model_fields[name]
    many = name == "stop"
    kind: Any = list[str] | None if many else _number(field.annotation) | None
    text = f"{field.description[:1].upper()}{field.description[1:]}." if field.description else ""
    default = "none" if field.default in (None, ()) else str(field.default)
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{text} Repeatable." if many else text,
        show_default=default,
        rich_help_panel=_PANEL,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _number(annotation: Any) -> type[int] | type[float]:
    return float if annotation is float else int


def stdin() -> TextIO:
    """Return stdin, or nothing where it is closed. Bytes that are no UTF-8 become halves of
    surrogate pairs, which prompts are refused for in words."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin or io.StringIO()


def said(text: str, images: Sequence[str]) -> Any:
    """Return a text, or with pictures the turn of a user that shows them before it."""
    if not images:
        return text
    parts: list[Any] = [{"type": "image", "path": str(Path(name).expanduser())} for name in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class Asked:
    """A model that is asked.

    Attributes:
        writer: writes prompts for it.
        told: what layout it is, in words.
    """

    model: nn.Module
    writer: PromptWriter
    told: str


@contextmanager
def asking(
    shown: Session,
    path: str,
    device: str | None,
    layout: str | None,
    *,
    base: bool = False,
    stream: str = "auto",
    force_base: bool = False,
    files: bool = False,
) -> Iterator[Asked]:
    """Open a model to be asked; its adapter is left out while it is, if `base` says so.

    Args:
        files: prompts may name pictures by their paths: for what the user of this process asks, and
            never for what comes over a network.

    Raises:
        SpecError: there is no such layout. ModelError: there is nothing to load.
    """
    from peft import PeftModel

    from ..data.pictures import ANYWHERE
    from ..errors import Problem, SpecError
    from ..generation.prompts import LAYOUTS, PromptWriter, layout_of
    from ..model.own_biases import without_adapter
    from ..quantizing.state import state_of
    from .models import open_model, waiting

    if layout is not None and layout not in LAYOUTS:
        fix = f"use one of {', '.join(LAYOUTS)}"
        raise SpecError([Problem(f"{layout!r} is no layout", fix, where="--layout")])
    with waiting(shown, "loading the model"):
        model = open_model(path, device, force_base, stream)
    if (tokenizer := state_of(model).tokenizer) is None:
        from ..errors import ModelError

        raise ModelError("the model has no tokenizer", fix="put its files there", where=path)
    chosen: Layout = layout or layout_of(path, tokenizer)  # type: ignore[assignment]
    told = f"prompts {LAYOUTS[chosen]}"
    if base and not isinstance(model, PeftModel):
        told += f"; --base has no effect: {path} has no adapter that could be left out"
    with without_adapter(model) if base else nullcontext():
        yield Asked(model, PromptWriter(tokenizer, chosen, root=ANYWHERE if files else None), told)


def ids_of(asked: Asked, found: Sequence[tuple[Any, Any]]) -> list[list[int]]:
    """Return each prompt as tokens; an error names the row."""
    from ..errors import DataError

    made = []
    for row, text in found:
        try:
            made.append(asked.writer.ids(text))
        except DataError as error:
            if row is None:
                raise
            problem = error.problems[0]
            raise DataError(problem.what, fix=problem.fix, where=row.where) from None
    return made


def answer_into(
    file: AnswerFile,
    shown: Session,
    asked: Asked,
    rows: Sequence[Row],
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    what: str,
) -> None:
    """Answer the rows that `file` lacks yet; `what` says so beside the progress."""
    from ..generation import answers
    from ..showing.display import counting

    begun = file.done
    with counting(shown.progress, what, len(rows), begun) as advance:
        made = answers(
            asked.model, asked.writer.tokenizer, ids[begun:], sampling,
            batch_size=batch_size, first=begun,
        )  # fmt: skip
        for row, answer in zip(rows[begun:], made, strict=True):
            file.add(row, answer)
            advance()
