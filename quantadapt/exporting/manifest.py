"""`quantadapt.json`, which lies beside every adapter and model and says what base it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..capabilities import Cell
from ..errors import ModelError
from ..folders.atomic import put_back
from ..folders.environment import versions
from ..inputs.documents import problems_in, read_object, shown, validated
from ..inputs.fingerprints import Fingerprint
from ..inputs.weights import file_in
from ..machine import this_machine
from ..paths import BASE as BASE
from ..paths import MANIFEST as MANIFEST
from ..paths import is_entry, path_problem
from ..planning.peft_options import peft_options
from ..planning.refusals import make_cell
from ..planning.streaming import Stream
from ..quantizing.state import ModelState
from ..records import Adapter, Backend
from ..registry.discovery import registry
from .adapter_files import CONFIG

ADAPTER = "adapter"
MERGED = "merged"
FORMAT = 1
"""The layout of the file; an older version of quantadapt refuses a newer one."""

Dtype = Literal["float32", "bfloat16", "float16"]


def write_manifest(folder: Path, state: ModelState, **more: Any) -> None:
    """Write what `state` knows of the base, with versions and `more`, into `folder`."""
    known = {"format": FORMAT, "versions": versions(state.backend.requires)}
    manifest = state.manifest() | known | more
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def adapter_in(folder: Path) -> Path | None:
    """Return the PEFT folder of a run folder or of itself, or None."""
    if path_problem(str(folder)):
        return None
    places = (folder / ADAPTER, folder)
    return next((f for f in places if os.path.lexists(f / CONFIG)), None)


def adapter_folder(folder: Path) -> Path:
    """Return the PEFT folder of a run folder or of itself. Raises ModelError if there is none."""
    if problem := path_problem(str(folder)):
        raise ModelError(f"it is no path: {problem}", fix="check the path", where=str(folder))
    if (found := adapter_in(put_back(folder))) is None:
        fix = "pass the folder of a run, or of an adapter"
        raise ModelError("there is no adapter here", fix=fix, where=str(folder))
    return found


class Manifest(BaseModel):
    """What `quantadapt.json` holds, at least; exports may add to it."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int = Field(ge=1)
    base: str
    backend: str
    options: dict[str, Any]
    dtype: Dtype
    skip_modules: list[str]
    new_modules: list[str] = Field(default_factory=list)
    unused_modules: list[str] = Field(default_factory=list)
    adapter: str | None
    adapter_options: dict[str, Any] = Field(default_factory=dict)
    adapter_config: dict[str, dict[str, Any]] = Field(default_factory=dict)
    max_length: int | None = Field(None, ge=1)
    pooling: Literal["", "mean", "cls", "lasttoken"] = ""
    head: Literal["", "sequence", "token"] = ""
    labels: list[str] = Field(default_factory=list)
    begun_at_random: list[str] = Field(default_factory=list)
    stream: Stream = "none"
    rewritten: bool = False
    begun_elsewhere: bool = False
    changed: bool = False
    fingerprint: Fingerprint | None = None
    base_id: str = ""
    active: list[str] = Field(default=["default"], min_length=1)

    @field_validator("active")
    @classmethod
    def _are_names(cls, value: list[str]) -> list[str]:
        if wrong := [name for name in value if not is_entry(name)]:
            raise ValueError(f"should be names of adapters, which {wrong[0]!r} is not")
        return value

    @field_validator("base")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if value and (problem := path_problem(value)):  # empty: a live module
            raise ValueError(f"should be a path or a hub id: {problem}")
        return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote about the base: checked, and with options that the backend has.

    Raises:
        ModelError: it is not there, was damaged, or a newer version wrote it.
        PlanRefused: the backend or the adapter is not installed.
    """
    file = file_in(folder, MANIFEST)
    if not file.exists():
        what = f"{MANIFEST} is missing, so nothing says which base this belongs to"
        fix = "load it with peft: PeftModel.from_pretrained(base, folder)"
        raise ModelError(what, fix=fix, where=str(folder))
    fix = "restore the file from where you have the folder from"
    values = read_object(file, fix=fix)
    newest = values.get("format")
    if isinstance(newest, int) and newest > FORMAT:
        what = f"a newer quantadapt wrote it: its format is {newest}, this version reads {FORMAT}"
        raise ModelError(what, fix="pip install --upgrade quantadapt", where=str(file))
    manifest = validated(Manifest, values, fix=fix, where=str(file)).model_dump()
    backend = registry().backend(manifest["backend"])
    problems = [f"option {text}" for text in problems_in(backend.quantizer, manifest["options"])]
    if manifest["adapter"] is not None:
        known = peft_options(registry().adapter(manifest["adapter"]))
        for name, value in manifest["adapter_options"].items():
            if name not in known:
                problems.append(f"the installed PEFT has no adapter option {shown(name)}")
            elif not known[name].accepts(value):
                wanted = known[name].annotation
                problems.append(f"adapter option {name} is {shown(value)}, not of type {wanted}")
    if problems:
        raise ModelError(f"it cannot be used: {'; '.join(problems)}", fix=fix, where=str(file))
    return manifest


def combination(manifest: Mapping[str, Any]) -> tuple[Cell, Backend, Adapter]:
    """Return what a saved adapter was trained with, as rules look at it on this machine.

    Raises:
        ModelError: `manifest` is that of a base, without an adapter.
    """
    if manifest["adapter"] is None:
        fix = "pass the folder of a run, or of an adapter"
        raise ModelError(f"{MANIFEST} says of no adapter", fix=fix)
    backend = registry().backend(manifest["backend"])
    adapter = registry().adapter(manifest["adapter"])
    quantizer = backend.quantizer(**manifest["options"])
    options = {**adapter.defaults, **manifest.get("adapter_options", {})}
    device = this_machine().default_device
    noted = manifest.get("fingerprint")
    cell = make_cell(
        *(backend, quantizer, adapter, options, device, manifest["dtype"]),
        model=manifest["base"],
        fingerprint=None if noted is None else Fingerprint.model_validate(noted),
    )
    return cell, backend, adapter


def base_id_of(base: Path) -> str:
    """Return what a base and the adapter beside it are told to belong together by; empty for one
    that is not there, or that no adapter was saved with."""
    noted: str = read_manifest(base)["base_id"] if (base / MANIFEST).exists() else ""
    return noted
