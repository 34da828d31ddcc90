"""What was verified of the compatibility matrix: cells, files of them, and where they disagree with
what is declared.

`quantadapt matrix --verify` writes the files, or the conformance suite:

    {"generated": {"date": "...", "device": "...", "versions": {"torch": "..."}},
     "cells": [
      {"backend": "hqq", "options": {}, "adapter": "lora", "device": "cpu", "dtype": "float32",
       "declared": "requantize", "verified": "passed", "merge_error": 1e-7}]}

`generated` says what all cells have in common; a cell of other origin says so under "origin".
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.requirements import Requirement

from .. import __version__
from ..errors import DataError, PlanRefused
from ..machine import installed_version
from ..records import Adapter, Backend
from ..registry.discovery import registry
from .declared import MAIN, DeclaredCell, backend_title, declared_cell, preferred_dtype

Outcome = Literal["passed", "refused", "failed", "crashed", "not run"]

BUNDLED = Path(__file__).parent
"""Where the verified results that come with this version are: matrix-cpu.json, ..."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
"""What every result depends on; the backend's own requirements and its plugin come on top."""

HOW = "quantadapt matrix --verify"

QUANTIZED = 0.95
"""From this share of its weights on, embeddings and head not counted, a mixture of experts counts
as quantized."""


@dataclass(frozen=True)
class VerifiedCell:
    """What the conformance suite found for one cell.

    Attributes:
        options: the backend's, where they differ from its defaults.
        declared: what was declared at that time, a key of MEANING; empty if not known.
        figures: what was measured; errors are relative.
        detail: what went wrong, or why it was not run.
        origin: "date", "device" in words, "python" and "versions".
    """

    backend: str
    adapter: str
    verified: Outcome
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    declared: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What tells cells apart: backend, options, adapter, device and dtype."""
        options = json.dumps(self.options, sort_keys=True, default=str)
        return (self.backend, options, self.adapter, self.device, self.dtype)

    @property
    def title(self) -> str:
        """The combination, as people write it."""
        return f"{backend_title(self.backend, self.options)} x {self.adapter}"

    @property
    def merge_error(self) -> float | None:
        """The relative error of the merged model's logits; None where nothing was merged."""
        return self.figures.get("merge_error")

    @property
    def experts_share(self) -> float | None:
        """The share of the weights of mixtures of experts that were quantized, embeddings and head
        not counted; None where that was not tried."""
        return self.figures.get("experts_share")

    @property
    def bad(self) -> bool:
        """Whether it does not do what is declared."""
        return self.verified in ("failed", "crashed")

    def text(self) -> str:
        """Return the outcome and the merge error."""
        error = "" if self.merge_error is None else f" {self.merge_error:.0e}"
        return f"{self.verified}{error}"

    def to_dict(self) -> dict[str, Any]:
        """Return it in the format of the file, without the origin."""
        return {
            "backend": self.backend,
            "options": dict(self.options),
            "adapter": self.adapter,
            "device": self.device,
            "dtype": self.dtype,
            "declared": self.declared,
            "verified": self.verified,
            **{name: _rounded(value) for name, value in self.figures.items()},
            **({"detail": self.detail} if self.detail else {}),
        }


@dataclass(frozen=True)
class Verified:
    """One file of verified results: what is common to its cells, and the cells."""

    generated: Mapping[str, Any]
    cells: tuple[VerifiedCell, ...]
    source: str = ""

    @classmethod
    def of(cls, cells: Iterable[VerifiedCell], source: str = "") -> Verified:
        """Return `cells` in the order of the tables; of several with one key the last counts."""
        kept = {cell.key: cell for cell in cells}
        found = sorted(kept.values(), key=_place)
        return cls(_common([cell.origin for cell in found]), tuple(found), source)

    @property
    def origin(self) -> str:
        """Say where and with which versions, in one line."""
        facts = dict(self.generated)
        versions = facts.pop("versions", None) or {}
        if python := facts.pop("python", None):
            versions = {"python": python, **versions}
        if "date" not in facts:
            dates = sorted(
                {str(cell.origin["date"]) for cell in self.cells if "date" in cell.origin}
            )
            facts = {"date": " to ".join(dict.fromkeys((*dates[:1], *dates[-1:]))), **facts}
        parts = [str(value) for value in facts.values() if value]
        parts += [f"{name} {version}" for name, version in versions.items() if version]
        return ", ".join(parts) or "unknown"

    def where(self) -> str:
        """Say on which devices, shortly: "CPU", "CUDA"."""
        return ", ".join(dict.fromkeys(cell.device.upper() for cell in self.cells)) or "nothing"

    def by_device(self) -> list[Verified]:
        """Return it taken apart, so that each part is about one device."""
        devices = dict.fromkeys(cell.device for cell in self.cells)
        if len(devices) < 2:
            return [self]
        parts = ([cell for cell in self.cells if cell.device == device] for device in devices)
        return [Verified.of(cells, self.source) for cells in parts]

    def only(self, wanted: Callable[[VerifiedCell], bool]) -> Verified:
        """Return it with the cells that are `wanted`."""
        return Verified(self.generated, tuple(filter(wanted, self.cells)), self.source)

    def to_dict(self) -> dict[str, Any]:
        """Return it in the format of the file."""
        cells = []
        for cell in self.cells:
            differing = _difference(cell.origin, self.generated)
            cells.append({**cell.to_dict(), **({"origin": differing} if differing else {})})
        return {"generated": dict(self.generated), "cells": cells}

    def to_json(self) -> str:
        """Return the text of the file: one cell per line."""
        document = self.to_dict()
        lines = ",\n  ".join(json.dumps(cell, default=str) for cell in document["cells"])
        generated = json.dumps(document["generated"], default=str)
        return f'{{\n "generated": {generated},\n "cells": [\n  {lines}\n ]\n}}\n'


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _place(cell: VerifiedCell) -> tuple[Any, ...]:
    main = MAIN.index(cell.adapter) if cell.adapter in MAIN else len(MAIN)
    usual = cell.dtype == preferred_dtype(cell.device)
    options = json.dumps(cell.options, sort_keys=True, default=str)
    return (cell.device, cell.backend, bool(cell.options), options, not usual, main, cell.adapter)


