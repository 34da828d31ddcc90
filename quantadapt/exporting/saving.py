"""Save adapters as plain PEFT folders, and quantized bases as checkpoints.

Beside each lies `quantadapt.json`, which says what base it belongs to. Everything is written to a
temporary folder first and renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapting.several import unsavable
from ..dependencies import in_turn
from ..errors import ModelError, OutputError, PlanRefused, warn
from ..folders.atomic import atomic_folder, refuse_occupied, refuse_overlap, remove
from ..folders.written import LIST, first_changed, read_list, write_list
from ..inputs.documents import read_object
from ..planning.on_disk import quantization_of
from ..planning.reusing import Making
from ..protocols import Exporter, Figure
from ..quantizing.state import ModelState, state_of
from ..registry.blame import blaming_plugins
from .adapter_files import CONFIG, configs_to_note, copy_files
from .adapters import save_adapters
from .card import README, write_card
from .manifest import ADAPTER, BASE, MANIFEST, base_id_of, write_manifest
from .same_base import refuse_altered

if TYPE_CHECKING:
    from torch import nn

    from .tuned import Tuned


class NoCardWarning(UserWarning):
    """An adapter is saved without a model card, which could not be written."""


class NotPeftWarning(UserWarning):
    """An adapter is saved that PEFT alone does not load."""


@in_turn
@blaming_plugins
def save(model: nn.Module, path: str | Path, *, overwrite: bool = False, base: bool = True) -> Path:
    """Save the adapter to `path/adapter`, or, without one, the quantized base to `path`.

    The adapter is a plain PEFT folder; `quantadapt.json` in it records the base. A base that was
    calibrated here, or rewritten by PiSSA or LoftQ, cannot be made again from that alone; it is
    saved too, to `path/base`. Both note the same `base_id`, so that `load` knows a base that is not
    the adapter's, as a process may leave it that dies between the two.

    Args:
        model: what `quantize`, `attach` or `load` returned.
        path: a folder, which must not be one that the model was read from.
        overwrite: replace what an earlier `save` wrote there, a base too, and never anything else.
        base: False leaves such a base out, and one that is there as it is.

    Raises:
        OutputError: the folder holds something else; it is untouched.
        PlanRefused: an adapter has a name that no folder can have. ModelError: an adapter was
        attached, and `model` is not PEFT's model of it, or has lost it.
    """
    state, root = state_of(model), Path(path).expanduser()
    final, own_base = root / ADAPTER if state.adapter else root, root / BASE
    has_own_base = state.adapter is not None and _has_own_base(state)
    writes_base = has_own_base and base
    if problems := unsavable(model):
        raise PlanRefused(problems)
    _refuse_lost_adapter(model, state)
    refuse_overlap(final, [state.source])
    _refuse_foreign(final)
    refuse_occupied(final, overwrite)
    if state.adapter and base:
        _refuse_base_in_the_way(own_base, overwrite)
    if writes_base:
        _refuse_foreign(own_base)
        state.base_id = secrets.token_hex(8)
    replaces = writes_base and (own_base / MANIFEST).exists()
    with ExitStack() as stack:
        if replaces:  # nothing of the earlier pair is replaced until all of the new one is there
            beside = atomic_folder(own_base, overwrite=True, checksums=True)
            write_base(model, state, stack.enter_context(beside))
        with atomic_folder(final, overwrite=overwrite) as folder:
            _write(model, state, folder, base_id=_noted(state, own_base, writes_base))
    if writes_base and not replaces:  # afterwards: the base alone could be made again
        save_base(model, state, own_base, overwrite=overwrite)
    if state.adapter and overwrite and not has_own_base:
        _remove_stale(own_base, state)
    return final


def _write(model: nn.Module, state: ModelState, folder: Path, *, base_id: str) -> None:
    """Write the adapter of `model`, or the base that has none, into `folder`."""
    from ..loading.processors import save_tokenizer

    more: dict[str, Any] = {"base_id": base_id} if base_id else {}
    if state.adapter:
        more["active"] = save_adapters(model, folder)  # type: ignore[arg-type]
        more["adapter_config"] = configs_to_note(folder, more["active"])
        _tell_of_dora(model)
    else:
        state.quantizer.save(model, folder)
    if state.tokenizer is not None:
        save_tokenizer(state.tokenizer, folder)
    write_manifest(folder, state, **more)
    if state.adapter:
        manifest = read_object(folder / MANIFEST)
        for config in folder.rglob(CONFIG):  # PEFT's cards are forms to fill in
            _write_card(config.parent, manifest)


def _write_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the adapter's card; what is wrong with it is told, and keeps no adapter from its
    place."""
    try:
        write_card(folder, manifest)
    except OSError:  # of the disk: the adapter is not written either
        raise
    except Exception as error:
        text = f"the adapter has no model card: {type(error).__name__}: {error}"
        warn(text, NoCardWarning, stacklevel=6)


