"""`quantadapt judge`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..remote_code import trusting
from .answering import LayoutOption, with_sampling_flags
from .commands import add
from .flags import DeviceOption, ForceBaseOption, JsonOption, StreamOption, TrustOption
from .pairing import Source, is_file, is_run, made_pairs
from .session import session

if TYPE_CHECKING:
    from ..judging.endpoint import Endpoint
    from ..judging.pairs import Pair
    from ..judging.scores import Summary
    from .session import Session

KEY = "OPENAI_API_KEY"
"""The variable that holds what the endpoint wants to see."""
_JUDGE = "The judge"
_FOUND = "found.json"


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_sampling_flags(judge),
        "quantadapt judge runs/hqq-lora runs/hqq-dora --endpoint http://localhost:8000/v1 "
        "--judge-model llama",
        f"{KEY}=... quantadapt judge runs/hqq-lora base-answers.jsonl --endpoint "
        "https://api.openai.com/v1 --judge-model gpt-5",
    )


def judge(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A run, a model, or a file of answers that generate wrote."
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The folder for answers, verdicts and what they come to. The same command goes on "
            "after an interruption.",
        ),
    ] = Path("judged"),
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where OpenAI's API is spoken, e.g. http://localhost:8000/v1. "
            f"{KEY} holds the key.",
            rich_help_panel=_JUDGE,
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What the judge is called there.", rich_help_panel=_JUDGE
        ),
    ] = None,
    with_reference: Annotated[
        bool,
        typer.Option(
            "--with-reference",
            help="Show the judge what the data answer, too.",
            rich_help_panel=_JUDGE,
        ),
    ] = False,
    judge_tokens: Annotated[
        int, typer.Option(min=16, help="Longest verdict, in tokens.", rich_help_panel=_JUDGE)
    ] = 1024,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Questions to the judge at the same time.", rich_help_panel=_JUDGE
        ),
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, max=86400, help="Seconds for a verdict.", rich_help_panel=_JUDGE),
    ] = 120.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often it is asked again, each time after a longer wait, if it is busy or "
            "does not answer.",
            rich_help_panel=_JUDGE,
        ),
    ] = 5,
    pairs_only: Annotated[
        bool,
        typer.Option(
            "--pairs-only",
            help="Make the pairs alone, for `quantadapt people`.",
            rich_help_panel=_JUDGE,
        ),
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file of questions, as for generate.", show_default="what the run held out"
        ),
    ] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="Use at most so many questions.")] = 80,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew what is at --output.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most answers that are made at the same time.")
    ] = 16,
    layout: LayoutOption = None,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
    *,
    answers: dict[str, Any],
) -> None:
    """Let a model judge which of two models answers better.

    Both answer the same questions. The judge sees each pair twice, in both orders; a pair counts as
    won where it says so both times. Its words are kept. It exits with 1 if no pair could be judged.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..generation.sampling import Sampling
        from ..judging.endpoint import Endpoint
        from ..judging.folder import own_folder, write_json

        _check(a, b, endpoint, judge_model, pairs_only, prompts)
        sampling, folder = Sampling(**answers), output.expanduser()
        made_with = {
            **{"a": _named(a), "b": _named(b), "prompts": prompts, "max_prompts": max_prompts},
            **{"layout": layout, "options": sampling.model_dump(mode="json")},
        }
        asked = None
        if endpoint and judge_model and not pairs_only:
            asked = Endpoint(
                endpoint.rstrip("/"),
                judge_model,
                os.environ.get(KEY, ""),
                timeout=timeout,
                retries=retries,
                max_tokens=judge_tokens,
            )
            _check_there(shown, asked)
        judged_by = None
        if asked is not None:
            judged_by = {"model": asked.model, "endpoint": asked.url, "reference": with_reference}
        inputs = (a, b, prompts)
        with own_folder(folder, made_with, judged_by, inputs=inputs, overwrite=overwrite):
            source = Source(a, b, prompts, max_prompts)
            how: dict[str, Any] = {"device": device, "layout": layout}
            how |= {"stream": stream, "force_base": force_base}
            pairs = made_pairs(shown, source, folder, sampling, batch_size, how)
            if asked is None:
                text = f"{len(pairs)} pairs are in {folder / 'pairs.jsonl'}"
                shown.err.print(text, markup=False, soft_wrap=True)
                return
            summary = _judged(shown, pairs, asked, folder, with_reference, parallel)
            found = {"a": pairs[0].a, "b": pairs[0].b, "judge": judge_model, **asdict(summary)}
            write_json(folder / _FOUND, found)
        if json:
            shown.print_json(found)
        else:
            _show(shown, pairs[0], summary, folder)
    if summary.win_rate is None:
        raise SystemExit(1)


