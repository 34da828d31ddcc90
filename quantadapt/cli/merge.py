"""`quantadapt merge`: the exports that merge, under flags of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import Problem
from ..remote_code import trusting
from .commands import add
from .export import CalibrationOption, DataOption, OverwriteOption, RunArgument, written
from .flags import DeviceOption, ForceBaseOption, JsonOption, TrustOption
from .session import Session, session

if TYPE_CHECKING:
    from ..planning.exports import PlannedExport
    from ..protocols import Figure

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
    run: RunArgument,
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
    min_gain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --kind requantize: the share of the adapter's gain on held-out data that it "
            "has to keep; 0 takes any.",
            show_default="0.9",
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="With --kind requantize: how weights are rounded: nearest, grid, dithered, "
            "refined, compensated, or auto: the best of those tried until --min-gain and, by quick "
            "ones, 0.95 are kept.",
            show_default="auto",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Gets a folder `merged`.", show_default="the run folder"
        ),
    ] = None,
    data: DataOption = None,
    calibration: CalibrationOption = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="With --onto: compare before it is put in place."),
    ] = True,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Merge a trained adapter into its base.

    What was written is loaded again and compared with the adapter on held-out tokens before the
    folder gets its name. A merge that a rule forbids, or that keeps too little of what was learned,
    is refused, with the reason and the way out.
    --onto merges into the unquantized model that the base was made from, in the memory of one
    shard.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..exporting.manifest import read_manifest
        from ..planning.exports import MERGES, export_of
        from ..planning.on_disk import check_model
        from .models import check_export, checked_output, inputs_of

        name = MERGES[kind] if onto is None else "onto-base"
        given = {"min_gain": min_gain, "rounding": rounding}
        rounds = {option: value for option, value in given.items() if value is not None}
        found = _without_effect(kind, onto, [*rounds])
        options = rounds if name == MERGES["requantize"] else {}
        if onto is not None:
            options = {"base": onto, "check": check, "force_base": force_base}
            found += check_model(onto)
        planned = export_of(name, options)
        final = (output or Path(run)) / planned.folder
        with checked_output(final, overwrite, inputs_of(planned, run, data, calibration)):
            check_export(run, planned, found)
        figures = written(
            shown, run, planned, final, data, calibration, device, overwrite, force_base
        )
        if json:
            kinds = {"kind": kind} if onto is None else {"kind": "onto", "base": onto}
            if name == MERGES["requantize"]:
                kinds["rounding"] = read_manifest(final)["rounding"]["way"]
            values = {name: figure.value for name, figure in figures.items()}
            shown.print_json({"path": str(final), **kinds, **values})
            return
        _show(shown, planned, figures, final)


def _without_effect(kind: Kind, onto: str | None, rounds: Sequence[str]) -> list[Problem]:
    """Return what is wrong with flags that go with another merge; `rounds` are those of rounding
    that were given."""
    if onto is None and kind == "requantize":
        return []
    found = []
    if kind == "requantize":
        what = "onto an unquantized base the result is dense"
        fix = "leave --kind out, and quantize the merged model: quantadapt quantize"
        found.append(Problem(what, fix, where="--kind"))
    what = "it has no effect: nothing is quantized again here"
    fix = "leave it out" if onto is not None else "add --kind requantize, or leave it out"
    flags = [f"--{option.replace('_', '-')}" for option in rounds]
    return [*found, *(Problem(what, fix, where=flag) for flag in flags)]


def _show(
    shown: Session, planned: PlannedExport, figures: Mapping[str, Figure], path: Path
) -> None:
    from .progress import four_digits

    if said := planned.exporter.done(figures):
        shown.out.print(f"{planned.name}: {said}", markup=False, soft_wrap=True)
    for name in ("adapter", "merged"):
        if figure := figures.get(f"perplexity_{name}"):
            shown.out.print(f"perplexity {name}: {four_digits(figure.value)}")
    shown.out.print(f"written to {path}", markup=False, soft_wrap=True)
