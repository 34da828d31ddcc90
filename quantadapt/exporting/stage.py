"""The export stage: merge an adapter into its base, check the merged model, write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import planning
from ..errors import MergeRefused, ModelError, Problem
from ..evaluation.sizes import size_mib
from ..folders.atomic import atomic_folder, refuse_occupied
from ..planning.memory import MERGE_IN_LESS
from ..quantizing.examples import examples_from
from ..quantizing.state import ModelState, state_of
from ..stages import held_out_data
from .manifest import MERGED, write_manifest

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from ..quantizing.examples import Calibration


MergeKind = Literal["dense", "requantize"]


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
    held_out = held_out_data(data, tokenizer, state.max_length)
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
        write_manifest(folder, state)
