"""Further adapters on a model that has one: trained by runs of their own on the same base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, OptionsError, Problem
from ..inputs.documents import read_object
from ..model.own_biases import may_train_biases
from ..paths import is_entry
from ..quantizing.state import state_of
from ..registry.discovery import registry
from .adapter_files import CONFIG, check_adapters, peft_in_words, refuse_not_trained
from .adapters import ALONE, put_beside
from .manifest import adapter_folder, read_manifest
from .same_base import check_base

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel


def add_adapter(model: Any, path: str | Path, name: str, *, force_base: bool = False) -> None:
    """Put the adapter of another run beside those of `model`; which of them computes stays as it
    was.

    Args:
        path: a run folder, or the folder of an adapter.
        name: what it is called from now on.
        force_base: take it though its base had other weights or another config.

    Raises:
        OptionsError: the name cannot be used. ModelError: there is no adapter, it belongs to
        another base, or PEFT cannot have it beside the others.
    """
    folder = adapter_folder(Path(path).expanduser())
    where = str(folder)
    if not hasattr(model, "disable_adapter"):
        fix = "begin with a run or an adapter, and add others to that"
        raise ModelError("only what has an adapter takes another beside it", fix=fix, where=where)
    if not is_entry(name) or "." in name or name in model.peft_config:
        what = f"no second adapter can be called {name!r}"
        raise OptionsError([Problem(what, "give it another name, without dots", where)])
    manifest = read_manifest(folder)
    _refuse_other_kind(model, manifest, where)
    adapter = registry().adapter(manifest["adapter"])
    check_adapters(folder, manifest, adapter)
    refuse_not_trained(folder, manifest["active"])
    check_base(state_of(model), manifest, force=force_base)
    with peft_in_words(folder):
        put_beside(model, folder, name)


def _refuse_other_kind(model: PeftModel, manifest: Mapping[str, Any], where: str) -> None:
    """Raise ModelError where the base is not one and the same, or PEFT has no place for both."""
    state = state_of(model)
    what, fix = "", ALONE
    if manifest["adapter"] is None:
        raise ModelError("there is no adapter here", fix="pass the folder of a run", where=where)
    kind = registry().adapter(manifest["adapter"]).peft_type
    own = model.peft_config[str(model.active_adapter)]
    if kind != (has := getattr(own.peft_type, "value", own.peft_type)):
        what = f"PEFT has no {kind} beside {has} in one model"
    elif state.rewritten:
        what = "the first adapter's start changed its base, which it shares with no other"
    elif state.changed != manifest["changed"]:
        what = "an earlier adapter has changed the base of one of both for good"
    elif state.base_id != manifest["base_id"]:
        what = "one of both was saved with a base of its own"
    elif may_train_biases(model, read_object(Path(where) / CONFIG).get("bias")):
        what = "one of both has trained biases of the base, which all share"
        fix = "load it by itself"
    elif len(manifest["active"]) > 1:
        what = f"it is {len(manifest['active'])} adapters that work together"
    elif state.merge_aware or manifest.get("merge_aware"):
        what = "one of both was trained through the quantizer, and answers so"
    if what:
        raise ModelError(what, fix=fix, where=where)
