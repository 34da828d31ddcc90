"""`quantadapt serve`."""

from __future__ import annotations

import shlex
from dataclasses import replace
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
    TOKEN,
    HostOption,
    PortOption,
    address_of,
    listening,
    need,
    serve_app,
    token_for,
)
from .session import session

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from ..generation.prompts import PromptWriter
    from ..serving.app import Served
    from ..serving.worker import Voice


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        with_sampling_flags(serve),
        "quantadapt serve runs/hqq-lora",
        "quantadapt serve runs/a --adapter b=runs/b --adapter c=runs/c",
        f"{TOKEN}=$(openssl rand -hex 16) quantadapt serve ./model --host 0.0.0.0 --port 80",
    )


def serve(
    path: PathArgument,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.", show_default="the folder's name"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=PATH",
            help="Also serve the adapter of another run on the same base, under this name. "
            "Repeatable.",
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Most answers that are made at the same time.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most requests that wait; others are told to try later.")
    ] = 256,
    layout: LayoutOption = None,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    *,
    answers: dict[str, Any],
) -> None:
    """Serve a model as OpenAI's API does.

    /v1/chat/completions, /v1/completions and /v1/models, streamed or whole; the base without the
    adapter goes by the name of base. What a request leaves open, the flags say.

    It listens on this machine alone. To listen on others' addresses, set QUANTADAPT_TOKEN: clients
    have to show it as their API key. There is no encryption: put a proxy in front for that.
    """
    with session() as shown, trusting(trust_remote_code):
        from .answering import asking

        need("serving", ("fastapi", "uvicorn"), "serve")
        sampling = Sampling(**answers)
        token, others = token_for(host), _paths(adapter or [])
        with listening(host, port) as listener:
            with asking(shown, path, device, layout, stream=stream, force_base=force_base) as asked:
                further = _beside(asked.model, others, force_base)
                names = _names(asked.model, name or _name(path), further)
                writers = writers_for(asked.writer, others, layout)
                served = _served(asked, names, sampling, token, max_batch, max_waiting, writers)
                address = f"{address_of(host, listener)}/v1"
                called = ", ".join(names)
                told = _told(asked.told, writers)
                text = f"{told}; models: {called}\nserving at {address}  (Ctrl-C stops)"
                shown.err.print(text, markup=False, soft_wrap=True)
                if command := for_load(path):
                    text = f"for many users, write it for a server that is made for load: {command}"
                    shown.err.print(text, style="dim", markup=False, soft_wrap=True)
                _run(served, listener)
            shown.err.print("stopped", markup=False)


def _name(path: str) -> str:
    return Path(path).expanduser().resolve().name if Path(path).exists() else path


def _paths(given: Sequence[str]) -> dict[str, str]:
    """Return name -> path of `NAME=PATH`. Raises SpecError where one is not written so."""
    from ..errors import Problem, SpecError

    found = dict(text.partition("=")[::2] for text in given)
    if len(found) < len(given) or not all(name and path for name, path in found.items()):
        fix = "write --adapter NAME=PATH, each with a name of its own"
        raise SpecError([Problem(f"{', '.join(given)} names no adapters", fix, "--adapter")])
    return found


def _beside(model: Any, paths: Mapping[str, str], force_base: bool) -> dict[str, str]:
    """Put further adapters on the model; return what requests call each -> its name in PEFT, which
    takes fewer."""
    from ..exporting.beside import add_adapter

    found = {name: f"beside_{index}" for index, name in enumerate(paths)}
    for name, path in paths.items():
        add_adapter(model, path, found[name], force_base=force_base)
    return found


def writers_for(
    own: PromptWriter, paths: Mapping[str, str], layout: str | None
) -> dict[str, PromptWriter]:
    """Return what writes prompts for further adapters, by name, whose runs learnt them in another
    layout than `own` writes. `layout` is what the user has asked for, for all."""
    from ..generation.prompts import layout_of

    if layout is not None:
        return {}
    learnt = {name: layout_of(path, own.tokenizer) for name, path in paths.items()}
    return {n: replace(own, layout=each) for n, each in learnt.items() if each != own.layout}


def _told(own: str, writers: Mapping[str, PromptWriter]) -> str:
    from ..generation.prompts import LAYOUTS

    return own + "".join(f"; of {n} {LAYOUTS[w.layout]}" for n, w in writers.items() if w.layout)


def _served(
    asked: Any,
    names: dict[str, Voice],
    sampling: Sampling,
    token: str,
    max_batch: int,
    max_waiting: int,
    writers: Mapping[str, PromptWriter],
) -> Served:
    from ..generation.rows import base_of
    from ..serving.app import Served
    from ..serving.worker import Worker

    model, tokenizer = asked.model, asked.writer.tokenizer
    worker = Worker(model, tokenizer, names, max_batch=max_batch, max_waiting=max_waiting)
    config: Any = base_of(model).config
    config = getattr(config, "get_text_config", lambda: config)()
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    most = int(min(context, 2**30))
    return Served(worker, asked.writer, sampling, most, token, writers)


def _names(model: Any, name: str, further: Mapping[str, str]) -> dict[str, Voice]:
    """Return what requests call the model with its adapter, the base alone (None), and further
    adapters: those of its folder by their own names. Raises SpecError where two are called the
    same."""
    from ..errors import Problem, SpecError

    if not hasattr(model, "disable_adapter"):
        return {name: None}
    from ..serving.worker import active_of

    active = active_of(model)
    own = [(n, n) for n in model.peft_config if n not in (active, *further.values())]
    found = [(name, active), ("base", None), *own, *further.items()]
    if len(names := dict(found)) < len(found):
        called = [each for each, _ in found]
        twice = next(each for each in called if called.count(each) > 1)
        fix = "choose another --name, or NAME of --adapter"
        raise SpecError([Problem(f"two models are called {twice!r} here", fix, "--name")])
    return names


def for_load(path: str) -> str:
    """Return the command that writes the run at `path` for a server that is made for load, as its
    rules allow; empty where there is none, or no adapter."""
    from ..errors import QuantadaptError
    from ..planning.exports import export_of
    from ..records import Export
    from ..registry.discovery import registry
    from .models import check_export

    for record in registry().records(Export):
        for options in record.exporter.for_load:
            try:
                check_export(path, export_of(record.name, options))
            except QuantadaptError:
                continue
            told = " ".join(f"--set {name}={value}" for name, value in options.items())
            return f"quantadapt export {shlex.quote(path)} {record.name} {told}"
    return ""


def _run(served: Served, listener: socket.socket) -> None:
    from ..serving.app import create_app

    served.worker.start()
    try:  # a worker that is not halted lets the server wait for the longest answer
        serve_app(create_app(served), listener, served.worker.halt, lifespan="off")
    finally:
        served.worker.stop()
