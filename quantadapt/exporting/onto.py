"""Merge an adapter onto an unquantized base, shard by shard.

Works for every backend, because the base that the adapter was trained on is not needed: memory is
bounded by the largest shard and the embeddings, whatever the size of the model. For the check the
adapter runs on the base, layer by layer from disk, and what was written as transformers reads it,
block by block from disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..capabilities import Cell
from ..dependencies import in_turn
from ..errors import MergeRefused, Problem
from ..evaluation.held_out import held_out_data
from ..inputs.fingerprints import Fingerprint, fingerprint_of
from ..inputs.weights import refuse_link_out
from ..machine import this_machine
from ..paths import INDEX
from ..planning.on_disk import check_model
from ..planning.refusals import onto_refusals
from ..protocols import Exporter, Figure
from ..records import Adapter, Backend
from ..registry.blame import blaming_plugins
from ..registry.discovery import registry
from ..remote_code import trusting
from .adapter_files import adapter_places, check_adapters, refuse_not_trained
from .adapters import put_on
from .kept import merge_words
from .manifest import MANIFEST, MERGED, adapter_folder, combination
from .same_base import FORCE, noted, original_problem, tell_unknown_original
from .stage import write
from .tuned import Tuned, compared

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


class OntoBase(Exporter):
    """The adapter merged onto the unquantized base, shard by shard."""

    base: str = Field(description="folder or hub id of the unquantized safetensors checkpoint")
    check: bool = Field(
        True, description="compare what is written with base and adapter before it is put in place"
    )
    force_base: bool = Field(
        False, description="merge though it is not what the adapter's base was made from"
    )

    @property
    def folder(self) -> str:
        return MERGED

    @property
    def planned(self) -> str:
        return f"model merged onto {self.base}"

    def done(self, figures: Mapping[str, Figure]) -> str:
        return ", ".join(filter(None, [f"onto {self.base}", merge_words(figures)]))

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        found = check_model(self.base)
        if found:
            return found
        other = None if self.force_base else self._other(cell.fingerprint)
        return onto_refusals(backend, adapter, cell, self.base) + ([other] if other else [])

    def _other(self, then: Fingerprint | None) -> Problem | None:
        return original_problem(then, fingerprint_of(self.base), self.base)

    def _changed(self, manifest: Mapping[str, Any]) -> Problem | None:
        if not manifest["changed"]:
            return None
        what = "another adapter had changed the base that this one was trained on, for good:"
        what = f"{what} {self.base} lacks what that has learnt"
        fix = f"merge it into its own base, or pass what that was merged into, and {FORCE}"
        return Problem(what, fix, "base")

    def needed(self, tuned: Tuned) -> int:
        from ..loading.tensors import Checkpoint

        return Checkpoint(os.path.expanduser(self.base)).size

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        from ..adapting.method import config_class
        from ..loading.accounting import expecting
        from .checking import refuse_other_files
        from .merging import check_mergeable
        from .shards import MergedShards

        known, base = tuned.manifest, os.path.expanduser(self.base)
        adapter = registry().adapter(known["adapter"])
        config_class(adapter)  # PEFT may not know it yet
        check_adapters(tuned.adapter, known, adapter)
        device = this_machine().default_device if tuned.device == "auto" else tuned.device
        data = tuned.held_out if self.check else None  # told before the work if it is of no use
        with expecting(known["new_modules"], known["unused_modules"]):
            under = _Opened(base, device)
        self._refuse_other(known)
        tell_unknown_original(noted(known), fingerprint_of(self.base), self.base)
        attached = under.attached(tuned.adapter, known["active"])
        check_mergeable(attached)
        shards = MergedShards(attached, under.stored, under.ties, under.trained)
        meant = shards.write(folder, sketched=self.check)
        _copy_rest(under.stored.checkpoint.folder, tuned.adapter, folder)
        if shards.unties:
            _untie(folder, under.config)
        text = json.dumps({**known, "base": base}, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        found = {"layers": Figure(shards.layers)}
        if data is None:
            return found
        refuse_other_files(meant, folder)
        return found | under.checked(attached, folder, data)

    def _refuse_other(self, known: Mapping[str, Any]) -> None:
        """Raise MergeRefused where the base is not what the adapter's was made from, once it is
        here: a hub id may not have been before."""
        other = None if self.force_base else self._changed(known) or self._other(noted(known))
        if other:
            raise MergeRefused([other])


@in_turn
@blaming_plugins
def merge_onto(
    adapter: str | Path | PeftModel,
    base: str,
    path: str | Path,
    *,
    data: str | Dataset | None = None,
    check: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    force_base: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge an adapter onto an unquantized base and write `path/merged`, shard by shard.

    Args:
        adapter: a run folder, an adapter folder, or a model with an adapter.
        base: folder or hub id of the unquantized safetensors checkpoint.
        path: gets a folder `merged` that transformers loads.
        data: held-out data for the check, as for `evaluate`; the demo's if missing.
        check: compare what was written with base and adapter, token by token, before it is put
            into place. Runs both models with their layers on disk.
        device: where layers are merged and the check runs: auto, cpu, cuda, ...
        overwrite: replace an earlier `merged`.
        force_base: merge though `base` is not what the adapter's base was made from.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        kind ("onto"), base, layers (how many were merged), and with `check` kl (nats per token),
        top1 (share), perplexity_adapter (on the unquantized base) and perplexity_merged;
        of a model that predicts no tokens error, as `merge` does.

    Raises:
        MergeRefused: a rule forbids it. ModelError: the adapter does not fit `base`.
    """
    saved = isinstance(adapter, (str, Path))
    tuned = Tuned(
        live=None if saved else adapter,  # type: ignore[arg-type]
        saved=adapter_folder(Path(adapter)) if saved else None,  # type: ignore[arg-type]
        device=device,
        data=lambda own: held_out_data(data, own, tuned.manifest.get("max_length")),
    )
    exporter = OntoBase(base=base, check=check, force_base=force_base)
    with trusting(trust_remote_code):
        check_onto(tuned.manifest, exporter)
        found = write(exporter, tuned, Path(path) / MERGED, overwrite=overwrite)
    values = {name: figure.value for name, figure in found.items()}
    return {"kind": "onto", "base": os.path.expanduser(base), **values}


