"""`plan(spec)`: decide everything and find every mistake before any work starts.

Pure but for looking at the local files that the spec names: it downloads nothing and imports
neither torch nor a vendor. All problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import demo, loftq, parallel
from .capabilities import KEEP, Cell, Merge, refusals
from .checkpoint import config_of, quantization_of
from .distributed import world
from .drafting import (
    Draft,
    adapter_options,
    check_data,
    check_folder,
    check_training,
    device_of,
    dtype_of,
    model_of,
    quantizer_of,
)
from .errors import MergeRefused, PlanRefused, Problem
from .machine import Machine, this_machine
from .memory import GIB
from .memory_plan import MemoryPlan, memory_plan
from .parallel import Parallel
from .protocols import Quantizer
from .records import Adapter, Backend
from .registry import Registry, registry
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
    draft = Draft(spec, machine or this_machine(), registry_ or registry(), count)
    model = model_of(draft, weights)
    device = device_of(draft, elsewhere=bool(cards))
    backend: Backend | None = draft.lookup("backend", spec.backend.name)
    adapter: Adapter | None = draft.lookup("adapter", spec.adapter.name)
    quantizer, adopt = quantizer_of(draft, backend, model)
    options = adapter_options(draft, adapter)
    dtype = dtype_of(draft, backend, device)
    check_data(draft)
    check_training(draft, device)
    if check_output:
        check_folder(draft)
    kind: Parallel = "none"
    merge: MergePlan = "never"
    refused: tuple[Problem, ...] = ()
    memory: MemoryPlan | None = None
    if backend and adapter and quantizer:
        cell = make_cell(backend, quantizer, adapter, options, device, dtype)
        draft.problems += attach_refusals(cell, backend, adapter)
        draft.problems += loftq.problems(options, backend, has_original=not adopt)
        draft.notes += quantizer.notes(device)
        merge, refused = _merge(draft, cell, backend, adapter)
        unshared = parallel.share_problems(cell, backend, adapter, model, spec.export.merge)
        memory = _memory(draft, model, quantizer, cell, adapter, cards, unshared)
        kind, why = parallel.choose(spec, count, memory)
        draft.notes += why
        if kind == "fsdp":
            memory = memory and memory.shared_by(count)
            draft.problems += parallel.shard_problems(cell, backend, adapter, model)
            draft.notes += parallel.shard_notes(spec)
            merge, refused = "never", parallel.merge_problems(spec.export.merge)
        if not check_output and not cards:
            memory = None  # nothing is trained here
        elif memory is not None:
            _look_at_memory(draft, memory, asked=bool(cards), adopt=adopt)
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
        parallel=kind,
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


def _memory(
    draft: Draft,
    model: str,
    quantizer: Quantizer,
    cell: Cell,
    adapter: Adapter,
    cards: Sequence[float],
    unshared: Sequence[Problem],
) -> MemoryPlan | None:
    """Predict what a GPU with the whole base needs, for the cards that were asked about or the
    smallest that the run would use."""
    spec, on_gpu = draft.spec, cell.device == "cuda"
    made = memory_plan(
        spec,
        config_of(model) or {},
        quantizer,
        adapter,
        cell.adapter_options,
        dtype=cell.dtype if on_gpu or spec.dtype != "auto" else "bfloat16",
        unshared=unshared,
    )
    if made is None:
        if cards:
            what = "memory cannot be predicted for this model with this backend"
            fix = "decoders with Llama's sizes can, if the backend tells its bits per weight"
            draft.problems.append(Problem(what, fix, where="--card"))
        return None
    if cards:
        return made.with_cards([card * GIB for card in cards])
    there = draft.machine.memory
    if not on_gpu or not there:
        return made
    index = int(spec.device.partition(":")[2] or 0)
    used = there[: draft.processes] if draft.processes > 1 else there[index : index + 1]
    return made.with_cards([min(used)])


def _look_at_memory(draft: Draft, memory: MemoryPlan, *, asked: bool, adopt: bool) -> None:
    """Refuse a run that cannot fit, and note what else a user may want to know.

    Args:
        asked: whether the cards are some that were asked about, not this machine's.
        adopt: whether the base is quantized already.
    """
    spec = draft.spec
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
    draft: Draft, cell: Cell, backend: Backend, adapter: Adapter
) -> tuple[MergePlan, tuple[Problem, ...]]:
    choice = draft.spec.export.merge
    if choice == "never":
        return "never", ()
    wanted: Literal["dense", "requantize"] = "requantize" if choice == "requantize" else "dense"
    refused = tuple(merge_refusals(cell, backend, adapter, wanted))
    return ("never" if refused else wanted), refused
