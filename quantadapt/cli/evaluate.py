"""`quantadapt eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..folders.metrics import direction, label, with_unit
from ..remote_code import trusting
from .commands import add
from .flags import DeviceOption, ForceBaseOption, JsonOption, TrustOption
from .session import session

if TYPE_CHECKING:
    from ..protocols import Figure

DEFAULT = "perplexity"

_EXAMPLES = (
    "quantadapt eval runs/hqq-lora",
    "quantadapt eval ./model --data heldout.jsonl --evaluation perplexity --json",
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
            show_default="perplexity",
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
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure a model, a run or an adapter.

    By default its perplexity. A checkpoint is measured as it is; a run or adapter together with the
    quantized base that it was trained on.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..planning.stage import evaluators
        from .models import held_out_of, open_model, waiting

        wanted = evaluators(_wanted(evaluation or [DEFAULT], set_ or []))
        with waiting(shown, "loading the model"):
            model = open_model(path, device, force_base)
        with waiting(shown, "measuring"):
            from ..evaluation.stage import measure
            from ..quantizing.state import state_of
            from ..stages import given_of

            tokenizer = state_of(model).tokenizer
            held_out, origin = held_out_of(path, data, tokenizer)
            given = given_of(held_out, tokenizer, max_examples)
            given = replace(given, batch_size=batch_size, max_new_tokens=max_new_tokens)
            found = {name: measure(name, e, model, given) for name, e in wanted.items()}
        if json:
            shown.print_json(_document(path, origin, found))
            return
        for name, figures in found.items():
            (first, figure), *others = figures.items()
            head = f"{label(name, first)} {with_unit(figure.value, figure.unit, '{:.4f}'.format)}"
            shown.out.print(head, markup=False, soft_wrap=True)
            facts = [f"{key} {with_unit(f.value, f.unit, '{:.6g}'.format)}" for key, f in others]
            facts += [words] if (words := direction(figure.better)) else []
            line = f"{', '.join(facts)}, on {origin}"
            shown.err.print(line.removeprefix(", "), markup=False, soft_wrap=True, style="dim")


def _wanted(names: list[str], assignments: list[str]) -> list[dict[str, Any]]:
    """Return the evaluations with the options that `NAME.OPTION=VALUE` gives them."""
    from ..errors import Problem, SpecError, did_you_mean
    from ..spec import apply_overrides

    values = apply_overrides({name: {} for name in names}, assignments)
    if flat := [name for name, options in values.items() if not isinstance(options, dict)]:
        raise SpecError([Problem(f"{flat[0]!r} is no option", "write NAME.OPTION=VALUE", "--set")])
    if unknown := [name for name in values if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise SpecError([Problem(f"{unknown[0]!r} is no --evaluation here", hint, where="--set")])
    return [{**values[name], "name": name} for name in names]


def _document(path: str, origin: str, found: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
    """Return what is printed as JSON; the values of a single evaluation stand at the top, too."""
    evaluations = {
        name: {key: asdict(figure) for key, figure in figures.items()}
        for name, figures in found.items()
    }
    single = next(iter(found.values())) if len(found) == 1 else {}
    top = {key: figure.value for key, figure in single.items()}
    return {**top, "path": path, "data": origin, "evaluations": evaluations}
