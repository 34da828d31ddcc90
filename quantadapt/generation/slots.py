"""Answers that are made in slots: keys and values have fixed places, so that the pass for one more
token is recorded once, as a CUDA graph, and replayed for each token.

Decoding is a few thousand small kernels a token, which Python starts more slowly than a GPU runs
them. In `Rows` the cache grows at each token; here it has room for more tokens than it holds, and a
mask says which of them a row sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..compiling import compiled_functions
from ..errors import SlowerWarning, warn
from ..facade.lending import Lender, lenders_of, lent_by
from ..fused_kernels import fused_kernels
from ..model.recording import recording
from ..model.sinks import NAME as SINKS
from ..model.sinks import fused_groups
from ..model.towers import towers_of
from ..streaming import streamer_of
from .rows import Row, Rows, base_of, cache_name, takes_rows

LEAST_LENGTH = 256
"""Room for so many tokens at first; twice as much whenever it is full."""

SEEN_BEFORE = 2
"""So many steps of a shape run as ever, which compiles kernels and fills caches of libraries."""


SAME = 0.1
"""What is replayed and what was computed before may differ by this part of their size."""


class NotRecordedWarning(UserWarning):
    """Passes for one token cannot be recorded; answers take longer."""


def rows_for(model: nn.Module) -> Rows:
    """Return an empty batch for a model, see `takes_rows`: on CUDA one that records."""
    rows = Rows(model)
    return SlotRows(model) if rows.device.type == "cuda" and not unrecorded(model) else rows


def unrecorded(model: nn.Module) -> str:
    """Return why answers of a model on CUDA are not recorded, so that they take longer; empty if
    they are."""
    if not takes_rows(model):
        return "it answers one prompt at a time, by transformers' own generate"
    if streamer_of(model) is not None:  # the places that blocks come to hold whatever is there
        return "its base is copied to the GPU block by block, for each token anew"
    return "" if takes_slots(model) else "its attention does not take keys at fixed places"


def takes_slots(model: nn.Module) -> bool:
    """Say whether a model computes with keys at fixed places: it says so itself, its attention
    obeys masks, and its layers see all tokens or the last few."""
    base = base_of(model)
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        bool(getattr(base, "_can_compile_fullgraph", False))
        and config._attn_implementation in ("sdpa", "eager", SINKS)
        and kinds <= {"full_attention", "sliding_attention"}
        and not towers_of(base)  # where a picture was, positions are no counts
    )


class SlotRows(Rows):
    """A batch that is answered token by token in a cache of fixed shape.

    Args:
        model: in evaluation mode, see `takes_slots`. Its active adapter stays the same.
        record: whether to record steps; on CUDA alone.
    """

    def __init__(self, model: nn.Module, *, record: bool = True) -> None:
        super().__init__(model)
        self._record = record and self.device.type == "cuda"
        self._store: _Store | None = None
        self._lenders: list[Lender] | None = None
        """Of what is recorded, as the adapter's weights in the dtype of the computation."""
        self._slots: dict[Row, int] = {}

    def clear(self) -> None:
        """Take all rows out, and give the memory back."""
        super().clear()
        self._slots, self._store = {}, None

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in, which the adapter's weights answer that there are now."""
        if not rows:
            return
        if self._lenders is None:
            self._lenders = lenders_of(self._model)
        for lender in self._lenders:
            lender.refresh()
        with lent_by(self._lenders):
            super().add(rows)

    def _enter(self, rows: Sequence[Row], mask: Tensor, cache: Any) -> None:
        going_on = [row for row in rows if not row.finish]
        if not going_on:
            return
        store = self._room([*self.rows, *going_on])
        free = sorted(set(range(store.slots)) - set(self._slots.values()))
        for slot, row in zip(free, going_on, strict=False):
            self._slots[row] = slot
            store.put(slot, cache, rows.index(row), mask.shape[1] - len(row.prompt))

    def step(self) -> None:
        """Choose one more token for each row; those that are done leave."""
        store = self._room(self.rows)
        ids, positions = [0] * store.slots, [0] * store.slots
        for row in self.rows:
            slot = self._slots[row]
            ids[slot], positions[slot] = row.tokens[-1], _length(row) - 1
        logits = self._logits(store, ids, positions)
        self._choose(self.rows, logits[[self._slots[row] for row in self.rows]])
        self._drop_done()

    def _drop_done(self) -> None:
        self.rows = [row for row in self.rows if not row.finish]
        self._slots = {row: slot for row, slot in self._slots.items() if not row.finish}

    def _room(self, rows: Sequence[Row]) -> _Store:
        """Return a store for these rows, with all that is in the one there is; a larger one has to
        be recorded anew."""
        old, length = self._store, max(map(_length, rows))
        if old is None or old.slots < len(rows) or old.length < length:
            slots = _doubled(old.slots if old else 1, len(rows))
            length = _doubled(old.length if old else LEAST_LENGTH, length)
            self._store = old = _Store(self._model, slots, length, old)
        return old

    def _logits(self, store: _Store, ids: list[int], positions: list[int]) -> Tensor:
        store.tell(ids, positions)
        if store.graph is not None:
            return store.replay()
        with lent_by(self._lenders or ()):
            return self._computed(store)

    def _computed(self, store: _Store) -> Tensor:
        """Return the logits after what was told to the store, and record where it is time to."""
        store.steps += 1
        if not self._record or store.steps <= SEEN_BEFORE:
            return store.forward()
        # It pays now: what is recorded runs for many tokens. Only the current GPU is recorded.
        current = torch.cuda.device(self.device)
        with current, compiled_functions(), fused_kernels(self._model, _tell):
            logits = store.forward()
            try:
                store.record(logits)
            except RuntimeError as error:  # out of memory, or something that waits for the GPU
                self._record = False
                reason = (str(error.__context__ or error).strip() or "no reason").splitlines()[0]
                what = f"passes for one token are not recorded as CUDA graphs: {reason}"
                warn(what, NotRecordedWarning, stacklevel=2)
        return logits


