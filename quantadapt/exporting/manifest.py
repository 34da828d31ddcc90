"""`quantadapt.json`, which lies beside every adapter and model and says what base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..capabilities import Cell
from ..errors import ModelError
from ..folders.environment import environment
from ..machine import this_machine
from ..planning.refusals import make_cell
from ..quantizing.state import ModelState
from ..records import Adapter, Backend
from ..registry.discovery import registry

MANIFEST = "quantadapt.json"
ADAPTER = "adapter"
BASE = "base"
MERGED = "merged"


def write_manifest(folder: Path, state: ModelState, **more: Any) -> None:
    """Write what `state` knows of the base, with versions and `more`, into `folder`."""
    versions = environment(state.backend.requires)["versions"]
    manifest = state.manifest() | {"format": 1, "versions": versions, **more}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def adapter_in(folder: Path) -> Path | None:
    """Return the PEFT folder of a run folder or of itself, or None."""
    places = (folder / ADAPTER, folder)
    return next((f for f in places if (f / "adapter_config.json").exists()), None)


def adapter_folder(folder: Path) -> Path:
    """Return the PEFT folder of a run folder or of itself. Raises ModelError if there is none."""
    if (found := adapter_in(folder.expanduser())) is None:
        fix = "pass the folder of a run, or of an adapter"
        raise ModelError("there is no adapter here", fix=fix, where=str(folder))
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote about the base. Raises ModelError if it is not there."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = f"{MANIFEST} is missing or unreadable, so nothing says which base this belongs to"
        fix = "load it with peft: PeftModel.from_pretrained(base, folder)"
        raise ModelError(what, fix=fix, where=str(folder)) from None
    return manifest


def combination(manifest: Mapping[str, Any]) -> tuple[Cell, Backend, Adapter]:
    """Return what a saved adapter was trained with, as rules look at it on this machine."""
    backend = registry().backend(manifest["backend"])
    adapter = registry().adapter(manifest["adapter"])
    quantizer = backend.quantizer(**manifest["options"])
    options = {**adapter.defaults, **manifest.get("adapter_options", {})}
    device = this_machine().default_device
    cell = make_cell(backend, quantizer, adapter, options, device, manifest["dtype"])
    return cell, backend, adapter
