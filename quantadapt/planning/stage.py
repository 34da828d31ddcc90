"""`plan(spec)`: decide everything and find every mistake before any work starts.

Pure but for looking at the local files that the spec names: it downloads nothing and imports
neither torch nor a vendor. All problems are collected and raised once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .. import demo
from ..capabilities import Cell, Merge
from ..distributed.world import world
from ..errors import MergeRefused, PlanRefused, Problem
from ..inputs.fingerprints import Fingerprint, fingerprint_of
from ..inputs.model_config import text_config, towers_in
from ..machine import Machine, this_machine
from ..memory.cards import GIB
from ..memory.towers import tower_weights
from ..protocols import Evaluator, Quantizer, Task
from ..records import Adapter, Backend, Evaluation, Objective, as_call
from ..registry.blame import blaming_plugins
from ..registry.discovery import Registry, registry
from ..remote_code import as_the_spec_says
from ..spec import Spec
from . import processes, streaming
from .context_parallel import context_problems
from .exports import MERGES, PlannedExport, exports_of, makes_dense, refused_where
from .layers import layers_of
from .live import config_of_module, quantizer_of_module, refuse_unused
from .memory import MemoryPlan
from .names import is_all_linear
from .on_disk import config_of, quantization_of
from .parts import (
    Draft,
    adapter_options,
    check_data,
    check_folder,
    check_resumed,
    check_task,
    check_training,
    device_of,
    dtype_of,
    evaluation_of,
    evaluators_of,
    model_of,
    quantizer_of,
    record_of,
    task_of,
)
from .processes import NO_MERGE, Parallel
from .refusals import (
    attach_refusals,
    data_start_problems,
    export_refusals,
    float8_problems,
    head_problems,
    invocation_problems,
    loftq_problems,
    make_cell,
    merge_aware_problems,
    misfit_problems,
    named_problems,
    packing_problems,
    refusals_beside,
    task_problems,
)
from .share import Share, share_on_disk, tower_sizes, towers_words
from .streaming import Stream
from .workload import memory_plan

if TYPE_CHECKING:
    from torch import nn

MergePlan = Literal["dense", "requantize", "never"]


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will do.

    Attributes:
        spec: the spec with every default resolved.
        model: checkpoint folder or hub id; empty for a live module.
        objective, task: what is learnt, and its options.
        adopt: the model is quantized already and is taken as it is.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: torch's name of the compute dtype.
        evaluators: what measures the models, by the names of the evaluations.
        exports: what will be written at the end, the adapter first, or why not.
        notes: decisions that a user may want to know of.
        processes: how many work on it, one device each.
        parallel: "ddp" or "fsdp" if there are several, else "none".
        stream: what of the base lies in CPU memory, and comes to the GPU block by block.
        memory: what training needs on a GPU; None where that cannot be predicted.
        share: how much of the model will be quantized; None where that is not known before it is.
        fingerprint: what a local base is known by; None of a live module, and before a download.
        config: the model's config.json; None where it is not here yet, as before the first download
            of a hub id. `completed` adds what it tells.
        machine: the devices that it was made for.
        trains: whether it is for a run that trains, so that its memory matters.
    """

    spec: Spec
    model: str
    backend: Backend
    quantizer: Quantizer
    adapter: Adapter
    adapter_options: Mapping[str, Any]
    objective: Objective
    task: Task
    device: str
    dtype: str
    adopt: bool = False
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)
    exports: tuple[PlannedExport, ...] = ()
    notes: tuple[str, ...] = ()
    processes: int = 1
    parallel: Parallel = "none"
    stream: Stream = "none"
    memory: MemoryPlan | None = None
    share: Share | None = None
    fingerprint: Fingerprint | None = field(default=None, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    machine: Machine = field(default_factory=this_machine, repr=False)
    trains: bool = False

    def __repr__(self) -> str:
        quantizer = as_call(self.backend.name, self.quantizer.model_dump())
        adapter = as_call(self.adapter.name, self.adapter_options)
        written = ", ".join(export.words for export in self.exports)
        device = self.device if self.processes == 1 else f"{self.processes} x {self.device}"
        return (
            f"<Plan {adapter} on {quantizer}, model {self.model or 'a live module'!r}, on {device}"
            f" in {self.dtype}; output {self.spec.output!r}: {written}>"
        )

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
            model=self.model,
            fingerprint=self.fingerprint,
        )

    @property
    def merge(self) -> MergePlan:
        """What `export.merge` comes to."""
        written = [export.name for export in self.exports if not export.refusals]
        return next((kind for kind, name in MERGES.items() if name in written), "never")

    @property
    def merge_refusals(self) -> tuple[Problem, ...]:
        """Why `auto` became `never`, if it did."""
        merges = [export for export in self.exports if export.name in MERGES.values()]
        return tuple(problem for export in merges for problem in export.refusals)

    @property
    def resolved(self) -> Spec:
        """The spec with all options as they were resolved, so that it plans the same again, also
        where other defaults have come."""
        named = {
            "backend": (self.backend.name, self.quantizer.model_dump(mode="json")),
            "adapter": (self.adapter.name, dict(self.adapter_options)),
            "objective": (self.objective.name, self.task.model_dump(mode="json")),
        }
        evaluations = [{"name": n, **e.model_dump(mode="json")} for n, e in self.evaluators.items()]
        values = self.spec.model_dump()
        values |= {kind: {"name": name, **options} for kind, (name, options) in named.items()}
        values["evaluate"] |= {"evaluations": evaluations, "tasks": []}
        return Spec(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint and self.fingerprint.model_dump(),
            "backend": {"name": self.backend.name, "options": self.quantizer.model_dump()},
            "adapter": {"name": self.adapter.name, "options": dict(self.adapter_options)},
            "objective": {"name": self.objective.name, "options": self.task.model_dump()},
            "device": self.device,
            "dtype": self.dtype,
            "adopt": self.adopt,
            "evaluations": [
                {"name": evaluation_of(name), "options": evaluator.model_dump()}
                for name, evaluator in self.evaluators.items()
            ],
            "merge": self.merge,
            "merge_refusals": [vars(problem) for problem in self.merge_refusals],
            "exports": [export.to_dict() for export in self.exports],
            "processes": self.processes,
            "parallel": self.parallel,
            "stream": self.stream,
            "memory": self.memory.to_dict() if self.memory else None,
            "share": self.share.fraction if self.share else None,
            "notes": list(self.notes),
        }


