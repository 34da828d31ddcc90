"""`quantadapt eval` and `quantadapt generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .commands import add
from .flags import DeviceOption, JsonOption
from .session import session

_EXAMPLES = {
    "eval": (
        "quantadapt eval runs/hqq-lora",
        "quantadapt eval ./model --data heldout.jsonl --json",
    ),
    "generate": (
        'quantadapt generate runs/hqq-lora --prompt "Write a function that adds a and b."',
        "echo Hello | quantadapt generate ./model --prompt -",
    ),
}

PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A run folder, an adapter, a model folder or a hub id."),
]


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(app, name, evaluate if name == "eval" else generate, *_EXAMPLES[name])


def evaluate(
    path: PathArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Held-out data.", show_default="the run's, or the demo's"
        ),
    ] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="Use at most so many examples.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 8,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure the perplexity of a model, a run or an adapter.

    A checkpoint is measured as it is; a run or adapter together with the quantized base that it
    was trained on.
    """
    with session(as_json=json) as shown:
        from .models import held_out_of, open_model, waiting

        with waiting(shown, "loading the model"):
            model = open_model(path, device)
        with waiting(shown, "measuring"):
            from ..quantizing.state import state_of
            from ..stages import evaluate as measure

            held_out, origin = held_out_of(path, data, state_of(model).tokenizer)
            found = measure(model, held_out, batch_size=batch_size, max_examples=max_examples)
        if json:
            shown.print_json({"path": path, "data": origin, **found})
            return
        shown.out.print(f"perplexity {found['perplexity']:.4f}")
        facts = f"loss {found['loss']:.4f} nats per token over {found['tokens']} tokens"
        shown.err.print(f"{facts}, on {origin}", markup=False, soft_wrap=True, style="dim")


def generate(
    path: PathArgument,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="The prompt; - reads stdin. Repeatable.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Answer a prompt greedily.

    The answer goes to stdout, all else to stderr.
    """
    with session(as_json=json) as shown:
        from .models import open_model, waiting

        prompts = [sys.stdin.read().strip() if text == "-" else text for text in prompt]
        with waiting(shown, "loading the model"):
            model = open_model(path, device)
        with waiting(shown, "generating"):
            from ..evaluation.stage import greedy
            from ..quantizing.state import state_of

            answers = greedy(
                model, state_of(model).tokenizer, prompts, max_new_tokens=max_new_tokens
            )
        if json:
            pairs = zip(prompts, answers, strict=True)
            shown.print_json([{"prompt": p, "answer": a} for p, a in pairs])
            return
        for answer in answers:
            shown.out.print(answer, markup=False, soft_wrap=True)
