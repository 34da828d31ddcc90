"""Load a saved adapter onto a model, and account for every tensor of its file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dependencies import unchanged_process
from ..errors import ModelError, Problem
from ..loading.accounting import WrongTensors, listed
from ..records import Adapter
from .method import config_class

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

WEIGHTS = "adapter_model.safetensors"


def adapter_config(adapter: Adapter, folder: Path) -> PeftConfig:
    """Return the config in an adapter's folder. Raises ModelError where it cannot be read, or is of
    another method than `adapter`."""
    expected = config_class(adapter)
    try:
        says = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = says.get("peft_type")
        if kind == adapter.peft_type:
            found: PeftConfig = expected.from_pretrained(str(folder))
            return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"its adapter_config.json cannot be read: {error}"
        fix = "put back the one that was written with the adapter"
        raise ModelError(what, fix=fix, where=str(folder)) from error
    what = f"its adapter_config.json says {kind}, but {adapter.peft_type} was trained and saved"
    raise ModelError(what, fix="put back what it said", where=str(folder))


def load_adapter(model: nn.Module, folder: Path, config: PeftConfig) -> PeftModel:
    """Return `model` under the adapter in `folder`.

    Args:
        model: holds facades; changed in place, as PEFT does.
        folder: as PEFT writes it.
        config: that of the adapter.

    Raises:
        WrongTensors: the file lacks a tensor of the adapter, or holds one that nothing takes.
        ModelError: it cannot be read, or does not fit this model.
    """
    from peft import PeftModel

    try:
        with unchanged_process():
            tuned = PeftModel.from_pretrained(
                model,  # type: ignore[arg-type]
                str(folder),
                is_trainable=not config.inference_mode,
                config=config,
            )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"the adapter does not fit this base: {lines[-1].strip()}"
        fix = "pass the model that the quantized base was made from"
        raise ModelError(what, fix=fix, where=str(folder)) from error
    if problems := _unaccounted(tuned, folder):
        with contextlib.suppress(Exception):  # some methods cannot be taken off again
            tuned.unload()  # type: ignore[operator]
        raise WrongTensors(problems)
    return tuned


def _unaccounted(tuned: PeftModel, folder: Path) -> list[Problem]:
    from peft import get_peft_model_state_dict

    given = _keys(folder)
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    missing = sorted(wanted - given)
    # PEFT saves embeddings of the base, too, where those were resized.
    unexpected = sorted(given - wanted - set(tuned.state_dict()))
    problems = []
    if missing:
        what = f"the adapter's file has no {listed(missing)}, which would stay untrained"
        problems.append(_problem(what, folder))
    if unexpected:
        what = f"the adapter's file holds what this base takes no part of: {listed(unexpected)}"
        problems.append(_problem(what, folder))
    return problems


def _problem(what: str, folder: Path) -> Problem:
    fix = "check that adapter_config.json, the weights and the base belong together"
    return Problem(what, fix, where=str(folder))


def _keys(folder: Path) -> set[str]:
    if (file := folder / WEIGHTS).exists():
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    from peft.utils import load_peft_weights

    weights: Iterable[Any] = load_peft_weights(str(folder), device="cpu")
    return set(weights)