@as_the_spec_says
@blaming_plugins
def plan(
    spec: Spec,
    *,
    module: nn.Module | None = None,
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
        module: a live module to plan for, instead of the spec's model.
        machine: the devices to plan for; this machine's by default.
        registry_: the plugins to choose from; those installed by default.
        check_output: whether a run folder will be made, so that it has to be free.
        processes: how many are to work on it; by default as many as were launched.
        cards: sizes in GiB of GPUs to plan for; they need not be in this machine.
        weights: whether a local model has to have its weights; a prediction needs the config alone.
    """
    spec = _with_defaults(spec, demo_run=module is None)
    count = world().size if processes is None else processes
    draft = Draft(spec, machine or this_machine(), registry_ or registry(), count, tuple(cards))
    backend = record_of(draft, Backend, spec.backend)
    adapter = record_of(draft, Adapter, spec.adapter)
    if module is None:
        model = model_of(draft, weights)
        config = config_of(model)
        quantizer, adopt = quantizer_of(draft, backend, config or {})
    else:
        model, config = "", config_of_module(module)
        refuse_unused(draft)
        quantizer, adopt = quantizer_of_module(draft, backend, module)
    fingerprint = fingerprint_of(model)
    device = device_of(draft)
    options = adapter_options(draft, adapter)
    objective, task = task_of(draft)
    evaluators = evaluators_of(draft, objective, task)
    exports = exports_of(draft)
    dtype = dtype_of(draft, backend, device)
    check_data(draft)
    check_task(draft, task)
    check_training(draft, device)
    if check_output:
        check_folder(draft)
        check_resumed(draft, quantizer, options, task, fingerprint)
        spec = draft.spec
    if not (backend and adapter and quantizer and objective and task):
        raise PlanRefused(draft.problems)
    made = Plan(
        spec=spec,
        model=model,
        backend=backend,
        quantizer=quantizer,
        adapter=adapter,
        adapter_options=options,
        objective=objective,
        task=task,
        device=device,
        dtype=dtype,
        adopt=adopt,
        evaluators=evaluators,
        exports=exports,
        processes=count,
        fingerprint=fingerprint,
        config=config,
        machine=draft.machine,
        trains=check_output or bool(cards),
    )
    return _settled(draft, made)


def completed(made: Plan, config: Mapping[str, Any]) -> Plan:
    """Return a plan with what the model's config tells, where that came only after the plan was
    made: whether the checkpoint is quantized already, the memory, how processes share the base.

    Pure. A plan that has its config is returned as it is.

    Raises:
        PlanRefused: with every problem that shows only now.
    """
    if made.config is not None:
        return made
    outdated = made.quantizer.notes(made.device)
    draft = Draft(made.spec, made.machine, registry(), made.processes)
    draft.notes += [note for note in made.notes if note not in outdated]
    quantizer, adopt = quantizer_of(draft, made.backend, config)
    if quantizer is None:
        raise PlanRefused(draft.problems)
    return _settled(draft, replace(made, config=config, quantizer=quantizer, adopt=adopt))


class Base(Protocol):
    """A quantized model, as a plan for its adapter looks at it; a `ModelState` is one."""

    source: str
    backend: Backend
    quantizer: Quantizer
    device: str

    @property
    def dtype_name(self) -> str:
        """torch's name of the compute dtype."""
        ...


def plan_adapter(base: Base, spec: Spec) -> Plan:
    """Plan attaching the spec's adapter to a base that is quantized already; all else is as it is.

    Raises:
        PlanRefused: with every problem at once.
    """
    draft = Draft(spec, this_machine(), registry())
    adapter = record_of(draft, Adapter, spec.adapter)
    options = adapter_options(draft, adapter)
    objective, task = task_of(draft)
    if not (adapter and objective and task):
        raise PlanRefused(draft.problems)
    made = Plan(
        spec=spec,
        model=base.source,
        backend=base.backend,
        quantizer=base.quantizer,
        adapter=adapter,
        adapter_options=options,
        objective=objective,
        task=task,
        device=base.device,
        dtype=base.dtype_name,
        adopt=not base.source or quantization_of(base.source) is not None,
    )
    draft.problems += _cell_problems(made)
    if draft.problems:
        raise PlanRefused(draft.problems)
    return made


def _cell_problems(made: Plan) -> list[Problem]:
    """Return why this adapter cannot be put onto this base; empty if it can."""
    found = attach_refusals(made.cell, made.backend, made.adapter)
    return found + loftq_problems(made.adapter_options, made.backend, has_original=not made.adopt)


def _settled(draft: Draft, made: Plan) -> Plan:
    """Return `made` with what its parts come to together. Raises what speaks against it."""
    made = _combined(draft, made)
    _raise_refused(draft.problems, made)
    return replace(made, notes=tuple(dict.fromkeys(draft.notes)))


def without_merges(made: Plan, why: list[Problem]) -> Plan:
    """Return `made` without the exports that merge the adapter, where `why` holds anything that
    only the model tells. Raises MergeRefused where the spec asks for one."""
    if why:
        exports = refused_where(made.exports, lambda e: why if e.exporter.merges else [])
        made = replace(made, exports=exports)
        _raise_refused([], made)
    return made


def _raise_refused(problems: list[Problem], made: Plan) -> None:
    """Raise `problems`, and what speaks against an export that the spec asks for."""
    refused = [export for export in made.exports if export.required and export.refusals]
    forbidden = [problem for export in refused for problem in export.refusals]
    if problems or not all(export.exporter.merges for export in refused):
        raise PlanRefused([*problems, *forbidden])
    if forbidden:
        raise MergeRefused(forbidden)


def task_for(spec: Spec) -> Task:
    """Return the options of the spec's objective. Raises PlanRefused with every problem at once."""
    draft = Draft(spec, this_machine(), registry())
    _, found = task_of(draft)
    check_task(draft, found)
    if found is None or draft.problems:
        raise PlanRefused(draft.problems)
    return found


def evaluators(wanted: Sequence[Mapping[str, Any]]) -> dict[str, Evaluator]:
    """Return what measures, by the names of the evaluations.

    Args:
        wanted: a `name` each, and options.

    Raises:
        PlanRefused: one is not there, lacks a library, or has no such option.
    """
    spec = Spec(evaluate={"evaluations": list(wanted)})
    draft = Draft(spec, this_machine(), registry())
    found = evaluators_of(draft)
    if draft.problems:
        raise PlanRefused(draft.problems)
    return found


def _combined(draft: Draft, made: Plan) -> Plan:
    """Return `made` with rules, merge, processes and memory looked at."""
    spec, cell, backend, adapter = made.spec, made.cell, made.backend, made.adapter
    config = made.config or {}
    draft.problems += _cell_problems(made)
    draft.problems += data_start_problems(made.adapter_options)
    if spec.train.merge_aware:
        draft.problems += merge_aware_problems(cell, backend, made.quantizer, adapter)
        draft.notes.append(MERGE_AWARE)
    asked = bool(draft.cards)
    capability = _capability(draft, made.device)
    draft.problems += float8_problems(
        spec.train, "cuda" if asked else made.device, made.dtype, None if asked else capability
    )
    if spec.train.compute == "fp8":
        draft.notes.append(FLOAT8)
    draft.problems += refusals_beside(cell, made.objective, made.task.model_dump())
    draft.problems += task_problems(
        made.task, spec.train, adds_to_loss=adapter.peft_type == "ADALORA"
    )
    draft.problems += context_problems(
        *(spec.train, made.task, config, made.adapter_options),
        processes=made.processes,
        longest=spec.train.row_length or spec.data.max_length,
    )
    if made.trains:
        options = made.adapter_options
        draft.problems += invocation_problems(made.task, spec.train, config, options)
        draft.problems += head_problems(made.task, config)
        draft.problems += packing_problems(spec.train, config)
    _look_at_layers(draft, made)
    for name, evaluator in made.evaluators.items():
        record = draft.registry.record(Evaluation, evaluation_of(name))
        draft.problems += refusals_beside(cell, record, evaluator.model_dump())
    draft.notes += made.quantizer.notes(made.device)
    _look_at_towers(draft, made)
    share = _share(draft, made)
    if share is not None and share.is_low:
        draft.notes.append(share.words)
    exports = refused_where(
        made.exports, lambda e: export_refusals(e.record, e.exporter, cell, backend, adapter)
    )
    merges = any(export.required and export.exporter.merges for export in exports)
    through = processes.merge_aware_problems(spec.train)
    through += processes.task_share_problems(made.task)
    unshared = [*processes.share_problems(cell, backend, adapter, config, merges), *through]
    memory = _memory(draft, made, unshared)
    kind, why = processes.choose(spec, made.processes, memory)
    draft.notes += why
    if kind == "fsdp":
        memory = memory and memory.shared_by(made.processes)
        draft.problems += [
            *processes.shard_problems(cell, backend, adapter, config),
            *through,
        ]
        draft.notes += processes.shard_notes(spec)
        exports = refused_where(exports, lambda e: [NO_MERGE] if e.exporter.merges else [])
    stream, memory = _streamed(draft, made, kind, memory)
    if memory and (problem := memory.merge_problem()):
        aware = spec.train.merge_aware
        dense = [e.name for e in exports if makes_dense(e, backend, aware)]
        exports = refused_where(exports, lambda e: [problem] if e.name in dense else [])
    if memory and stream != "none" and (again := memory.requantize_problem()):
        exports = refused_where(
            exports, lambda e: [again] if e.exporter.merges == Merge.REQUANTIZE else []
        )
    if not made.trains:
        memory = None
    elif memory is not None:
        _look_at_memory(draft, memory, adopt=made.adopt)
    return replace(made, exports=exports, parallel=kind, stream=stream, memory=memory, share=share)


def _streamed(
    draft: Draft, made: Plan, parallel: Parallel, memory: MemoryPlan | None
) -> tuple[Stream, MemoryPlan | None]:
    """Return what of the base is streamed, and what memory is predicted then."""
    spec, host, adopt = made.spec, draft.machine.host, made.adopt
    on_gpu, asked = made.cell.device == "cuda", bool(draft.cards)
    wanted = spec.train.stream in ("experts", "all")
    stream = streaming.choose(spec, memory, parallel, on_gpu=on_gpu, asked=asked)
    if wanted and not on_gpu:
        draft.notes.append(streaming.NO_GPU)
    if wanted:
        draft.problems += streaming.unstreamed(made.adapter_options)
    if stream != "none" and memory is not None:
        memory = memory.streamed_as(stream)
    draft.problems += streaming.problems(
        *(spec, stream, memory, made.quantizer, None if asked else host),
        parallel=parallel,
        processes=made.processes,
        adopt=adopt,
    )
    draft.notes += streaming.notes(stream, spec, memory)
    return stream, memory


MERGE_AWARE = (
    "merge_aware: each pass also rounds every adapted weight onto the grid of its layer, which "
    "takes as long as dequantizing it several times, and is not recorded as a CUDA graph"
)


FLOAT8 = (
    "compute: fp8: while it trains, products with the base round its weights and what comes in to "
    "8-bit floats; adapters, the head, stacks of experts, every evaluation and what a reference "
    "says before stay in the compute dtype"
)


def _capability(draft: Draft, device: str) -> tuple[int, int] | None:
    """Return the compute capability of the GPU `device`, or None."""
    index, there = device.partition(":")[2] or "0", draft.machine.cuda
    return there[int(index)] if index.isdigit() and int(index) < len(there) else None


def _share(draft: Draft, made: Plan) -> Share | None:
    """Return how much of a local checkpoint will be quantized."""
    dense = made.backend.name == "none" or made.adopt
    if dense or draft.problems or not made.model:
        return None
    vocabulary = text_config(made.config or {}).get("vocab_size")
    skip, folder = tuple(made.spec.skip_modules or ()), Path(made.model).expanduser()
    experts, towers = made.quantizer.quantizes_experts, made.spec.towers
    return share_on_disk(folder, vocabulary, skip, experts=experts, towers=towers)


UNKNOWN_LAYERS = (
    "how the layers of this model are called is not known here: whether those that are named are"
    " there shows when a run begins, before any work"
)


def _look_at_layers(draft: Draft, made: Plan) -> None:
    """Refuse names that no layer has and sizes that cannot be quantized, as far as the checkpoint
    tells of them."""
    spec, config, options = made.spec, made.config, made.adapter_options
    if config is None or any(problem.where == "model" for problem in draft.problems):
        return
    skip, towers = tuple(spec.skip_modules or ()), towers_in(config)
    layers = layers_of(config, Path(made.model).expanduser() if made.model else None)
    if made.trains and layers is not None:
        draft.problems += named_problems(made.adapter, options, layers, skip)
    fresh = bool(made.model) and not (made.adopt or towers or spec.skip_misfits)
    if fresh and layers is not None:
        draft.problems += misfit_problems(made.quantizer, layers.without(skip))[0]
    names = not is_all_linear(options.get("target_modules"))
    if made.model and made.trains and names and not (layers and layers.names):
        draft.notes.append(UNKNOWN_LAYERS)


def _look_at_towers(draft: Draft, made: Plan) -> None:
    """Tell what of an image-text model stays as it is; refuse towers that a model has not."""
    config, chosen = made.config, made.spec.towers
    if config is None:
        return
    there = towers_in(config)
    if there and not made.adopt:
        sizes = tower_sizes(Path(made.model).expanduser()) if made.model else {}
        draft.notes.append(towers_words(there, chosen, sizes))
    if chosen != ["language"] and "vision" not in there:
        what = "the model has no towers to choose from: config.json has no vision_config"
        draft.problems.append(Problem(what, "leave towers out", where="towers"))
    elif made.adopt and chosen != ["language"]:
        what = "the model is quantized already: what of it is, is known from its files"
        draft.problems.append(Problem(what, "leave towers out", where="towers"))


def _with_defaults(spec: Spec, *, demo_run: bool) -> Spec:
    """Fill in where the user said nothing: the output, and in a run of the bundled demo what that
    wants to be trained with."""
    spec = spec.model_copy(deep=True)
    if demo_run and spec.model is None and not spec.data.named:
        others = {} if spec.objective.name == "sft" else demo.TRAIN_OTHERS
        for name, value in (demo.TRAIN_DEFAULTS | others).items():
            if name not in spec.train.model_fields_set:
                setattr(spec.train, name, value)
    if spec.output is None:
        spec.output = f"runs/{spec.backend.name}-{spec.adapter.name}"
    return spec


def _memory(draft: Draft, made: Plan, unshared: Sequence[Problem]) -> MemoryPlan | None:
    """Predict what a GPU with the whole base needs, for the cards that were asked about or the
    smallest that the run would use."""
    on_gpu = made.cell.device == "cuda"
    memory = memory_plan(
        made.spec,
        made.config or {},
        made.quantizer,
        made.adapter,
        made.adapter_options,
        made.task,
        dtype=made.dtype if on_gpu or made.spec.dtype != "auto" else "bfloat16",
        adopt=made.adopt,
        unshared=unshared,
        beside=_weights_beside(made),
        streamable=not streaming.unstreamed(made.adapter_options),
    )
    if memory is None:
        if draft.cards:
            what = "memory cannot be predicted for this model with this backend"
            fix = "decoders with Llama's sizes can, if the backend tells its bits per weight"
            draft.problems.append(Problem(what, fix, where="--card"))
        return None
    if memory.work.tower is not None:
        count = memory.work.tower.patches
        draft.notes.append(f"memory counts one picture of {count:,} patches for each example")
    if made.spec.train.stream == "auto" and made.processes == 1:
        host = math.inf if draft.cards else draft.machine.host
        streams = streaming.ways(memory.work, made.quantizer, host, adopt=made.adopt)
        memory = replace(memory, streams=streams)
    if draft.cards:
        return memory.with_cards([card * GIB for card in draft.cards])
    used = _used_cards(draft, made.device) if on_gpu else ()
    return memory.with_cards([min(used)]) if used else memory


def _weights_beside(made: Plan) -> int:
    """Return how many weights the towers of an image-text model have: by its files, or about."""
    config = made.config or {}
    if not towers_in(config):
        return 0
    sizes = tower_sizes(Path(made.model).expanduser()) if made.model else {}
    sizes.pop("language", None)
    return sum(sizes.values()) or tower_weights(config)


def _used_cards(draft: Draft, device: str) -> tuple[int, ...]:
    """Return the bytes of the GPUs that the run would use; none where they are not known."""
    there = draft.machine.memory
    if draft.processes > 1:
        return there[: draft.processes]
    index = device.partition(":")[2] or "0"
    return there[int(index) : int(index) + 1] if index.isdigit() else ()


def _look_at_memory(draft: Draft, memory: MemoryPlan, *, adopt: bool) -> None:
    """Refuse a run that cannot fit, and note what else a user may want to know.

    Args:
        adopt: whether the base is quantized already.
    """
    spec, asked = draft.spec, bool(draft.cards)
    on_gpu = bool(memory.cards) and not asked
    if spec.train.use_liger_kernel and not memory.work.fused_kernels and on_gpu:
        draft.notes.append("more memory and time are needed without liger-kernel: install it")
    if asked and not any(card.fits for card in memory.cards):
        draft.problems += [memory.problem(card) for card in memory.cards]
    elif on_gpu:
        measures_dense = spec.evaluate.unquantized and not adopt and memory.work.shards == 1
        draft.problems += memory.problems(measures_dense)
        draft.notes += memory.host_notes(draft.machine.host)
        draft.notes += memory.notes(spec.evaluate.batch_size)
