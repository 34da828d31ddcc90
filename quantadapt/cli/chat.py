"""`quantadapt chat`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..generation.sampling import Sampling
from ..remote_code import trusting
from .answering import BareOption, LayoutOption, said, stdin, with_sampling_flags
from .commands import add
from .evaluate import PathArgument
from .flags import DeviceOption, ForceBaseOption, StreamOption, TrustOption
from .session import session

if TYPE_CHECKING:
    from .answering import Asked
    from .session import Session

_HELP = """\
/reset             forget the chat
/system TEXT       set the system prompt and begin anew; without TEXT, none
/adapter on|off    answer with the adapter, or let the base answer
/set NAME VALUE    change an option of the answers, e.g. /set temperature 0.7
/image FILE        show a picture with the next question
/again             answer the last question once more
/help              this
/exit              leave; so does Ctrl-D. Ctrl-C stops an answer"""


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_sampling_flags(chat),
        "quantadapt chat runs/hqq-lora",
        'quantadapt chat ./model --system "Answer in one sentence." --temperature 0.7',
    )


def chat(
    path: PathArgument,
    system: Annotated[str, typer.Option(help="The system prompt.", show_default="none")] = "",
    layout: LayoutOption = None,
    base: BareOption = False,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    *,
    answers: dict[str, Any],
) -> None:
    """Talk with a model.

    Answers appear as they are made. /help lists what else can be done: begin anew, hear the base
    without the adapter, change how answers are drawn. What is no terminal is read line by line.
    """
    with session() as shown, trusting(trust_remote_code):
        from .answering import asking

        sampling = Sampling(**answers)
        how: dict[str, Any] = {"stream": stream, "force_base": force_base, "files": True}
        with asking(shown, path, device, layout, **how) as asked:
            talk = Talk(shown, asked, sampling, system, adapter=not base)
            has_adapter = hasattr(asked.model, "disable_adapter")
            text = f"{asked.told}{'' if has_adapter else '; there is no adapter'}. /help for help"
            shown.err.print(text, style="dim", markup=False, soft_wrap=True)
            talk.go_on()


@dataclass
class Talk:
    """A chat on the terminal.

    Attributes:
        turns: what was said, but for the system prompt.
        images: files of pictures that come with the next question.
        adapter: whether the adapter answers, not the base alone.
    """

    shown: Session
    asked: Asked
    sampling: Sampling
    system: str = ""
    adapter: bool = True
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def go_on(self) -> None:
        """Read and answer until there is nothing more to read."""
        given = stdin()
        while (line := self._read(given)) is not None:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name in ("/exit", "/quit"):
                    return
                self._command(name, rest.strip())
            elif line.strip():
                self._ask(line)

    def _read(self, given: TextIO) -> str | None:
        try:
            if given.isatty():
                return self.shown.err.input("[bold]>[/bold] ")
            line = given.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.shown.err.print()
            return None

    def _say(self, text: str) -> None:
        self.shown.err.print(text, style="dim", markup=False, soft_wrap=True)

    def _command(self, name: str, rest: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/adapter": self._set_adapter,
            "/set": self._set,
            "/image": self._show,
            "/again": self._again,
            "/help": lambda _: self._say(_HELP),
        }
        if name in commands:
            commands[name](rest)
        else:
            self._say(f"there is no {name}; /help lists what there is")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self.images.clear()
        self._say("a new chat")

    def _set_system(self, text: str) -> None:
        self.system = text
        self._reset("")

    def _set_adapter(self, word: str) -> None:
        if not hasattr(self.asked.model, "disable_adapter"):
            self._say("there is no adapter here")
        elif word in ("on", "off"):
            self.adapter = word == "on"
            self._say(
                "the adapter answers" if self.adapter else "the base answers, without adapter"
            )
        else:
            self._say("write /adapter on, or /adapter off")

    def _set(self, text: str) -> None:
        from ..errors import SpecError
        from ..inputs.plain_yaml import YAMLError, parse

        try:
            name, value = shlex.split(text)
        except ValueError:
            self._say(f"write /set NAME VALUE; names: {', '.join(Sampling.model_fields)}")
            return
        try:
            read = [value] if name == "stop" else parse(value)
            self.sampling = Sampling(**{**self.sampling.model_dump(), name: read})
        except (SpecError, YAMLError) as error:
            self._say(str(error))

    def _show(self, name: str) -> None:
        if not name or not Path(name).expanduser().is_file():
            self._say(
                f"there is no file {name}; write /image FILE" if name else "write /image FILE"
            )
        elif self.asked.writer.layout != "chat":
            self._say("pictures are shown in chats: begin with --layout chat")
        else:
            self.images.append(name)
            self._say("it comes with your next question")

    def _again(self, _: str) -> None:
        if not self.turns:
            self._say("nothing was asked yet")
            return
        if self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        self._answer()

    def _ask(self, text: str) -> None:
        asked = said(text, self.images)
        self.turns += asked if self.images else [{"role": "user", "content": text}]
        self.images = []
        self._answer()

    def _answer(self) -> None:
        """Answer the last turn; what cannot be asked is told and forgotten."""
        from ..errors import QuantadaptError

        pieces: list[str] = []
        try:
            for piece in self._pieces():
                pieces.append(piece)
                self.shown.out.print(piece, end="", markup=False, soft_wrap=True)
                self.shown.out.file.flush()
        except KeyboardInterrupt:
            self._say("\n(stopped)")
        except QuantadaptError as error:
            self.turns.pop()
            self._say(str(error))
            return
        self.shown.out.print()
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _pieces(self) -> Any:
        from contextlib import nullcontext

        from ..generation import streamed
        from ..model.own_biases import without_adapter

        turns = [{"role": "system", "content": self.system}] if self.system else []
        asked, turns = self.asked, [*turns, *self.turns]
        text: Any = turns if asked.writer.layout != "text" else "".join(t["content"] for t in turns)
        ids = asked.writer.ids(text)
        with nullcontext() if self.adapter else without_adapter(asked.model):
            yield from streamed(asked.model, asked.writer.tokenizer, ids, self.sampling)
