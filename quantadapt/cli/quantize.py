"""`quantadapt quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..memory.cards import size_words
from .commands import add
from .flags import DeviceOption, DtypeOption, JsonOption, TrustOption
from .session import session

if TYPE_CHECKING:
    from ..planning.planned import Plan


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        quantize,
        "quantadapt quantize ORG/NAME --backend hqq --set bits=3 --output model-hqq3",
        "quantadapt quantize ./model --backend bnb-nf4 --output model-nf4 --overwrite",
        "quantadapt quantize ./model --backend gptq --calibration texts.jsonl --output model-gptq",
    )


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint.")],
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="A name from `quantadapt backends`.")
    ] = "hqq",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of the backend, e.g. bits=3; repeatable."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="File, folder or hub id that backends which calibrate are shown.",
            show_default="none; the demo model has its own",
        ),
    ] = None,
    skip_misfits: Annotated[
        bool,
        typer.Option("--skip-misfits", help="Leave layers dense whose size does not fit."),
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that quantadapt wrote there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Quantize a model and save the checkpoint.

    The checkpoint is in the backend's own format, or in that of transformers where there is one.
    """
    with session(as_json=json) as shown:
        from ..planning.stage import plan
        from ..quantizing.stage import with_config
        from .models import checked_output, waiting

        given: dict[str, Any] = {"device": device, "dtype": dtype}
        given |= {"skip_misfits": skip_misfits, "trust_remote_code": trust_remote_code}
        spec = _spec(model, backend, set_ or [], **given)
        with checked_output(output, overwrite, (model, calibration)):
            made = with_config(plan(spec, check_output=False))
        with waiting(shown, f"quantizing with {made.backend.name}"):
            facts = _quantized(made, output, calibration, overwrite)
        if json:
            shown.print_json(facts)
            return
        options = ", ".join(f"{k}={v}" for k, v in facts["options"].items())
        size = size_words(facts["mib"] * 2**20)
        text = f"{output}: {facts['backend']} ({options}), {size}"
        shown.out.print(text, markup=False, soft_wrap=True)


def _spec(model: str, backend: str, overrides: list[str], **given: Any) -> Any:
    from ..spec import Spec, apply_overrides

    options = apply_overrides({}, [item.removeprefix("backend.") for item in overrides])
    values: dict[str, Any] = {"model": model, "backend": {**options, "name": backend}}
    return Spec(**values, **{key: value for key, value in given.items() if value is not None})


def _quantized(
    made: Plan, output: Path, calibration: str | None, overwrite: bool
) -> dict[str, Any]:
    """Quantize and save; return what was written."""
    from ..exporting.saving import save
    from ..folders.atomic import folder_size
    from ..quantizing.stage import quantize_plan

    saved = save(quantize_plan(made, calibration=calibration), output, overwrite=overwrite)
    return {
        "path": str(output),
        "model": made.model,
        "backend": made.backend.name,
        "options": made.quantizer.model_dump(mode="json"),
        "dtype": made.dtype,
        "mib": folder_size(saved) / 2**20,
    }
