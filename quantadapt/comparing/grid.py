"""The grid: what is compared, and the runs that it comes to.

    spec:    all that the runs have in common
    grid:    {backend: [hqq, bnb-nf4], adapter: [lora, dora], train.learning_rate: [1e-4, 3e-4]}

A cell is one value of each axis but the seed; a run is a cell with a seed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from ..errors import PlanRefused, Problem, SpecError
from ..inputs.likely_names import did_you_mean
from ..inputs.typed import Typed
from ..records import Adapter, Backend, as_call
from ..registry.discovery import registry
from ..spec import Spec, named, put, wrong_value

ALL = "all"
"""In the place of backends or adapters: every one that is registered."""
DENSE = "none"
"""The backend of the reference."""
NAMED = {"backend": Backend, "adapter": Adapter}
MOST = 10_000
"""Runs in a grid; more is a slip of the pen."""
_MAY_DIFFER = ("backend", "adapter", "train", "export", "seed", "dtype", "skip_modules")
"""Keys of the spec, or their sections, that runs of one table may differ in."""
_MAY_NOT = ("train.resume", "train.report_to", "train.max_time")

Prefer = Literal["size", "memory", "time"]


class Options(Typed):
    """How runs are compared.

    Attributes:
        budget: hours of GPUs, or of the machine where there is none; the worst are dropped early.
        reference: also train the first adapter on the dense base.
        by: the figure that quality is judged by; the first of the first evaluation if empty.
        within: what counts as near the best: a share of it, of figures in percent in points.
        prefer: what is to be small among those.
        keep_merged: keep the merged models that are made to measure them.
        gpus: how many GPUs to use; all by default.
        at_once: how many runs share each GPU, or the machine where there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float | None = Field(None, gt=0)
    reference: bool = True
    by: str = ""
    within: float = Field(0.01, ge=0, lt=1)
    prefer: Prefer = "size"
    keep_merged: bool = False
    gpus: int | None = Field(None, ge=1)
    at_once: int = Field(1, ge=1)


@dataclass(frozen=True)
class Cell:
    """What is compared: one value of each axis but the seed.

    Attributes:
        pair: backend and adapter with their options, e.g. `hqq(bits=3) x lora`.
        rest: its other settings, e.g. `learning_rate=0.0003`; may be empty.
        settings: axis -> value.
        reference: it is there to be compared with, and not recommended.
    """

    pair: str
    rest: str
    settings: Mapping[str, Any]
    reference: bool = False

    @property
    def label(self) -> str:
        """All of it, for people; no two cells have the same."""
        return ", ".join(filter(None, (self.pair, self.rest)))


@dataclass(frozen=True)
class Run:
    """A cell with a seed. `name` is that of its folder."""

    name: str
    cell: Cell
    seed: int
    spec: Spec


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how. Make it with `comparison`.

    Attributes:
        common: what the runs have in common, as a YAML file says it.
        grid: axis -> its values; backend, adapter and seed are always there.
    """

    common: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    options: Options
    runs: tuple[Run, ...]

    @property
    def cells(self) -> list[Cell]:
        """The cells, references first."""
        return list({run.cell.label: run.cell for run in self.runs}.values())

    @property
    def spec(self) -> Spec:
        """That of the first run."""
        return self.runs[0].spec

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data. Whether code is trusted is asked for each time anew."""
        common = {k: v for k, v in self.common.items() if k != "trust_remote_code"}
        grid = {key: list(values) for key, values in self.grid.items()}
        return {"spec": common, "grid": grid, "compare": self.options.model_dump()}


