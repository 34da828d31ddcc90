"""The adapters of a model as files: the active one lies where PEFT looks first, in the folder
itself; others lie in a folder each, under their names."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapting.several import kept_apart, keys_of, weights_to_save
from ..errors import ModelError
from .adapter_files import adapter_places, peft_in_words

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

DEFAULT = "default"
"""What PEFT calls an adapter to which nobody gave a name."""
ALONE = "load it by itself, or train both alike"
"""What to do with an adapter that cannot be beside another one."""
_SHARED = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.", ".unilora_theta_d.")
"""Of what PEFT names where it is shared and stores once."""


def active_adapters(model: Any) -> list[str]:
    """Return the names of the adapters that `model` computes with."""
    return list(model.base_model.active_adapters)


def save_adapters(model: Any, folder: Path) -> list[str]:
    """Write all adapters of `model` into `folder`; return the names of the active ones, of which
    the first lies in `folder` itself."""
    active, weights = active_adapters(model), weights_to_save(model)
    given: dict[str, Any] = {"state_dict": weights, "save_embedding_layers": "auto"}
    if not _has_dense_ends(model):
        given["save_embedding_layers"] = False
    with kept_apart(model):
        if active[0] == DEFAULT:
            model.save_pretrained(str(folder), **given)
            return active
        for name in model.peft_config:
            place = folder if name == active[0] else folder / name
            place.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                model.save_pretrained(scratch, selected_adapters=[name], **given)
                made = Path(scratch) if name == DEFAULT else Path(scratch, name)
                for file in [f for f in made.iterdir() if f.is_file()]:
                    file.rename(place / file.name)
    return active


def _has_dense_ends(model: Any) -> bool:
    """Whether neither embedding nor head is quantized: PEFT saves those that are targets, too, and
    a quantized one is in the base."""
    from ..facade import QuantLinear

    base = model.get_base_model()
    ends = (getattr(base, f"get_{end}_embeddings", lambda: None) for end in ("input", "output"))
    layers = [getattr(end(), "base_layer", end()) for end in ends]
    return not any(isinstance(layer, QuantLinear) for layer in layers)


def put_on(
    model: nn.Module,
    folder: Path,
    active: Sequence[str],
    *,
    config: PeftConfig | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Put the saved adapters called `active` onto a base, all of them or none.

    Args:
        model: the base.
        folder: what `save_adapters` wrote, or a PEFT folder.
        active: names, of which the first lies in `folder` itself.
        config: that of the first adapter, which is read where it is missing.
        is_trainable: whether the adapters can be trained further.

    Raises:
        ModelError: an adapter holds something that the base has no place for, or lacks something.
    """
    from ..adapting.injecting import all_or_nothing, loaded_beside, reloaded

    first, *others = active
    places = adapter_places(folder, active)
    with peft_in_words(folder), all_or_nothing(model):
        tuned, read = reloaded(model, folder, config, adapter_name=first, is_trainable=is_trainable)
        for name, place in places.items():
            if name != first:
                read = loaded_beside(tuned, place, name, is_trainable)
            unexpected = _write_weights(tuned, read.unexpected_keys, place)
            missing = _missing(tuned, read.missing_keys, name)
            _refuse_other_keys(missing, unexpected, place)
        if others:
            tuned.base_model.set_adapter(list(active))
    return tuned


def put_beside(tuned: PeftModel, folder: Path, name: str) -> None:
    """Put one more saved adapter, called `name` from now on, beside those of `tuned`, all of it or
    nothing. Those that compute are the same as before.

    Raises:
        ModelError: it holds something that the base has no place for, or lacks something; or it
            trains single tokens of what another one trains whole, or the reverse.
    """
    from ..adapting.injecting import all_or_nothing, loaded_beside

    with all_or_nothing(tuned):
        read = loaded_beside(tuned, folder, name, is_trainable=False)
        _refuse_wrapped_twice(tuned, folder)
        _refuse_other_keys(_missing(tuned, read.missing_keys, name), read.unexpected_keys, folder)


def _refuse_wrapped_twice(tuned: PeftModel, folder: Path) -> None:
    """Raise ModelError where PEFT has wrapped what one adapter trains whole for the tokens that
    another one trains: it makes such a model, and fails when that computes."""
    from peft.utils.other import AuxiliaryTrainingWrapper as Wrapper

    for name, module in tuned.named_modules():
        if isinstance(module, Wrapper) and isinstance(module.original_module, Wrapper):
            part = name.rpartition(".")[2]
            what = f"one adapter trains {part} whole, and another single tokens of it"
            raise ModelError(what, fix=ALONE, where=str(folder))


def _write_weights(tuned: PeftModel, keys: Sequence[str], folder: Path) -> list[str]:
    """Write what the adapter holds of the base, and has another name here. Return the keys of other
    tensors.

    Whole weights go into quantized layers, which have no parameter of that name: PEFT saves a head
    or embedding that is adapted. Biases go to where PEFT would have saved them from: their names
    depend on which layers have adapters, others beside it too.
    """
    from ..facade import QuantLinear
    from ..loading.tensors import Checkpoint

    others, saved = [], Checkpoint(str(folder))
    modules = dict(tuned.named_modules()) if keys else {}
    for key in keys:
        layer = modules.get(key.removesuffix(".weight"))
        if isinstance(layer, QuantLinear) and key in saved:
            layer.write(saved.read(key))
        elif (bias := _bias_called(key, modules)) is not None and key in saved:
            bias.data.copy_(saved.read(key).view_as(bias))  # `copy_` would spread one number
        else:
            others.append(key)
    return others


def _bias_called(key: str, modules: Mapping[str, nn.Module]) -> nn.Parameter | None:
    """Return the bias of the base that has this name where other layers have adapters."""
    from torch import nn

    holder, _, name = key.rpartition(".")
    holder = holder.removesuffix(".base_layer")
    for place in (f"{holder}.base_layer", holder) if name == "bias" else ():
        bias = getattr(modules.get(place), "bias", None)
        if isinstance(bias, nn.Parameter):
            return bias
    return None


def _missing(tuned: PeftModel, keys: Sequence[str], name: str) -> list[str]:
    """Return which of the keys that PEFT misses are those of the adapter `name`: it takes all that
    hold the name anywhere, and `a` is in nearly every one. What is shared is stored once."""
    own = keys_of(tuned, name) if keys else ()
    return [key for key in keys if key in own and not any(part in key for part in _SHARED)]


def _refuse_other_keys(missing: Sequence[str], unexpected: Sequence[str], folder: Path) -> None:
    for keys, what in (
        (unexpected, "the adapter holds what this base has no place for"),
        (missing, "the adapter lacks what its config says is there"),
    ):
        if keys:
            shown = ", ".join(list(keys)[:3]) + (f" and {len(keys) - 3} more" if keys[3:] else "")
            fix = "pass the model that the adapter was trained on"
            raise ModelError(f"{what}: {shown}", fix=fix, where=str(folder))
