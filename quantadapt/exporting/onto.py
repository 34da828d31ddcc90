"""Merge an adapter onto an unquantized base, shard by shard.

Works for every backend, because the base that the adapter was trained on is not needed: memory is
bounded by the largest shard (and, for the check, the embeddings), whatever the size of the model.
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
from ..errors import MergeRefused, ModelError, Problem, QuantadaptError
from ..inputs.documents import reason
from ..machine import this_machine
from ..paths import INDEX
from ..planning.on_disk import check_model
from ..planning.refusals import onto_refusals
from ..protocols import Exporter, Figure
from ..records import Adapter, Backend
from ..registry.discovery import registry
from ..stages import held_out_data
from .adapter_files import check_adapter, refuse_not_trained
from .manifest import MANIFEST, MERGED, adapter_folder, combination
from .stage import merge_words, write
from .tuned import Tuned, compared

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor, nn

    from ..loading.tensors import Checkpoint

_IN_MEMORY = "merge it in memory: quantadapt merge, without --onto"


class OntoBase(Exporter):
    """The adapter merged onto the unquantized base, shard by shard."""

    base: str = Field(description="folder or hub id of the unquantized safetensors checkpoint")
    check: bool = Field(
        True, description="compare what is written with base and adapter before it is put in place"
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
        return check_model(self.base) or onto_refusals(backend, adapter, cell, self.base)

    def needed(self, tuned: Tuned) -> int:
        from ..loading.tensors import Checkpoint

        return Checkpoint(os.path.expanduser(self.base)).size

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        import torch

        from ..adapting.method import config_class
        from ..loading.tensors import Checkpoint
        from .stored import open_stored

        adapter = registry().adapter(tuned.manifest["adapter"])
        config_class(adapter)  # PEFT may not know it yet
        check_adapter(tuned.adapter, adapter)
        base, device = os.path.expanduser(self.base), tuned.device
        device = this_machine().default_device if device == "auto" else device
        data = tuned.held_out if self.check else None
        checkpoint = Checkpoint(base)
        model = _attached(base, tuned.adapter, device)
        found = {"layers": Figure(_write_shards(model, checkpoint, folder))}
        _copy_rest(checkpoint.folder, tuned.adapter, folder)
        text = json.dumps({**tuned.manifest, "base": base}, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        if data is not None:
            merged = open_stored(str(folder), device=device, dtype=torch.float32)
            found |= compared(model, merged, data)
        return found


def merge_onto(
    adapter: str | Path | PeftModel,
    base: str,
    path: str | Path,
    *,
    data: str | Dataset | None = None,
    check: bool = True,
    device: str = "auto",
    overwrite: bool = False,
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

    Returns:
        kind ("onto"), base, layers (how many were merged), and with `check` kl (nats per token),
        top1 (share), perplexity_adapter (on the unquantized base) and perplexity_merged.

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
    exporter = OntoBase(base=base, check=check)
    check_onto(tuned.manifest, exporter)
    found = write(exporter, tuned, Path(path) / MERGED, overwrite=overwrite)
    values = {name: figure.value for name, figure in found.items()}
    return {"kind": "onto", "base": os.path.expanduser(base), **values}


def check_onto(manifest: Mapping[str, Any], exporter: OntoBase) -> None:
    """Raise MergeRefused where the adapter of `manifest` must not be merged onto that base."""
    if found := exporter.refusals(*combination(manifest)):
        raise MergeRefused(found)


def _attached(base: str, adapter: Path, device: str) -> PeftModel:
    """Return the base, its layers on disk, under the adapter. Merging is done in float32."""
    import torch

    from ..adapting.injecting import reloaded
    from .stored import open_stored

    refuse_not_trained(adapter)
    model: Any = open_stored(base, device=device, dtype=torch.float32)
    try:
        return reloaded(model, adapter).eval()
    except QuantadaptError:
        raise
    except Exception as error:  # what is in the files decides what PEFT does
        what = f"the adapter does not fit this base: {reason(error)}"
        fix = "pass the model that the quantized base was made from"
        raise ModelError(what, fix=fix, where=base) from error


def _write_shards(tuned: PeftModel, checkpoint: Checkpoint, folder: Path) -> int:
    """Write the files of `checkpoint` again with merged weights in them; return how many."""
    from safetensors.torch import save_file

    layers = _adapted(tuned)
    trained = _trained_modules(tuned)
    weight_map: dict[str, str] = {}
    for file, keys in checkpoint.shards():
        tensors: dict[str, Tensor] = {}
        for key in keys:
            name, _, part = key.rpartition(".")
            if name in layers and part == "bias":
                continue  # written beside its weight
            stored = checkpoint.read(key)
            values = {key: trained.get(key, stored)}
            if name in layers and part == "weight":
                values = {f"{name}.{part}": value for part, value in _merged(layers[name]).items()}
            tensors |= {k: v.to(stored.dtype).cpu().contiguous() for k, v in values.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if (checkpoint.folder / INDEX).exists():
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = weight_map
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(layers)


def _adapted(tuned: PeftModel) -> dict[str, Any]:
    """Return name -> adapted layer. Raises ModelError where one is not in the checkpoint."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ..facade import QuantLinear

    base: nn.Module = tuned.get_base_model()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    lost = [n for n, m in layers.items() if not isinstance(m.get_base_layer(), QuantLinear)]
    if lost:
        what = f"these layers are no linear layers of the checkpoint: {', '.join(lost[:3])}"
        raise ModelError(what, fix=_IN_MEMORY)
    return layers


def _trained_modules(tuned: PeftModel) -> dict[str, Tensor]:
    """Return key -> value of modules that were trained whole (PEFT's `modules_to_save`).

    Raises ModelError where one is tied to another, of which the checkpoint holds a single tensor.
    """
    from peft.utils import ModulesToSaveWrapper

    base: nn.Module = tuned.get_base_model()
    found: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if _is_tied(base, name):
                what = f"{name} was trained whole, and is tied to another layer of the checkpoint"
                raise ModelError(what, fix=_IN_MEMORY)
            kept: Any = module.modules_to_save[module.active_adapters[0]]
            found |= {f"{name}.{key}": value for key, value in kept.state_dict().items()}
    return found


def _is_tied(base: nn.Module, name: str) -> bool:
    """Say whether a weight of the module `name` is also one of a module elsewhere."""
    inside: set[int] = set()
    outside: set[int] = set()
    for key, parameter in base.named_parameters(remove_duplicate=False):
        (inside if key.startswith(f"{name}.") else outside).add(id(parameter))
    return bool(inside & outside)


def _merged(layer: Any) -> dict[str, Tensor]:
    from .merging import merged_layer

    dense: Any = merged_layer(layer, "dense")
    return {"weight": dense.weight} | ({} if dense.bias is None else {"bias": dense.bias})


def _copy_rest(source: Path, adapter: Path, folder: Path) -> None:
    """Copy config and tokenizer; the adapter's tokenizer wins over the base's."""
    wanted = {".json", ".txt", ".model", ".jinja"}
    files = [f for f in source.iterdir() if f.suffix in wanted and f.name not in (INDEX, MANIFEST)]
    files += [f for f in adapter.iterdir() if "token" in f.name or f.suffix == ".jinja"]
    for file in files:
        if file.is_file():
            shutil.copy(file, folder / file.name)