def comparison(
    common: Mapping[str, Any],
    grid: Mapping[str, Any],
    *,
    seeds: int | None = None,
    **options: Any,
) -> Comparison:
    """Return a comparison. Raises SpecError or PlanRefused with all that is wrong.

    Args:
        common: what all runs have in common, as `Spec` takes it.
        grid: axis, a dotted key of the spec -> list of its values.
        seeds: so many, from the common one on; instead of an axis `seed`.
        options: see `Options`.
    """
    problems = list(_axis_problems(grid))
    chosen = _options(options, problems)
    if seeds is not None and not (type(seeds) is int and seeds >= 1):
        problems.append(Problem(f"{seeds!r} is not possible", "use a number, 1 or more", "seeds"))
    if seeds is not None and "seed" in grid:
        problems.append(Problem("the grid has seeds already", "say it once", "seeds"))
    if problems:
        raise SpecError(problems)
    axes = _axes(common, grid, seeds)
    count = len([*_settings(axes)]) if _size(axes) <= MOST else _size(axes)
    if count > MOST:
        fix = f"take fewer values: at most {MOST} runs"
        raise SpecError([Problem(f"the grid comes to {count} runs", fix, "grid")])
    if count == 1:
        what = "there is nothing to compare: the grid has one run"
        fix = "name several backends, adapters or seeds, or use quantadapt run for one run"
        raise SpecError([Problem(what, fix, where="grid")])
    _check_names(axes)
    cells = _cells(axes, chosen.reference)
    return Comparison(common, axes, chosen, tuple(_runs(common, cells, axes["seed"])))


# What is wrong ----------------------------------------------------------------------------------


def _axis_problems(grid: object) -> Iterator[Problem]:
    if not isinstance(grid, Mapping):
        fix = "write keys with lists of values, e.g. {backend: [hqq, bnb-nf4]}"
        yield Problem(f"{grid!r} is no mapping", fix, where="grid")
        return
    for key, values in grid.items():
        where = f"grid.{key}"
        section = str(key).partition(".")[0]
        if section not in Spec.model_fields:
            yield Problem(f"unknown key {key!r}", did_you_mean(section, Spec.model_fields), where)
        elif section not in _MAY_DIFFER or key in _MAY_NOT:
            what = "it is the same in all runs, or their figures could not be compared"
            fix = f"say it beside the grid; runs may differ in {', '.join(_MAY_DIFFER)}"
            yield Problem(what, fix, where)
        elif not isinstance(values, (list, tuple)):
            if not (values == ALL and key in NAMED):
                yield Problem(f"{values!r} is no list", f"write [{_shown(values)}]", where)
        elif not values:
            yield Problem("the list is empty", "name a value, or leave the key out", where)
        elif twice := _repeated(values):
            yield Problem(f"{twice} is named twice", "name it once", where)


def _repeated(values: Sequence[Any]) -> str:
    """Return a value that is there twice, as text; empty where none is."""
    seen: set[str] = set()
    for value in values:
        text = f"{type(value).__name__} {_shown(value)}"
        if text in seen:
            return _shown(value)
        seen.add(text)
    return ""


def _options(given: Mapping[str, Any], problems: list[Problem]) -> Options:
    try:
        return Options(**given)
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            if detail["type"] == "extra_forbidden":
                hint = did_you_mean(name, Options.model_fields)
                problems.append(Problem(f"unknown key {name!r}", hint, f"compare.{name}"))
            else:
                problems.append(wrong_value(dict(detail), f"compare.{name}"))
        return Options()


def _check_names(axes: Mapping[str, Sequence[Any]]) -> None:
    """Raise PlanRefused where a backend or adapter is not known: more than one cell is lost."""
    problems = []
    for key, kind in NAMED.items():
        for value in axes[key]:
            name = value.get("name") if isinstance(value, Mapping) else value
            if not isinstance(name, str):
                fix = "write a name, or {name: ..., option: ...}"
                problems.append(Problem(f"{_shown(value)} names no {key}", fix, f"grid.{key}"))
                continue
            try:
                registry().record(kind, name)  # type: ignore[type-var]
            except PlanRefused as error:
                problems += error.problems
    if problems:
        raise PlanRefused(problems)


# Cells and runs ---------------------------------------------------------------------------------


def _axes(
    common: Mapping[str, Any], grid: Mapping[str, Any], seeds: int | None
) -> dict[str, list[Any]]:
    """Return the axes, backend and adapter first and the seed last, each with its values."""
    axes: dict[str, list[Any]] = {}
    known = {
        "backend": [record.name for record in registry().backends()],
        "adapter": [record.name for record in registry().adapters()],
    }
    for key in NAMED:
        if grid.get(key) == ALL:
            axes[key] = known[key]
        else:
            axes[key] = [_short(v) for v in grid.get(key, [_common(common, key)])]
    axes |= {key: list(grid[key]) for key in grid if key not in (*NAMED, "seed")}
    first = common.get("seed", 0)
    if "seed" in grid:
        axes["seed"] = list(grid["seed"])
    else:
        whole = isinstance(first, int) and not isinstance(first, bool)
        axes["seed"] = [first + i for i in range(seeds or 1)] if whole else [first]
    return axes


