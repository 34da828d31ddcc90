"""`quantadapt people`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import add
from .flags import JsonOption
from .listening import (
    PAGE,
    HostOption,
    PortOption,
    address_of,
    is_loopback,
    listening,
    need,
    serve_app,
    token_for,
)
from .session import session

if TYPE_CHECKING:
    from ..judging.pairs import Pair
    from ..judging.scores import Outcome
    from ..judging.votes import Tally
    from .session import Session

_FEW = 20
"""With less votes, resampling them tells little of how sure a rating is."""


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        people,
        "quantadapt judge runs/hqq-lora runs/hqq-dora -o judged --pairs-only",
        "quantadapt people judged",
        "quantadapt people judged --report",
    )


def people(
    pairs: Annotated[
        list[str],
        typer.Argument(metavar="PAIRS", help="Folders that judge wrote, or files of pairs."),
    ],
    votes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the votes are.",
            show_default="votes.jsonl beside the pairs",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say what the votes come to, and show no page.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order of the pairs and the sides of the answers.")
    ] = 0,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7861,
    json: JsonOption = False,
) -> None:
    """Let people vote which of two answers is better, in the browser.

    Nobody sees whose answer is whose; sides and order are drawn for each voter. A vote is on the
    disk before the next pair is shown. --report has the Elo of the models and how far voters agree.

    The page is for this machine alone. To show it to others, give their address with --host and set
    QUANTADAPT_TOKEN: that is the password then, and the name that they log in with is the voter's.
    """
    with session(as_json=json) as shown:
        from ..errors import Problem, SpecError
        from ..judging.pairs import read_pairs

        if json and not report:
            raise SpecError([Problem("it goes with --report", "add --report", "--json")])
        found = [pair for source in pairs for pair in read_pairs(source)]
        file = (votes or _beside(pairs[0])).expanduser()
        if report:
            _report(shown, pairs, found, file)
            return
        need("the page", ("gradio",), "studio")
        token = token_for(host)
        with listening(host, port) as listener:
            from ..folders.atomic import locked
            from ..judging.page import people_page
            from ..judging.votes import Ballot, Votes
            from ..studio.page import page_app

            ballot = Ballot.of(found, seed)
            if not ballot.pairs:
                what, fix = "no pair has two different answers", "compare other models"
                raise SpecError([Problem(what, fix, pairs[0])])
            same = len(found) - len(ballot.pairs)
            if same:
                shown.note(f"{same} pairs are not shown: their answers are the same")
            with locked(file):
                app = page_app(
                    people_page(ballot, Votes(file)), token=token, any_host=not is_loopback(host)
                )
                text = f"{len(ballot.pairs)} pairs, votes go into {file}\n"
                text += f"the page is at {address_of(host, listener)}  (Ctrl-C stops)"
                shown.err.print(text, markup=False, soft_wrap=True)
                serve_app(app, listener, lambda: None, **PAGE)
        shown.err.print("stopped", markup=False)


def _beside(source: str) -> Path:
    from ..judging.votes import VOTES

    path = Path(source).expanduser()
    return (path if path.is_dir() else path.parent) / VOTES


def _report(shown: Session, sources: Sequence[str], pairs: Sequence[Pair], file: Path) -> None:
    from ..errors import Problem, SpecError
    from ..judging.votes import read_votes, tally

    given = read_votes(file)
    if not given:
        fix = "let people vote first: the command without --report"
        raise SpecError([Problem("there are no votes yet", fix, str(file))])
    found = tally(pairs, given, _judged(sources))
    if shown.as_json:
        shown.print_json(found.to_dict())
    else:
        _show(shown, found)


def _judged(sources: Sequence[str]) -> dict[str, Outcome]:
    """Return what a judge made of the pairs, where it has."""
    from ..judging.judge import JUDGEMENTS, read_judgements
    from ..judging.scores import outcome_of

    found: dict[str, Outcome] = {}
    for source in sources:
        path = Path(source).expanduser()
        file = (path if path.is_dir() else path.parent) / JUDGEMENTS
        said = read_judgements(file)
        for pair in dict.fromkeys(name for name, _ in said):
            both = said.get((pair, "ab"), "unreadable"), said.get((pair, "ba"), "unreadable")
            if "unreadable" not in both:
                found[pair] = outcome_of(*both)
    return found


def _show(shown: Session, found: Tally) -> None:
    def say(text: str) -> None:
        shown.out.print(text, markup=False, soft_wrap=True)

    voters = ", ".join(f"{name} {count}" for name, count in found.by_voter.items())
    say(f"{found.votes} votes: {voters}")
    for name, rating in sorted(found.ratings.items(), key=lambda item: -item[1].value):
        say(f"Elo {rating.value:.0f}, 95% {rating.low:.0f} to {rating.high:.0f}: {name}")
    if found.votes < _FEW:
        shown.note(f"{found.votes} votes are few: ratings and intervals tell little yet")
    for (one, other), (kappa, count) in found.kappas.items():
        told = "no more than chance tells" if kappa is None else f"{kappa:.2f}"
        say(f"agreement of {one} and {other}, Cohen's kappa: {told}, {count} pairs")
    if found.fleiss is not None and len(found.by_voter) > 2:
        say(f"agreement of all people, Fleiss' kappa: {found.fleiss:.2f}")
    if found.left is not None:
        say(f"votes for the left side: {found.left:.0%}")
    if found.others:
        shown.note(f"{found.others} votes are on other pairs and do not count")