def _tell_of_dora(model: nn.Module) -> None:
    from ..adapting.expert_dora import has_dora_on_experts

    if has_dora_on_experts(model):
        what = "PEFT without quantadapt does not load DoRA on stacks of experts"
        warn(f"{what}: merge it for others, quantadapt merge", NotPeftWarning, stacklevel=5)


def _noted(state: ModelState, own_base: Path, is_saved: bool) -> str:
    """Return the `base_id` that an adapter notes: that of the base beside it."""
    known = is_saved or (state.base_id and base_id_of(own_base) == state.base_id)
    return state.base_id if known else ""


def _lies_in(source: str, folder: Path) -> bool:
    """Say whether a local checkpoint is `folder` or lies in it."""
    found = Path(source).expanduser()
    return bool(source) and found.exists() and found.resolve().is_relative_to(folder.resolve())


def _refuse_lost_adapter(model: nn.Module, state: ModelState) -> None:
    whole = hasattr(model, "disable_adapter") and bool(getattr(model, "peft_config", None))
    if state.adapter is not None and not whole:
        what = "an adapter was attached, and here is none: it was deleted, or this is what PEFT's"
        fix = "pass what attach or load returned; to save the base alone, its unload()"
        raise ModelError(f"{what} get_base_model() returns", fix=fix)


def _refuse_base_in_the_way(own_base: Path, overwrite: bool) -> None:
    """Raise OutputError where the base of an earlier adapter must not be replaced or removed."""
    if not (own_base / MANIFEST).exists():
        return
    if own_base.is_symlink():  # whose it is, and what else reads it, is not known
        fix = "remove the link, or choose another folder"
        raise OutputError("a link is in the way", fix=fix, where=str(own_base))
    refuse_occupied(own_base, overwrite)


def _remove_stale(own_base: Path, state: ModelState) -> None:
    """Remove the base of an earlier adapter, which is not this one's, unless it is what this one
    was trained on."""
    if (own_base / MANIFEST).exists() and not _lies_in(state.source, own_base):
        refuse_occupied(own_base, overwrite=True)
        remove(own_base)


def _has_own_base(state: ModelState) -> bool:
    """Whether the base cannot be made again from its checkpoint and options alone."""
    if state.rewritten or state.changed or state.own_base or state.calibration is not None:
        return True
    calibrates = state.backend.calibration and state.quantizer.needs_data
    return bool(state.source) and calibrates and quantization_of(state.source) is None


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        fix = "choose another folder, or empty it yourself"
        raise OutputError("it holds something that save did not write", fix=fix, where=str(folder))


def save_base(
    model: nn.Module,
    state: ModelState,
    folder: Path,
    *,
    overwrite: bool = False,
    making: Making | None = None,
) -> None:
    """Save the quantized base of `model`, adapter or not; `state` is the model's.

    Args:
        making: how it was made, for runs that would make the same.
    """
    state.base_id = state.base_id or secrets.token_hex(8)
    with atomic_folder(folder, overwrite=overwrite, checksums=True) as made:
        write_base(model, state, made, making)


