"""The page of `quantadapt studio`: plan a run, look at its data, start it, watch it, talk to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import QuantadaptError
from ..folders.run_folder import RunFolder
from ..generation.sampling import Sampling
from ..machine import this_machine
from ..records import Adapter, Backend, Objective
from ..registry.discovery import registry
from ..reporting.html import Html
from .conversation import conversation
from .desk import Desk
from .form import Form
from .looking import CARDS, data_html, plan_html
from .page import QUIETLY, gr, html, page
from .parts import heading, note, problem_list
from .watching import report_html, watch_html

_SECONDS = 2
"""Between two looks at a run."""
_TYPED = (
    *("name", "model", "backend", "adapter", "objective", "data", "pasted"),
    *("steps", "learning_rate", "more"),
)
"""The fields of `Form` that are texts, in the order of the inputs."""
_LEDE = "Plan a run, look at its data, start it, watch it and talk with it. All of it stays here."


def studio_page(desk: Desk) -> gr.Blocks:
    """Return the page over the runs of `desk`."""
    with page("quantadapt studio") as blocks:
        html(heading("studio", _LEDE))
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("New run", id="new"):
                form = _form(desk)
            with gr.Tab("Runs", id="runs"):
                watch = _watch(desk)
            with gr.Tab("Chat", id="chat") as chat:
                _chat(desk, chat)
        form.start.click(
            form.started,
            form.fields,
            [form.plan, tabs, watch.choice],
            **{**QUIETLY, "api_name": "start"},
        ).then(watch.shown, watch.choice, watch.outputs, **QUIETLY, api_name=False)

        def loaded() -> tuple[Any, Any]:
            going = desk.runs.running is not None
            return gr.Tabs(selected="runs" if going else "new"), _choice(desk, None)

        blocks.load(loaded, None, [tabs, watch.choice], **QUIETLY, api_name=False).then(
            watch.shown, watch.choice, watch.outputs, **QUIETLY, api_name=False
        )
    return blocks


# New run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    fields: list[Any]
    plan: Any
    start: Any
    started: Any


def _form(desk: Desk) -> _Form:
    gpus = len(this_machine().cuda)
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            model = gr.Textbox(
                "", label="Model", info="A folder or a hub id.", placeholder="the bundled demo",
                elem_id="model",
            )  # fmt: skip
            with gr.Row():
                backend = gr.Dropdown(
                    _names(Backend), value="hqq", label="Backend", info="How it is quantized.",
                    elem_id="backend", min_width=140,
                )  # fmt: skip
                adapter = gr.Dropdown(
                    _names(Adapter), value="lora", label="Adapter", info="What is trained on top.",
                    elem_id="adapter", min_width=140,
                )  # fmt: skip
            objective = gr.Dropdown(
                _names(Objective), value="sft", label="Objective", elem_id="objective",
                info="What is learnt of the data; it says which columns they have.",
            )  # fmt: skip
            data = gr.Textbox(
                "", label="Data", placeholder="the bundled demo's", elem_id="data",
                info="JSONL, JSON, CSV, Parquet or text: a file, a folder or a hub id.",
            )  # fmt: skip
            with gr.Accordion("Paste data instead", open=False, elem_id="paste"):
                pasted = gr.Textbox(
                    "", label="JSONL", lines=5, max_lines=12, elem_id="pasted",
                    placeholder='{"instruction": "...", "output": "..."}',
                    info="One object a line. It is kept beside the runs, and wins over the field.",
                )  # fmt: skip
            with gr.Row():
                steps = gr.Textbox(
                    "", label="Steps", placeholder="one epoch; of the demo, 60", elem_id="steps",
                    min_width=140,
                )  # fmt: skip
                rate = gr.Textbox(
                    "", label="Learning rate", placeholder="as the adapter has it", elem_id="rate",
                    min_width=140,
                )  # fmt: skip
            with gr.Accordion("More options", open=False, elem_id="more"):
                more = gr.Textbox(
                    "", label="KEY=VALUE, one a line", lines=3, max_lines=12, elem_id="set",
                    placeholder="backend.bits=3\nadapter.r=8\ndata.max_length=1024",
                    info="Any key of the spec, as after --set.",
                )  # fmt: skip
                name = gr.Textbox(
                    "", label="Name", placeholder="after backend and adapter", elem_id="name"
                )
                count = gr.Slider(
                    1, max(gpus, 2), value=1, step=1, label="GPUs", visible=gpus > 1, elem_id="gpus"
                )
            cards = gr.Dropdown(
                list(CARDS), value=[], multiselect=True, label="Would it fit another card?",
                elem_id="cards",
            )  # fmt: skip
        with gr.Column(scale=7, min_width=340):
            plan = html(name="plan")
            with gr.Row():
                start = gr.Button("Start the run", variant="primary", elem_id="start", scale=2)
                look = gr.Button("Look at the data", elem_id="look")
            seen = html(name="seen")
    fields = [*(name, model, backend, adapter, objective, data, pasted, steps, rate, more, count)]

    def planned(*values: Any) -> Html:
        return plan_html(_filled(desk, values[:-1]), [CARDS[card] for card in values[-1] or ()])

    def seeing(*values: Any) -> Html:
        return data_html(_filled(desk, values))

    def started(*values: Any) -> tuple[Any, Any, Any]:
        form = _filled(desk, values)
        form = replace(form, name=form.folder.name)  # the next free one would be another soon
        try:
            form.plan()
            desk.start(form.arguments(), form.folder)
        except QuantadaptError as error:
            return problem_list(error.problems, "Nothing was started"), gr.skip(), gr.skip()
        return gr.skip(), gr.Tabs(selected="runs"), _choice(desk, form.name)

    typed = (name, model, data, pasted, steps, rate, more)
    events = [field.blur for field in typed] + [field.submit for field in typed]
    events += [field.change for field in (backend, adapter, objective, cards, count)]
    gr.on(events, planned, [*fields, cards], plan, **QUIETLY, api_name="plan")
    gr.context.Context.root_block.load(planned, [*fields, cards], plan, **QUIETLY, api_name=False)
    look.click(seeing, fields, seen, **{**QUIETLY, "show_progress": "minimal"}, api_name="look")
    return _Form(fields, plan, start, started)


def _names(kind: type[Any]) -> list[str]:
    return sorted(record.name for record in registry().records(kind))


def _filled(desk: Desk, values: Sequence[Any]) -> Form:
    *said, gpus = values
    texts = dict(zip(_TYPED, (str(value or "") for value in said), strict=True))
    return Form(desk.runs.root, gpus=int(gpus or 1), trust_remote_code=desk.trust, **texts)


# Runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watch:
    choice: Any
    outputs: list[Any]
    shown: Any


def _watch(desk: Desk) -> _Watch:
    last, listed = gr.State(""), gr.State([])
    with gr.Row(elem_classes="with-buttons"):
        choice = gr.Dropdown(
            _titled(desk), value=None, label="Run", elem_id="run", scale=5, interactive=True
        )
        stop = gr.Button("Stop", elem_id="stop-run", interactive=False, min_width=120)
        resume = gr.Button("Go on", elem_id="resume", interactive=False, min_width=120)
    told = html(name="told")
    watched = html(name="watched")
    with gr.Accordion("Report", open=False, elem_id="report"):
        report = html(name="report-page")
    outputs = [watched, stop, resume, report, last]

    def shown(name: str | None) -> tuple[Any, ...]:
        return _seen(desk, name, "")

    def stopped(name: str | None) -> tuple[Any, ...]:
        if folder := desk.runs.folder(name):
            desk.runs.stop(folder)
        return "", *_seen(desk, name, "")

    def resumed(name: str | None) -> tuple[Any, ...]:
        wrong = Html()
        if folder := desk.runs.folder(name):
            try:
                desk.resume(folder)
            except QuantadaptError as error:
                wrong = problem_list(error.problems, "It was not gone on with")
        return wrong, *_seen(desk, name, "")

    def ticked(name: str | None, before: str, known: Any) -> tuple[Any, ...]:
        names = _titled(desk)
        changed = gr.skip() if names == known else gr.Dropdown(choices=names)
        return changed, names, *_seen(desk, name, before)

    choice.input(lambda name: ("", *shown(name)), choice, [told, *outputs], **QUIETLY,
                 api_name="watch")  # fmt: skip
    stop.click(stopped, choice, [told, *outputs], **QUIETLY, api_name="stop_run")
    resume.click(resumed, choice, [told, *outputs], **QUIETLY, api_name="resume")
    gr.Timer(_SECONDS).tick(
        ticked, [choice, last, listed], [choice, listed, *outputs], **QUIETLY, api_name="tick"
    )
    return _Watch(choice, outputs, shown)


def _seen(desk: Desk, name: str | None, before: str) -> tuple[Any, ...]:
    """Return values for `_Watch.outputs`; what has not changed since `before` is left alone."""
    runs = desk.runs
    folder = runs.folder(name)
    page = watch_html(runs, folder)
    kind = runs.state(folder).kind if folder else ""
    signature = f"{name}\n{kind}\n{page}"
    if signature == before:
        return tuple(gr.skip() for _ in range(5))
    mine = kind in ("starting", "running")
    told = folder is not None and runs.is_told_to_stop(folder)
    same = before.split("\n")[:2] == [str(name), kind]
    return (
        page,
        gr.Button("Stop at once" if told else "Stop", interactive=mine),
        gr.Button(interactive=kind in ("interrupted", "ended", "failed") and not runs.running),
        gr.skip() if same else report_html(folder),
        signature,
    )


def _titled(desk: Desk) -> list[tuple[str, str]]:
    runs = desk.runs
    folders = [RunFolder(runs.root / name) for name in runs.names()]
    return [(f"{one.path.name}: {runs.state(one).words}", one.path.name) for one in folders]


def _choice(desk: Desk, name: str | None) -> Any:
    """Return the list of runs with one chosen: that, or the one that goes on, or the latest."""
    titled, running = _titled(desk), desk.runs.running
    chosen = name or (running[0].name if running else titled[0][1] if titled else None)
    return gr.Dropdown(choices=titled, value=chosen)


# Chat ---------------------------------------------------------------------------------------------


def _chat(desk: Desk, tab: Any) -> None:
    with gr.Row(elem_classes="with-buttons"):
        choice = gr.Dropdown(
            desk.talkers(), value=None, label="Run", info="One that has its adapter.",
            elem_id="talker", scale=5, interactive=True,
        )  # fmt: skip
        open_ = gr.Button("Open", variant="primary", elem_id="open", min_width=120)
        close = gr.Button("Put away", elem_id="close", min_width=120)
    told = html(name="talk-told")
    talk = conversation(lambda: desk.speaker, Sampling())

    def listed(chosen: str | None) -> Any:
        names, speaker = desk.talkers(), desk.speaker
        if chosen not in names:
            chosen = speaker.name if speaker else names[0] if names else None
        return gr.Dropdown(choices=names, value=chosen)

    def opened(name: str | None) -> Any:
        try:
            words = note(desk.open(name))
        except QuantadaptError as error:
            return problem_list(error.problems, "The model was not opened"), *talk.refresh()
        return words, *talk.refresh()

    def closed() -> Any:
        desk.close()
        return note("The model is put away; its memory is free."), *talk.refresh()

    outputs = [told, *talk.outputs]
    busy = {**QUIETLY, "show_progress": "minimal"}
    open_.click(opened, choice, outputs, **busy, api_name="open")
    close.click(closed, None, outputs, **QUIETLY, api_name="close")
    tab.select(listed, choice, choice, **QUIETLY, api_name=False)
    gr.context.Context.root_block.load(
        talk.refresh, None, list(talk.outputs), **QUIETLY, api_name=False
    )
