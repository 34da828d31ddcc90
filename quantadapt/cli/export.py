"""`quantadapt export`, and what `merge` does as well: write an export of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..remote_code import trusting
from .commands import add
from .flags import DeviceOption, ForceBaseOption, JsonOption, TrustOption
from .session import Session, session

if TYPE_CHECKING:
    from ..planning.exports import PlannedExport
    from ..protocols import Figure

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder or an adapter folder.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Held-out data for the check.", show_default="the run's"),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="What a backend that calibrates is shown when it quantizes again.",
        show_default="the run's",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")]


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        export,
        "quantadapt export runs/hqq-lora merged-requantized --output model-merged",
        "quantadapt export runs/aqlm-lora onto-base --set base=ORG/NAME",
    )


def export(
    run: RunArgument,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What to write: one of `quantadapt exports`.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OPTION=VALUE",
            help="An option of the export, see `quantadapt exports show NAME`. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Gets a folder called as the export is, or `merged`.",
            show_default="the run folder",
        ),
    ] = None,
    data: DataOption = None,
    calibration: CalibrationOption = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    force_base: ForceBaseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write a tuned model in another form.

    Whatever a run can export can be written later from its folder. An export that a rule forbids
    is refused, with the reason and the way out.
    """
    with session(as_json=json) as shown, trusting(trust_remote_code):
        from ..planning.exports import export_of
        from ..spec import apply_overrides
        from .models import check_export, checked_output, inputs_of

        planned = export_of(name, apply_overrides({}, options or ()))
        if force_base and hasattr(planned.exporter, "force_base"):
            forced = planned.exporter.model_copy(update={"force_base": True})
            planned = replace(planned, exporter=forced)
        final = (output or Path(run)) / planned.folder
        with checked_output(final, overwrite, inputs_of(planned, run, data, calibration)):
            check_export(run, planned)
        found = written(
            shown, run, planned, final, data, calibration, device, overwrite, force_base
        )
        if json:
            figures = {name: figure.to_dict() for name, figure in found.items()}
            shown.print_json({"export": name, "path": str(final), "figures": figures})
            return
        from ..exporting.stage import done_words

        text = f"{name}: {done_words(planned, found, final)}"
        shown.out.print(text, markup=False, soft_wrap=True)


def written(
    shown: Session,
    run: str,
    planned: PlannedExport,
    final: Path,
    data: str | None,
    calibration: str | None,
    device: str | None,
    overwrite: bool,
    force_base: bool = False,
) -> Mapping[str, Figure]:
    """Write the export `planned` of `run` to `final`, and return its figures."""
    from ..exporting.manifest import adapter_folder
    from ..exporting.stage import write
    from ..exporting.tuned import Tuned
    from ..registry.blame import blaming
    from .models import calibration_of, held_out_of, waiting

    tuned = Tuned(
        saved=adapter_folder(Path(run)),
        device=device or "auto",
        force_base=force_base,
        data=lambda tokenizer: held_out_of(run, data, tokenizer)[0].examples,
        examples=lambda tokenizer: calibration_of(run, calibration, tokenizer),
    )
    if planned.exporter.merges:
        with waiting(shown, "loading the model"):
            assert tuned.model
    with waiting(shown, f"writing {planned.words}"), blaming(planned.record, "exporting"):
        return write(planned.exporter, tuned, final, overwrite=overwrite)
