"""What the commands that work with one model share: open it, find its data, check the output."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ModelError, OutputError, PlanRefused, Problem, SpecError
from ..exporting.manifest import ADAPTER, MANIFEST, MERGED, adapter_in
from ..folders.atomic import (
    OTHER_OUTPUT,
    in_words,
    is_free,
    put_back,
    refuse_occupied,
    refuse_overlap,
    refuse_unwritable,
)
from ..folders.lock import refuse_in_use
from ..inputs.documents import read_object
from ..paths import path_problem
from ..remote_code import trusted
from .flags import parted

if TYPE_CHECKING:
    from torch import nn

    from ..data.reading import HeldOut
    from ..planning.exports import PlannedExport
    from ..spec import Spec
    from .session import Session


@contextmanager
def waiting(shown: Session, text: str) -> Iterator[None]:
    """Show a spinner, and afterwards how long it took."""
    from .progress import spinner

    started = time.perf_counter()
    with spinner(shown.progress, text):
        yield
    took = f"{text}: {time.perf_counter() - started:.1f} s"
    shown.err.print(took, style="dim", markup=False, soft_wrap=True)


def open_model(
    path: str, device: str | None, force_base: bool = False, stream: str = "auto"
) -> nn.Module:
    """Load a run folder, an adapter, a saved or merged model, or any checkpoint or hub id.

    Raises:
        ModelError: there is nothing to load. SpecError: `stream` is nothing that can be streamed.
    """
    from ..exporting.loading import load
    from ..planning.on_disk import check_model, quantization_of
    from ..spec import Streaming
    from ..stages import quantize

    if found := path_problem(path):
        raise ModelError(f"{path!r} is no path: {found}", fix="check the path")
    which, place = parted(stream)
    if which not in get_args(Streaming):
        fix = f"use one of {', '.join(get_args(Streaming))}"
        raise SpecError([Problem(f"{which!r} cannot be streamed", fix, where="--stream")])
    folder = put_back(path)
    ours = any((folder / name / MANIFEST).exists() for name in (".", ADAPTER, MERGED))
    if ours or adapter_in(folder) is not None:  # `load` says what it misses
        how: dict[str, Any] = {"stream": which, "stream_folder": place, "force_base": force_base}
        return load(folder, device=device or "auto", **how, trust_remote_code=trusted())
    if problems := check_model(path):
        raise PlanRefused(problems)
    config = quantization_of(str(folder))
    backend = "none" if config is None else _backend_of(config, path)
    source = str(folder) if folder.exists() else path
    kept: Any = {"stream": "none" if which == "auto" else which, "stream_folder": place}
    return quantize(source, backend, device=device or "auto", **kept, trust_remote_code=trusted())


def _backend_of(config: dict[str, Any], path: str) -> str:
    from ..registry.discovery import registry

    readers, failures = registry().readers(config)
    if readers:
        return readers[0].name
    if failures:
        raise failures[0]
    method = config.get("quant_method", "an unknown method")
    fix = "install the plugin that can; `quantadapt backends` lists those that are there"
    raise ModelError(f"no backend here reads a checkpoint made by {method}", fix=fix, where=path)


def held_out_of(path: str, data: str | None, tokenizer: Any) -> tuple[HeldOut, str]:
    """Return the data to measure on, tokenized, and where that choice came from.

    It is what `data` names, or what the run at `path` held out, or the bundled demo's; cut to the
    `max_length` of the run.
    """
    from .. import planning
    from ..data.reading import MAX_LENGTH, read_held_out
    from ..spec import DataSpec

    folder, run = Path(path).expanduser(), spec_of_run(path)
    if data is None and run is not None:
        named = ", ".join(run.data.named)
        origin = f"what the run held out of {named or 'the bundled demo data'}"
        return planning.task_for(run).read_for(run, tokenizer).held_out, origin
    made = _manifest(folder / ADAPTER) or _manifest(folder) or {}
    like = run.data if run else DataSpec(max_length=made.get("max_length") or MAX_LENGTH)
    origin = data or "the bundled demo's data; --data names other data"
    return read_held_out(data, tokenizer, like=like), origin


def measured_in(path: str) -> list[str]:
    """Return what is measured where nobody says, by the objective of the run at `path`; none where
    there is no run."""
    from ..records import Objective
    from ..registry.discovery import registry

    run = spec_of_run(path)
    return [*registry().record(Objective, run.objective.name).evaluations] if run else []


def calibration_of(path: str, calibration: str | None, tokenizer: Any) -> Any:
    """Return what to calibrate on: what `calibration` names, or what the run at `path` used."""
    from .. import planning
    from ..quantizing.examples import calibration_examples, examples_from

    if calibration is not None:
        return examples_from(calibration, tokenizer)
    if (spec := spec_of_run(path)) is None:
        return None
    read = planning.task_for(spec).read_for
    return calibration_examples(spec, tokenizer, lambda: read(spec, tokenizer).train)


def spec_of_run(path: str) -> Spec | None:
    """Return the spec of the run at `path`; None where there is no run."""
    from ..spec import Spec

    file = Path(path).expanduser() / "spec.yaml"
    return Spec.load(file) if os.path.lexists(file) else None  # a link that leads nowhere is told


def inputs_of(planned: PlannedExport, run: str, *data: str | None) -> list[str | Path | None]:
    """Return what an export of `run` reads."""
    from ..exporting.manifest import BASE, adapter_in

    adapter = None if path_problem(run) else adapter_in(put_back(run))
    base = (_manifest(adapter) or {}).get("base") if adapter else None
    own: list[str | Path | None] = []
    if adapter:
        own = [adapter, adapter.parent / BASE, str(base or "")]
    return [*own, *planned.exporter.reads, *data]


def check_export(run: str, planned: PlannedExport, found: Iterable[Problem] = ()) -> None:
    """Raise, before anything is loaded, where there is no adapter or a rule forbids the export.

    Args:
        found: what is wrong besides.
    """
    from ..errors import MergeRefused
    from ..exporting.adapter_files import check_adapters
    from ..exporting.manifest import adapter_folder, combination, read_manifest
    from ..planning.exports import as_trained_problems
    from ..planning.refusals import export_refusals

    kind: type[PlanRefused] = MergeRefused if planned.exporter.merges else PlanRefused
    problems = list(found)
    if problems:
        kind = PlanRefused
    try:
        folder = adapter_folder(Path(run))
        manifest = read_manifest(folder)
        cell, backend, adapter = combination(manifest)
        refused = [
            *export_refusals(planned.record, planned.exporter, cell, backend, adapter),
            *as_trained_problems(planned.exporter, bool(manifest.get("merge_aware"))),
        ]
        problems += [problem for problem in refused if problem not in problems]
        check_adapters(folder, manifest, adapter)
    except (ModelError, PlanRefused) as error:
        kind = kind if problems else PlanRefused
        problems += error.problems
    if problems:
        raise kind(problems)


@contextmanager
def checked_output(
    folder: Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> Iterator[None]:
    """Refuse, together with what the body is refused for, a folder that could not be written.

    Args:
        inputs: what is read, which must not lie in the folder, nor the folder in it.
    """
    if problem := path_problem(str(folder)):
        found = [Problem(f"{str(folder)!r} is no path: {problem}", OTHER_OUTPUT, "--output")]
    else:
        found = _output_problems(folder.expanduser(), overwrite, inputs)
    try:
        yield
    except PlanRefused as error:
        raise type(error)([*error.problems, *found]) from None
    if found:
        raise PlanRefused(found)


def _output_problems(
    folder: Path, overwrite: bool, inputs: Iterable[str | Path | None]
) -> list[Problem]:
    where = str(folder)
    try:
        refuse_in_use(folder)
        put_back(folder)
        with in_words(folder):
            taken = folder.is_dir() and not is_free(folder)
        if taken and "backend" not in (_manifest(folder) or {}):
            what = "the folder is not empty and was not made by quantadapt"
            return [Problem(what, OTHER_OUTPUT, where)]
        if taken and not overwrite:
            what = "the folder holds a model already"
            return [Problem(what, f"{OTHER_OUTPUT}, or pass --overwrite", where)]
        refuse_overlap(folder, inputs)
        refuse_occupied(folder, overwrite)
        refuse_unwritable(folder)
    except OutputError as error:
        return list(error.problems)
    return []


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return read_object(folder / MANIFEST)
    except ModelError:
        return None
