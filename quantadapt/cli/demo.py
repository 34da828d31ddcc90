"""`quantadapt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..generation.sampling import Sampling
from ..remote_code import trusting
from .answering import LayoutOption, with_sampling_flags
from .commands import add
from .evaluate import PathArgument
from .flags import DeviceOption, ForceBaseOption, StreamOption, TrustOption
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
    from ..generation.questions import Question
    from .session import Session

_MOST_QUESTIONS = 48


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_sampling_flags(demo),
        "quantadapt demo runs/hqq-lora",
        "quantadapt demo runs/hqq-lora --questions mine.jsonl --port 8080",
    )


def demo(
    path: PathArgument,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Questions to choose from: a data file, as for training.",
            show_default="what the run held out",
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    layout: LayoutOption = None,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    *,
    answers: dict[str, Any],
) -> None:
    """Let base and tuned model answer side by side, in the browser.

    The page is for this machine alone. To show it to others, give their address with --host and set
    QUANTADAPT_TOKEN: that is the password then. The page loads nothing from elsewhere, and tells
    nobody anything.
    """
    with session() as shown, trusting(trust_remote_code):
        from .answering import asking

        need("the demo", ("gradio",), "studio")
        sampling, token = Sampling(**answers), token_for(host)
        found = _questions(shown, path, questions)
        with (
            listening(host, port) as listener,
            asking(shown, path, device, layout, stream=stream, force_base=force_base) as asked,
        ):
            from ..studio.demo import demo_page
            from ..studio.page import page_app
            from ..studio.speaking import Speaker

            speaker = Speaker.open(asked.model, asked.writer, name=_name(path), questions=found)
            app = page_app(
                demo_page(speaker, sampling), token=token, any_host=not is_loopback(host)
            )
            text = f"{asked.told}\nthe demo is at {address_of(host, listener)}  (Ctrl-C stops)"
            shown.err.print(text, markup=False, soft_wrap=True)
            try:
                serve_app(app, listener, speaker.worker.halt, **PAGE)
            finally:
                speaker.close()
            shown.err.print("stopped", markup=False)


def _name(path: str) -> str:
    return Path(path).expanduser().resolve().name if Path(path).expanduser().exists() else path


def _questions(shown: Session, path: str, source: str | None) -> list[Question]:
    """Return what may be asked: of a file, or of what the run at `path` held out."""
    from ..errors import QuantadaptError
    from ..generation.questions import held_out_questions
    from ..spec import DataSpec
    from .models import spec_of_run

    if source is not None:
        spec = DataSpec(path=source, eval_path=source)
        return held_out_questions(spec, seed=0, most=_MOST_QUESTIONS)
    try:
        if (run := spec_of_run(path)) is None:
            return []
        return held_out_questions(run.data, seed=run.seed, most=_MOST_QUESTIONS)
    except QuantadaptError as error:  # data may have gone since
        shown.note(f"the run's held-out questions are not offered: {error}")
        return []
