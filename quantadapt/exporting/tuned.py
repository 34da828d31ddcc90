"""A tuned model as exporters are given it: from a run that goes on, from a folder, or live."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import demo
from ..errors import GpuTooSmall
from ..planning.exports import MergeKind
from ..planning.memory import MERGE_IN_LESS
from ..protocols import Figure
from ..quantizing.examples import examples_from
from ..quantizing.state import state_of
from ..quantizing.tokenizer import find_tokenizer
from ..remote_code import trusted
from .card import metrics_beside
from .loading import load
from .manifest import read_manifest
from .saving import save

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from ..evaluation.gain import Gain, TokenLosses
    from ..quantizing.examples import Examples
    from .merging import Write


@dataclass(frozen=True)
class Tuned:
    """A tuned model, as an exporter is given it. What takes time or memory is done when it is first
    asked for: `tuned.merged("dense")` returns a merged model, `tuned.compared(merged)` figures of
    how far that is from the adapter.

    Attributes:
        adapter: the folder of the saved adapter, as PEFT reads it.
        manifest: what its `quantadapt.json` says: base, backend, options, dtype, adapter, ...
        model: the quantized base with its adapter. Leave it as it is.
        tokenizer: the one that it was trained with; None for a live module without one.
        held_out: tokenized held-out examples.
        device: where a model goes that has to be loaded: auto, cpu, cuda, ...
        force_base: it may be loaded onto a base that it was not trained on.
    """

    # What it is made from: the model where it is in memory, the saved adapter where there is one;
    # what returns held-out data, and what backends and ways of rounding are shown, for a
    # tokenizer; of a run, the losses of the base, measured before there was an adapter, and what
    # it measures on a merged model besides, and what it has measured so far.

    live: PeftModel | None = None
    saved: Path | None = None
    device: str = "auto"
    force_base: bool = False
    data: Callable[[Any], Dataset] | None = None
    examples: Callable[[Any], Examples | None] | None = None
    before: TokenLosses | None = None
    measure: Callable[[nn.Module], None] | None = None
    metrics: Mapping[str, Any] | None = None

    @cached_property
    def model(self) -> PeftModel:
        """The base with its adapter; loaded if it is not in memory. Leave it as it is."""
        if self.live is not None:
            return self.live
        how: dict[str, Any] = {"force_base": self.force_base, "trust_remote_code": trusted()}
        model: Any = load(self.adapter, device=self.device, **how)
        return model  # type: ignore[no-any-return]

    @cached_property
    def adapter(self) -> Path:
        """The folder of the adapter, as PEFT reads it, with `quantadapt.json`."""
        return self.saved or save(self.model, self._scratch.name, base=False)

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="quantadapt-")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What is known of the base: `base`, `backend`, `options`, `dtype`, `adapter`, ..."""
        return read_manifest(self.adapter)

    @property
    def metrics_so_far(self) -> Mapping[str, Any]:
        """What is in `metrics.json` of the run that it comes from, or will be; empty of others."""
        return metrics_beside(self.adapter) if self.metrics is None else self.metrics

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that it was trained with; None for a live module without one."""
        if self.live is None:
            return find_tokenizer(str(self.adapter))
        return state_of(self.live).tokenizer

    @cached_property
    def held_out(self) -> Dataset:
        """Held-out examples: columns `input_ids` and `completion_mask`."""
        assert self.data is not None
        return self.data(self.tokenizer)

    @cached_property
    def calibration(self) -> Examples | None:
        """What a quantizer, or a way of rounding, is shown; None where there is nothing."""
        given = None if self.examples is None else self.examples(self.tokenizer)
        state = state_of(self.model)
        if not (found := given or state.calibration) and state.source == str(demo.MODEL_DIR):
            return examples_from(str(demo.TRAIN_FILE), self.tokenizer)
        return found

    def merged(self, kind: MergeKind = "dense", write: Write | None = None) -> nn.Module:
        """Return the base with the adapter merged in: dense, or quantized again as it was.

        Raises GpuTooSmall where GPU memory does not suffice. The combination has to allow it: say
        so in `Exporter.merges`. `write` says how weights are rounded; by default as the backend
        quantizes.
        """
        from .merging import merged_model

        state = state_of(self.model)
        calibrates = state.backend.calibration and state.quantizer.needs_data
        if kind == "requantize" and calibrates:
            state.calibration = self.calibration
        with memory_in_words():
            return merged_model(self.model, kind, write)

    @cached_property
    def losses(self) -> TokenLosses:
        """The losses of base and adapter at held-out tokens."""
        from ..evaluation.gain import token_losses

        return token_losses(self.model, self.held_out)

    @cached_property
    def gain(self) -> Gain | None:
        """What the adapter gained on held-out data; None where that is not known: the model
        predicts no tokens, or the adapter has changed its base and that cannot be made again."""
        from ..evaluation.gain import Gain

        return None if self._base is None else Gain.between(self._base, self.losses)

    @cached_property
    def _base(self) -> TokenLosses | None:
        from ..evaluation.gain import token_losses
        from ..evaluation.predictions import predicts_tokens
        from .loading import base_of

        if self.before is not None or not predicts_tokens(self.model):
            return self.before
        base = base_of(self.model)
        return None if base is None else token_losses(base, self.held_out)

    def gain_kept(self, merged: nn.Module) -> float | None:
        """Return the share of the gain that a merged model keeps, see `evaluation.gain_kept`."""
        from ..evaluation.gain import gain_kept, token_losses

        if self._base is None:
            return None
        found = token_losses(merged, self.held_out)
        return gain_kept(self._base.mean, self.losses.mean, found.mean)

    def compared(
        self, merged: nn.Module, check: Callable[[dict[str, Figure]], None] | None = None
    ) -> dict[str, Figure]:
        """Compare a merged model with this one, token by token, on held-out data.

        Args:
            check: called with the figures, to which it may add, before a run measures the merged
                model for its report.
        """
        with memory_in_words():
            found = compared(self.model, merged, self.held_out)
            if gain := self.gain:
                found["gain"] = Figure(gain.value, "nats per token", "higher")
                found["gain_error"] = Figure(gain.error, "nats per token")
            if (kept := self.gain_kept(merged)) is not None:
                found["gain_kept"] = Figure(kept, "share", "higher")
            if check is not None:
                check(found)
            if self.measure is not None:
                self.measure(merged)
            return found


def compared(model: nn.Module, merged: nn.Module, data: Dataset) -> dict[str, Figure]:
    """Return how far a merged model is from the model that was merged, on held-out data."""
    from ..evaluation.predictions import predicts_tokens
    from ..evaluation.stage import answers_apart, compare, snapshot

    if not predicts_tokens(model):
        return {"error": Figure(answers_apart(model, merged, data), "relative", "lower")}
    check = compare(snapshot(model, data), snapshot(merged, data))
    return {
        "kl": Figure(check.kl, "nats per token", "lower"),
        "top1": Figure(check.top1, "share", "higher"),
        "perplexity_adapter": Figure(check.perplexity_reference, better="lower"),
        "perplexity_merged": Figure(check.perplexity_candidate, better="lower"),
    }


TOO_SMALL = "the GPU is too small to make a merged model beside the model"


@contextmanager
def memory_in_words() -> Iterator[None]:
    """Turn running out of GPU memory while merging into a GpuTooSmall that names the way out."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuTooSmall(TOO_SMALL, fix=MERGE_IN_LESS) from error
