"""Is a base the one that an adapter was trained on? Another one is refused unless it is forced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, Problem, warn
from ..folders.run_folder import json_ready
from ..folders.written import altered, read_list
from ..inputs.fingerprints import Fingerprint, difference, difference_of_original
from ..quantizing.state import ModelState
from .manifest import MANIFEST

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz")
FORCE = "force it: --force-base, or force_base=True"


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded onto a base that it was not trained on."""


class UnknownBaseWarning(UserWarning):
    """Nothing tells whether a base is the one that an adapter was trained on."""


def noted(manifest: Mapping[str, Any]) -> Fingerprint | None:
    """Return what a manifest says that the base is known by; None of an older version."""
    found = manifest.get("fingerprint")
    return None if found is None else Fingerprint.model_validate(found)


def check_base(state: ModelState, manifest: Mapping[str, Any], *, force: bool) -> None:
    """Look whether the base that `state` is of is the one that the adapter of `manifest` was
    trained on. Warns of other options, and where nothing tells.

    Raises:
        ModelError: it has other weights or another config, and `force` does not say otherwise.
    """
    then, now = noted(manifest), state.fingerprint
    found = None if then is None or now is None else difference(then, now)
    base = state.source or "the module"
    if found and not force:
        what = f"{base} is not the base that the adapter was trained on: it has {found}"
        named = manifest.get("base")
        other = f", {named}" if named else ""
        right = "put back the files that it had" if named == base else f"pass that base{other}"
        fix = f"{right}, or {FORCE}"
        raise ModelError(what, fix=fix, where=state.source)
    if state.changed and not manifest["changed"] and not force:
        what = "the module is not the base that the adapter was trained on: another adapter has"
        fix = f"pass a base as it was, or {FORCE}"
        raise ModelError(f"{what} changed it for good", fix=fix)
    if found is None and not state.own_base:  # that one has a base_id
        _tell_unknown(then, now, base, changed=manifest["changed"])
    _warn_other_options(state, manifest, known=found is not None)


def refuse_altered(base: Path, *, force: bool) -> None:
    """Look whether the files of a base that lies beside its adapter are those that were written.
    Warns of what computes nothing, such as a chat template, and where it is forced.

    Raises:
        ModelError: its weights or its config were altered, and `force` does not say otherwise.
    """
    listed = read_list(base) or {}
    listed.pop(MANIFEST, None)
    names = altered(base, listed)
    if not names:
        return
    gone = [name for name in names if not (base / name).exists()]
    there = [name for name in names if name not in gone]
    found = [f"{_are(there)} not as when the adapter was trained on it"] if there else []
    found += [f"{_are(gone)} missing"] if gone else []
    what = "; ".join(found)
    computes = [name for name in names if name == "config.json" or name.endswith(_WEIGHTS)]
    if computes and not force:
        raise ModelError(what, fix=f"put back what was written, or {FORCE}", where=str(base))
    warn(f"{base}: {what}", BaseMismatchWarning, stacklevel=5)


def _are(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _tell_unknown(
    then: Fingerprint | None, now: Fingerprint | None, base: str, *, changed: bool
) -> None:
    if changed:
        why = "another adapter had changed that one for good"
    elif then is None:
        why = "nothing was noted when it was saved"
    elif now is None:
        why = "its files could not be looked at"
    elif then.kind != now.kind:
        why = "one of both was a live module"
    else:
        why = "a live module that was quantized already does not show its weights"
    what = f"nothing tells whether {base} is the base that the adapter was trained on: {why}"
    warn(what, UnknownBaseWarning, stacklevel=5)


def _warn_other_options(state: ModelState, manifest: Mapping[str, Any], *, known: bool) -> None:
    now: Any = json_ready(state.manifest())
    named = bool(manifest.get("base") and now["base"])  # what was a module has no name
    names = (*(() if known or not named else ("base",)), "backend", "options", "dtype")
    differing = [
        f"{key} {manifest.get(key)!r}, now {now[key]!r}"
        for key in names
        if manifest.get(key) != now[key]
    ]
    if differing:
        text = f"the adapter was trained on another base: {'; '.join(differing)}"
        warn(text, BaseMismatchWarning, stacklevel=5)


def original_problem(
    then: Fingerprint | None, now: Fingerprint | None, base: str
) -> Problem | None:
    """Return why the unquantized checkpoint `base`, known by `now`, is not what an adapter was
    trained on, whose base is known by `then`; None where it is, or where nothing tells."""
    found = None if then is None or now is None else difference_of_original(then, now)
    if not found:
        return None
    what = f"{base} is not what the adapter's base was made from: it has {found}"
    return Problem(what, f"pass the unquantized model that it was, or {FORCE}", "base")


def tell_unknown_original(then: Fingerprint | None, now: Fingerprint | None, base: str) -> None:
    """Warn where nothing tells whether `base` is what an adapter's base was made from."""
    if then is None or now is None or difference_of_original(then, now) is None:
        why = "its base was quantized already" if then else "nothing was noted when it was saved"
        what = f"nothing tells whether {base} is what the adapter's base was made from: {why}"
        warn(what, UnknownBaseWarning, stacklevel=5)
