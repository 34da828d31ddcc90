"""The export `compressed-tensors`: a tuned model on any base, as vLLM serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from quantadapt.capabilities import Merge
from quantadapt.errors import ModelError
from quantadapt.protocols import Exporter, Figure
from quantadapt.spec import MinGain
from quantadapt_compressed_tensors.schemes import SIZES, Name, sized

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from quantadapt.exporting.tuned import Tuned
    from quantadapt_compressed_tensors import CompressedTensors


class CompressedExport(Exporter):
    """The adapter merged, and the model quantized by a scheme of compressed-tensors. Layers that
    fit the scheme as they are keep their values, changed as `rounding: dithered` does; others are
    rounded to nearest."""

    scheme: Name = Field("W4A16", description="by the library's name: bits of weights and inputs")
    group_size: int | None = Field(
        None, ge=-1, description="of integer schemes of groups: inputs that share a scale; -1: rows"
    )
    min_gain: MinGain = Field(0.9, description="the share of the adapter's gain to be kept")

    @model_validator(mode="after")
    def _has_groups(self) -> CompressedExport:
        if self.group_size == 0 or (self.group_size and self.scheme not in SIZES):
            raise ValueError(f"a group_size goes with {', '.join(SIZES)} alone")
        return self

    @property
    def merges(self) -> Merge:
        return Merge.DENSE

    @property
    def planned(self) -> str:
        return f"merged model in compressed-tensors' {self.scheme}"

    def done(self, figures: Mapping[str, Figure]) -> str:
        from quantadapt.exporting.kept import merge_words

        said = [self.scheme, merge_words(figures)]
        if (dense := figures.get("dense_layers")) is not None and dense.value:
            said.append(f"{dense.value:.0f} layers stay dense: the scheme's groups do not fit them")
        return ", ".join(filter(None, said))

    @property
    def _quantizer(self) -> CompressedTensors:
        from quantadapt_compressed_tensors import CompressedTensors

        return CompressedTensors(scheme=self.scheme, group_size=self.group_size)

    def needed(self, tuned: Tuned) -> int:
        from quantadapt.exporting.merging import bare_base, merged_bytes
        from quantadapt.facade import facades

        found, scheme = merged_bytes(tuned.model, "dense"), sized(self.scheme, self.group_size)
        for _, facade in facades(bare_base(tuned.model)):
            columns, size = facade.weight.shape[-1], facade.compute_dtype.itemsize
            rows = facade.weight.numel() // columns
            if scheme.misfit(columns, rows) is None:
                saved = size - scheme.bits(rows, columns, 8 * size) / 8
                found -= int(facade.weight.numel() * saved)
        return found

    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        from quantadapt.exporting.checking import refuse_other_model, sketches
        from quantadapt.exporting.loading import load
        from quantadapt.exporting.manifest import write_manifest
        from quantadapt.loading.processors import save_tokenizer
        from quantadapt.quantizing.state import state_of

        _ = tuned.held_out, tuned.gain  # what is wrong with the data is told before the work
        model, misfits = self._quantized(tuned)
        state = state_of(model)
        state.quantizer.save(model, folder)
        if state.tokenizer is not None:
            save_tokenizer(state.tokenizer, folder)
        write_manifest(folder, state)
        meant = sketches(model)
        del model  # what is read from the files takes its place
        loaded = load(folder, device=state.device).eval()
        refuse_other_model(meant, loaded)
        figures = tuned.compared(loaded, self._refuse_little)
        return {**figures, "dense_layers": Figure(misfits)}

    def _quantized(self, tuned: Tuned) -> tuple[nn.Module, int]:
        """Return the merged model, quantized, and how many layers do not fit the scheme."""
        from quantadapt.facade import wrap
        from quantadapt.loading import linear_layers
        from quantadapt.quantizing.state import state_of
        from quantadapt.registry.discovery import registry
        from quantadapt_compressed_tensors import METHOD
        from quantadapt_compressed_tensors.grid import lend_grids

        merged, quantizer = tuned.merged("dense"), self._quantizer
        state, scheme = state_of(merged), sized(self.scheme, self.group_size)
        rounded = state_of(tuned.model).merge_aware
        lend_grids(scheme, tuned.model.get_base_model(), merged, rounded=rounded)
        layers = list(linear_layers(merged, state.skip_modules))
        misfits = [n for n, one in layers if scheme.misfit(one.in_features, one.out_features)]
        if len(misfits) == len(layers):
            what = f"no layer of the model fits {self.scheme}: {misfits[0]} is the first"
            raise ModelError(what, fix="take another scheme, or group_size")
        skip = (*state.skip_modules, *misfits)
        model = quantizer.quantize(
            merged,
            device=state.device,
            dtype=state.dtype,
            calibration=self._examples(tuned) if quantizer.needs_data else None,
            skip_modules=skip,
        )
        wrapped: Any = wrap(model, quantizer.target, state.dtype, skip)
        wrapped.quantadapt = dataclasses.replace(
            state, backend=registry().backend(METHOD), quantizer=quantizer, skip_modules=skip
        )
        made: nn.Module = wrapped.eval()
        return made, len(misfits)

    def _examples(self, tuned: Tuned) -> list[dict[str, Any]]:
        """Return what scales of inputs are found with: what the base was calibrated on, or the
        held-out examples."""
        import torch

        from quantadapt.quantizing.state import state_of

        if shown := state_of(tuned.model).calibration:
            return shown
        rows = tuned.held_out["input_ids"]
        return [{"input_ids": torch.tensor([list(row)])} for row in rows]

    def _refuse_little(self, figures: dict[str, Figure]) -> None:
        from quantadapt.exporting.checking import refuse_no_number
        from quantadapt.exporting.kept import refuse_little

        refuse_no_number(figures)
        words = f"rounded to nearest by {self.scheme}"
        ways = (
            "take a finer scheme=NAME, or a smaller group_size",
            "quantize again as the base was (quantadapt merge RUN --kind requantize)",
            "merge dense (quantadapt merge RUN)",
            "keep the adapter beside the base",
            "set a lower min_gain=SHARE",
        )
        refuse_little(figures, self.min_gain, words, {}, ways)
