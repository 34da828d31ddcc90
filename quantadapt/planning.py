"""`plan(spec)`: decide everything and find every mistake before any work starts.

Pure but for looking at the local files that the spec names: it downloads nothing and imports
neither torch nor a vendor. All problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from . import demo, loftq, parallel
from .capabilities import KEEP, Cell, Merge, refusals
from .checkpoint import (
    check_model,
    config_of,
    has_config_alone,
    is_local_path,
    quantization_of,
)
from .dependencies import missing_for_optimizer, missing_requirements
from .distributed import world
from .errors import MergeRefused, OutputError, PlanRefused, Problem, did_you_mean
from .machine import Machine, this_machine
from .memory import GIB
from .memory_plan import MemoryPlan, memory_plan
from .parallel import Parallel
from .peft_options import peft_options
from .protocols import Quantizer
from .records import Adapter, Backend
from .registry import Registry, registry
from .run_folder import RunFolder
from .spec import Spec

MergePlan = Literal["dense", "requantize", "never"]

WAY_OUT = f"{KEEP}, or merge it onto the unquantized base (quantadapt merge RUN --onto BASE)"


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        spec: the spec with every default resolved.
        model: checkpoint folder or hub id.
        adopt: the checkpoint is quantized already and is loaded as it is.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: torch's name of the compute dtype.
        merge: what the export will write besides the adapter.
        merge_refusals: why `auto` became `never`, if it did.
        notes: decisions that a user may want to know of.
        processes: how many work on it, one device each.
        parallel: "ddp" or "fsdp" if there are several, else "none".
        memory: what training needs on a GPU; None where that cannot be predicted.
    """

    spec: Spec
    model: str
    backend: Backend
    quantizer: Quantizer
    adapter: Adapter
    adapter_options: Mapping[str, Any]
    device: str
    dtype: str
    adopt: bool = False
    merge: MergePlan = "never"
    merge_refusals: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    processes: int = 1
    parallel: Parallel = "none"
    memory: MemoryPlan | None = None

    @property
    def calibrates(self) -> bool:
        """Whether quantizing has to be shown data."""
        return self.backend.calibration and self.quantizer.needs_data and not self.adopt

    @property
    def cell(self) -> Cell:
        """The facts that rules look at."""
        return make_cell(
            self.backend,
            self.quantizer,
            self.adapter,
            self.adapter_options,
            self.device,
            self.dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "model": self.model,
            "backend": {"name": self.backend.name, "options": self.quantizer.model_dump()},
            "adapter": {"name": self.adapter.name, "options": dict(self.adapter_options)},
            "device": self.device,
            "dtype": self.dtype,
            "adopt": self.adopt,
            "merge": self.merge,
            "merge_refusals": [vars(problem) for problem in self.merge_refusals],
            "processes": self.processes,
            "parallel": self.parallel,
            "memory": self.memory.to_dict() if self.memory else None,
            "notes": list(self.notes),
        }


def make_cell(
    backend: Backend,
    quantizer: Quantizer,
    adapter: Adapter,
    adapter_options: Mapping[str, Any],
    device: str,
    dtype: str,
) -> Cell:
    """Return the facts about one combination."""
    return Cell(
        backend=backend.name,
        adapter=adapter.name,
        device=device.partition(":")[0],
        dtype=dtype,
        backend_options=quantizer.model_dump(),
        adapter_options=adapter_options,
    )