def _tell(note: str) -> None:
    warn(note, SlowerWarning, stacklevel=4)


def _length(row: Row) -> int:
    """Return how many tokens a row has with the one that is read next."""
    return len(row.prompt) + len(row.tokens)


def _doubled(start: int, least: int) -> int:
    while start < least:
        start *= 2
    return start


class _Store:
    """Keys and values of `slots` rows of up to `length` tokens, and the pass for one more token.

    Args:
        old: a smaller one, whose rows are taken over.
    """

    def __init__(self, model: nn.Module, slots: int, length: int, old: _Store | None) -> None:
        self.slots, self.length, self.steps = slots, length, 0
        self.graph: Any = None
        self._model: Any = model
        device = next(model.parameters()).device
        self._told = torch.zeros(2, slots, dtype=torch.long, device=device)  # ids and positions
        self._places = torch.arange(length, device=device)
        self._layers: list[_SlotLayer] = []
        self._logits: Any = None
        for layer in old._layers if old else []:
            self._layers.append(self._layer(layer.keys, layer.values))
            for name in ("keys", "values"):
                there = getattr(layer, name)
                getattr(self._layers[-1], name)[: len(there), :, : there.shape[2]] = there

    def _layer(self, keys: Any, values: Any) -> _SlotLayer:
        shapes = [(self.slots, t.shape[1], self.length, t.shape[3]) for t in (keys, values)]
        return _SlotLayer(keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]), self._told[1])

    def put(self, slot: int, cache: Any, index: int, start: int) -> None:
        """Put row `index` of a cache into a slot, without the padding before `start`."""
        if not self._layers:
            self._layers = [self._layer(layer.keys, layer.values) for layer in cache.layers]
        for layer, from_ in zip(self._layers, cache.layers, strict=True):
            count = from_.keys.shape[2] - start
            layer.keys[slot, :, :count] = from_.keys[index, :, start:]
            layer.values[slot, :, :count] = from_.values[index, :, start:]

    def tell(self, ids: list[int], positions: list[int]) -> None:
        """Say which token each slot reads next, and where it stands."""
        self._told.copy_(torch.tensor([ids, positions]))

    def forward(self) -> Tensor:
        """Return the logits after the tokens that were told, float32 [slots, vocabulary]."""
        ids, positions = self._told
        with torch.no_grad(), fused_groups(self._model):
            output = self._model(
                input_ids=ids[:, None],
                position_ids=positions[:, None],
                attention_mask=self._masks(positions),
                use_cache=True,
                **{cache_name(self._model): Cache(layers=list(self._layers))},
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Return who sees which places, [slots, 1, 1, length], as transformers takes it."""
        config = self._model.config.get_text_config()
        seen = self._places <= positions[:, None]
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        near = seen if window is None else seen & (self._places > positions[:, None] - window)
        if not kinds:
            return self._as_mask(near)
        if "sliding_attention" not in kinds:
            return self._as_mask(seen)
        return {"full_attention": self._as_mask(seen), "sliding_attention": self._as_mask(near)}

    def _as_mask(self, seen: Tensor) -> Tensor:
        seen = seen[:, None, None]
        if self._model.config.get_text_config()._attn_implementation != "eager":
            return seen
        dtype = self._layers[0].keys.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def record(self, expected: Tensor) -> None:
        """Record the pass; its replay has to give `expected`, of the same tokens. Raises
        RuntimeError."""
        graph = torch.cuda.CUDAGraph()
        with recording(graph):
            self._logits = self.forward()
        graph.replay()
        # Sums of many layers in 16 bits, which libraries may order otherwise while they record.
        if not (self._logits - expected).norm() <= SAME * expected.norm():  # NaN neither
            raise RuntimeError("what was recorded computes something else")
        self.graph = graph

    def replay(self) -> Tensor:
        """Return what `forward` would; the next replay writes over it."""
        self.graph.replay()
        logits: Tensor = self._logits
        return logits


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of a layer, [slots, heads, length, head_dim]; new ones are written at
    `positions` [slots]."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.positions = keys, values, positions
        self.is_initialized, self.is_sliding = True, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one more token a slot, and return all."""
        where = self.positions[:, None, None, None]
        for there, new in ((self.keys, key_states), (self.values, value_states)):
            there.scatter_(2, where.expand_as(new), new.to(there.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Return a length that says that something is there; positions are given."""
        return int(self.keys.shape[2] - 1)

    def get_max_length(self) -> int:
        """Return how many tokens it can hold."""
        return int(self.keys.shape[2])
