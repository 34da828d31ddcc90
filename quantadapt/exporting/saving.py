"""Save, load and merge: adapters as plain PEFT folders, bases and merged models as checkpoints.

Beside each lies `quantadapt.json`, which says what base it belongs to. Everything is written to a
temporary folder first and renamed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import planning
from ..dependencies import unchanged_process
from ..errors import MergeRefused, ModelError, OutputError, Problem
from ..folders.atomic import atomic_folder, refuse_occupied
from ..folders.environment import environment
from ..paths import is_local_path
from ..planning.memory import MERGE_IN_LESS
from ..planning.on_disk import quantization_of
from ..quantizing.examples import examples_from
from ..quantizing.state import ModelState, state_of
from ..registry.discovery import registry
from ..stages import held_out_data, quantize

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor, nn

    from ..quantizing.examples import Calibration

RECORD = "quantadapt.json"
ADAPTER = "adapter"
BASE = "base"
MERGED = "merged"

MergeKind = Literal["dense", "requantize"]


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded onto a base that it was not trained on."""


def save(model: nn.Module, path: str | Path, *, overwrite: bool = True, base: bool = True) -> Path:
    """Save the adapter to `path/adapter`, or, without one, the quantized base to `path`.

    The adapter is a plain PEFT folder; `quantadapt.json` in it records the base. A base that was
    calibrated here, or rewritten by PiSSA or LoftQ, cannot be made again from that alone; it is
    saved too, to `path/base`.

    Args:
        model: what `quantize`, `attach` or `load` returned.
        path: a folder; what an earlier `save` wrote there, a base too, is replaced if `overwrite`.
        overwrite: only ever replaces a folder that `save` wrote.
        base: False leaves such a base out, and one that is there as it is.

    Raises:
        OutputError: the folder holds something else; it is untouched.
    """
    state, root = state_of(model), Path(path).expanduser()
    final = root / ADAPTER if state.adapter else root
    saves_base = state.adapter is not None and _has_own_base(state)
    _refuse_foreign(final)
    if saves_base and base:
        _refuse_foreign(root / BASE)
        save_base(model, root / BASE, overwrite=overwrite)
    with atomic_folder(final, overwrite=overwrite) as folder:
        if state.adapter:
            model.save_pretrained(str(folder))  # type: ignore[operator]
        else:
            state.quantizer.save(model, folder)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(folder))
        _write_record(folder, state)
    if state.adapter and not saves_base and overwrite and (root / BASE / RECORD).exists():
        shutil.rmtree(root / BASE)  # of an earlier adapter: `load` would put this one onto it
    return final


def _has_own_base(state: ModelState) -> bool:
    """Whether the base cannot be made again from its checkpoint and options alone."""
    if state.rewritten or state.calibration is not None:
        return True
    calibrates = state.backend.calibration and state.quantizer.needs_data
    return bool(state.source) and calibrates and quantization_of(state.source) is None


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists():
        fix = "choose another folder, or empty it yourself"
        raise OutputError("it holds something that save did not write", fix=fix, where=str(folder))


def save_base(model: nn.Module, folder: Path, *, overwrite: bool = False) -> None:
    """Save the quantized base of `model`, adapter or not."""
    from .merging import bare_base

    state = state_of(model)
    base = model if state.adapter is None else bare_base(model)  # type: ignore[arg-type]
    with atomic_folder(folder, overwrite=overwrite) as made:
        state.quantizer.save(base, made)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(made))
        _write_record(made, state, rewritten=state.rewritten)


def _write_record(folder: Path, state: ModelState, **more: Any) -> None:
    versions = environment(state.backend.requires)["versions"]
    record = state.record() | {"format": 1, "versions": versions, **more}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(
    path: str | Path, *, base: str | nn.Module | None = None, device: str = "auto"
) -> nn.Module:
    """Load what `save`, `merge` or a run wrote.

    Args:
        path: a run folder, an adapter folder, or a saved quantized or merged model.
        base: put the adapter onto this base instead of the recorded one: a path, which is quantized
            as recorded, or a model from `quantize`. A base other than recorded warns.
        device: auto, cpu, cuda, ...

    Raises:
        ModelError: there is nothing to load.
    """
    folder = Path(path).expanduser()
    if (adapter := _adapter_in(folder)) is not None:
        tuned: nn.Module = _load_adapter(adapter, base, device)
        return tuned
    if not (folder / "config.json").exists() and (folder / MERGED).is_dir():
        folder = folder / MERGED
    quantized = "quantization_config" in _config(folder)
    record = read_record(folder)
    backend = record["backend"] if quantized else "none"
    return quantize(str(folder), backend, device=device, dtype=record["dtype"])


