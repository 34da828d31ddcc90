"""Attach an adapter: build PEFT's own config and hand the model to PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..dependencies import unchanged_process
from ..errors import PlanRefused, Problem, did_you_mean
from ..facade import facades
from ..planning.refusals import wants_loftq, without_loftq
from ..quantizing.stage import nothing_quantized
from ..quantizing.state import ModelState
from ..records import Adapter
from . import loftq

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ALL_LINEAR = "all-linear"


def attach_adapter(
    model: nn.Module, state: ModelState, adapter: Adapter, options: Mapping[str, Any]
) -> PeftModel:
    """Return a PeftModel with a new, untrained adapter; only its parameters are trainable.

    Args:
        model: holds facades; changed in place, as PEFT does.
        state: that of `model`; remembers the adapter.
        adapter: which method.
        options: fields of its PEFT config. `target_modules` is a list of name endings, a regular
            expression for full names, or "all-linear" (the default): every quantized layer.

    Raises:
        PlanRefused: `target_modules` matches nothing, the model has an adapter already, or PEFT
            refuses the options.
    """
    from peft import get_peft_model

    from .fused import use_fused_layers

    _refuse_second(model)
    options = {**adapter.defaults, **options}
    given = without_loftq(options) if wants_loftq(options) else options
    _refuse_parameters(model, given.get("target_parameters"))
    config = peft_config(model, adapter, given)
    if adapter.peft_type == "LORA":
        use_fused_layers(config)  # type: ignore[arg-type]
    before = {id(facade.vendor) for _, facade in facades(model)}
    try:
        with unchanged_process():  # PEFT imports libraries of quantizers, of other models' too
            tuned = get_peft_model(model, config)  # type: ignore[arg-type]
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise PlanRefused([Problem(f"PEFT refuses it: {error}", where="adapter")]) from error
    if wants_loftq(options):
        loftq.initialize(tuned, state, options)  # type: ignore[arg-type]
    # PiSSA and LoftQ put new values into the base's layers.
    state.rewritten = any(id(facade.vendor) not in before for _, facade in facades(tuned))
    state.adapter, state.adapter_options = adapter, options
    return tuned  # type: ignore[return-value]


def _refuse_second(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        fix = "take it off first, model = model.unload(), or attach to a model of its own"
        raise PlanRefused([Problem("the model has an adapter already", fix, where="adapter")])


def _refuse_parameters(model: nn.Module, wanted: Iterable[str] | None) -> None:
    """Raise PlanRefused where `target_parameters` names the weight of a quantized layer."""
    weights = [f"{name}.weight" for name, _ in facades(model)]
    fix = "name the layer in target_modules: for a linear layer that is the same"
    problems = [
        Problem(f"{name} is quantized, no parameter", fix, where="adapter.target_parameters")
        for name in wanted or ()
        if any(_ends(weight, name) for weight in weights)
    ]
    if problems:
        raise PlanRefused(problems)


def peft_config(model: nn.Module, adapter: Adapter, options: Mapping[str, Any]) -> PeftConfig:
    """Return the PEFT config for `adapter` with `target_modules` resolved against `model`."""
    from .method import made_config

    values = {**adapter.defaults, **options}
    values["target_modules"] = resolve_targets(model, values.get("target_modules"))
    values.setdefault("task_type", _task_type(model))
    if adapter.peft_type == "ADALORA":
        # The real count is set when training starts; PEFT only wants it to be positive here.
        values.setdefault("total_step", 10_000)
    try:
        return made_config(adapter, values)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanRefused([Problem(f"PEFT refuses it: {error}", where="adapter")]) from error


def resolve_targets(model: nn.Module, wanted: str | Iterable[str] | None) -> list[str] | str:
    """Return `target_modules` for PEFT. Raises PlanRefused if nothing would match."""
    return _resolve(model, [name for name, _ in facades(model)], wanted)


def check_targets(source: str, wanted: str | Iterable[str] | None) -> None:
    """Raise PlanRefused if `target_modules` matches no layer of the checkpoint `source`.

    Looks at the model's architecture only; no weights are loaded.
    """
    if wanted is None or wanted == ALL_LINEAR:
        return
    from ..loading.reading import architecture

    model = architecture(source)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    _resolve(model, names, wanted)


def _resolve(
    model: nn.Module, names: list[str], wanted: str | Iterable[str] | None
) -> list[str] | str:
    if wanted is None or wanted == ALL_LINEAR:
        if not names:
            raise nothing_quantized(model)
        return _endings(model, names)
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name, _ in model.named_modules()):
            raise _no_target([wanted], names)
        return wanted
    endings = list(wanted)
    missing = [e for e in endings if not any(_ends(name, e) for name, _ in model.named_modules())]
    if missing:
        raise _no_target(missing, names)
    return endings


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _endings(model: nn.Module, names: list[str]) -> list[str]:
    """Return the shortest name endings that match the facades and nothing else."""
    wanted = set(names)
    endings = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    if matched == wanted and not any(ending.isdigit() for ending in endings):
        return sorted(endings)
    return sorted(wanted)


def _no_target(missing: list[str], names: list[str]) -> PlanRefused:
    known = sorted({name.rpartition(".")[2] for name in names})
    problems = [
        Problem(
            f"no layer of the model matches {ending!r}",
            _layer_hint(ending, known),
            where="adapter.target_modules",
        )
        for ending in missing
    ]
    return PlanRefused(problems)


def _layer_hint(ending: str, known: list[str]) -> str:
    hint, layers = did_you_mean(ending, known), ", ".join(known)
    return f"name one of its layers: {layers}" if layers in hint else f"{hint} (layers: {layers})"


def _task_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
