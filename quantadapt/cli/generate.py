"""`quantadapt generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..folders.metrics import many
from ..remote_code import trusting
from .answering import (
    BareOption,
    LayoutOption,
    answer_into,
    ids_of,
    said,
    stdin,
    with_sampling_flags,
)
from .commands import add
from .evaluate import PathArgument
from .flags import DeviceOption, ForceBaseOption, JsonOption, StreamOption, TrustOption
from .session import session

if TYPE_CHECKING:
    from ..generation import Sampling
    from .answering import Asked
    from .session import Session


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_sampling_flags(generate),
        'quantadapt generate runs/hqq-lora --prompt "Write a Python function named get_area that '
        'multiplies width by height."',
        'quantadapt generate runs/vision --image photo.jpg --prompt "What is this?"',
        "quantadapt generate ./model --file prompts.jsonl --out answers.jsonl",
        "echo Hello | quantadapt generate ./model --prompt - --temperature 0.7 --top-p 0.9",
    )


def generate(
    path: PathArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="The prompt; - reads stdin. Repeatable."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="A picture that comes before the prompt. Repeatable."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help="A file with prompts: JSONL, JSON, CSV, Parquet or text, with the columns prompt, "
            "messages, or instruction and input.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The JSONL file that gets each row of --file with its answer. The same command "
            "goes on after an interruption.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier file at --out.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most answers that are made at the same time.")
    ] = 16,
    layout: LayoutOption = None,
    base: BareOption = False,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    *,
    answers: dict[str, Any],
) -> None:
    """Answer prompts, or a file of them.

    The answers go to stdout, or to a file; all else goes to stderr.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..generation import Sampling
        from .answering import asking

        _check(prompt, file, out, json, overwrite, image or [])
        sampling = Sampling(**answers)
        found = _prompts(prompt or [], file, image or [])
        how: dict[str, Any] = {"base": base, "stream": stream, "force_base": force_base}
        how["files"] = True
        opened = asking(shown, path, device, layout, **how)
        with opened as asked:
            shown.err.print(asked.told, style="dim", markup=False, soft_wrap=True)
            if out is not None:
                made_with = {"model": path, "base": base, "layout": asked.writer.layout}
                _to_file(shown, asked, found, sampling, out, made_with, overwrite, batch_size)
                return
            _to_screen(shown, asked, found, sampling, batch_size)


def _check(
    prompt: list[str] | None,
    file: str | None,
    out: Path | None,
    json: bool,
    overwrite: bool,
    images: list[str],
) -> None:
    from ..errors import Problem, SpecError
    from ..folders.lines import problems_of
    from ..folders.lock import refuse_in_use
    from ..inputs.documents import shown

    problems = []
    if bool(prompt) == bool(file):
        what = "there is nothing to answer" if not file else "--prompt and --file are both given"
        problems.append(Problem(what, "give --prompt TEXT or --file PROMPTS", where="--prompt"))
    if images and file:
        what, fix = "--file names the pictures of each of its rows", "leave --image out"
        problems.append(Problem(what, fix, "--image"))
    for name in images:
        if not Path(name).expanduser().is_file():
            what = f"there is no file {shown(name)}"
            problems.append(Problem(what, "check the path", "--image"))
    if out is not None and not file:
        problems.append(Problem("--out takes the answers to a --file", "leave it out", "--out"))
    if out is not None and json:
        problems.append(Problem("--out has JSON lines in any case", "leave --json out", "--json"))
    if out is not None:
        problems += problems_of(out.expanduser(), file, overwrite=overwrite)
    if problems:
        raise SpecError(problems)
    if out is not None:
        refuse_in_use(out.expanduser())


def _prompts(prompts: list[str], file: str | None, images: list[str]) -> list[tuple[Any, Any]]:
    """Return what is asked, each with the row of the file that it comes from. With pictures that is
    a chat."""
    from ..errors import DataError, SpecError
    from ..generation.files import read_prompts

    if file is not None:
        try:
            return list(read_prompts(file))
        except DataError as error:  # nothing was loaded yet
            raise SpecError(error.problems) from None
    texts = [stdin().read().strip() if text == "-" else text for text in prompts]
    return [(None, said(text, images)) for text in texts]


def _to_screen(
    shown: Session, asked: Asked, found: list[tuple[Any, Any]], sampling: Sampling, batch_size: int
) -> None:
    from ..generation import answers
    from .models import waiting

    ids = ids_of(asked, found)
    with waiting(shown, "generating"):
        tokenizer = asked.writer.tokenizer
        made = list(answers(asked.model, tokenizer, ids, sampling, batch_size=batch_size))
    if shown.as_json:
        pairs = zip(found, made, strict=True)
        shown.print_json([{"prompt": text, "answer": a.text} for (_, text), a in pairs])
        return
    for answer in made:
        shown.out.print(answer.text, markup=False, soft_wrap=True)


def _to_file(
    shown: Session,
    asked: Asked,
    found: list[tuple[Any, Any]],
    sampling: Sampling,
    out: Path,
    made_with: dict[str, Any],
    overwrite: bool,
    batch_size: int,
) -> None:
    from ..generation.files import answer_file

    ids, rows = ids_of(asked, found), [row for row, _ in found]
    made_with |= {"options": sampling.model_dump(mode="json"), "batch_size": batch_size}
    with answer_file(out.expanduser(), rows, made_with, overwrite=overwrite) as file:
        if file.done:
            text = f"{file.done} of {len(rows)} answers are there already; going on"
            shown.err.print(text, markup=False, soft_wrap=True)
        answer_into(file, shown, asked, rows, ids, sampling, batch_size, "answering")
    told = f"{many(len(rows), 'answer')} {'is' if len(rows) == 1 else 'are'} in {out}"
    shown.err.print(told, markup=False, soft_wrap=True)
