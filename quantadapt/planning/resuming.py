"""What a run that is resumed may change, and a look whether it is still the run that was begun.

The table in docs/reference/resuming.md is made from `on_resume`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ..errors import OutputError, Problem
from ..folders.checkpoints import last_whole, too_few_steps
from ..folders.run_folder import RunFolder, json_ready
from ..inputs.fingerprints import Fingerprint, difference
from ..inputs.plain_yaml import read_yaml
from ..protocols import Quantizer, Task
from ..spec import Named, Spec

OnResume = Literal["may", "more", "must not", "no effect", "not kept"]

KEPT = frozenset(
    (
        *("model", "seed", "dtype", "skip_modules", "skip_misfits", "towers"),
        *("data.image_folder", "data.max_pixels"),
        *("new_modules", "unused_modules"),
        *("data.path", "data.eval_path", "data.eval_fraction", "data.format", "data.columns"),
        *(
            "data.sources",
            "data.eval_examples",
            "data.split_seed",
            "data.max_length",
            "data.max_examples",
        ),
        *("train.learning_rate", "train.lr_scheduler_type", "train.warmup_ratio"),
        "train.lr_scheduler_kwargs",
        *("train.weight_decay", "train.optim", "train.packing", "train.merge_aware"),
        "train.compute",
        *("train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
        "train.context_parallel_size",
    )
)
"""What adapter, optimizer, schedule and the place in the data come from. Beside these, all of
backend, adapter and objective."""

PLACES = frozenset(("model", "data.path", "data.eval_path"))
"""Of these, names of a file or folder: the same one under another name is no change."""

UNUSED = frozenset(("data.calibration_path", "data.calibration_examples"))
"""What only made the base, which a run that is resumed finds in its folder."""

LONGER = frozenset(("train.max_steps", "train.num_train_epochs"))
"""What may grow: a schedule that decays is then the one of the longer run from there on."""

NOT_KEPT = frozenset(("output", "overwrite", "force_base", "reuse_base", "train.resume"))

PARTS = ("backend", "adapter", "objective")


def on_resume(key: str) -> OnResume:
    """Say whether a dotted key of the spec may change when a run is resumed."""
    if key in NOT_KEPT:
        return "not kept"
    if key in UNUSED:
        return "no effect"
    if key in LONGER:
        return "more"
    return "must not" if key in KEPT or key.partition(".")[0] in PARTS else "may"


def keys_of(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a spec."""
    for name, field in record.model_fields.items():
        inner = field.annotation
        if (
            isinstance(inner, type)
            and issubclass(inner, BaseModel)
            and not issubclass(inner, Named)
        ):
            yield from keys_of(inner, f"{name}.")
        else:
            yield prefix + name


def resumed(
    spec: Spec,
    quantizer: Quantizer,
    adapter_options: Mapping[str, Any],
    task: Task,
    processes: int,
    *,
    fingerprint: Fingerprint | None = None,
) -> tuple[Spec, list[Problem], list[str]]:
    """Compare a spec with the run that it goes on with.

    Args:
        fingerprint: what the model is known by now.

    Returns:
        The spec, with what is in force where a key has no effect; what must not be so; notes.
    """
    folder = RunFolder(Path(spec.output or "").expanduser())
    problems, notes = _checkpoint_problems(folder.path, spec), list[str]()
    if not (folder.path / "spec.yaml").is_file():
        return spec, problems, notes  # it ended before it was written down
    written, begun = read_yaml(folder.path / "spec.yaml"), folder.read_json("plan.json")
    now_written, then = spec.model_dump(mode="json"), _facts(written, begun)
    now = {
        "backend": {"name": spec.backend.name, "options": quantizer.model_dump(mode="json")},
        "adapter": {"name": spec.adapter.name, "options": dict(adapter_options)},
        "objective": {"name": spec.objective.name, "options": task.model_dump(mode="json")},
        "processes": processes,
    }
    for key, value in _facts(now_written, now).items():
        if key in then and not _same(key, then[key], value):
            what = f"{value!r} makes it another run; the one in {folder.path} has {then[key]!r}"
            fix = f"resume with {key}={then[key]!r}, or start the other run in another --output"
            if key in PLACES:
                fix += f"; if only its place has changed, change it in {folder.path / 'spec.yaml'}"
            problems.append(Problem(what, fix, where=key))
    problems += [] if spec.force_base else _other_base(begun, fingerprint, spec.model or "")
    earlier, data_then = {}, written.get("data")
    data_then = data_then if isinstance(data_then, Mapping) else {}
    for key in sorted(UNUSED):
        name = key.rpartition(".")[2]
        value, before = now_written["data"].get(name), data_then.get(name)
        if name in data_then and value != before:
            notes.append(f"{key} has no effect on a resumed run, whose base is there: {before!r}")
            earlier[name] = before
    data = spec.data.model_copy(update=earlier)
    return spec.model_copy(update={"data": data}), problems, notes


def _other_base(begun: Mapping[str, Any], now: Fingerprint | None, model: str) -> list[Problem]:
    """Return why the files of `model` are not those that the run was begun with."""
    try:
        then = Fingerprint.model_validate(begun.get("fingerprint"))
    except ValidationError:  # an older version began it
        return []
    found = None if now is None else difference(then, now)
    if not found:
        return []
    what = f"{model} is not the base that the run was begun with: it has {found}"
    fix = "put the files back, start anew in another --output, or --set force_base=true"
    return [Problem(what, fix, where="model")]


def _checkpoint_problems(folder: Path, spec: Spec) -> list[Problem]:
    try:
        last = last_whole(folder)
    except OutputError as error:
        return list(error.problems)
    problem = too_few_steps(last, spec.train) if last else None
    return [problem] if problem else []


def _same(key: str, then: Any, now: Any) -> bool:
    if then == now:
        return True
    if key not in PLACES or not (isinstance(then, str) and isinstance(now, str)):
        return False
    places = [Path(place).expanduser().resolve() for place in (then, now)]
    return places[0] == places[1]


def _facts(spec: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of what a checkpoint depends on; nothing of what was not written
    down."""
    facts: dict[str, Any] = {}
    for key in sorted(KEPT):
        section, _, name = key.rpartition(".")
        values = spec.get(section) if section else spec
        if isinstance(values, Mapping) and name in values:
            facts[key] = values[name]
    for kind in PARTS:
        record = plan.get(kind)
        options = record.get("options") if isinstance(record, Mapping) else None
        if isinstance(record, Mapping) and isinstance(options, Mapping):  # else it was damaged
            values = {"name": record.get("name"), **options}
            facts |= {f"{kind}.{name}": json_ready(value) for name, value in values.items()}
    if "processes" in plan:
        facts["processes"] = plan["processes"]
    return facts