def attach_refusals(cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
    """Return why `cell` cannot be attached; empty means it can."""
    return refusals(cell, (*backend.rules, *adapter.rules))


def merge_refusals(
    cell: Cell, backend: Backend, adapter: Adapter, choice: Literal["dense", "requantize"]
) -> list[Problem]:
    """Return why `cell` cannot be merged that way; empty means it can."""
    rules = (*backend.rules, *adapter.rules)
    found = refusals(cell, rules, "merge")
    if choice == "requantize":
        found += refusals(cell, rules, "requantize")
    limit = min(backend.merge, adapter.merge)
    wanted = Merge.DENSE if choice == "dense" else Merge.REQUANTIZE
    if limit < wanted and not found:
        found.append(_merge_limit(backend, adapter, limit))
    return found


def _merge_limit(backend: Backend, adapter: Adapter, limit: Merge) -> Problem:
    who = adapter if adapter.merge == limit else backend
    where = f"{backend.name} x {adapter.name}"
    if limit == Merge.NEVER:
        fix = KEEP if who is adapter else WAY_OUT
        return Problem(f"{who.name} is never merged", fix, where, f"{who.name}-merge-never")
    what = f"{who.name} is merged into dense weights only, not quantized again"
    return Problem(what, "use export.merge: dense", where, f"{who.name}-merge-dense")


def onto_refusals(backend: Backend, adapter: Adapter, cell: Cell, base: str) -> list[Problem]:
    """Return why the adapter of `cell` cannot be merged onto the checkpoint `base`, which does not
    touch the backend's own weights; empty means it can."""
    found = refusals(cell, adapter.rules, "merge")
    found += refusals(cell, (*backend.rules, *adapter.rules), "onto")
    if adapter.merge == Merge.NEVER and not found:
        found.append(_merge_limit(backend, adapter, Merge.NEVER))
    if (method := quantization_of(base)) is not None:
        what = f"{base} is quantized itself, with {method.get('quant_method', 'some method')}"
        found.append(Problem(what, "pass the unquantized model", "--onto"))
    return found


@dataclass
class _Draft:
    """The plan while it is being made; problems pile up here."""

    spec: Spec
    machine: Machine
    registry: Registry
    processes: int = 1
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lookup(self, kind: Literal["backend", "adapter"], name: str) -> Any:
        try:
            return getattr(self.registry, kind)(name)
        except PlanRefused as error:
            self.problems.extend(error.problems)
            return None


def plan(
    spec: Spec,
    *,
    machine: Machine | None = None,
    registry_: Registry | None = None,
    check_output: bool = True,
    processes: int | None = None,
    cards: Sequence[float] = (),
    weights: bool = True,
) -> Plan:
    """Resolve `spec` or raise PlanRefused with every problem at once.

    Args:
        spec: what is wanted.
        machine: the devices to plan for; this machine's by default.
        registry_: the plugins to choose from; those installed by default.
        check_output: whether a run folder will be made, so that it has to be free.
        processes: how many are to work on it; by default as many as were launched.
        cards: sizes of GPUs in GiB to predict memory for, instead of this machine's.
        weights: whether a local model has to have its weights; a prediction needs the config alone.
    """
    spec = _with_demo_defaults(spec)
    count = world().size if processes is None else processes
    draft = _Draft(spec, machine or this_machine(), registry_ or registry(), count)
    model = _model(draft, weights)
    device = _device(draft)
    backend: Backend | None = draft.lookup("backend", spec.backend.name)
    adapter: Adapter | None = draft.lookup("adapter", spec.adapter.name)
    quantizer, adopt = _quantizer(draft, backend, model)
    options = _adapter_options(draft, adapter)
    dtype = _dtype(draft, backend, device)
    _check_data(draft)
    _check_training(draft, device)
    if check_output:
        _check_output(draft)
    merge: MergePlan = "never"
    refused: tuple[Problem, ...] = ()
    memory: MemoryPlan | None = None
    if backend and adapter and quantizer:
        cell = make_cell(backend, quantizer, adapter, options, device, dtype)
        draft.problems += attach_refusals(cell, backend, adapter)
        draft.problems += loftq.problems(options, backend, has_original=not adopt)
        draft.notes += quantizer.notes(device)
        merge, refused = _merge(draft, cell, backend, adapter)
        if parallel.parallel_for(spec.train, count) == "fsdp":
            draft.problems += parallel.shard_problems(cell, backend, adapter, model)
            draft.notes += parallel.shard_notes(spec)
            merge, refused = "never", parallel.merge_problems(spec.export.merge)
        if check_output or cards:
            memory = _memory(draft, model, quantizer, cell, adapter, adopt, cards)
    forbidden = refused if spec.export.merge != "auto" else ()
    if draft.problems:
        raise PlanRefused([*draft.problems, *forbidden])
    if forbidden:
        raise MergeRefused(forbidden)
    assert backend
    assert adapter
    assert quantizer
    return Plan(
        spec=spec,
        model=model,
        backend=backend,
        quantizer=quantizer,
        adapter=adapter,
        adapter_options=options,
        device=device,
        dtype=dtype,
        adopt=adopt,
        merge=merge,
        merge_refusals=refused,
        notes=tuple(draft.notes),
        processes=count,
        parallel=parallel.parallel_for(spec.train, count),
        memory=memory,
    )


def _with_demo_defaults(spec: Spec) -> Spec:
    """Fill in what the bundled demo wants to be trained with, where the user said nothing."""
    spec = spec.model_copy(deep=True)
    if spec.model is None and spec.data.path is None:
        for name, value in demo.TRAIN_DEFAULTS.items():
            if name not in spec.train.model_fields_set:
                setattr(spec.train, name, value)
    if spec.output is None:
        spec.output = f"runs/{spec.backend.name}-{spec.adapter.name}"
    return spec


def _model(draft: _Draft, weights: bool) -> str:
    if draft.spec.model is None:
        return str(demo.MODEL_DIR)
    if not weights and has_config_alone(draft.spec.model):
        draft.notes.append("there are no weights here: this is a prediction, a run needs them")
    else:
        draft.problems += check_model(draft.spec.model)
    return draft.spec.model


def _device(draft: _Draft) -> str:
    """Return the device of this process; of several, each has that of its number."""
    found = parallel.device_problems(draft.spec, draft.machine, draft.processes)
    draft.problems += found
    wanted = draft.spec.device
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


def _quantizer(draft: _Draft, backend: Backend | None, model: str) -> tuple[Quantizer | None, bool]:
    """Return the quantizer, and whether the checkpoint was quantized by it already."""
    if backend is None:
        return None, False
    draft.problems += missing_requirements(backend)
    found = quantization_of(model)
    if found is None:
        return _fresh_quantizer(draft, backend), False
    adopted = backend.quantizer.from_checkpoint(found)
    if adopted is None:
        draft.problems.append(_wrong_checkpoint(draft, backend, found))
        return None, True
    given = draft.spec.backend.options
    differing = {k: v for k, v in given.items() if getattr(adopted, k, None) != v}
    for name, value in differing.items():
        what = f"the checkpoint is quantized already, with {name}={getattr(adopted, name, None)!r}"
        fix = f"leave out {name}={value!r}, or start from the unquantized model"
        draft.problems.append(Problem(what, fix, where=f"backend.{name}"))
    draft.notes.append(f"the checkpoint is quantized already ({backend.name}); loaded as it is")
    return adopted, True


def _wrong_checkpoint(draft: _Draft, backend: Backend, found: Mapping[str, Any]) -> Problem:
    makers = [
        other.name
        for other in draft.registry.backends()
        if other.quantizer.from_checkpoint(found) is not None
    ]
    method = found.get("quant_method", "an unknown method")
    what = f"the checkpoint is quantized with {method}, backend {backend.name!r} cannot read it"
    fix = f"use --backend {makers[0]}" if makers else "start from the unquantized model"
    return Problem(what, fix, where="model")


def _fresh_quantizer(draft: _Draft, backend: Backend) -> Quantizer | None:
    try:
        return backend.quantizer(**draft.spec.backend.options)
    except ValidationError as error:
        draft.problems += [_option_problem(backend, dict(d)) for d in error.errors()]
        return None


def _option_problem(backend: Backend, detail: dict[str, Any]) -> Problem:
    name = ".".join(str(part) for part in detail["loc"])
    where = f"backend.{name}"
    if detail["type"] == "extra_forbidden":
        hint = did_you_mean(name, backend.quantizer.model_fields)
        what = f"backend {backend.name!r} has no option {name!r}"
        return Problem(what, hint or "it has no options", where)
    if detail["type"] == "literal_error":
        what = f"{detail['input']!r} is not possible"
        return Problem(what, f"use one of {detail['ctx']['expected']}", where)
    return Problem(f"{detail['msg']}, got {detail['input']!r}", where=where)


def _adapter_options(draft: _Draft, adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    draft.problems += missing_requirements(adapter)
    given = draft.spec.adapter.options
    known = peft_options(adapter.peft_type)
    for name, value in given.items():
        where = f"adapter.{name}"
        if name not in known:
            what = f"adapter {adapter.name!r} has no option {name!r}"
            draft.problems.append(Problem(what, did_you_mean(name, known), where))
        elif not known[name].accepts(value):
            what = f"{value!r} is not of type {known[name].annotation}"
            default = adapter.defaults.get(name, known[name].default)
            draft.problems.append(Problem(what, f"default: {default}", where))
        elif name in ("r", "init_r", "target_r") and isinstance(value, int) and value < 1:
            draft.problems.append(Problem(f"{value} is no rank", "use 1 or more", where))
    return {**adapter.defaults, **given}


def _dtype(draft: _Draft, backend: Backend | None, device: str) -> str:
    wanted = draft.spec.dtype
    dtype = draft.machine.default_dtype(device) if wanted == "auto" else wanted
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


def _check_data(draft: _Draft) -> None:
    for key in ("path", "eval_path", "calibration_path"):
        path = getattr(draft.spec.data, key)
        if path and is_local_path(path) and not Path(path).exists():
            fix = "check the path; a hub id has the form owner/name"
            draft.problems.append(Problem(f"{path} does not exist", fix, where=f"data.{key}"))


def _check_training(draft: _Draft, device: str) -> None:
    train = draft.spec.train
    draft.problems += missing_for_optimizer(train.optim)
    if train.gradient_checkpointing is not None and train.memory != "auto":
        what = "memory and gradient_checkpointing both say which layers are computed again"
        fix = "leave one of them out"
        draft.problems.append(Problem(what, fix, where="train.gradient_checkpointing"))
    if isinstance(train.memory, float) and not device.startswith("cuda"):
        draft.notes.append("train.memory limits the memory of a GPU; this run has none")


def _check_output(draft: _Draft) -> None:
    spec = draft.spec
    inputs = spec.inputs
    try:
        RunFolder.check(
            spec.output or "", overwrite=spec.overwrite, resume=spec.train.resume, inputs=inputs
        )
    except OutputError as error:
        draft.problems += [replace(p, where=f"output {p.where}") for p in error.problems]


def _memory(
    draft: _Draft,
    model: str,
    quantizer: Quantizer,
    cell: Cell,
    adapter: Adapter,
    adopt: bool,
    cards: Sequence[float],
) -> MemoryPlan | None:
    """Predict memory, for the cards that were asked about or the one that the run would use."""
    spec, kind = draft.spec, parallel.parallel_for(draft.spec.train, draft.processes)
    on_gpu = cell.device == "cuda" or spec.dtype != "auto"
    made = memory_plan(
        spec,
        config_of(model) or {},
        quantizer,
        adapter,
        cell.adapter_options,
        dtype=cell.dtype if on_gpu else "bfloat16",
        shards=draft.processes if kind == "fsdp" else 1,
    )
    if made is None:
        if cards:
            what = "memory cannot be predicted for this model with this backend"
            fix = "decoders with Llama's sizes can, if the backend tells its bits per weight"
            draft.problems.append(Problem(what, fix, where="--card"))
        return None
    if spec.train.use_liger_kernel and not made.work.fused_kernels and cell.device == "cuda":
        draft.notes.append("more memory and time are needed without liger-kernel: install it")
    if cards:
        made = made.with_cards([card * GIB for card in cards])
        if not any(card.fits for card in made.cards):
            draft.problems += [made.problem(card) for card in made.cards]
    elif cell.device == "cuda" and draft.machine.memory:
        index = spec.device.partition(":")[2]
        made = made.with_cards([draft.machine.memory[int(index or 0)]])
        measures_dense = spec.evaluate.unquantized and not adopt and kind != "fsdp"
        draft.problems += made.problems(measures_dense)
        draft.notes += made.notes(spec.evaluate.batch_size)
    return made


def _merge(
    draft: _Draft, cell: Cell, backend: Backend, adapter: Adapter
) -> tuple[MergePlan, tuple[Problem, ...]]:
    choice = draft.spec.export.merge
    if choice == "never":
        return "never", ()
    wanted: Literal["dense", "requantize"] = "requantize" if choice == "requantize" else "dense"
    refused = tuple(merge_refusals(cell, backend, adapter, wanted))
    return ("never" if refused else wanted), refused
