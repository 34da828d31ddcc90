"""The part of a page in which two voices of a model answer the same questions side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionsError
from ..generation.sampling import Sampling
from ..reporting.html import Html, capital, el
from .page import QUIETLY, gr, html
from .parts import problem_list
from .speaking import BASE, Said, Speaker

_EMPTY = "Ask something below, or take one of the questions."
_RANGES: dict[str, dict[str, float]] = {
    "max_new_tokens": {"minimum": 1, "maximum": 2048, "step": 1},
    "temperature": {"minimum": 0, "maximum": 2, "step": 0.05},
    "top_p": {"minimum": 0.05, "maximum": 1, "step": 0.01},
    "min_p": {"minimum": 0, "maximum": 1, "step": 0.01},
    "repetition_penalty": {"minimum": 0.5, "maximum": 2, "step": 0.05},
}
"""The options of `Sampling` that are sliders; others are typed."""


@dataclass
class _Side:
    """What one side of a talk has said and heard: (role, text, note) of each turn."""

    turns: list[tuple[str, str, str]] = field(default_factory=list)

    def asked(self, system: str, speaker: Speaker) -> list[dict[str, str]]:
        """Return the turns of the next prompt."""
        said = self._valid if speaker.chats else self.turns[-1:]
        wanted = system.strip() and speaker.takes_system
        opening = [{"role": "system", "content": system}] if wanted else []
        return [*opening, *({"role": role, "content": text} for role, text, _ in said)]

    @property
    def _valid(self) -> list[tuple[str, str, str]]:
        """The turns without questions that could not be answered."""
        pairs = zip(self.turns, [*self.turns[1:], ("", "", "")], strict=True)
        return [turn for turn, following in pairs if "error" not in (turn[0], following[0])]


@dataclass
class Talk:
    """What a reader has asked; one for each open page."""

    left: _Side = field(default_factory=_Side)
    right: _Side = field(default_factory=_Side)


@dataclass(frozen=True)
class Conversation:
    """The components of a conversation, and what fills them for the model that is open."""

    outputs: Sequence[Any]
    refresh: Callable[[], Sequence[Any]]


def conversation(current: Callable[[], Speaker | None], sampling: Sampling) -> Conversation:
    """Draw a conversation with the model that `current` gives, inside of a page.

    Args:
        sampling: how to answer at first; readers may change it.
    """
    drawn = _Drawn.on_page(_Look.of(current()), sampling)
    _connect(drawn, _Listening(current))

    def refresh() -> Sequence[Any]:
        return drawn.as_it_looks(_Look.of(current()))

    return Conversation(drawn.refreshed, refresh)


@dataclass(frozen=True)
class _Drawn:
    """The components of a conversation."""

    talk: Any
    left_column: Any
    left_voice: Any
    right_voice: Any
    left: Any
    right: Any
    expected: Any
    question: Any
    ask: Any
    stop: Any
    anew: Any
    examples: Any
    system: Any
    options: Sequence[Any]

    @classmethod
    def on_page(cls, first: _Look, sampling: Sampling) -> _Drawn:
        """Draw them, from the top to the bottom of the page."""
        parts = {"talk": gr.State(Talk()), **_sides(first), "expected": html(name="expected")}
        parts |= {"question": _question(first), **_buttons(first), "examples": _examples(first)}
        with gr.Accordion("How to answer", open=False, elem_id="how"):
            parts["system"] = gr.Textbox(
                "", label="System prompt", info="Stands before every chat.", lines=1, max_lines=6,
                elem_id="system", visible=first.takes_system,
            )  # fmt: skip
            return cls(**parts, options=_sampling_inputs(sampling))

    @property
    def refreshed(self) -> list[Any]:
        """What `as_it_looks` fills."""
        voices = [self.talk, self.left_column, self.left_voice, self.right_voice]
        told = [self.left, self.right, self.expected]
        return [*voices, *told, self.question, self.ask, self.examples, self.system]

    def as_it_looks(self, now: _Look) -> Sequence[Any]:
        """Return values for `refreshed`."""
        return (
            Talk(),
            gr.Column(visible=now.both),
            gr.Dropdown(choices=now.voices, value=BASE, visible=now.several),
            gr.Dropdown(choices=now.voices, value=now.active, visible=now.several),
            *(now.left, now.right, ""),
            gr.Textbox(interactive=now.open),
            gr.Button(interactive=now.open),
            gr.Dataset(samples=now.questions, visible=bool(now.questions)),
            gr.Textbox(visible=now.takes_system),
        )


def _sides(first: _Look) -> dict[str, Any]:
    """Draw what the two voices say, and the choice of voices."""
    voices, several = first.voices, first.several
    with gr.Row(equal_height=True):
        with gr.Column(min_width=300, visible=first.both) as column:
            left_voice = gr.Dropdown(voices, value=BASE, label="Left", visible=several)
            left = html(first.left, name="left")
        with gr.Column(min_width=300):
            right_voice = gr.Dropdown(voices, value=first.active, label="Right", visible=several)
            right = html(first.right, name="right")
    return {
        **{"left_column": column, "left_voice": left_voice, "left": left},
        **{"right_voice": right_voice, "right": right},
    }


def _question(first: _Look) -> Any:
    return gr.Textbox(
        "", label="Question", info="Enter asks; Shift+Enter begins a new line.", lines=1,
        max_lines=12, elem_id="question", interactive=first.open,
    )  # fmt: skip


def _buttons(first: _Look) -> dict[str, Any]:
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask", interactive=first.open, scale=3)
        stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=120)
        anew = gr.Button("New chat", elem_id="anew", min_width=120)
    return {"ask": ask, "stop": stop, "anew": anew}


def _examples(first: _Look) -> Any:
    return gr.Dataset(
        components=["textbox"],
        samples=first.questions,
        type="index",
        label="Questions that the training has not seen",
        samples_per_page=6,
        elem_id="examples",
        visible=bool(first.questions),
    )


class _Listening:
    """What happens when a reader does something.

    Args:
        current: gives the model that is open.
    """

    def __init__(self, current: Callable[[], Speaker | None]) -> None:
        self.current = current
        self._stops: dict[str, threading.Event] = {}

    def asking(
        self,
        request: gr.Request,
        was: Talk,
        text: str,
        opening: str,
        one: str,
        other: str,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield what the page shows while the answers come."""
        stopped = self._stops[request.session_hash] = threading.Event()
        said, voices = (text, opening), (one, other)
        for found in _asked(self.current(), was, said, voices, values, stopped):
            if self._stops.get(request.session_hash) is not stopped:  # nobody waits any more
                return
            yield found

    def stopping(self, request: gr.Request) -> None:
        """End the answers, and keep what there is."""
        if found := self._stops.get(request.session_hash):
            found.set()

    def leaving(self, request: gr.Request) -> None:
        """End the answers of a page that is closed."""
        if found := self._stops.pop(request.session_hash, None):
            found.set()

    def beginning(self, request: gr.Request, one: str, other: str) -> tuple[Any, ...]:
        """Forget the chat."""
        self.leaving(request)
        return Talk(), gr.skip(), *_panels(self.current(), Talk(), one, other), "", *_idle()

    def choosing(self, index: int) -> tuple[str, Any]:
        """Take one of the questions of the data."""
        speaker = self.current()
        if speaker is None or index >= len(speaker.questions):
            return "", gr.skip()
        found = speaker.questions[index]
        return found.text, found.system or gr.skip()


