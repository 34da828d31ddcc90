"""The page on which people vote: two answers side by side, of models that nobody names."""

from __future__ import annotations

from typing import Any

from ..errors import QuantadaptError
from ..reporting.html import Html, el
from ..studio.page import QUIETLY, gr, html, page
from ..studio.parts import heading, note
from .votes import Ballot, Side, Votes

LONGEST_NAME = 64
_LEDE = (
    "Two models answered the same question. Say which answer is better, or that neither is. Every "
    "vote is kept at once: close the page when you like, and go on under the same name."
)
_SIDES: dict[Side, str] = {"left": "Left is better", "tie": "Neither", "right": "Right is better"}


def people_page(ballot: Ballot, votes: Votes) -> gr.Blocks:
    """Return the page; several people may have it open."""
    with page("quantadapt people") as blocks:
        html(heading("Which answer is better?", _LEDE))
        voter = gr.State("")
        with gr.Row(elem_id="who") as who:
            name = gr.Textbox(label="Your name", max_length=LONGEST_NAME, elem_id="name", scale=3)
            begin = gr.Button("Begin", variant="primary", elem_id="begin", min_width=120)
        told = html(name="told")
        with gr.Column(visible=False) as ballot_paper:
            question = html(name="question")
            with gr.Row(equal_height=True):
                with gr.Column(min_width=300):
                    left = html(name="left")
                with gr.Column(min_width=300):
                    right = html(name="right")
            with gr.Row():
                buttons = {
                    side: gr.Button(text, elem_id=f"vote-{side}") for side, text in _SIDES.items()
                }
            # What the reader looks at, which a second click must not take for what came after it.
            seen = gr.Textbox(visible="hidden", label="pair", elem_id="seen")
        outputs = [told, who, ballot_paper, question, left, right, seen]

        def started(given: str, request: gr.Request) -> tuple[Any, ...]:
            mine = " ".join(str(getattr(request, "username", None) or given).split())
            if not mine or len(mine) > LONGEST_NAME:
                return ("", note("Say who you are: any name, of 64 characters at most."),
                        *(gr.skip() for _ in outputs[1:]))  # fmt: skip
            return (mine, *_shown(ballot, votes, mine))

        begun = [voter, *outputs]
        begin.click(started, [name], begun, api_name="begin", **QUIETLY)
        name.submit(started, [name], begun, api_name=False, show_progress="hidden")
        for side, button in buttons.items():
            vote = _voting(ballot, votes, side)
            button.click(vote, [voter, seen], outputs, api_name=f"vote_{side}", **QUIETLY)
    return blocks


def _voting(ballot: Ballot, votes: Votes, side: Side) -> Any:
    def voted(voter: str, seen: str) -> tuple[Any, ...]:
        pair = ballot.pairs.get(seen)
        trouble = ""
        if voter and pair is not None:
            try:
                votes.add(ballot.vote(voter, pair, side))
            except QuantadaptError as error:
                trouble = error.problems[0].what
        return _shown(ballot, votes, voter, trouble)

    return voted


def _shown(ballot: Ballot, votes: Votes, voter: str, trouble: str = "") -> tuple[Any, ...]:
    """Return what a voter sees next: how far it is, the question and both answers."""
    if not voter:
        again = gr.update(visible=True)
        return (note("Say who you are first."), again, *(gr.skip() for _ in range(5)))
    done = votes.of(voter) & ballot.pairs.keys()
    pair, count = ballot.next_for(voter, done), len(ballot.pairs)
    words = f"{voter}: {len(done)} of {count} done"
    if pair is None:
        thanks = note(f"{words}. Thank you, that was all.")
        hidden = gr.update(visible=False)
        return (thanks, hidden, hidden, "", "", "", "")
    if trouble:
        words = f"{trouble}. Your vote was not kept; vote again."
    one, other = pair.answer_a, pair.answer_b
    if ballot.left(voter, pair) == "b":
        one, other = other, one
    return (
        note(words),
        gr.update(visible=False),
        gr.update(visible=True),
        _text("Question", pair.prompt),
        _text("Left", one),
        _text("Right", other),
        pair.id,
    )


def _text(title: str, text: str) -> Html:
    """Return a text as it stands, every mark of HTML in it escaped."""
    return el("div", el("h2", title), el("div", el("pre", text), class_="boxed"), class_="qa")
