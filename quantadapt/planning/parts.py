"""The parts of a plan, each resolved by itself: model, device, quantizer, adapter, dtype, data.

As pure as the plan. What is wrong is noted in the draft, so that all of it is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .. import demo
from ..data.sources import matching
from ..dependencies import missing_requirements, tracker_problems
from ..distributed.world import world
from ..errors import ModelError, OutputError, PlanRefused, PluginError, Problem
from ..folders.run_folder import RunFolder
from ..inputs.documents import shown
from ..inputs.fingerprints import Fingerprint
from ..inputs.likely_names import did_you_mean
from ..inputs.model_config import DEQUANTIZED
from ..machine import Machine
from ..paths import is_local_path, path_problem
from ..protocols import Evaluator, Quantizer, Task
from ..records import Adapter, Backend, Evaluation, Objective, R, Record, kind_of
from ..registry.discovery import Registry, adopted
from ..remote_code import code_notes
from ..spec import Named, Spec, wrong_value
from .adapter_options import checked_options
from .on_disk import check_model, has_config_alone, quantization_in
from .optimizers import optimizer_problems
from .peft_options import method_problems
from .processes import device_problems
from .resuming import resumed

Made = TypeVar("Made", bound=BaseModel)


@dataclass
class Draft:
    """The plan while it is being made; problems pile up here.

    Attributes:
        cards: sizes in GiB of GPUs that are asked about; they need not be in this machine.
    """

    spec: Spec
    machine: Machine
    registry: Registry
    processes: int = 1
    cards: tuple[float, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def record_of(draft: Draft, kind: type[R], named: Named) -> R | None:
    """Return the record that the spec names; what it lacks is a problem, too."""
    try:
        found = draft.registry.record(kind, named.name)
    except PlanRefused as error:
        draft.problems += error.problems
        return None
    draft.problems += missing_requirements(found)
    return found


def options_of(
    draft: Draft, record: R | None, named: Named, options: Callable[[R], type[Made]]
) -> Made | None:
    """Return a record's options as the spec has them; None, and problems, if they cannot be used.

    Args:
        record: what `record_of` returned.
        options: gets the options' class from the record, e.g. `lambda found: found.quantizer`.
    """
    if record is None:
        return None
    wanted = options(record)
    try:
        return wanted(**named.options)
    except ValidationError as error:
        draft.problems += [_option_problem(record, wanted, dict(d)) for d in error.errors()]
        return None


def _option_problem(record: Record, options: type[BaseModel], detail: dict[str, Any]) -> Problem:
    kind, name = kind_of(record), ".".join(str(part) for part in detail["loc"])
    where = f"{kind}.{name}"
    if detail["type"] == "extra_forbidden":
        hint = did_you_mean(name, options.model_fields)
        what = f"{kind} {record.name!r} has no option {name!r}"
        return Problem(what, hint or "it has no options", where)
    if not name:  # several options do not go together
        given = ", ".join(f"{key}={value!r}" for key, value in dict(detail["input"]).items())
        what = str(detail["msg"]).removeprefix("Value error, ")
        fix = f"change or leave out one of {given}" if given else "set the options that it names"
        return Problem(what, fix, kind)
    return wrong_value(detail, where)


def model_of(draft: Draft, weights: bool) -> str:
    """Return the checkpoint; `weights` says whether it has to have them."""
    if draft.spec.model is None:
        return str(demo.MODEL_DIR)
    if not weights and has_config_alone(draft.spec.model):
        draft.notes.append("there are no weights here: this is a prediction, a run needs them")
    else:
        draft.problems += check_model(draft.spec.model)
    draft.notes += code_notes(draft.spec.model)
    return os.path.expanduser(draft.spec.model)


def device_of(draft: Draft) -> str:
    """Return the device of this process; of several, each has that of its number."""
    wanted = draft.spec.device
    if draft.cards and wanted.partition(":")[0] in ("auto", "cuda"):
        return "cuda"
    draft.problems += device_problems(draft.spec, draft.machine, draft.processes)
    if wanted == "auto":
        wanted = draft.machine.default_device
    if draft.processes > 1 and wanted == "cuda":
        return f"cuda:{world().local_rank}"
    kind, _, index = wanted.partition(":")
    if kind == "cuda":
        count = len(draft.machine.cuda)
        if count == 0:
            what = "there is no CUDA device here, or torch was built without CUDA"
            fix = "use device: cpu, or install a CUDA build of torch; `quantadapt doctor` looks"
            draft.problems.append(Problem(what, fix, where="device"))
        elif index and not (index.isdigit() and int(index) < count):
            what = f"{wanted!r} does not exist, there are {count} CUDA devices"
            draft.problems.append(Problem(what, f"use cuda:0 to cuda:{count - 1}", where="device"))
    elif kind not in ("cpu", "mps", "xpu", "hpu"):
        what = f"{wanted!r} is no device"
        draft.problems.append(Problem(what, "use auto, cpu, cuda or cuda:N", where="device"))
    return wanted


def quantizer_of(
    draft: Draft, backend: Backend | None, config: Mapping[str, Any]
) -> tuple[Quantizer | None, bool]:
    """Return the quantizer, and whether the checkpoint was quantized by it already.

    Args:
        config: the checkpoint's config.json; empty where it is not known.
    """
    found = quantization_in(config)
    if backend is None or found is None:
        return fresh_quantizer(draft, backend), False
    try:
        quantizer = adopted(backend, found)
    except (PluginError, ModelError) as error:
        draft.problems += error.problems
        return None, True
    if quantizer is None and (method := found.get("quant_method")) in DEQUANTIZED:
        note = f"what the checkpoint stores in {method} is dequantized while it is read"
        makers, _ = draft.registry.readers(found)
        draft.notes.append(f"{note}; --backend {makers[0].name} keeps it" if makers else note)
        return fresh_quantizer(draft, backend), False
    if quantizer is None:
        draft.problems.append(_wrong_checkpoint(draft, backend, found))
        return None, True
    refuse_other_options(draft, quantizer, "checkpoint")
    draft.notes.append(f"the checkpoint is quantized already ({backend.name}); loaded as it is")
    return quantizer, True


def fresh_quantizer(draft: Draft, backend: Backend | None) -> Quantizer | None:
    """Return the quantizer that the spec asks for."""
    return options_of(draft, backend, draft.spec.backend, lambda found: found.quantizer)


def refuse_other_options(draft: Draft, adopted: Quantizer, what_is: str) -> None:
    """Note options of the spec that are not those of what is quantized already, or that say how."""
    for name, value in draft.spec.backend.options.items():
        has = getattr(adopted, name, None)
        if value != has and _read_as(adopted, name, value) != has:
            what = f"the {what_is} is quantized already, with {name}={has!r}"
            fix = f"leave out {name}={value!r}, or start from the unquantized model"
            draft.problems.append(Problem(what, fix, where=f"backend.{name}"))
    if draft.spec.skip_misfits:
        what = f"the {what_is} is quantized already: no layer is left to fit or not"
        draft.problems.append(Problem(what, "leave it out", where="skip_misfits"))


def _read_as(adopted: Quantizer, name: str, value: Any) -> Any:
    """Return a value as the quantizer reads it, a list as a tuple, say."""
    try:
        return getattr(type(adopted)(**{name: value}), name, None)
    except ValidationError:
        return value


def _wrong_checkpoint(draft: Draft, backend: Backend, found: Mapping[str, Any]) -> Problem:
    makers, failures = draft.registry.readers(found)
    method = found.get("quant_method", "an unknown method")
    what = f"the checkpoint is quantized with {method}, backend {backend.name!r} cannot read it"
    fix = f"use --backend {makers[0].name}" if makers else "start from the unquantized model"
    if failures and not makers:
        what += f"; {failures[0].problems[0]}"
    return Problem(what, fix, where="model")


def task_of(draft: Draft) -> tuple[Objective | None, Task | None]:
    """Return the objective and its options."""
    named = draft.spec.objective
    objective = record_of(draft, Objective, named)
    return objective, options_of(draft, objective, named, lambda found: found.task)


def adapter_options(draft: Draft, adapter: Adapter | None) -> dict[str, Any]:
    """Return the adapter's options: its defaults, and what the spec says and can be used."""
    if adapter is None:
        return {}
    if not missing_requirements(adapter):
        draft.problems += method_problems(adapter)
    options, problems = checked_options(adapter, draft.spec.adapter.options)
    draft.problems += problems
    return options