def _connect(drawn: _Drawn, listening: _Listening) -> None:
    """Have the components tell what is done with them."""
    voices = [drawn.left_voice, drawn.right_voice]
    given = [drawn.talk, drawn.question, drawn.system, *voices, *drawn.options]
    shown = [drawn.talk, drawn.question, drawn.left, drawn.right, drawn.expected]
    shown += [drawn.ask, drawn.stop]
    at_once: dict[str, Any] = {**QUIETLY, "queue": False}
    gr.on(
        [drawn.ask.click, drawn.question.submit],
        *(listening.asking, given, shown),
        **QUIETLY,
        concurrency_limit=None,
        api_name="ask",
    )
    drawn.stop.click(listening.stopping, **at_once, api_name="stop")
    drawn.anew.click(listening.beginning, voices, shown, **at_once, api_name="anew")
    asked = [drawn.question, drawn.system]
    drawn.examples.click(listening.choosing, drawn.examples, asked, **QUIETLY, api_name="example")
    for voice in voices:
        voice.input(listening.beginning, voices, shown, **at_once, api_name=False)
    gr.context.Context.root_block.unload(listening.leaving)


@dataclass(frozen=True)
class _Look:
    """What a conversation looks like before anything was asked."""

    open: bool
    voices: list[tuple[str, str]]
    active: str
    takes_system: bool
    questions: list[list[str]]
    left: Html
    right: Html

    @classmethod
    def of(cls, speaker: Speaker | None) -> _Look:
        left, right = _panels(speaker, Talk(), "", "")
        if speaker is None:
            return cls(False, [(BASE, BASE)], BASE, True, [], left, right)
        voices = [(label, key) for key, label in speaker.voices.items()]
        questions = [[one.text] for one in speaker.questions]
        return cls(True, voices, speaker.active, speaker.takes_system, questions, left, right)

    @property
    def both(self) -> bool:
        """Whether there are two sides."""
        return len(self.voices) > 1

    @property
    def several(self) -> bool:
        """Whether there is a choice of voices."""
        return len(self.voices) > 2


def _idle() -> tuple[Any, Any]:
    """Return (ask, stop) as they are while nothing is answered."""
    return gr.Button(interactive=True), gr.Button(interactive=False)


