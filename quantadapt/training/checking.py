"""What training is given, looked at before anything is made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..adapting.adalora import tuner_of
from ..adapting.several import unsavable
from ..adapting.vblora import cut_short
from ..dependencies import tracker_problems
from ..distributed.world import world
from ..errors import PlanRefused, Problem, TrainingError
from ..inputs.likely_names import did_you_mean
from ..planning.context_parallel import context_problems
from ..planning.optimizers import optimizer_problems
from ..planning.refusals import (
    float8_problems,
    head_problems,
    invocation_problems,
    merge_aware_problems,
    packing_problems,
    task_problems,
)
from ..quantizing.state import state_of
from .figures import adapter_device, compute_dtype

if TYPE_CHECKING:
    from datasets import Dataset

    from ..protocols import Task
    from ..spec import TrainSpec


def check(model: Any, spec: TrainSpec, task: Task) -> None:
    """Look at what `train` is given, data aside. Raises TrainingError or PlanRefused."""
    if not any(p.requires_grad for p in model.parameters()):
        fix = "check adapter.target_modules, and that the adapter was not loaded for inference"
        raise TrainingError("the model has no trainable weights", fix=fix)
    found = task_problems(task, spec, adds_to_loss=tuner_of(model) is not None)
    config = config_of(model)
    found += head_problems(task, {**config, "architectures": [_class_name(model)]})
    found += packing_problems(spec, config)
    state = state_of(model) if hasattr(model, "quantadapt") else None
    options = state.cell.adapter_options if state is not None and state.adapter else {}
    found += context_problems(spec, task, config, options, processes=world().size)
    found += invocation_problems(task, spec, config, options)
    if spec.merge_aware and state is not None and state.adapter is not None:
        cell = state.cell
        found += merge_aware_problems(cell, state.backend, state.quantizer, state.adapter)
    found += _float8_problems(model, spec)
    found += optimizer_problems(spec)
    found += tracker_problems(spec.report_to)
    found += cut_short(model)
    found += unsavable(model)  # told now, not when it is to be saved
    if found:
        raise PlanRefused(found)


def _float8_problems(model: Any, spec: TrainSpec) -> list[Problem]:
    """Return why products with the base are not computed in 8-bit floats here, if they are to."""
    import torch

    from ..facade import float8, linear_facades

    if spec.compute != "fp8":
        return []
    device, dtype = adapter_device(model), str(compute_dtype(model)).rpartition(".")[2]
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else None
    if found := float8_problems(spec, device.type, dtype, capability):
        return found
    where, fix = "train.compute", "leave train.compute out"
    if reason := float8.refused(device):
        return [Problem(f"products of 8-bit floats fail here: {reason}", fix, where)]
    if not any(layer.takes_float8 for _, layer in linear_facades(model)):
        what = f"no layer of the base has sizes that are multiples of {float8.MULTIPLE}"
        return [Problem(what, fix, where)]
    return []


def _class_name(model: Any) -> str:
    """Return the class of the base where that is transformers' own; others may be called so and
    predict tokens."""
    base = type(getattr(model, "get_base_model", lambda: model)())
    return base.__name__ if base.__module__.startswith("transformers.models.") else ""


def config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model of transformers as its config.json has it."""
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def check_held_out(spec: TrainSpec, held_out: Dataset | None) -> None:
    """Raise TrainingError where there is nothing to measure on while training."""
    if spec.validates != "no" and not held_out:
        what = "there are no held-out examples to measure on while training"
        fix = "pass some as eval_data, or leave train.eval_steps and train.eval_strategy out"
        raise TrainingError(what, fix=fix, where="train")


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens the model has an embedding for; None where it has none."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def problems(spec: TrainSpec) -> list[Problem]:
    """Return what is wrong with settings that only transformers can judge; loads no model."""
    from transformers.training_args import OptimizerNames

    names = [member.value for member in OptimizerNames]
    if spec.optim in names:
        return []
    what, fix = f"there is no {spec.optim!r}", did_you_mean(spec.optim, names)
    return [Problem(what, fix, where="train.optim")]