def take_base(base: Path, folder: Path, given: str, model: str) -> None:
    """Put the base of another run at `folder`, under its `base_id`. Its files get second names; on
    another disk they are copied.

    Args:
        given: what the user calls the place that it is taken from.
        model: what it was made from, as this run calls it: the other may have had a copy.

    Raises:
        ModelError: it is not as it was written, perhaps as somebody is deleting it.
    """
    values, listed = read_object(base / MANIFEST), read_list(base) or {}
    values["base"] = model
    values["making"]["taken_from"] = values["making"].get("taken_from") or given
    listed.pop(MANIFEST, None)
    with atomic_folder(folder, listed=False) as made:
        try:
            copy_files(base, made, leave_out=(LIST, MANIFEST), copy=_linked)
            changed = first_changed(made, listed)
        except FileNotFoundError as error:
            what = f"{Path(error.filename).name} is not there any more"
            raise ModelError(what, fix="make the base anew", where=str(base)) from None
        if changed:
            what = f"{changed} is not as it was written"
            raise ModelError(what, fix="make the base anew", where=str(base))
        (made / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_list(made, checksums=True, known=listed)


def refuse_changed(base: Path) -> None:
    """Raise ModelError where the base of a run is not as it was written any more: what was learnt
    on it would go on upon another."""
    listed = read_list(base) or {}
    listed.pop(MANIFEST, None)
    try:
        what = f"{name} is not as it was written" if (name := first_changed(base, listed)) else ""
    except FileNotFoundError as error:
        what = f"{Path(error.filename).name} is not there any more"
    if what:
        fix = "put it back as it was, or start anew in another --output"
        raise ModelError(what, fix=fix, where=str(base))


def write_base(
    model: nn.Module, state: ModelState, folder: Path, making: Making | None = None
) -> None:
    """Write the quantized base of `model` into `folder`, which is there."""
    from ..loading.processors import save_tokenizer
    from ..model.own_biases import own_biases
    from .merging import bare_base

    with own_biases(model):
        base = model if state.adapter is None else bare_base(model)  # type: ignore[arg-type]
        state.quantizer.save(base, folder)
    if state.tokenizer is not None:
        save_tokenizer(state.tokenizer, folder)
    more = {} if making is None else {"making": making.model_dump()}
    write_manifest(folder, state, rewritten=state.rewritten, base_id=state.base_id, **more)


class AdapterFolder(Exporter):
    """The adapter as PEFT's own folder. A run saves it before all other exports (`save`), so this
    copies it, with a base that cannot be made again beside it."""

    @property
    def planned(self) -> str:
        return ADAPTER

    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        base = tuned.adapter.parent / BASE
        if folder != tuned.adapter:
            copy_files(tuned.adapter, folder)
            final = folder.parent / BASE
            if (base / MANIFEST).exists() and not base_id_of(base) == base_id_of(final) != "":
                refuse_altered(base, force=tuned.force_base)
                # There is an adapter only where it may be replaced, and its base with it.
                replaces = (folder.parent / ADAPTER).exists()
                with atomic_folder(final, overwrite=replaces, checksums=True) as beside:
                    copy_files(base, beside)
        elif (metrics := tuned.metrics) is not None:  # in a run, once there are figures
            with atomic_folder(folder, overwrite=True) as again:  # so that its list is right always
                shutil.copytree(folder, again, dirs_exist_ok=True, copy_function=_linked)
                for name in (README, LIST):
                    (again / name).unlink(missing_ok=True)
                write_card(again, tuned.manifest, metrics=metrics)
        sizes = (file.stat().st_size for file in folder.rglob("*.safetensors"))
        return {"size": Figure(sum(sizes) / 2**20, "MiB")}


def _linked(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; where that cannot be done, copy it."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
