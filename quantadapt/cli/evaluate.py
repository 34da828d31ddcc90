"""`quantadapt eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..folders.metrics import add_figures, direction, label, with_error, with_unit
from ..remote_code import trusting
from .commands import add
from .flags import DeviceOption, ForceBaseOption, JsonOption, StreamOption, TrustOption
from .session import session

if TYPE_CHECKING:
    from ..protocols import Evaluator, Figure, Given
    from .session import Session

DEFAULT = "perplexity"
_TASKS = "Tasks of lm-evaluation-harness"

_EXAMPLES = (
    "quantadapt eval runs/hqq-lora",
    "quantadapt eval ./model --data heldout.jsonl --evaluation perplexity --json",
    "quantadapt eval runs/hqq-lora --tasks arc_easy,gsm8k --limit 100",
)

PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A run folder, an adapter, a model folder or a hub id."),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(app, name, evaluate, *_EXAMPLES)


def evaluate(
    path: PathArgument,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluation",
            "-e",
            metavar="NAME",
            help="What to measure: a name from `quantadapt evaluations`. Repeatable.",
            show_default="of a run what its objective says, else perplexity",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.OPTION=VALUE",
            help="An option of the evaluation of that name. Repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks and groups, with commas between them, e.g. mmlu,gsm8k.",
            show_default="none",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples before each question.",
            show_default="each task's own",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Only the first so many questions of each task; below 1: this share of them.",
            show_default="all",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    include_path: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="Has files of other tasks. Repeatable.", rich_help_panel=_TASKS
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Write questions by the tokenizer's chat template.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Which models of a run to measure, with commas between them: unquantized, "
            "quantized, tuned, merged.",
            show_default="tuned; with --tasks, all that there are",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Held-out data.", show_default="the run's, or the demo's"
        ),
    ] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Use at most so many examples.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 8,
    max_new_tokens: MaxNewTokensOption = 64,
    device: DeviceOption = None,
    stream: StreamOption = "auto",
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a model, a run or an adapter.

    By default what the objective of the run says, or perplexity. A checkpoint is measured as it is;
    a run or adapter together with the quantized base that it was trained on. With --models, or
    --tasks, so are the others of the run, and what changed from one to the next.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..planning.stage import evaluators
        from .models import measured_in
        from .run_models import chosen_models

        options = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}
        options["apply_chat_template"] = apply_chat_template or None
        given = _tasks(tasks or [], options)
        names = evaluation or ((measured_in(path) or [DEFAULT]) if not tasks else [])
        wanted = evaluators([*_wanted(names, set_ or []), *given])
        chosen = chosen_models(path, models or [], everything=bool(tasks))
        found, origin = _measured(
            shown, path, chosen, wanted, data, max_examples, device, force_base,
            stream=stream, batch_size=batch_size, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        if json:
            shown.print_json(_document(path, origin, found))
        elif len(chosen) == 1:
            _show(shown, origin, found[chosen[0]])
        else:
            _show_all(shown, origin, found)


Found = Mapping[str, Mapping[str, "Figure"]]
"""Figures by evaluation and name."""


def _measured(
    shown: Session,
    path: str,
    chosen: Sequence[str],
    wanted: Mapping[str, Evaluator],
    data: str | None,
    max_examples: int,
    device: str | None,
    force_base: bool,
    *,
    stream: str,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[dict[str, Found], str]:
    """Return what was found of each model, and on what data."""
    from ..evaluation.stage import measure
    from .models import waiting
    from .run_models import opened_models

    found: dict[str, Found] = {}
    origin, more = "", ""
    opened = opened_models(path, chosen, device, force_base=force_base, stream=stream)
    for name in chosen:
        with waiting(shown, f"loading the model{more}"):
            _, model = next(opened)
        with waiting(shown, f"measuring{f' {name}' if len(chosen) > 1 else ''}"):
            given, origin = _given(path, model, data, max_examples)
            given = replace(given, batch_size=batch_size, max_new_tokens=max_new_tokens)
            found[name] = {key: measure(key, e, model, given) for key, e in wanted.items()}
        del model
    return found, origin


def _given(path: str, model: Any, data: str | None, max_examples: int) -> tuple[Given, str]:
    from ..evaluation.held_out import given_of
    from ..quantizing.state import state_of
    from .models import held_out_of

    tokenizer = state_of(model).tokenizer
    held_out, origin = held_out_of(path, data, tokenizer)
    return given_of(held_out, tokenizer, max_examples), origin


def _show(shown: Session, origin: str, found: Found) -> None:
    """Print what was found of one model: the first figure of each evaluation, then the others."""
    for name, figures in found.items():
        (first, figure), *others = figures.items()
        value = with_error(figure.value, figure.error, figure.unit, "{:.4f}".format)
        shown.out.print(f"{label(name, first)} {value}", markup=False, soft_wrap=True)
        facts = [f"{key} {with_unit(f.value, f.unit, '{:.6g}'.format)}" for key, f in others]
        if figure.error is not None:
            facts = []
            for key, other in others:
                value = with_error(other.value, other.error, other.unit, "{:.4f}".format)
                shown.out.print(f"{label(name, key)} {value}", markup=False, soft_wrap=True)
        # the direction is that of the first figure; others may have another one
        said = "; ".join(filter(None, (direction(figure.better), ", ".join(facts))))
        line = f"{said}, on {origin}" if said else f"on {origin}"
        shown.err.print(line, markup=False, soft_wrap=True, style="dim")


def _show_all(shown: Session, origin: str, found: Mapping[str, Found]) -> None:
    """Print what was found of several models as tables."""
    from .progress import figures_table, show_errors

    evaluations = _compared(found)
    plain = {
        name: figures
        for name, figures in evaluations.items()
        if not any(figure.get("errors") for figure in figures.values())
    }
    if plain:
        shown.out.print(figures_table(plain, "green"))
        shown.err.print(f"on {origin}", markup=False, soft_wrap=True, style="dim")
    for figures in evaluations.values():
        show_errors(shown.out, figures)


def _compared(found: Mapping[str, Found]) -> dict[str, Any]:
    """Return the figures as metrics.json has them, with what changed from model to model."""
    metrics: dict[str, Any] = {"evaluations": {}}
    for index, (model, evaluations) in enumerate(found.items()):
        before = list(found)[:index]
        for name, figures in evaluations.items():
            earlier = {other: found[other][name] for other in before}
            add_figures(metrics, name, model, figures, earlier)
    compared: dict[str, Any] = metrics["evaluations"]
    return compared


def _tasks(names: list[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluation that `--tasks` asks for. Raises SpecError where other options are
    given without it."""
    from ..errors import Problem, SpecError

    given = {name: value for name, value in options.items() if value is not None}
    if not names:
        what = "it says how to measure tasks, and there are none"
        flags = [f"--{name.replace('_', '-')}" for name in given]
        if flags:
            raise SpecError([Problem(what, "add --tasks NAMES", flag) for flag in flags])
        return []
    words = [word.strip() for text in names for word in text.split(",") if word.strip()]
    return [{"name": "tasks", "tasks": words, **given}]