def evaluators_of(
    draft: Draft, objective: Objective | None = None, task: Task | None = None
) -> dict[str, Evaluator]:
    """Return what measures, by the names of the evaluations, in the order of the spec, or as the
    objective and its task have them where that does not say. Of several with one name, those with
    options have these in their names, too: `exact (shots=5)`."""
    found: dict[str, Evaluator] = {}
    wanted: Sequence[Named] = draft.spec.evaluate.wanted
    told_by_task: set[str] = set()
    if objective is not None and "evaluations" not in draft.spec.evaluate.model_fields_set:
        given = {name: task.evaluated_with(name) if task else {} for name in objective.evaluations}
        told_by_task = {name for name, options in given.items() if options or task is None}
        its_own = [Named(name=name, **options) for name, options in given.items()]
        wanted = [*its_own, *wanted[len(draft.spec.evaluate.evaluations) :]]
    names = [named.name for named in wanted]
    for named in wanted:
        told = ", ".join(f"{key}={value}" for key, value in named.options.items())
        label = named.name
        if names.count(label) > 1 and told:
            label = f"{label} ({told})"
        record = record_of(draft, Evaluation, named)
        evaluator = options_of(draft, record, named, lambda record: record.evaluator)
        if label in found:
            what = f"{label!r} is named twice"
            fix = "name it once, or with other options"
            draft.problems.append(Problem(what, fix, where="evaluate.evaluations"))
        if evaluator is not None and record is not None:
            found[label] = evaluator
            if not missing_requirements(record) and label not in told_by_task:
                draft.problems += evaluator.refusals()
    return found


