"""`quantadapt init`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import add
from .flags import JsonOption, SpecFlags, with_spec_flags
from .session import session

if TYPE_CHECKING:
    from .session import Session

_FILLED = ("model", "data", "backend", "adapter", "objective", "set")
_STDOUT = "-"


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_spec_flags(init, *_FILLED),
        "quantadapt init",
        "quantadapt init qlora --model ORG/NAME --data train.jsonl",
        "quantadapt init small-card --backend hqq --set train.learning_rate=1e-4 -o mine.yaml",
    )


def init(
    flags: SpecFlags,
    use: Annotated[
        str | None,
        typer.Argument(metavar="USE", help="What the run is for; without it, the uses are listed."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The file to write; - is stdout.",
            show_default="USE.yaml",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check", help="Write it though it cannot run here: it is for another machine."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Write a commented config for a use, or list the uses.

    What you give is filled in, and the run is planned: what `quantadapt plan` refuses is not
    written. The name of a use is a config itself: `quantadapt run qlora` runs it as it stands.
    """
    with session(as_json=json) as shown:
        if use is None:
            _refuse_without_use(flags, output)
            _list(shown)
            return
        file = Path(f"{use}.yaml" if output is None else output).expanduser()
        to_screen = output == _STDOUT
        text = _text(flags, use, use if to_screen else file.stem, checked=not no_check)
        if not to_screen:
            _write(file, text, overwrite)
        if json:
            shown.print_json({"use": use, "file": None if to_screen else str(file), "text": text})
        elif to_screen:
            shown.out.write(text)
        else:
            _tell(shown, file)


def _refuse_without_use(flags: SpecFlags, output: str | None) -> None:
    """Raise SpecError where something is to be filled in, and nothing says into what."""
    from ..errors import Problem, SpecError

    given = [f"--{name}" for name in _FILLED if getattr(flags, name) is not None]
    given += ["--output"] * (output is not None)
    if given:
        fix = "name one: `quantadapt init` lists them"
        raise SpecError([Problem(f"{', '.join(given)}: for which use?", fix, where="USE")])


def _list(shown: Session) -> None:
    from rich.table import Table

    from ..inputs.configs import names, summary

    if shown.as_json:
        shown.print_json([{"name": name, "summary": summary(name)} for name in names()])
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("use", style="bold", no_wrap=True)
    table.add_column("what for")
    for name in names():
        table.add_row(name, summary(name))
    shown.out.print(table)
    for line in (
        "",
        "quantadapt init USE --model MODEL --data FILE    writes one for you to change",
        "quantadapt run USE --model MODEL --data FILE     runs it as it stands",
    ):
        shown.out.print(line, markup=False, soft_wrap=True)


def _text(flags: SpecFlags, use: str, name: str, *, checked: bool) -> str:
    """Return the config of a use with what the flags say filled in, for a run called `name`.

    Raises:
        SpecError, PlanRefused: it cannot be used; the second only if it is to be `checked`.
    """
    from ..inputs.commented_yaml import changed
    from ..inputs.configs import shipped
    from ..inputs.plain_yaml import parse

    flags.config = shipped(use)
    values, text = flags.values(), flags.config.read_text(encoding="utf-8")
    before: dict[str, Any] = parse(text)
    if values.get("output") == before["output"]:
        values["output"] = f"runs/{name}"
    text = changed(text, before, values)
    spec = flags.spec()
    if checked:
        from ..objectives.surveying import surveyed
        from ..planning.stage import plan

        surveyed(plan(spec, check_output=False, weights=False))
    return text


def _write(file: Path, text: str, overwrite: bool) -> None:
    """Write the file. Raises OutputError where something is there already."""
    from ..errors import OutputError
    from ..folders.atomic import in_words, refuse_unwritable, write_atomic

    if file.is_dir():
        raise OutputError("it is a folder", fix="name a file", where=str(file))
    if os.path.lexists(file) and not overwrite:
        fix = "choose another name with --output, or replace it: --overwrite"
        raise OutputError("the file is there already", fix=fix, where=str(file))
    refuse_unwritable(file.parent)
    with in_words(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text)


def _tell(shown: Session, file: Path) -> None:
    name = shlex.quote(str(file))
    for line in (
        f"{file} is written. Look at it, then:\n",
        f"  quantadapt plan {name}",
        f"  quantadapt run {name}",
    ):
        shown.out.print(line, markup=False, soft_wrap=True)
