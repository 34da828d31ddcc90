"""Why a combination is refused: rules of backend and adapter, merges, LoftQ. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ..capabilities import KEEP, Cell, Merge, refusals
from ..errors import Problem
from ..inputs.fingerprints import Fingerprint
from ..protocols import AdapterTarget, Exporter, Quantizer, Task
from ..records import Adapter, Backend, Export, Record, kind_of
from ..spec import TrainSpec
from .on_disk import quantization_of

WAY_OUT = f"{KEEP}, or merge it onto the unquantized base (quantadapt merge RUN --onto BASE)"


def make_cell(
    backend: Backend,
    quantizer: Quantizer,
    adapter: Adapter,
    adapter_options: Mapping[str, Any],
    device: str,
    dtype: str,
    *,
    model: str = "",
    fingerprint: Fingerprint | None = None,
) -> Cell:
    """Return the facts about one combination."""
    return Cell(
        backend=backend.name,
        adapter=adapter.name,
        device=device.partition(":")[0],
        dtype=dtype,
        backend_options=quantizer.model_dump(),
        adapter_options=adapter_options,
        model=model,
        fingerprint=fingerprint,
    )


def attach_refusals(cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
    """Return why `cell` cannot be attached; empty means it can."""
    return refusals(cell, (*backend.rules, *adapter.rules))


def refusals_beside(
    cell: Cell, record: Record, options: Mapping[str, Any], action: str = "attach"
) -> list[Problem]:
    """Return why a record that is neither backend nor adapter forbids `action` with `cell`; its
    rules see its own name and options as well."""
    return refusals(cell.beside(kind_of(record), record.name, options), record.rules, action)


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


def export_refusals(
    record: Export, exporter: Exporter, cell: Cell, backend: Backend, adapter: Adapter
) -> list[Problem]:
    """Return why an export of `cell` is not written; empty if it is."""
    found = refusals_beside(cell, record, exporter.model_dump())
    if exporter.merges != Merge.NEVER:
        choice: Any = exporter.merges.name.lower()
        found += merge_refusals(cell, backend, adapter, choice)
    return [*found, *exporter.refusals(cell, backend, adapter)]


def task_problems(task: Task, train: TrainSpec, *, adds_to_loss: bool) -> list[Problem]:
    """Return why the options of an objective do not go with how it is to be trained.

    Args:
        adds_to_loss: whether the adapter adds something to the model's loss, as AdaLoRA does.
    """
    name, found = type(task).__name__, []
    if train.packing and not task.packs:
        what = f"{name} does not keep the examples of a row apart"
        found.append(Problem(what, "leave train.packing out", "train.packing", "task-packs"))
    if adds_to_loss and task.logits != "model":
        what = f"{name} has a loss of its own, without what AdaLoRA adds to the model's"
        fix = "use another adapter, e.g. lora, or objective: sft"
        found.append(Problem(what, fix, "objective", "task-loss-adalora"))
    if task.generates and train.validates != "no":
        what = f"{name} has no loss on held-out data, as it learns from answers of its own"
        fix = "leave train.eval_steps and train.eval_strategy out; evaluations measure rewards"
        found.append(Problem(what, fix, "train", "task-validation"))
    return found + task.misfits(train) + validation_problems(train)


def validation_problems(train: TrainSpec) -> list[Problem]:
    """Return which settings of validation while training have no effect, or contradict."""
    found, measure = [], "set train.eval_steps, or train.eval_strategy: epoch"
    wants = {
        "load_best_model_at_end": train.load_best_model_at_end,
        "early_stopping_patience": train.early_stopping_patience is not None,
        "early_stopping_threshold": train.early_stopping_threshold > 0,
    }
    for name in (name for name, wanted in wants.items() if wanted):
        if train.validates == "no":
            what = "nothing is measured on held-out data while training"
            found.append(Problem(what, measure, f"train.{name}"))
    if train.early_stopping_threshold > 0 and train.early_stopping_patience is None:
        what, fix = "it has no effect by itself", "set train.early_stopping_patience, too"
        found.append(Problem(what, fix, "train.early_stopping_threshold"))
    if train.eval_steps is not None and train.validates != "steps":
        what = f"it has no effect with eval_strategy: {train.validates}"
        found.append(Problem(what, "leave one of both out", "train.eval_steps"))
    return found


_FROM_DATA = ("eva", "corda", "lora_ga")
"""Starts of LoRA that PEFT computes from data, by a function that one calls oneself."""


def data_start_problems(options: Mapping[str, Any]) -> list[Problem]:
    """Return why a run cannot start the adapter as its options say; empty if it can."""
    start = options.get("init_lora_weights")
    if not isinstance(start, str) or start not in _FROM_DATA:
        return []
    what = f"{start} is computed from data by a function of PEFT's own, which a run does not call"
    fix = "use true, pissa or olora; or call PEFT's function in Python, stage by stage"
    return [Problem(what, fix, "adapter.init_lora_weights")]


def invocation_problems(
    task: Task, train: TrainSpec, config: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Problem]:
    """Return why an adapter that is off up to its invocation, aLoRA, is not trained so; empty if it
    is, or is none. PEFT looks for one invocation a row, in causal language models alone."""
    where, without = "adapter.alora_invocation_tokens", "leave it out: that is plain LoRA"
    if not options.get("alora_invocation_tokens"):
        return []
    found = []
    if not task.wants_lm or config.get("is_encoder_decoder"):
        what = "aLoRA is for models that predict the next token: with others PEFT never switches it"
        found.append(Problem(f"{what} on", without, where, "alora-causal"))
    if train.packing:
        what = "aLoRA looks for one invocation in a row, and packed rows hold several examples"
        found.append(Problem(what, "leave train.packing out", "train.packing", "alora-packing"))
    return found


def misfit_problems(
    quantizer: Quantizer, sizes: Mapping[str, tuple[int, int]]
) -> tuple[list[Problem], list[str]]:
    """Return why layers cannot be quantized, and which.

    Args:
        sizes: (in_features, out_features) by name; of a stack of experts those of the tall layer.

    Returns:
        A problem for each reason, which names the first layer and counts the others; and the names
        of all of them.
    """
    reasons: dict[str, list[str]] = {}
    for name, size in sizes.items():
        if why := quantizer.misfit(*size):
            reasons.setdefault(why, []).append(name)
    fix = "change the backend's options, or set skip_misfits: true to leave such layers dense"
    problems = []
    for why, names in reasons.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        problems.append(Problem(why, fix, where=f"{names[0]}{more}"))
    return problems, [name for names in reasons.values() for name in names]


def merge_aware_problems(
    cell: Cell, backend: Backend, quantizer: Quantizer, adapter: Adapter
) -> list[Problem]:
    """Return why this combination is not trained through the quantizer; empty if it is."""
    where, without = "train.merge_aware", "leave train.merge_aware out"
    found = []
    if type(quantizer.target).grid is AdapterTarget.grid:
        what = f"it is not known what values the scales of {backend.name} allow"
        fix = f"{without}, or use another backend, e.g. hqq or bnb-nf4"
        found.append(Problem(what, fix, where, "merge-aware-grid"))
    else:
        found += merge_refusals(cell, backend, adapter, "requantize")
    return found


FLOAT8_FROM = (9, 0)
"""The compute capability from which on cards multiply 8-bit floats row by row: Hopper's."""


