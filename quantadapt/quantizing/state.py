"""What quantadapt remembers about a model: it travels on the model as `model.quantadapt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..capabilities import Cell
from ..errors import QuantadaptError
from ..inputs.fingerprints import Fingerprint
from ..planning.refusals import make_cell
from ..planning.streaming import Stream
from ..protocols import Quantizer, Task
from ..records import Adapter, Backend, as_call
from .recognizing import config_by_peft, is_new, recognized, rewrites

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..model.own_biases import OwnBiases


@dataclass(repr=False)
class ModelState:
    """How a model was made.

    Attributes:
        source: path or hub id of the checkpoint; empty for a live module.
        backend, quantizer: how its linear layers are quantized.
        device: "cpu", "cuda:0", ...
        dtype: compute dtype.
        skip_modules: names left dense.
        conv1d: names of the layers that are `Conv1D` in the model's own class, so that dense ones
            are to be written with their weight transposed.
        new_modules: names that may be missing in the checkpoint.
        unused_modules: names that may be in the checkpoint and not in the model.
        tokenizer: the checkpoint's tokenizer, or None.
        calibration: the examples that the base was calibrated on here, or None.
        rewritten: attaching the adapter changed the base for good.
        changed: an adapter that was there before did: it was merged into the base, left biases in
            it that it had trained, or had a start that rewrote it. No checkpoint holds this base.
        notes: what loading found that a user may want to know of.
        own_base: it was loaded from a base that lies beside an adapter, and may be there alone.
        base_id: by what such a base and its adapter are known to belong together, once saved.
        fingerprint: what the base is known by; None where its files could not be looked at.
        loaded_from: the folder that `load` read it from, if it did.
        adapter, adapter_options: what is attached, if anything.
        max_length: the longest example in tokens that it was trained on, where that is known.
        pooling: how the vectors that it was trained to make are made of its tokens' states; empty
            where it was not trained to make any.
        of_base: both as they were before there was that adapter.
        learnt: that adapter was trained before: it was loaded, `train` has done a step, or PEFT
            put it there and it is no new one.
        begun: the weights that are trained, with their values in CPU memory as the training began
            that compared with them; None where that compared with the model without its adapter.
        begun_elsewhere: they were another model's, and are not known here.
        own_biases: biases of the base that the adapter trains, with the values that they had.
        merge_aware: its adapter computes, and is merged, on the scales that the base has.
        head, labels: the kind of head that the checkpoint was read with, if it was not its own, and
            what that tells apart; see `loading.heads`.
        begun_at_random: names of the modules that no file held.
        stream: what of the base lies in CPU memory: "none", "experts" or "all".
    """

    source: str
    backend: Backend
    quantizer: Quantizer
    device: str
    dtype: torch.dtype
    skip_modules: tuple[str, ...] = ()
    tokenizer: Any = None
    calibration: list[dict[str, Tensor]] | None = None
    conv1d: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    unused_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rewritten: bool = False
    changed: bool = False
    own_base: bool = False
    base_id: str = ""
    fingerprint: Fingerprint | None = None
    loaded_from: str = ""
    adapter: Adapter | None = None
    adapter_options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    pooling: str = ""
    of_base: tuple[int | None, str] = (None, "")
    learnt: bool = False
    begun: OwnBiases | None = None
    begun_elsewhere: bool = False
    own_biases: OwnBiases = field(default_factory=list)
    merge_aware: bool = False
    head: str = ""
    labels: tuple[str, ...] = ()
    begun_at_random: tuple[str, ...] = ()
    stream: Stream = "none"

    def __repr__(self) -> str:
        base = as_call(self.backend.name, self.quantizer.model_dump())
        adapter = self.adapter and as_call(self.adapter.name, self.adapter_options)
        tuned = f", {adapter}" if adapter else ""
        source = self.source or "a live module"
        return f"<ModelState {source!r}: {base}{tuned}, on {self.device} in {self.dtype_name}>"

    @property
    def dtype_name(self) -> str:
        """torch's name of the compute dtype, e.g. "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def cell(self) -> Cell:
        """The facts that rules look at, where an adapter is attached."""
        assert self.adapter is not None
        quantizer, options = self.quantizer, self.adapter_options
        device, dtype = self.device, self.dtype_name
        return make_cell(
            *(self.backend, quantizer, self.adapter, options, device, dtype),
            model=self.source,
            fingerprint=self.fingerprint,
        )

    def gain_adapter(
        self,
        adapter: Adapter,
        options: Mapping[str, Any],
        *,
        learnt: bool,
        biases: OwnBiases | None = None,
    ) -> None:
        """Take note that the model has an adapter.

        Args:
            learnt, biases: see the attributes `learnt` and `own_biases`.
        """
        self.adapter, self.adapter_options = adapter, dict(options)
        self.own_biases, self.learnt = biases or [], learnt
        self.begun, self.begun_elsewhere = None, False
        self.of_base = (self.max_length, self.pooling)

    def lose_adapter(self, *, changed: bool) -> None:
        """Take note that PEFT has taken the adapter away.

        Args:
            changed: whether the base is another one for it.
        """
        self.adapter, self.adapter_options, self.own_biases = None, {}, []
        self.learnt, self.begun, self.begun_elsewhere = False, None, False
        if not changed:  # nothing is left in the base of what the adapter had learnt
            self.max_length, self.pooling = self.of_base
        if changed or self.rewritten:  # from now on that of a live module
            self.changed, self.rewritten, self.own_base = True, False, False
            self.source, self.fingerprint, self.base_id, self.loaded_from = "", None, "", ""

    def manifest(self) -> dict[str, Any]:
        """Return what `quantadapt.json` says about the base: JSON-ready."""
        return {
            "base": self.source,
            "fingerprint": self.fingerprint and self.fingerprint.model_dump(),
            "backend": self.backend.name,
            "options": self.quantizer.model_dump(mode="json"),
            "dtype": self.dtype_name,
            "skip_modules": list(self.skip_modules),
            "new_modules": list(self.new_modules),
            "unused_modules": list(self.unused_modules),
            "adapter": self.adapter.name if self.adapter else None,
            "adapter_options": self.adapter_options,
            "max_length": self.max_length,
            "pooling": self.pooling,
            "merge_aware": self.merge_aware,
            "begun_elsewhere": self.begun is not None or self.begun_elsewhere,
            "head": self.head,
            "labels": list(self.labels),
            "begun_at_random": list(self.begun_at_random),
            "changed": self.changed,
            "stream": self.stream,
        }


def note_learnt(model: nn.Module, task: Task) -> None:
    """Take note that the adapter of `model`, if that is one of ours, has been trained by `task`."""
    if isinstance(state := getattr(model, "quantadapt", None), ModelState):
        state.learnt = True
        state.pooling = getattr(task, "pooling", "")  # what makes vectors has it: embed


def state_of(model: nn.Module) -> ModelState:
    """Return the state of a model that `quantize` or `load` returned, adapter or not. Of an adapter
    that PEFT itself put there, it is noted now.

    Raises:
        QuantadaptError: the model did not come from there.
    """
    state = getattr(model, "quantadapt", None)
    if not isinstance(state, ModelState):
        what = "this model did not come from quantadapt.quantize or quantadapt.load"
        raise QuantadaptError(what, fix="call model = quantadapt.quantize(model, backend=...)")
    if state.adapter is None and (config := config_by_peft(model)) is not None:
        found, options = recognized(config)
        state.gain_adapter(found, options, learnt=not is_new(model))
        state.rewritten |= rewrites(found, options)
    return state