def check_onto(manifest: Mapping[str, Any], exporter: OntoBase) -> None:
    """Raise MergeRefused where the adapter of `manifest` must not be merged onto that base."""
    if found := exporter.refusals(*combination(manifest)):
        raise MergeRefused(found)


class _Opened:
    """A base whose layers stay on disk, computing in float32, and what has to be known of it before
    PEFT changes its tree.

    Attributes:
        stored: its parameters, in its files.
        ties: its parameters that are tied.
        trained: once an adapter is attached, names of its own parameters that the adapter holds.
    """

    def __init__(self, base: str, device: str) -> None:
        import torch

        from .stored import open_stored, stored_parameters
        from .ties import tied_groups

        self.device, self.stored = device, stored_parameters(base)
        self.model = open_stored(base, device=device, dtype=torch.float32, parameters=self.stored)
        self.kind, self.config = type(self.model), self.model.config
        self.ties = tied_groups(self.model)
        self.parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.trained: list[str] = []

    def attached(self, adapter: Path, active: list[str]) -> PeftModel:
        """Return it under the saved adapters that are active; see `put_on`."""
        from ..loading.tensors import Checkpoint
        from .merging import adapted_parts

        refuse_not_trained(adapter, active)
        tuned = put_on(self.model, adapter, active).eval()
        places = adapter_places(adapter, active)
        keys = {k for p in places.values() for k in Checkpoint(str(p)).files}
        found = {key.removeprefix("base_model.model.") for key in keys} & self.parameters
        parts = tuple(f"{name}." for name, _ in adapted_parts(tuned.get_base_model()))
        self.trained = sorted(name for name in found if not name.startswith(parts))
        return tuned

    def checked(self, tuned: PeftModel, folder: Path, data: Dataset) -> dict[str, Figure]:
        """Return how far what was written is from the adapter on the base. Raises ModelError where
        that is more than rounding."""
        import torch

        from .checking import blocks_on_disk, refuse_far, written_model

        with blocks_on_disk(folder, self.device) as places:
            options = {"dtype": torch.float32, **places}
            merged = written_model(self.kind, folder, unused=self.stored.unused, **options)
            found = compared(tuned, merged, data)
        dtype = self.stored.dtype(next(iter(self.stored.checkpoint.files)))
        refuse_far(found, dtype, activations=0)
        return found


def _untie(folder: Path, config: Any) -> None:
    """Have the config in `folder` say that head and embedding are two; `config` is the model's."""
    from .ties import untie

    if not untie(config):
        return
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    parts = [values, *(v for v in values.values() if isinstance(v, dict))]
    for part in parts:
        if part is values or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_rest(source: Path, adapter: Path, folder: Path) -> None:
    """Copy config and tokenizer; the adapter's tokenizer wins over the base's."""
    wanted = {".json", ".txt", ".model", ".jinja", ".py"}  # code of the model's own, too
    files = [f for f in source.iterdir() if f.suffix in wanted and f.name not in (INDEX, MANIFEST)]
    files += [f for f in adapter.iterdir() if "token" in f.name or f.suffix == ".jinja"]
    for file in files:
        refuse_link_out(file, file.parent)
        if file.is_file():
            shutil.copy(file, folder / file.name)