def float8_problems(
    train: TrainSpec, device: str, dtype: str, capability: tuple[int, int] | None
) -> list[Problem]:
    """Return why products with the base are not computed in 8-bit floats; empty if they are, or
    are not to be.

    Args:
        dtype: torch's name of the compute dtype.
        capability: of the card; None where that is not known.
    """
    where, without = "train.compute", "leave train.compute out"
    if train.compute != "fp8":
        return []
    found = []
    if not device.startswith("cuda"):
        what = "8-bit floats are multiplied by GPUs from Hopper on, and this run has none"
        found.append(Problem(what, f"{without}, or use such a GPU", where, "fp8-gpu"))
    elif capability is not None and capability < FLOAT8_FROM:
        name = f"{capability[0]}.{capability[1]}"
        what = f"a GPU of compute capability {name} has no row-wise products of 8-bit floats"
        fix = f"{without}, or use one of {FLOAT8_FROM[0]}.0 or newer (Hopper)"
        found.append(Problem(what, fix, where, "fp8-gpu"))
    if device.startswith("cuda") and dtype != "bfloat16":
        what = f"products of 8-bit floats give bfloat16, and the compute dtype is {dtype}"
        found.append(Problem(what, f"use dtype: bfloat16, or {without}", where, "fp8-dtype"))
    if train.merge_aware:
        what = "with train.merge_aware products are of the very weights that a merge keeps"
        found.append(Problem(what, f"{without}, or train.merge_aware", where, "fp8-merge-aware"))
    return found


