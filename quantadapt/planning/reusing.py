"""A base that an earlier run has calibrated: where it is, and whether another run would make the
same one. What quantizing depends on lies beside it, in its `quantadapt.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ModelError, Problem
from ..folders.environment import LIBRARIES, versions
from ..folders.metrics import duration
from ..inputs.documents import read_object, validated
from ..paths import BASE, MANIFEST, path_problem
from .planned import Plan

KEY = "reuse_base"
MODEL, LABELS, EXAMPLES = "model", "labels", "examples"
"""Of `Making.of`, what is known only once the data are read: digests, and what a classifier tells
apart."""
_COMPUTING = ("torch", "transformers")
"""Of the libraries that all runs use, those that the numbers of a base come from."""
_OTHERS = {MODEL: "it was made from another model", EXAMPLES: "it was calibrated on other examples"}


class Making(BaseModel):
    """What a calibrated base was made from, and what that took.

    Attributes:
        of: all that quantizing reads, by key of the spec; `model` and `examples` are digests.
        seconds: that quantizing took.
        peak_memory_gib: of the GPU then, or of the whole process where there is none, in GiB.
        device: "cpu", "cuda", ...
        taken_from: the folder that it was copied from; empty where it was made.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    of: dict[str, Any]
    seconds: float = Field(ge=0)
    peak_memory_gib: float = Field(ge=0)
    device: str
    taken_from: str = ""


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the settings that the quantize stage reads, by key of the spec. The adapter and the
    training are none of them."""
    spec = plan.spec
    options = plan.quantizer.model_dump(mode="json")
    installed = versions(plan.backend.requires)
    used = [name for name in installed if name in _COMPUTING or name not in LIBRARIES]
    return {
        "backend": plan.backend.name,
        **{f"backend.{name}": value for name, value in options.items()},
        "dtype": plan.dtype,
        "device": plan.device.partition(":")[0],
        "objective": plan.task.head,
        "skip_modules": spec.skip_modules,
        "skip_misfits": spec.skip_misfits,
        "towers": list(spec.towers),
        "new_modules": list(spec.new_modules),
        "unused_modules": list(spec.unused_modules),
        **{f"the version of {name}": installed[name] for name in used},
    }


def base_in(folder: Path) -> Path | None:
    """Return the calibrated base in a run folder, or `folder` itself if it is one. None where there
    is none; one that is half written has another name."""
    places = (folder / BASE, folder)
    return next((place for place in places if (place / MANIFEST).is_file()), None)


def making_of(base: Path) -> Making | None:
    """Return what is noted of how a base was made; None where a run did not calibrate it. Raises
    ModelError where the note is damaged."""
    values = read_object(base / MANIFEST).get("making")
    if values is None:
        return None
    fix = "make the base anew"
    return validated(Making, values, ModelError, fix=fix, where=str(base / MANIFEST))


def suits(run: Path, plan: Plan) -> bool:
    """Say whether the folder of a run holds a base that `plan` could take, going by settings; what
    its data are is not looked at."""
    base = base_in(run / BASE)
    try:
        making = making_of(base) if base else None
    except ModelError:
        return False
    return making is not None and not difference(making.of, settings_of(plan))


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say why a base is not the one that would be made now; empty where it is. What `now` does not
    say is not compared; a model of which nothing is known is like no other."""
    for key, value in now.items():
        if then.get(key) != value or (key == MODEL and not value):
            before, after = _short(then.get(key)), _short(value)
            told = f"it was made with {key} {before}, and this run has {after}"
            return _OTHERS.get(key, told)
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def look_at_reused(plan: Plan) -> tuple[list[Problem], list[str]]:
    """Return what is wrong with `reuse_base` of a plan, and what to tell of it."""
    given = plan.spec.reuse_base
    if given is None:
        return [], []
    if not plan.calibrates:
        why = "the model is quantized already" if plan.adopt else "this backend needs no data"
        return [], [f"{KEY} has no effect: {why}"]
    if plan.spec.train.resume and base_in(Path(plan.spec.output or "").expanduser() / BASE):
        return [], [f"{KEY} has no effect on a resumed run, whose base is there"]
    fix = "name the folder of a run whose backend calibrates, or leave it out"
    if problem := path_problem(given):
        return [Problem(f"{given!r} is no path: {problem}", fix, where=KEY)], []
    base = base_in(Path(given).expanduser())
    if base is None:
        return [Problem(f"there is no base of a run in {given}", fix, where=KEY)], []
    try:
        making = making_of(base)
    except ModelError as error:
        return list(error.problems), []
    if making is None:
        what = f"nothing tells what the base in {given} was calibrated on"
        return [Problem(what, fix, where=KEY)], []
    if other := difference(making.of, settings_of(plan)):
        what = f"the base in {given} is not the one that this run would make: {other}"
        return [Problem(what, fix, where=KEY)], []
    took = duration(making.seconds)
    note = f"the base is taken from {given}, if it was calibrated on these data; that took {took}"
    return [], [note]