def _asked(
    speaker: Speaker | None,
    was: Talk,
    said: tuple[str, str],
    voices: tuple[str, str],
    values: Sequence[Any],
    stopped: threading.Event,
) -> Iterator[tuple[Any, ...]]:
    """Yield values for (talk, question, left, right, expected, ask, stop) as the answers come."""
    text, opening = said
    idle, busy = _idle(), (gr.Button(interactive=False), gr.Button(interactive=True))
    if speaker is None or not text.strip():
        yield was, text, *_panels(speaker, was, *voices), "", *idle
        return
    try:
        sampling = _sampling(values)
    except OptionsError as error:
        wrong = problem_list(error.problems, "These options cannot be used")
        yield was, text, *_panels(speaker, was, *voices), wrong, *idle
        return
    left, right = voices[0] or BASE, voices[1] or speaker.active
    sides = {"left": (left, was.left), "right": (right, was.right)}
    if len(speaker.voices) == 1:
        del sides["left"]
    for _, side in sides.values():
        side.turns.append(("user", text, ""))
    asked = {name: (voice, side.asked(opening, speaker)) for name, (voice, side) in sides.items()}
    expected = _expected(speaker, text)
    for found in speaker.answers(asked, sampling, stopped):
        yield was, "", *_panels(speaker, was, *voices, found), expected, *busy
    for name, (_, side) in sides.items():
        side.turns.append(_kept(found[name]))
    yield was, "", *_panels(speaker, was, *voices), expected, *idle


def _kept(said: Said) -> tuple[str, str, str]:
    role = "error" if said.finish == "error" else "assistant"
    return role, said.text, _note(said)


def _note(said: Said) -> str:
    ends = {"stop": "", "length": "cut at its longest", "stopped": "stopped", "error": ""}
    count = f"{said.tokens:,} token{'' if said.tokens == 1 else 's'}" if said.tokens else ""
    return "; ".join(filter(None, [count, said.note or ends.get(said.finish, "")]))


def _panels(
    speaker: Speaker | None, talk: Talk, one: str, other: str, coming: dict[str, Said] | None = None
) -> tuple[Html, Html]:
    """Return both sides; `coming` are the answers that are being made."""
    coming = coming or {}
    active = speaker.active if speaker else ""
    return (
        _panel(speaker, talk.left, one or BASE, coming.get("left")),
        _panel(speaker, talk.right, other or active, coming.get("right")),
    )


def _panel(speaker: Speaker | None, side: _Side, voice: str, said: Said | None) -> Html:
    name = speaker.voices.get(voice, "") if speaker else ""
    kind = "base" if voice == BASE and speaker and len(speaker.voices) > 1 else "tuned"
    turns = [_turn(*turn) for turn in side.turns]
    if said is not None:
        turns.append(_turn("assistant", said.text, _note(said), coming=not said.finish))
    inner = turns or [el("p", _EMPTY if speaker else "No model is open.", class_="empty")]
    heading = el("p", el("span", name, class_="name"), class_=f"voice {kind}")
    return el("div", heading, el("div", el("div", *inner), class_="talk"), class_="qa")


def _turn(role: str, text: str, note: str, *, coming: bool = False) -> Html:
    below = [el("p", note, class_="note")] if note else []
    if role == "error":
        return el("div", el("p", note), class_="problem", role="alert")
    body = el("pre", text or ("" if coming or role == "user" else "(nothing)"), dir="auto")
    return el("div", body, *below, class_=f"turn {role}{' coming' if coming else ''}")


def _expected(speaker: Speaker, text: str) -> Html:
    """Return what the data answer to a question of theirs."""
    found = next((q.reference for q in speaker.questions if q.text == text), "")
    if not found.strip():
        return Html()
    heading = el("p", el("span", "in the data", class_="name"), class_="voice")
    return el("div", heading, el("pre", found, class_="boxed", dir="auto"), class_="qa")


# How to answer ------------------------------------------------------------------------------------


def _sampling_inputs(sampling: Sampling) -> list[Any]:
    """Draw an input for each option of `Sampling`, in their order."""
    found = []
    with gr.Row():
        for name, option in Sampling.model_fields.items():
            value = getattr(sampling, name)
            about = {
                "label": capital(name.replace("_", " ")),
                "info": f"{capital(option.description or '')}.",
                "elem_id": name.replace("_", "-"),
                "min_width": 230,
            }
            if ranges := _RANGES.get(name):
                top = max(ranges["maximum"], value)
                found.append(gr.Slider(value=value, **{**ranges, "maximum": top}, **about))
            elif name == "stop":
                found.append(
                    gr.Textbox("\n".join(value), lines=2, placeholder="one a line", **about)
                )
            else:
                found.append(
                    gr.Textbox("" if value is None else str(value), placeholder="none", **about)
                )
    return found


def _sampling(values: Sequence[Any]) -> Sampling:
    """Return the options that were chosen. Raises OptionsError."""
    named = dict(zip(Sampling.model_fields, values, strict=True))
    named["stop"] = [line for line in str(named["stop"] or "").split("\n") if line]
    given = {name: value for name, value in named.items() if value not in ("", None)}
    return Sampling(**given)
