"""`quantadapt merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ModelError, PlanRefused, Problem
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
        "quantadapt merge runs/aqlm-lora --onto ORG/NAME",
    )


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")],
    kind: Annotated[
        Kind,
        typer.Option(help="dense weights, or requantize: quantized again as the base was."),
    ] = "dense",
    onto: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Merge onto this unquantized checkpoint (folder or hub id) instead, shard by "
            "shard; works for every backend.",
        ),
    ] = None,
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
    calibration: Annotated[
        str | None,
        typer.Option(
            help="What a backend that calibrates is shown when it quantizes again.",
            show_default="the run's",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="With --onto: compare before it is put in place."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Merge a trained adapter into its base.

    The merged model is compared with the adapter on held-out tokens before it is written. A merge
    that a rule forbids is refused, with the reason and the way out. --onto merges into the
    unquantized model that the base was made from, in the memory of one shard.
    """
    with session(as_json=json) as shown:
        from ..exporting.manifest import MERGED
        from .models import check_manifest, checked_output, open_model, waiting

        folder = output or Path(run)
        if onto is not None:
            with checked_output(folder / MERGED, overwrite):
                _check_onto(run, onto, kind)
            with waiting(shown, f"merging onto {onto}"):
                found = _merged_onto(run, onto, folder, data, check, device, overwrite)
            _show(shown, found, folder / MERGED)
            return
        with checked_output(folder / MERGED, overwrite):
            if problems := _adapter_problems(run):
                raise PlanRefused(problems)
            check_manifest(run, kind)
        with waiting(shown, "loading the model"):
            model = open_model(run, device)
        with waiting(shown, f"merging ({kind})"):
            found = _merged(model, run, kind, folder, data, calibration, overwrite)
        _show(shown, found, folder / MERGED)


def _merged(
    model: nn.Module,
    run: str,
    kind: Kind,
    folder: Path,
    data: str | None,
    calibration: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    from ..exporting.stage import check_merge
    from ..exporting.stage import merge as merge_and_save
    from ..quantizing.state import state_of
    from .models import calibration_of, held_out_of

    state = state_of(model)
    check_merge(state, kind)
    held_out, _ = held_out_of(run, data, state.tokenizer)
    examples = None
    if kind == "requantize" and state.backend.calibration:
        examples = calibration_of(run, calibration, state.tokenizer)
    adapted: Any = model
    return merge_and_save(
        adapted, folder, kind=kind, data=held_out, calibration=examples, overwrite=overwrite
    )


def _adapter_problems(run: str) -> list[Problem]:
    from ..exporting.manifest import adapter_folder

    try:
        adapter_folder(Path(run))
    except ModelError as error:
        return list(error.problems)
    return []


def _check_onto(run: str, base: str, kind: Kind) -> None:
    """Find what is wrong before torch is imported."""
    from ..exporting.manifest import adapter_folder, read_manifest
    from ..exporting.onto import check_onto
    from ..planning.on_disk import check_model

    found = [*_adapter_problems(run), *check_model(base)]
    if kind == "requantize":
        what = "onto an unquantized base the result is dense"
        fix = "leave --kind out, and quantize the merged model: quantadapt quantize"
        found.append(Problem(what, fix, where="--kind"))
    if found:
        raise PlanRefused(found)
    check_onto(read_manifest(adapter_folder(Path(run))), base)


def _merged_onto(
    run: str,
    base: str,
    folder: Path,
    data: str | None,
    check: bool,
    device: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    from ..exporting.manifest import adapter_folder
    from ..exporting.onto import merge_onto
    from ..quantizing.stage import load_tokenizer
    from .models import held_out_of

    held_out = None
    if check:
        held_out, _ = held_out_of(run, data, load_tokenizer(str(adapter_folder(Path(run)))))
    return merge_onto(
        run,
        base,
        folder,
        data=held_out,
        check=check,
        device=device or "auto",
        overwrite=overwrite,
    )


def _show(shown: Session, found: dict[str, Any], path: Path) -> None:
    from .progress import four_digits, merge_verdict

    if shown.as_json:
        shown.print_json({"path": str(path), **found})
        return
    for line in merge_verdict(found):
        shown.out.print(line, markup=False, soft_wrap=True)
    for name in ("adapter", "merged"):
        if f"perplexity_{name}" in found:
            shown.out.print(f"perplexity {name}: {four_digits(found[f'perplexity_{name}'])}")
    shown.out.print(f"written to {path}", markup=False, soft_wrap=True)
