"""What a run will do: a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..capabilities import Cell
from ..errors import Problem
from ..inputs.fingerprints import Fingerprint
from ..machine import Machine, this_machine
from ..protocols import Evaluator, Quantizer, Task
from ..records import Adapter, Backend, Objective, as_call
from ..spec import Spec
from .exports import MERGES, PlannedExport
from .memory import MemoryPlan
from .parts import evaluation_of
from .processes import Parallel
from .refusals import make_cell
from .share import Share
from .streaming import Stream

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
