"""`plan(spec)`: decide everything and find every mistake before any work starts.

Pure but for looking at the local files that the spec names: it downloads nothing and imports
neither torch nor a vendor. All problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .. import demo
from ..capabilities import Cell
from ..distributed.world import world
from ..errors import MergeRefused, PlanRefused, Problem
from ..machine import Machine, this_machine
from ..memory.workload import GIB
from ..protocols import Quantizer, Task
from ..records import Adapter, Backend, Objective
from ..registry.discovery import Registry, registry
from ..spec import MergeChoice, Spec
from . import processes
from .memory import MemoryPlan, memory_plan
from .on_disk import config_of
from .parts import (
    Draft,
    adapter_options,
    check_data,
    check_folder,
    check_resumed,
    check_training,
    device_of,
    dtype_of,
    model_of,
    quantizer_of,
    record_of,
    task_of,
)
from .processes import Parallel
from .refusals import (
    attach_refusals,
    loftq_problems,
    make_cell,
    merge_refusals,
    refusals_beside,
    task_problems,
)

MergePlan = Literal["dense", "requantize", "never"]


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        spec: the spec with every default resolved.
        model: checkpoint folder or hub id.
        objective, task: what is learnt, and its options.
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
    objective: Objective
    task: Task
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
            "objective": {"name": self.objective.name, "options": self.task.model_dump()},
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
        cards: sizes in GiB of GPUs to plan for; they need not be in this machine.
        weights: whether a local model has to have its weights; a prediction needs the config alone.
    """
    spec = _with_demo_defaults(spec)
    count = world().size if processes is None else processes
    draft = Draft(spec, machine or this_machine(), registry_ or registry(), count, tuple(cards))
    model = model_of(draft, weights)
    device = device_of(draft)
    backend = record_of(draft, Backend, spec.backend)
    adapter = record_of(draft, Adapter, spec.adapter)
    quantizer, adopt = quantizer_of(draft, backend, model)
    options = adapter_options(draft, adapter)
    objective, task = task_of(draft)
    dtype = dtype_of(draft, backend, device)
    check_data(draft)
    check_training(draft, device)
    if check_output:
        check_folder(draft)
        check_resumed(draft, quantizer, options, task)
    if not (backend and adapter and quantizer and objective and task):
        raise PlanRefused(draft.problems)
    made = _combined(
        draft,
        Plan(
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
            processes=count,
        ),
        trains=check_output or bool(cards),
    )
    forbidden = made.merge_refusals if spec.export.merge != "auto" else ()
    if draft.problems:
        raise PlanRefused([*draft.problems, *forbidden])
    if forbidden:
        raise MergeRefused(forbidden)
    return replace(made, notes=tuple(draft.notes))


def task_for(spec: Spec) -> Task:
    """Return the options of the spec's objective. Raises PlanRefused with every problem at once."""
    draft = Draft(spec, this_machine(), registry())
    _, found = task_of(draft)
    if found is None or draft.problems:
        raise PlanRefused(draft.problems)
    return found


def _combined(draft: Draft, made: Plan, *, trains: bool) -> Plan:
    """Return `made` with what its parts come to together: rules, merge, processes and memory.

    Args:
        trains: whether the plan is for training, so that its memory matters.
    """
    spec, cell, backend, adapter = made.spec, made.cell, made.backend, made.adapter
    draft.problems += attach_refusals(cell, backend, adapter)
    draft.problems += loftq_problems(made.adapter_options, backend, has_original=not made.adopt)
    draft.problems += refusals_beside(cell, made.objective, made.task.model_dump())
    draft.problems += task_problems(
        made.task, spec.train, adds_to_loss=adapter.peft_type == "ADALORA"
    )
    draft.notes += made.quantizer.notes(made.device)
    merge, refused = _merge(spec.export.merge, cell, backend, adapter)
    unshared = processes.share_problems(cell, backend, adapter, made.model, spec.export.merge)
    memory = _memory(draft, made, unshared)
    kind, why = processes.choose(spec, made.processes, memory)
    draft.notes += why
    if kind == "fsdp":
        memory = memory and memory.shared_by(made.processes)
        draft.problems += processes.shard_problems(cell, backend, adapter, made.model)
        draft.notes += processes.shard_notes(spec)
        merge, refused = "never", processes.merge_problems(spec.export.merge)
    whole = merge == "dense" or (merge == "requantize" and backend.calibration)
    if whole and memory and (problem := memory.merge_problem()):
        merge, refused = "never", (problem,)
    if not trains:
        memory = None
    elif memory is not None:
        _look_at_memory(draft, memory, adopt=made.adopt)
    return replace(made, merge=merge, merge_refusals=refused, parallel=kind, memory=memory)


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


def _memory(draft: Draft, made: Plan, unshared: Sequence[Problem]) -> MemoryPlan | None:
    """Predict what a GPU with the whole base needs, for the cards that were asked about or the
    smallest that the run would use."""
    on_gpu = made.cell.device == "cuda"
    memory = memory_plan(
        made.spec,
        config_of(made.model) or {},
        made.quantizer,
        made.adapter,
        made.adapter_options,
        made.task,
        dtype=made.dtype if on_gpu or made.spec.dtype != "auto" else "bfloat16",
        unshared=unshared,
    )
    if memory is None:
        if draft.cards:
            what = "memory cannot be predicted for this model with this backend"
            fix = "decoders with Llama's sizes can, if the backend tells its bits per weight"
            draft.problems.append(Problem(what, fix, where="--card"))
        return None
    if draft.cards:
        return memory.with_cards([card * GIB for card in draft.cards])
    used = _used_cards(draft, made.device) if on_gpu else ()
    return memory.with_cards([min(used)]) if used else memory


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
        draft.notes += memory.notes(spec.evaluate.batch_size)


def _merge(
    choice: MergeChoice, cell: Cell, backend: Backend, adapter: Adapter
) -> tuple[MergePlan, tuple[Problem, ...]]:
    if choice == "never":
        return "never", ()
    wanted: Literal["dense", "requantize"] = "requantize" if choice == "requantize" else "dense"
    refused = tuple(merge_refusals(cell, backend, adapter, wanted))
    return ("never" if refused else wanted), refused