def _adapter_in(folder: Path) -> Path | None:
    places = (folder / ADAPTER, folder)
    return next((f for f in places if (f / "adapter_config.json").exists()), None)


def adapter_folder(folder: Path) -> Path:
    """Return the PEFT folder of a run folder or of itself. Raises ModelError if there is none."""
    if (found := _adapter_in(folder.expanduser())) is None:
        fix = "pass the folder of a run, or of an adapter"
        raise ModelError("there is no adapter here", fix=fix, where=str(folder))
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = "there is neither an adapter nor a model here"
        raise ModelError(
            what, fix="pass a folder that a run or save wrote", where=str(folder)
        ) from None
    return config


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote about the base. Raises ModelError if it is not there."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = f"{RECORD} is missing or unreadable, so nothing says which base this belongs to"
        fix = "load it with peft: PeftModel.from_pretrained(base, folder)"
        raise ModelError(what, fix=fix, where=str(folder)) from None
    return record


def _load_adapter(folder: Path, base: str | nn.Module | None, device: str) -> PeftModel:
    from peft import LoraConfig, PeftConfig, PeftModel

    from ..adapting.fused import use_fused_layers
    from ..facade import facades

    record = read_record(folder)
    if base is None and (folder.parent / BASE / RECORD).exists():
        model = load_base(folder.parent / BASE, device)
    elif base is None or isinstance(base, str):
        _refuse_missing_base(base or record["base"], folder)
        model = quantize(
            base or record["base"],
            record["backend"],
            device=device,
            dtype=record["dtype"],
            skip_modules=record["skip_modules"],
            **record["options"],
        )
    else:
        model = base
    state = state_of(model)
    _warn_other_base(state, record)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        use_fused_layers(config)
        if state.rewritten:  # the base has given its part to the adapter already
            config.init_lora_weights = True
    before = {id(facade.vendor) for _, facade in facades(model)}
    with unchanged_process():
        peft_model = PeftModel.from_pretrained(
            model,  # type: ignore[arg-type]
            str(folder),
            is_trainable=True,
            config=config,
        )
    # PiSSA starts again from the base as it was, and so rewrites it again.
    state.rewritten |= any(id(facade.vendor) not in before for _, facade in facades(peft_model))
    state.adapter = registry().adapter(record["adapter"])
    state.adapter_options = dict(record["adapter_options"])
    return peft_model


def _refuse_missing_base(base: str, adapter: Path) -> None:
    if is_local_path(base) and not Path(base).expanduser().exists():
        what = f"its base {base} is not there, seen from {Path.cwd()}"
        fix = "go to the folder in which it was trained, or in Python pass base=... to load"
        raise ModelError(what, fix=fix, where=str(adapter))


def load_base(folder: Path, device: str) -> nn.Module:
    """Load what `save_base` wrote, under the name and options that it was made from."""
    record = read_record(folder)
    model = quantize(str(folder), record["backend"], device=device, dtype=record["dtype"])
    state = state_of(model)
    state.source, state.rewritten = record["base"], record.get("rewritten", False)
    state.quantizer = state.backend.quantizer(**record["options"])
    return model


def _warn_other_base(state: ModelState, record: Mapping[str, Any]) -> None:
    now = state.record()
    differing = [
        f"{key} {record.get(key)!r}, now {now[key]!r}"
        for key in ("base", "backend", "options", "dtype")
        if record.get(key) != now[key]
    ]
    if differing:
        text = f"the adapter was trained on another base: {'; '.join(differing)}"
        warnings.warn(text, BaseMismatchWarning, stacklevel=4)