def _common(common: Mapping[str, Any], key: str) -> Any:
    value = common.get(key)
    return (
        value
        if value is not None
        else Spec.model_fields[key].get_default(call_default_factory=True).name
    )


def _short(value: Any) -> Any:
    """Return `{name: x}` as `x`, so that the same thing is written in one way."""
    return value["name"] if isinstance(value, Mapping) and [*value] == ["name"] else value


def _size(axes: Mapping[str, Sequence[Any]]) -> int:
    size = 1
    for values in axes.values():
        size *= len(values)
    return size


def _settings(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _cells(axes: Mapping[str, Sequence[Any]], reference: bool) -> list[Cell]:
    """Return the cells, references first: what is in the grid on the dense base, and else the
    first adapter (LoRA, if it is there) on it, with all else but what a backend is told."""
    own = {key: values for key, values in axes.items() if key != "seed"}
    found = [Cell(*in_words(s), s) for s in _settings(own)]
    names = [_name(value) for value in axes["backend"]]
    if not reference or DENSE in names:
        return sorted(found, key=lambda cell: _name(cell.settings["backend"]) != DENSE)
    loras = [value for value in axes["adapter"] if _name(value) == "lora"]
    beside = {key: values for key, values in own.items() if not key.startswith("backend.")}
    beside |= {"backend": [DENSE], "adapter": [*loras, axes["adapter"][0]][:1]}
    return [*(Cell(*in_words(s), s, reference=True) for s in _settings(beside)), *found]


def _name(value: Any) -> str:
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def in_words(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return `hqq(bits=3) x lora`, and `learning_rate=0.0003`."""
    parts = []
    for kind in NAMED:
        value = settings[kind]
        options = (
            {k: v for k, v in value.items() if k != "name"} if isinstance(value, Mapping) else {}
        )
        options |= {
            key.partition(".")[2]: v for key, v in settings.items() if key.startswith(f"{kind}.")
        }
        parts.append(as_call(_name(value), options))
    rest = [
        f"{key.removeprefix('train.')}={_shown(value)}"
        for key, value in settings.items()
        if key.partition(".")[0] not in NAMED
    ]
    return " x ".join(parts), ", ".join(rest)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _runs(common: Mapping[str, Any], cells: Sequence[Cell], seeds: Sequence[Any]) -> Iterator[Run]:
    """Yield a run for each cell and seed. Raises SpecError with all mistakes of all of them."""
    problems: dict[Problem, None] = {}
    made: list[Run] = []
    taken: set[str] = set()
    for cell in cells:
        for seed in seeds:
            values = _values(common, {**cell.settings, "seed": seed}, seeds)
            try:
                spec = Spec(**values)
            except SpecError as error:
                problems |= dict.fromkeys(error.problems)
                continue
            name = f"{_slug(cell)}-seed{seed}"
            if name in taken:
                name = f"{name}-{_digest(cell)}"
            taken.add(name)
            made.append(Run(name, cell, seed, spec))
    if problems:
        raise SpecError([*problems])
    yield from made


def _values(
    common: Mapping[str, Any], settings: Mapping[str, Any], seeds: Sequence[Any]
) -> dict[str, Any]:
    """Return what the spec of a run says. All runs are measured on the same held-out data."""
    values: dict[str, Any] = deepcopy(dict(common))
    for key, value in settings.items():
        if key in NAMED:
            same = named(values.get(key), value) if isinstance(value, str) else dict(value)
            values[key] = same
        else:
            put(values, key, deepcopy(value))
    put(values, "data.split_seed", _split_seed(common, seeds))
    return values


def _split_seed(common: Mapping[str, Any], seeds: Sequence[Any]) -> Any:
    data = common.get("data")
    given = data.get("split_seed") if isinstance(data, Mapping) else None
    return seeds[0] if given is None else given


def _slug(cell: Cell) -> str:
    """Return the label as the name of a folder."""
    text = re.sub(r"[^\w.]+", "-", cell.label.replace(" x ", "-"), flags=re.ASCII).strip("-.")
    return text if len(text) <= 80 else f"{text[:70]}-{_digest(cell)}"


def _digest(cell: Cell) -> str:
    return hashlib.sha256(cell.label.encode()).hexdigest()[:8]
