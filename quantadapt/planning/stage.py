"""`plan(spec)`: decide everything and find every mistake before any work starts.

Pure but for looking at the local files that the spec names: it downloads nothing and imports
neither torch nor a vendor. All problems are collected and raised once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from .. import demo
from ..distributed.world import world
from ..errors import MergeRefused, PlanRefused, Problem
from ..inputs.fingerprints import fingerprint_of
from ..machine import Machine, this_machine
from ..protocols import Evaluator, Quantizer, Task
from ..records import Adapter, Backend
from ..registry.blame import blaming_plugins
from ..registry.discovery import Registry, registry
from ..remote_code import as_the_spec_says
from ..spec import Spec
from .combining import cell_problems, combined
from .exports import exports_of, refused_where
from .live import config_of_module, quantizer_of_module, refuse_unused
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
    evaluators_of,
    model_of,
    quantizer_of,
    record_of,
    task_of,
)
from .planned import Plan

if TYPE_CHECKING:
    from torch import nn


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
    draft.problems += cell_problems(made)
    if draft.problems:
        raise PlanRefused(draft.problems)
    return made


def _settled(draft: Draft, made: Plan) -> Plan:
    """Return `made` with what its parts come to together. Raises what speaks against it."""
    made = combined(draft, made)
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
