"""`quantadapt merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .commands import add
from .flags import DeviceOption, JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["dense", "requantize"]


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        merge,
        "quantadapt merge runs/hqq-lora",
        "quantadapt merge runs/hqq-lora --kind requantize --output model-merged",
    )


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    kind: Annotated[
        Kind,
        typer.Option(help="dense weights, or requantize: quantized again as the base was."),
    ] = "dense",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Gets a folder `merged`.", show_default="the run folder"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Held-out data for the check.", show_default="the run's"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Merge a trained adapter into its base.

    The merged model is compared with the adapter on held-out tokens before it is written. A merge
    that a rule forbids is refused, with the reason and the way out.
    """
    with session(as_json=json) as shown:
        from .models import MERGED, check_output, check_record, open_model, waiting

        folder = output or Path(run)
        check_record(run, kind)
        check_output(folder / MERGED, overwrite)
        with waiting(shown, "loading the model"):
            model = open_model(run, device)
        with waiting(shown, f"merging ({kind})"):
            found = _merged(model, run, kind, folder, data, overwrite)
        _show(shown, found, folder / MERGED)


def _merged(
    model: nn.Module, run: str, kind: Kind, folder: Path, data: str | None, overwrite: bool
) -> dict[str, Any]:
    from ..saving import check_merge
    from ..saving import merge as merge_and_save
    from ..state import state_of
    from .models import held_out_of

    state = state_of(model)
    check_merge(state, kind)
    held_out, _ = held_out_of(run, data, state.tokenizer)
    adapted: Any = model
    return merge_and_save(adapted, folder, kind=kind, data=held_out, overwrite=overwrite)


def _show(shown: Session, found: dict[str, Any], path: Path) -> None:
    from .progress import merge_verdict

    if shown.as_json:
        shown.print_json({"path": str(path), **found})
        return
    for line in merge_verdict(found):
        shown.out.print(line, markup=False, soft_wrap=True)
    for name in ("adapter", "merged"):
        shown.out.print(f"perplexity {name}: {found[f'perplexity_{name}']:.4g}")
    shown.out.print(f"written to {path}", markup=False, soft_wrap=True)