def _wanted(names: list[str], assignments: list[str]) -> list[dict[str, Any]]:
    """Return the evaluations with the options that `NAME.OPTION=VALUE` gives them."""
    from ..errors import Problem, SpecError
    from ..inputs.likely_names import did_you_mean
    from ..spec import apply_overrides

    values = apply_overrides({name: {} for name in names}, assignments)
    if flat := [name for name, options in values.items() if not isinstance(options, dict)]:
        raise SpecError([Problem(f"{flat[0]!r} is no option", "write NAME.OPTION=VALUE", "--set")])
    if unknown := [name for name in values if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise SpecError([Problem(f"{unknown[0]!r} is no --evaluation here", hint, where="--set")])
    return [{**values[name], "name": name} for name in names]


def _document(path: str, origin: str, found: Mapping[str, Found]) -> dict[str, Any]:
    """Return what is printed as JSON: the tuned model's figures, or those of the only one. The
    values of a single evaluation stand at the top, too."""
    main = found.get("tuned") or next(iter(found.values()))
    evaluations = {
        name: {key: figure.to_dict() for key, figure in figures.items()}
        for name, figures in main.items()
    }
    single = next(iter(main.values())) if len(main) == 1 else {}
    top = {key: figure.value for key, figure in single.items()}
    document = {**top, "path": path, "data": origin, "evaluations": evaluations}
    return {**document, "models": _compared(found)} if len(found) > 1 else document