def merge(
    model: PeftModel,
    path: str | Path,
    *,
    kind: MergeKind = "dense",
    data: str | Dataset | None = None,
    calibration: Calibration = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge the adapter into its base, check it on held-out tokens, and write `path/merged`.

    `model` itself stays as it is.

    Args:
        model: a base with an adapter.
        path: gets a folder `merged` that transformers loads.
        kind: "dense", or "requantize" to quantize the merged weights as the base was.
        data: held-out data for the check, as for `evaluate`; the demo's if missing.
        calibration: as for `quantize`: what a backend that calibrates is shown when it quantizes
            again; by default what it was shown before, if that happened in this process.
        tokenizer: needed for a live module only.
        overwrite: replace an earlier `merged`.

    Returns:
        kind, kl (nats per token), top1 (share), perplexity_adapter, perplexity_merged.

    Raises:
        MergeRefused: a rule forbids it; names the rule, the reason and the way out.
        OutputError: `path/merged` is there already. ModelError: GPU memory does not suffice.
    """
    from .merging import merged_model

    state, final = state_of(model), Path(path).expanduser() / MERGED
    check_merge(state, kind)
    refuse_occupied(final, overwrite)
    tokenizer = tokenizer or state.tokenizer
    held_out = held_out_data(data, tokenizer)
    if calibration is not None:
        state.calibration = examples_from(calibration, tokenizer)
    with merge_memory_in_words():
        merged = merged_model(model, kind)
        check = check_merged(model, merged, held_out)
    write_merged(merged, kind, final, overwrite)
    return {"kind": kind, **check}


@contextmanager
def merge_memory_in_words() -> Iterator[None]:
    """Turn running out of GPU memory while merging into a ModelError that names the way out."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        what = "the GPU is too small to make a merged model beside the model"
        raise ModelError(what, fix=MERGE_IN_LESS) from error


def check_merge(state: ModelState, kind: MergeKind) -> None:
    """Raise MergeRefused where a rule forbids this merge."""
    if state.adapter is None:
        raise MergeRefused([Problem("there is no adapter to merge", "attach and train one first")])
    cell = planning.make_cell(
        state.backend,
        state.quantizer,
        state.adapter,
        state.adapter_options,
        state.device,
        state.dtype_name,
    )
    if found := planning.merge_refusals(cell, state.backend, state.adapter, kind):
        raise MergeRefused(found)


def check_merged(model: PeftModel, merged: nn.Module, data: Dataset) -> dict[str, float]:
    """Compare merged and unmerged model, token by token, on held-out data."""
    from ..evaluation.stage import compare, snapshot

    check = compare(snapshot(model, data), snapshot(merged, data))
    return {
        "kl": check.kl,
        "top1": check.top1,
        "perplexity_adapter": check.perplexity_reference,
        "perplexity_merged": check.perplexity_candidate,
    }


def write_merged(merged: nn.Module, kind: MergeKind, final: Path, overwrite: bool) -> None:
    """Write a merged model to the folder `final`, whole or not at all."""
    state = state_of(merged)
    needed = int(size_mib(merged) * 2**20)
    with atomic_folder(final, overwrite=overwrite, needed=needed) as folder:
        if kind == "requantize":
            state.quantizer.save(merged, folder)
        else:
            merged.save_pretrained(str(folder))  # type: ignore[operator]
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(folder))
        _write_record(folder, state)


def size_mib(model: nn.Module) -> float:
    """Return the size of everything that a checkpoint of `model` holds, in MiB."""
    tensors = [part for tensor in model.state_dict().values() for part in _parts(tensor)]
    sizes = {_place(t): t.numel() * t.element_size() for t in tensors}  # tied weights count once
    sizes.pop(0, None)
    return sum(sizes.values()) / 2**20


def _place(tensor: Tensor) -> int:
    """Return where a tensor lies; 0 for those of a sharded base, which have no memory of their own
    and count in the parameter that is sharded."""
    whole: Any = tensor
    return whole.data_ptr() if not hasattr(whole, "full_tensor") else id(whole)


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor subclass is made of, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
