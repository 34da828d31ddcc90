"""Attach an adapter: build PEFT's own config and hand the model to PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import PlanRefused, Problem, QuantadaptError, warn
from ..facade import facades, linear_facades
from ..model.own_biases import biases_of, those_trained
from ..planning.peft_options import peft_options
from ..planning.refusals import wants_loftq, without_loftq
from ..planning.targets import experts_problems, on_embeddings
from ..quantizing.state import ModelState
from ..records import Adapter
from ..registry.blame import blamed
from . import loftq
from .injecting import all_or_nothing, injected
from .merge_aware import forget_merge_aware
from .target_problems import adapted_problems, bias_problem
from .targets import (
    name_problems,
    quantizable,
    quantizable_stacks,
    resolve_targets,
    stacks_in,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from ..planning.planned import Plan

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How the classes of transformers' models end -> PEFT's `task_type`, with which it trains the head
too, and saves it with the adapter."""


class UnmergeableWarning(UserWarning):
    """What an adapter will have learnt cannot be merged into its base."""


def attach_adapter(
    model: nn.Module, state: ModelState, adapter: Adapter, options: Mapping[str, Any]
) -> PeftModel:
    """Return a PeftModel with a new, untrained adapter; only its parameters are trainable.

    Args:
        model: holds facades; changed in place, as PEFT does. If this raises, it is as it was.
        state: that of `model`; remembers the adapter.
        adapter: which method.
        options: fields of its PEFT config. `target_modules` is a list of name endings, a regular
            expression for full names, or "all-linear" (the default): every quantized layer.

    Raises:
        PlanRefused: the options name what is not there, the model has an adapter already, or PEFT
            refuses the options.
    """
    _refuse_second(model)
    forget_merge_aware(model, state)
    options = _training_what_is_new(adapter, {**adapter.defaults, **options}, state)
    config = peft_config(model, adapter, options, adaptable(model, state.skip_modules))
    if problem := bias_problem(model, config):
        text = f"the adapter cannot be merged: {problem.what}; {problem.fix}"
        warn(text, UnmergeableWarning, stacklevel=5)
    before = {id(facade.vendor) for _, facade in facades(model)}
    biases = biases_of(model, getattr(config, "bias", None))
    with all_or_nothing(model):
        try:
            tuned = injected(model, config)
        except (QuantadaptError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever it is, it is one of these options that brought it up
            raise blamed(error) or PlanRefused([_refusal(error)]) from error
        if wants_loftq(options):
            loftq.initialize(tuned, state, options)  # type: ignore[arg-type]
    # PiSSA and LoftQ put new values into the base's layers.
    state.rewritten = any(id(facade.vendor) not in before for _, facade in facades(tuned))
    state.gain_adapter(adapter, options, learnt=False, biases=those_trained(biases))
    return tuned


_PEFT_TRAINS = re.compile(r"(^|\.)(classifier|score|qa_outputs)(\.|$)")
"""Heads that PEFT trains by itself, by the task that it is told."""


def _training_what_is_new(
    adapter: Adapter, options: dict[str, Any], state: ModelState
) -> dict[str, Any]:
    """Return options with which all is trained that started at random: it would stay so.

    Raises:
        PlanRefused: the method does not train modules whole.
    """
    new = [name for name in state.begun_at_random if not _PEFT_TRAINS.search(name)]
    named = [*(options.get("modules_to_save") or ())]
    new = [name for name in new if not any(f".{name}".endswith(f".{one}") for one in named)]
    if not new:
        return options
    if "modules_to_save" not in peft_options(adapter):
        what = f"{', '.join(new)} starts at random, and {adapter.name} trains no whole modules"
        fix = "use another adapter, e.g. lora, or a checkpoint that has it"
        raise PlanRefused([Problem(what, fix, "adapter")])
    return {**options, "modules_to_save": [*named, *new]}


def check_adapter(plan: Plan, skip: tuple[str, ...] | None) -> list[Problem]:
    """Attach the adapter of `plan` to a model without weights: what fails there is told now.

    Args:
        skip: the modules that stay dense; None means the default.

    Returns:
        What keeps it from being merged.

    Raises:
        PlanRefused: with all that `attach_adapter` could know from names and sizes.
    """
    from ..loading.reading import architecture
    from ..model.linears import is_conv1d, other_linears
    from ..model.modules import make_linear

    own = architecture(plan.model)
    conv1d = [name for name, module in other_linears(own) if is_conv1d(module)]
    model = make_linear(own)
    for name in conv1d:
        model.get_submodule(name).conv1d = True  # type: ignore[assignment] # as of facades
    options = {**plan.adapter.defaults, **plan.adapter_options}
    there = quantizable(model, skip), quantizable_stacks(model, skip)
    config: Any = peft_config(model, plan.adapter, options, there)
    problem = bias_problem(model, config)
    _try_without_values(model, config)
    return [problem] if problem else []


def _try_without_values(model: nn.Module, config: Any) -> None:
    """Attach to a model on the meta device. Raises PlanRefused with what PEFT refuses."""
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others want values
    try:
        with torch.device("meta"):
            injected(model, config)
    except QuantadaptError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        if "meta" not in str(error):  # else it wants values, too
            raise blamed(error) or PlanRefused([_refusal(error)]) from error
    except Exception:  # of a method that does not work without values
        return


def adaptable(model: nn.Module, skip: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Return the names of the quantized linear layers, and of the stacks of experts: the quantized
    ones, and those that are dense though they are not in `skip`."""
    return [name for name, _ in linear_facades(model)], stacks_in(model, skip)


def _refuse_second(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        fix = "take it off first, model = model.unload(), or attach to a model of its own"
        raise PlanRefused([Problem("the model has an adapter already", fix, where="adapter")])


def peft_config(
    model: nn.Module,
    adapter: Adapter,
    options: Mapping[str, Any],
    there: tuple[list[str], list[str]] | None = None,
) -> PeftConfig:
    """Return the PEFT config for `adapter` with `target_modules` resolved against `model`.

    Args:
        there: names of the layers and of the stacks of experts that are quantized, where `model`
            has no facades yet.

    Raises:
        PlanRefused: with all that the options name and that is not there, or what PEFT refuses.
    """
    from .method import made_config

    values = {**adapter.defaults, **options}
    layers, stacks = there or adaptable(model)
    problems = name_problems(model, values, stacks)
    try:
        targets = resolve_targets(model, values, layers, stacks)
    except PlanRefused as error:
        raise PlanRefused([*error.problems, *problems]) from None
    values["target_modules"] = targets.modules
    unfit = experts_problems(adapter, values, layers) if targets.stacks else []
    problems += unfit
    if targets.parameters and not unfit:
        values["target_parameters"] = targets.parameters
    values.setdefault("task_type", _task_type(model))
    if adapter.peft_type == "ADALORA":
        # The real count is set when training starts; PEFT only wants it to be positive here.
        values.setdefault("total_step", 10_000)
    try:
        config = made_config(adapter, without_loftq(values) if wants_loftq(values) else values)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise blamed(error) or PlanRefused([*problems, _refusal(error)]) from error
    if config.target_modules is not None:  # type: ignore[attr-defined]
        how = {"own_method": bool(adapter.method), "embeddings": on_embeddings(adapter, values)}
        start = values.get("init_lora_weights")
        problems += adapted_problems(model, config, layers, stacks, start=start, **how)
    if problems:
        raise PlanRefused(problems)
    return config


def _refusal(error: Exception) -> Problem:
    """Return what PEFT says, without the modules that it prints in full."""
    text = re.sub(r"\(\n.*?\n\)", "", str(error), flags=re.DOTALL).strip()
    said = " ".join(text.split())[:300] or type(error).__name__
    if kind := re.match(r"Target module (\w+).* is not supported", said):
        what = f"target_modules names a {kind[1]}, which is no layer that the adapter goes onto"
        fix = "leave it out; modules_to_save trains a module whole"
        return Problem(what, fix, where="adapter.target_modules")
    expected = isinstance(error, (ValueError, TypeError, ImportError))
    what = f"PEFT refuses it: {said}" if expected else f"PEFT fails: {type(error).__name__}: {said}"
    return Problem(what, "change the option that this is about", where="adapter")


def _task_type(model: nn.Module) -> str | None:
    config, name = getattr(model, "config", None), type(model).__name__
    for ending, task in _TASKS.items():
        if config is not None and name.endswith(ending):
            return task
    if config is None or not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
