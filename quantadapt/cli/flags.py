"""The flags that describe a run, shared by `run` and `plan`, and how they become a `Spec`.

Three sources, the later one wins: the YAML file, the flags, `--set`. A flag changes what it names
and leaves the rest of the file alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ..spec import Spec

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_WHAT, _HOW, _WHERE = "What to run", "How to train", "Where"

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of the YAML file, e.g. train.warmup_ratio=0.1, or an option of the backend "
        "or adapter: backend.bits=3, adapter.r=8. May be repeated; wins over everything else.",
        rich_help_panel=_WHAT,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout, all else to stderr.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:1, ...", show_default="auto", rich_help_panel=_WHERE),
]
GpusOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Work on several GPUs, a process each; see train.parallel. With --device cpu: as many "
        "processes without a GPU, to try it out.",
        rich_help_panel=_WHERE,
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model; without it that is refused.",
        rich_help_panel=_WHERE,
    ),
]
ForceBaseOption = Annotated[
    bool,
    typer.Option(
        "--force-base", help="Take a base that is not the one that the adapter was trained on."
    ),
]
StreamOption = Annotated[
    str,
    typer.Option(
        "--stream",
        metavar="WHAT[:FOLDER]",
        help="Keep the base in CPU memory and copy it to the GPU block by block: all, experts, "
        "none, or auto (as while it was trained); with a folder on a fast disk, there instead.",
        rich_help_panel=_WHERE,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Compute dtype: auto, float32, bfloat16 or float16.",
        show_default="auto",
        rich_help_panel=_WHERE,
    ),
]


@dataclass
class SpecFlags:
    """One field for each flag; None means not given."""

    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="The run as YAML: a file, or a name that `quantadapt init` lists.",
            show_default=False,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Checkpoint folder or hub id.", show_default="the bundled demo",
            rich_help_panel=_WHAT,
        ),
    ] = None  # fmt: skip
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="JSONL, JSON, CSV, Parquet or text file, folder, or hub id.",
            show_default="the bundled demo's", rich_help_panel=_WHAT,
        ),
    ] = None  # fmt: skip
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "-b", help="How to quantize: a name from `quantadapt backends`.",
            show_default="hqq", rich_help_panel=_WHAT,
        ),
    ] = None  # fmt: skip
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", "-a", help="What to train: a name from `quantadapt adapters`.",
            show_default="lora", rich_help_panel=_WHAT,
        ),
    ] = None  # fmt: skip
    objective: Annotated[
        str | None,
        typer.Option(
            help="What is learnt: a name from `quantadapt objectives`.", show_default="sft",
            rich_help_panel=_WHAT,
        ),
    ] = None  # fmt: skip
    set: SetOption = None
    max_steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps.", show_default="one epoch", rich_help_panel=_HOW),
    ] = None
    max_time: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Write a checkpoint and end after so long; --resume goes on.",
            rich_help_panel=_HOW,
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Peak learning rate.", rich_help_panel=_HOW),
    ] = None
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT[:FOLDER]",
            help="Keep the base in CPU memory and copy it to the GPU block by block: all, experts, "
            "none, or auto (where training does not fit otherwise); with a folder on a fast disk, "
            "there instead.",
            show_default="auto",
            rich_help_panel=_HOW,
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="For data order and start.", rich_help_panel=_HOW)
    ] = None
    merge_aware: Annotated[
        bool,
        typer.Option(
            "--merge-aware",
            help="Train through the quantizer, so that --merge requantize writes what was trained.",
            rich_help_panel=_HOW,
        ),
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=_HOW)
    ] = False
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="The run folder.", show_default="runs/BACKEND-ADAPTER",
            rich_help_panel=_WHERE,
        ),
    ] = None  # fmt: skip
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier run in that folder.", rich_help_panel=_WHERE
        ),
    ] = False
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What to export besides the adapter: auto (dense where the combination allows "
            "it, requantize with --merge-aware), dense, requantize, or never.",
            show_default="auto",
            rich_help_panel=_WHERE,
        ),
    ] = None
    min_gain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --merge requantize: the share of the gain that it has to keep.",
            show_default="0.9",
            rich_help_panel=_WHERE,
        ),
    ] = None
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="With --merge requantize: nearest, grid, dithered, refined, compensated, or auto.",
            show_default="auto",
            rich_help_panel=_WHERE,
        ),
    ] = None
    device: DeviceOption = None
    dtype: DtypeOption = None
    trust_remote_code: TrustOption = False

    def values(self) -> dict[str, Any]:
        """Return what file and flags say, as YAML would. Raises SpecError."""
        from ..spec import apply_overrides, named, put

        values = _read(self.config) if self.config else {}
        for name, key in _KEYS.items():
            given = getattr(self, name)
            if given is not None and given is not False:
                put(values, key, given)
        if self.stream is not None:
            what, folder = parted(self.stream)
            put(values, "train.stream", what)
            if folder is not None:
                put(values, "train.stream_folder", folder)
        for name in ("backend", "adapter", "objective"):
            if (given := getattr(self, name)) is not None:
                values[name] = named(values.get(name), given)
        return apply_overrides(values, self.set or ())

    def spec(self) -> Spec:
        """Return the spec. Raises SpecError with every mistake."""
        from ..planning.mistakes import spec_of

        return spec_of(self.values())


def parted(stream: str) -> tuple[str, str | None]:
    """Return what `--stream` says: what is streamed, and the folder where it lies, or None."""
    what, _, folder = stream.partition(":")
    return what, folder or None


def _read(file: Path) -> dict[str, Any]:
    """Return what a YAML file says. That of a run folder, which may come from elsewhere, cannot say
    that code is trusted."""
    from ..folders.run_folder import MARKER
    from ..inputs.configs import located
    from ..inputs.plain_yaml import read_yaml

    file = located(file)
    values = read_yaml(file)
    if (file.parent / MARKER).exists():
        values.pop("trust_remote_code", None)
    return values


_KEYS = {
    "model": "model",
    "data": "data.path",
    "max_steps": "train.max_steps",
    "max_time": "train.max_time",
    "learning_rate": "train.learning_rate",
    "resume": "train.resume",
    "seed": "seed",
    "output": "output",
    "overwrite": "overwrite",
    "merge_aware": "train.merge_aware",
    "merge": "export.merge",
    "min_gain": "export.min_gain",
    "rounding": "export.rounding",
    "device": "device",
    "dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}


def with_spec_flags(function: Callable[..., None], *names: str) -> Callable[..., None]:
    """Give a command spec flags on the command line, those called `names` or all, and one SpecFlags
    as first argument."""
    hints = get_type_hints(SpecFlags, include_extras=True)
    own_hints = get_type_hints(function, include_extras=True)
    shared = [
        inspect.Parameter(f.name, _KEYWORD, default=f.default, annotation=hints[f.name])
        for f in fields(SpecFlags)
        if not names or f.name in names
    ]
    _, *own = inspect.signature(function).parameters.values()
    own = [p.replace(kind=_KEYWORD, annotation=own_hints[p.name]) for p in own]

    def command(**values: Any) -> None:
        flags = SpecFlags(**{p.name: values.pop(p.name) for p in shared})
        function(flags, **values)

    command.__doc__ = function.__doc__
    command.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
    command.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    return command