def _common(origins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all origins say alike; within "versions", name by name."""
    first = origins[0] if origins else {}
    found = {}
    for name, value in first.items():
        values = [origin.get(name) for origin in origins]
        if isinstance(value, Mapping):
            found[name] = _common([other or {} for other in values])
        elif all(other == value for other in values):
            found[name] = value
    return found


def _difference(origin: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `common` does not say, so that `_sum` gives `origin` again."""
    found = {}
    for name, value in origin.items():
        if isinstance(value, Mapping):
            value = _difference(value, common.get(name) or {})
            if value:
                found[name] = value
        elif name not in common or common[name] != value:
            found[name] = value
    return found


def _sum(common: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    versions = {**(common.get("versions") or {}), **(rest.get("versions") or {})}
    return {**common, **rest, **({"versions": versions} if versions else {})}


def origin_of(backend: Backend, device: str) -> dict[str, Any]:
    """Return date, device (as it is called here) and versions, for results of today."""
    versions = {"quantadapt": __version__}
    try:
        provenance = registry().provenance(backend)
    except PlanRefused:  # a record that no plugin gave
        provenance = None
    if provenance and provenance.distribution not in ("", "quantadapt"):
        versions[provenance.distribution] = provenance.version
    needed = [Requirement(text).name for text in backend.requires]
    versions |= {name: installed_version(name) or "" for name in (*PACKAGES, *needed)}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def read_verified(path: str | Path) -> Verified:
    """Read a file of verified results. Raises DataError where it is none."""
    fix = f"write it with `{HOW}`"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", fix=fix, where=str(path)) from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", fix=fix, where=str(path)) from None
    try:
        generated = dict(values.get("generated", {}))
        cells = tuple(verified_cell(cell, generated) for cell in values["cells"])
        return Verified(generated, cells, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"not a file of verified results: {error!r}"
        raise DataError(what, fix=fix, where=str(path)) from None


def verified_cell(
    values: Mapping[str, Any], generated: Mapping[str, Any] | None = None
) -> VerifiedCell:
    """Return one cell of a file; `generated` is what the file says of all of them."""
    rest = dict(values)
    names = ("backend", "adapter", "verified")
    backend, adapter, outcome = (str(rest.pop(name)) for name in names)
    if outcome not in get_args(Outcome):
        raise ValueError(f"verified is {outcome!r}")
    texts = {n: str(rest.pop(n)) for n in ("device", "dtype", "detail") if n in rest}
    return VerifiedCell(
        backend,
        adapter,
        outcome,  # type: ignore[arg-type]
        options=dict(rest.pop("options", {})),
        declared=str(rest.pop("declared", "")).lower(),
        origin=_sum(generated or {}, rest.pop("origin", {})),
        figures={n: float(v) for n, v in rest.items() if v is not None and n != "failed"},
        **texts,
    )


def bundled() -> list[Verified]:
    """Return the verified results that come with this version."""
    return [read_verified(file) for file in sorted(BUNDLED.glob("matrix-*.json"))]


def disagreements(
    parts: Iterable[Verified], backends: Iterable[Backend], adapters: Iterable[Adapter]
) -> list[str]:
    """Return a sentence for each way in which verified results and declarations disagree.

    Args:
        parts: the results that are to hold for `backends` and `adapters`.
        backends: each has to be verified on a CPU, if it runs on one, with the MAIN adapters.
        adapters: what the results may speak of.
    """
    known_backends = {backend.name: backend for backend in backends}
    known_adapters = {adapter.name: adapter for adapter in adapters}
    found, verified = [], set()
    for cell in (cell for part in parts for cell in part.cells):
        where = f"{cell.title} on {cell.device} in {cell.dtype}"
        if cell.bad:
            found.append(f"{where}: {cell.verified}. {cell.detail}".strip())
        if cell.backend not in known_backends or cell.adapter not in known_adapters:
            found.append(f"{where}: there is no such backend or adapter")
            continue
        now = declared_cell(
            known_backends[cell.backend],
            known_adapters[cell.adapter],
            device=cell.device,
            dtype=cell.dtype,
            options=cell.options,
        ).word
        if not _agree_on_experts(cell, known_backends[cell.backend]):
            found.append(f"{where}: quantized {cell.experts_share:.0%} of models with experts")
        if cell.declared != now:
            found.append(f"{where}: declared {now} now, {cell.declared or 'nothing'} when verified")
        if cell.verified != "not run" and not cell.options:
            verified.add((cell.backend, cell.adapter, cell.device))
    for backend in known_backends.values():
        missing = [name for name in MAIN if (backend.name, name, "cpu") not in verified]
        if missing and "cpu" in backend.devices:
            found.append(f"{backend.name} x {', '.join(missing)}: not verified on cpu")
    return found


def _agree_on_experts(cell: VerifiedCell, backend: Backend) -> bool:
    share = cell.experts_share
    return share is None or (share >= QUANTIZED) == backend.quantizes_experts(cell.options)


def to_json(cells: Sequence[DeclaredCell], verified: Sequence[Verified]) -> dict[str, Any]:
    """Return both parts as JSON-ready data."""
    return {
        "declared": [cell.to_dict() for cell in cells],
        "verified": [part.to_dict() for part in verified],
    }
