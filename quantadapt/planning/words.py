"""What a plan comes to, in words: for terminals and pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..folders.metrics import many
from ..records import as_call
from ..spec import TrainSpec
from .planned import Plan
from .share import remark

if TYPE_CHECKING:
    from ..data.report import DataReport


def plan_rows(plan: Plan, data: DataReport | None) -> list[tuple[str, str]]:
    """Return the plan as pairs of a name and what it comes to.

    Args:
        data: formats and rows of the data, where they are at hand.
    """
    spec, train = plan.spec, plan.spec.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    batch *= plan.processes // train.context_parallel_size
    steps = f"{steps_words(train)}, {many(batch, 'example')} in a step"
    backend = _options(plan.backend.name, plan.quantizer.model_dump())
    return [
        ("model", model_name(plan)),
        ("backend", f"{backend}, as the checkpoint has it" if plan.adopt else backend),
        ("adapter", _options(plan.adapter.name, plan.adapter_options)),
        ("objective", _options(plan.objective.name, plan.task.model_dump())),
        ("device", f"{device_words(plan)}, computing in {_dtype_words(plan)}"),
        (
            "data",
            "\n".join(data.words()) if data else ", ".join(spec.data.named) or "the bundled demo's",
        ),
        ("train", f"{steps}, learning rate {train.learning_rate:g}{_schedule_words(train)}"),
        ("output", str(spec.output)),
        ("export", export_words(plan)),
        *([("quantized", plan.share.amount)] if plan.share else []),
        *([("memory", "\n".join(plan.memory.words()))] if plan.memory else []),
    ]


def plan_remarks(plan: Plan) -> list[str]:
    """Return what else is to be known: exports that are refused, with the way out, and notes."""
    refused = [f"no {export.name}: {p}" for export in plan.exports for p in export.refusals]
    return [*refused, *map(remark, plan.notes)]


def _options(name: str, options: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name} ({given})" if given else name


def _schedule_words(train: TrainSpec) -> str:
    """Return the schedule where it was given options."""
    options = train.lr_scheduler_kwargs
    return f", {as_call(train.lr_scheduler_type, options)}" if options else ""


def steps_words(train: TrainSpec) -> str:
    """Say how long the training is."""
    if train.max_steps > 0:
        return many(train.max_steps, "step")
    return "1 epoch" if train.num_train_epochs == 1 else f"{train.num_train_epochs:g} epochs"


def model_name(plan: Plan) -> str:
    """Return the model as the user named it."""
    return plan.spec.model or "the bundled demo"


def device_words(plan: Plan) -> str:
    """Say on what the plan works."""
    if plan.processes == 1:
        return plan.device
    how, share = str(plan.parallel), plan.spec.train.context_parallel_size
    if share > 1:
        how += f", {share} share a row"
    return f"{plan.processes} x {plan.device.partition(':')[0]} ({how})"


def _dtype_words(plan: Plan) -> str:
    products = ", products with the base in fp8" if plan.spec.train.compute == "fp8" else ""
    return f"{plan.dtype}{products}"


def export_words(plan: Plan) -> str:
    """Say what will be written."""
    return ", ".join(export.words for export in plan.exports)