def evaluation_of(label: str) -> str:
    """Return the name of the evaluation that is called `label` in a plan."""
    return label.partition(" (")[0]


def dtype_of(draft: Draft, backend: Backend | None, device: str) -> str:
    """Return torch's name of the compute dtype; GPUs that are asked about do bfloat16."""
    dtype: str = draft.spec.dtype
    if dtype == "auto":
        asked = draft.cards and device == "cuda"
        dtype = "bfloat16" if asked else draft.machine.default_dtype(device)
    if backend and dtype not in backend.dtypes:
        what = f"backend {backend.name!r} does not compute in {dtype}"
        fix = f"use dtype: {', '.join(backend.dtypes)}"
        draft.problems.append(Problem(what, fix, where="dtype"))
    kind = device.partition(":")[0]
    if backend and kind not in backend.devices:
        what = f"backend {backend.name!r} does not run on {kind}"
        fix = f"use device: {', '.join(backend.devices)}"
        draft.problems.append(Problem(what, fix, where="device"))
    return dtype


_PATHS = ("path", "eval_path", "calibration_path")


def check_data(draft: Draft) -> None:
    """Look whether local files of data are there."""
    data = draft.spec.data
    named = [(f"data.{key}", getattr(data, key)) for key in _PATHS]
    named += [(f"data.sources.{n}", source.path) for n, source in enumerate(data.sources)]
    for where, path in named:
        if path and (problem := path_problem(path)):
            what, fix = f"{shown(path)} is no path: {problem}", "check the path"
            draft.problems.append(Problem(what, fix, where=where))
        elif path and has_magic(path) and not Path(path).expanduser().exists():
            if not matching(path):
                what, fix = f"no file fits the pattern {path}", "check the path"
                draft.problems.append(Problem(what, fix, where=where))
        elif path and is_local_path(path) and not Path(path).expanduser().exists():
            fix = "check the path; a hub id has the form owner/name"
            draft.problems.append(Problem(f"{path} does not exist", fix, where=where))
        elif not path and where.startswith("data.sources"):
            draft.problems.append(Problem("the source has no path", "name it", where=where))


def check_task(draft: Draft, task: Task | None) -> None:
    """Look whether the task goes with data and training, and let it say how rows are filled where
    nobody does."""
    if task is None:
        return
    if draft.spec.train.packing is None:
        draft.spec.train.packing = task.packs_by_default
    if problems := task.conflicts(draft.spec):
        draft.problems += problems
    elif not any(problem.where.startswith("data.") for problem in draft.problems):
        draft.notes += task.remarks(draft.spec)


def check_training(draft: Draft, device: str) -> None:
    """Look for options of training that contradict each other or lack their library."""
    train = draft.spec.train
    draft.problems += optimizer_problems(train)
    draft.problems += tracker_problems(train.report_to)
    if train.gradient_checkpointing is not None and train.memory != "auto":
        what = "memory and gradient_checkpointing both say which layers are computed again"
        fix = "leave one of them out"
        draft.problems.append(Problem(what, fix, where="train.gradient_checkpointing"))
    row, longest = train.row_length, draft.spec.data.max_length
    if row is not None and row < longest:
        what = f"examples may have {longest:,} tokens, and a packed row has room for {row:,}"
        fix = f"set train.packing to {longest} or more, or data.max_length to {row}"
        draft.problems.append(Problem(what, fix, where="train.packing"))
    if isinstance(train.memory, float) and not device.startswith("cuda"):
        draft.notes.append("train.memory limits the memory of a GPU; this run has none")


def check_folder(draft: Draft) -> None:
    """Look whether the run folder is free, or may be replaced or taken up."""
    spec = draft.spec
    inputs = [path for path in spec.inputs if not path_problem(path)]
    if problem := path_problem(spec.output or ""):
        what = f"{shown(spec.output)} is no path: {problem}"
        draft.problems.append(Problem(what, "choose another --output", where="output"))
        return
    try:
        RunFolder.check(
            spec.output or "", overwrite=spec.overwrite, resume=spec.train.resume, inputs=inputs
        )
    except OutputError as error:
        draft.problems += [replace(p, where=f"output {p.where}".strip()) for p in error.problems]


def check_resumed(
    draft: Draft,
    quantizer: Quantizer | None,
    adapter_options: Mapping[str, Any],
    task: Task | None,
    fingerprint: Fingerprint | None,
) -> None:
    """Look whether a run that is to be resumed is still the one that was begun."""
    if path_problem(draft.spec.output or ""):
        return
    if draft.spec.train.resume and quantizer and task:
        given = draft.spec, quantizer, adapter_options, task, draft.processes
        draft.spec, problems, notes = resumed(*given, fingerprint=fingerprint)
        draft.problems += problems
        draft.notes += notes
