"""`quantadapt compare`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..inputs.configs import COMPARISONS, located
from .commands import add
from .flags import DeviceOption, DtypeOption, JsonOption, SpecFlags, TrustOption
from .session import Session, session

if TYPE_CHECKING:
    from ..comparing.grid import Comparison

_WHAT, _HOW, _WHERE = "What to compare", "How", "Where"


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        compare,
        "quantadapt compare --backends hqq,bnb-nf4 --adapters lora,dora -o compared",
        "quantadapt compare --model ORG/NAME --data train.jsonl --backends hqq,'hqq(bits=3)' "
        "--set 'train.learning_rate=[1e-4,3e-4]' --seeds 2 -o compared",
        "quantadapt compare grid.yaml --budget 2 -o compared",
        "quantadapt compare grid.yaml -o compared --dry-run",
    )


def compare(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="GRID.yaml",
            help="What all runs have in common, as for run, with a grid: of lists, and compare: "
            "for options; or the name of one that comes along: demo, learning-rate.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Checkpoint folder or hub id.",
            show_default="the bundled demo",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="JSONL, JSON, CSV, Parquet or text file, folder, or hub id.",
            show_default="the bundled demo's",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Names from `quantadapt backends`, with options where they "
            "are not the defaults: hqq,'hqq(bits=3)'; or all.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Names from `quantadapt adapters`, likewise.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key of the YAML file. With a list it is compared: "
            "train.learning_rate=[1e-4,3e-4]. May be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs of each cell, which show what is chance.",
            show_default="1",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    reference: Annotated[
        bool | None,
        typer.Option(
            "--reference/--no-reference",
            help="Also train on the dense base, to compare with.",
            show_default="--reference",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps.", show_default="one epoch", rich_help_panel=_HOW),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            help="Hours of GPUs, or of the machine where there is none, for all runs together: "
            "the worst are dropped early (successive halving).",
            rich_help_panel=_HOW,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIGURE",
            help="What quality is judged by.",
            show_default="the first evaluation's first",
            rich_help_panel=_HOW,
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="What counts as near the best.",
            show_default="0.01",
            rich_help_panel=_HOW,
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="What is to be small among those: size, memory or time.",
            show_default="size",
            rich_help_panel=_HOW,
        ),
    ] = None,
    keep_merged: Annotated[
        bool | None,
        typer.Option(
            "--keep-merged",
            help="Keep the merged models, which are made to measure what a merge keeps.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what failed.", rich_help_panel=_HOW)
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The folder of the comparison; the same command goes on in it.",
            rich_help_panel=_WHERE,
        ),
    ] = Path("compared"),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier comparison there.", rich_help_panel=_WHERE
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use so many GPUs, a run on each.",
            show_default="all",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RUNS",
            help="So many runs share each GPU, or the machine where there is none: all is done "
            "sooner, but speeds are of shared ones.",
            show_default="1",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be run, and end.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Find out which quantization and which adapter to take, for your model and data.

    Each cell of the grid is trained, measured and merged, in a process of its own; a crash costs
    its row alone. What a rule refuses is told at once and left out. It leaves one table, with
    quality, memory, size, speed and time, and a page with what nothing beats: compare.html.

    The same command goes on after an interruption; what has ended is not run again.
    """  # fmt: skip
    with session(as_json=json) as shown:
        flags = SpecFlags(
            config=config and located(config, COMPARISONS), model=model, data=data,
            max_steps=max_steps, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        options = {
            "budget": budget, "reference": reference, "by": by, "within": within,
            "prefer": prefer, "keep_merged": keep_merged, "gpus": gpus, "at_once": at_once,
        }  # fmt: skip
        named = {"backend": backends, "adapter": adapters}
        made = _comparison(flags, set or [], named, seeds, options)
        trusted = made.spec.trust_remote_code
        _carry_out(shown, made, output, overwrite, retry, trusted, dry_run=dry_run)


def _comparison(
    flags: SpecFlags,
    assignments: list[str],
    named: dict[str, str | None],
    seeds: int | None,
    options: dict[str, Any],
) -> Comparison:
    """Return what file and flags say; the flags win."""
    from ..comparing.axes import lists_in
    from ..comparing.grid import comparison

    axes, flags.set = lists_in(assignments)
    common = flags.values()
    grid = common.pop("grid", None) or {}
    told = common.pop("compare", None) or {}
    _refuse_odd(grid, told)
    for kind, text in named.items():
        if text is not None:
            grid = {**grid, kind: _names(text, kind)}
    given = {key: value for key, value in options.items() if value is not None}
    if seeds is None:
        seeds = told.get("seeds")
    told = {key: value for key, value in told.items() if key != "seeds"}
    return comparison(common, {**grid, **axes}, seeds=seeds, **{**told, **given})


def _refuse_odd(grid: object, told: object) -> None:
    from ..errors import Problem, SpecError

    fix = "write keys and values"
    parts = {"grid": grid, "compare": told}
    problems = [
        Problem(f"{value!r} is no mapping", fix, where=key)
        for key, value in parts.items()
        if not isinstance(value, dict)
    ]
    if problems:
        raise SpecError(problems)


_ITEM = re.compile(r"\s*([^\s,()]+)\s*(?:\(([^()]*)\))?\s*(,|$)")


def _names(text: str, kind: str) -> Any:
    """Return what a list like `hqq, hqq(bits=3)` names."""
    from ..errors import Problem, SpecError
    from ..spec import apply_overrides

    if text.strip() == "all":
        return "all"
    found: list[Any] = []
    at = 0
    while at < len(text):
        item = _ITEM.match(text, at)
        if item is None:
            what = f"{text[at:].strip()!r} is no list of {kind}s"
            fix = "write names, separated by commas, with options in brackets: hqq,'hqq(bits=3)'"
            raise SpecError([Problem(what, fix, where=f"--{kind}s")])
        name, options, _ = item.groups()
        parts = [part for part in re.split(r",(?![^\[]*\])", options or "") if part.strip()]
        found.append(apply_overrides({"name": name}, parts) if parts else name)
        at = item.end()
    return found


def _carry_out(
    shown: Session,
    made: Comparison,
    output: Path,
    overwrite: bool,
    retry: bool,
    trusted: bool,
    *,
    dry_run: bool,
) -> None:
    from ..comparing.stage import look_at, run_comparison
    from ..showing.comparing import CompareDisplay
    from .comparing_view import result_lines, show_plan, show_table

    cells = look_at(made, output, overwrite=overwrite)
    show_plan(shown.progress, made, cells, output)
    if dry_run:
        if shown.as_json:
            shown.print_json([cell.to_dict() for cell in cells])
        return
    command = shlex.join(["quantadapt", *sys.argv[1:]])
    try:
        with CompareDisplay(shown.progress) as display:
            result = run_comparison(
                made,
                output,
                overwrite=overwrite,
                retry=retry,
                trusted=trusted,
                listener=display,
                command=command,
            )
    except KeyboardInterrupt:
        shown.note(f"what has ended is kept in {output}; the same command goes on")
        raise
    show_table(shown.progress, made, result.table, result.verdict)
    for line in result_lines(result):
        shown.progress.print(line, markup=False, soft_wrap=True)
    if shown.as_json:
        from ..inputs.documents import read_object

        shown.print_json(read_object(result.folder / "compare.json"))