def _check(
    a: str,
    b: str,
    endpoint: str | None,
    judge_model: str | None,
    pairs_only: bool,
    prompts: str | None,
) -> None:
    """Raise SpecError with all that is wrong with the options."""
    from ..errors import Problem, SpecError
    from ..judging.endpoint import endpoint_problems

    problems = []
    if not pairs_only:
        if endpoint is None:
            fix = "give the address of the judge's API, or --pairs-only"
            problems.append(Problem("there is no judge", fix, "--endpoint"))
        if not judge_model:
            problems.append(Problem("the judge has no name", "say which model", "--judge-model"))
    if endpoint is not None:
        problems += endpoint_problems(endpoint)
    files = [path for path in (a, b) if is_file(path)]
    if files and prompts is not None:
        what = f"{files[0]} has its questions already"
        problems.append(Problem(what, "leave it out", "--prompts"))
    if a == b:
        problems.append(Problem("both are the same", "name two", "B"))
    if not files and prompts is None and not any(map(is_run, (a, b))):
        what = "neither has questions: no run, no file of answers"
        problems.append(Problem(what, "give --prompts FILE", "--prompts"))
    if problems:
        raise SpecError(problems)


def _named(path: str) -> str:
    """Return a path with, for a file, what is in it."""
    import hashlib

    if not is_file(path):
        return path
    content = Path(path).expanduser().read_bytes()
    return f"{path} {hashlib.sha256(content).hexdigest()[:16]}"


def _check_there(shown: Session, endpoint: Endpoint) -> None:
    """Raise PlanRefused where the endpoint does not answer, before any model is loaded."""
    from ..errors import EndpointError, PlanRefused
    from ..judging.endpoint import is_readable_by_others

    if endpoint.key and is_readable_by_others(endpoint.url):
        shown.note(f"{KEY} goes to {endpoint.url} unencrypted")
    try:
        endpoint.check()
    except EndpointError as error:
        raise PlanRefused(error.problems) from None


def _judged(
    shown: Session,
    pairs: Sequence[Pair],
    endpoint: Endpoint,
    folder: Path,
    with_reference: bool,
    parallel: int,
) -> Summary:
    """Let the judge judge, and return what its verdicts come to."""
    from contextlib import ExitStack

    from ..errors import EndpointError, OutputError
    from ..judging.judge import JUDGEMENTS, judge_pairs, read_judgements
    from ..judging.scores import summary_of
    from ..judging.verdicts import ORDERS
    from ..showing.display import counting

    file, count = folder / JUDGEMENTS, 2 * len(pairs)
    if not file.exists():
        with ExitStack() as stack:

            def told(begun: int) -> Any:
                if begun:
                    text = f"{begun} of {count} verdicts are there already; going on"
                    shown.err.print(text, markup=False, soft_wrap=True)
                return stack.enter_context(counting(shown.progress, "judging", count, begun))

            try:
                judge_pairs(
                    pairs, endpoint, file,
                    with_reference=with_reference, parallel=parallel, told=told,
                )  # fmt: skip
            except EndpointError:
                stack.close()
                text = f"{len(read_judgements(file))} of {count} verdicts are kept in {folder}"
                shown.err.print(text, markup=False, soft_wrap=True)
                raise
    verdicts = read_judgements(file)
    if any((pair.id, order) not in verdicts for pair in pairs for order in ORDERS):
        fix = "pass --overwrite, and the judge judges anew"
        raise OutputError("it lacks verdicts on the pairs beside it", fix=fix, where=str(file))
    return summary_of([(verdicts[p.id, "ab"], verdicts[p.id, "ba"]) for p in pairs])


def _show(shown: Session, pair: Pair, found: Summary, folder: Path) -> None:
    def say(text: str) -> None:
        shown.out.print(text, markup=False, soft_wrap=True)

    if found.win_rate is None:
        say(f"no pair was judged: none of the {2 * found.pairs} verdicts could be read")
    else:
        rate, n = found.win_rate, found.judged
        say(f"{pair.a} wins {found.wins_a}, {pair.b} wins {found.wins_b}, {found.ties} ties of {n}")
        interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f}%"
        say(f"win rate of {pair.a} {rate.value:.1%}, 95% interval {interval}, ties half")
        bias = f"the first answer {found.first} times, the last {found.last} times"
        say(f"same verdict in both orders {found.consistent} of {n}; else it preferred {bias}")
    if found.unreadable:
        lost = found.pairs - found.judged
        text = f"{found.unreadable} of {2 * found.pairs} verdicts could not be read"
        shown.note(f"{text}; the {lost} pairs that they are about do not count")
    shown.err.print(f"all of it is in {folder}", markup=False, soft_wrap=True, style="dim")