_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM"
    r"|NextSentencePrediction|PreTraining)$|(?<!LMHead)(?<!DoubleHeads)Model$"
)
"""How transformers' classes end that do not predict the next token."""


def head_problems(task: Task, config: Mapping[str, Any]) -> list[Problem]:
    """Return why the objective cannot learn from a model with this config, or of the class that it
    names."""
    name = other_head(config)
    if not task.wants_lm or not name:
        return task.refusals(config)
    what = f"{type(task).__name__} learns to predict tokens, and the model is a {name}"
    fix = "train it from Python (quantize, attach, a Trainer of yours), or use an objective for it"
    return [Problem(what, fix, "objective", "task-head")]


def packing_problems(train: TrainSpec, config: Mapping[str, Any]) -> list[Problem]:
    """Return why a model with this config does not learn from packed rows; empty if it may."""
    if not train.packing or not config.get("is_encoder_decoder"):
        return []
    what = "packing is for causal models, this is an encoder-decoder model"
    return [Problem(what, "leave train.packing out", "train.packing", "packing-causal")]


def other_head(config: Mapping[str, Any]) -> str:
    """Return the class that config.json names where that does not predict the next token."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and _OTHER_HEADS.search(name) else ""


LOFTQ = "loftq"


def wants_loftq(options: Mapping[str, Any]) -> bool:
    """Say whether the adapter's options ask for LoftQ."""
    return bool(options.get("init_lora_weights") == LOFTQ)


def without_loftq(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that PEFT is to see: a LoRA whose values are set afterwards."""
    return {**options, "init_lora_weights": True, "loftq_config": {}}


def loftq_iterations(options: Mapping[str, Any]) -> int:
    """Return how often W - B A is taken apart; PEFT's name is `loftq_config.loftq_iter`."""
    return int((options.get("loftq_config") or {}).get("loftq_iter", 1))


def loftq_problems(
    options: Mapping[str, Any], backend: Backend, has_original: bool
) -> list[Problem]:
    """Return why LoftQ cannot be done here; empty if it can, or is not wanted."""
    if not wants_loftq(options):
        return []
    found = []
    if not has_original:
        what = "LoftQ compares with the unquantized weights, and this base is quantized already"
        fix = "start from the unquantized checkpoint, or use init_lora_weights: true"
        found.append(Problem(what, fix, "adapter.init_lora_weights"))
    again = backend.merge == Merge.REQUANTIZE and not backend.calibration
    if loftq_iterations(options) > 1 and not again:
        what = f"backend {backend.name!r} cannot quantize single layers again"
        found.append(Problem(what, "use loftq_iter: 1", "adapter.loftq_config.loftq_iter"))
    if loftq_iterations(options) < 1:
        where = "adapter.loftq_config.loftq_iter"
        found.append(Problem("it is a count", "use 1 or more", where))
    return found
