"""Answers that are made together: a batch of rows, padded on the left, that join and leave.

Each row is a prompt and what was answered so far. Keys and values of all rows lie in one cache;
whoever joins is computed alone and put into it, and whoever is done is taken out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.batches import padded
from ..evaluation.predictions import device_of, is_encoder_decoder
from .sampling import Chooser, drawn_together, refuse_no_number

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(eq=False)
class Row:
    """One answer in the making.

    Attributes:
        prompt: token ids.
        choose: how its tokens are chosen.
        limit: most tokens of the answer.
        ends: ids that end it.
        tokens: the answer so far, without the id that ended it.
        end: that id, if one has.
        finish: "stop" or "length" once it is done, "error" if no token could be chosen; else empty.
        error: why that was.
    """

    prompt: Sequence[int]
    choose: Chooser
    limit: int
    ends: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    end: int | None = None
    finish: str = ""
    error: Exception | None = None

    def take(self, token: int) -> None:
        """Take what was chosen as the next token."""
        if token in self.ends:
            self.finish, self.end = "stop", token
            return
        self.tokens.append(token)
        if len(self.tokens) >= self.limit:
            self.finish = "length"


def takes_rows(model: nn.Module) -> bool:
    """Say whether answers of a model can be made by `Rows`: it is a decoder whose cache is keys and
    values alone, not the state of a recurrent layer, say, and its adapters are on everywhere."""
    from ..facade.invocations import has_invocations

    base = base_of(model)
    if has_invocations(model):
        return False
    stateful = getattr(base, "_is_stateful", False)
    return bool(cache_name(base)) and not stateful and not is_encoder_decoder(base)


def cache_name(base: nn.Module) -> str:
    """Return what a model of transformers calls the keys and values that it is given; empty if it
    takes none. Since 5.24 it is `cache`."""
    takes = inspect.signature(type(base).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), "")


def base_of(model: Any) -> Any:
    """Return the model of transformers that an adapter may be attached to."""
    return getattr(model, "get_base_model", lambda: model)()


class Rows:
    """A batch that is answered token by token.

    Args:
        model: in evaluation mode, see `takes_rows`.

    Attributes:
        rows: those that are not done.
        device: where they are computed.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self._model = base_of(model)
        self.device = device_of(model)
        self._takes = inspect.signature(type(self._model).forward).parameters
        self._cache: Any = DynamicCache()
        self._mask: Any = None  # [rows, length], 1 where a row has a token
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in: reads their prompts and chooses the first token of each."""
        from transformers import DynamicCache

        if not rows:
            return
        ids = padded([list(row.prompt) for row in rows], 0, left=True).to(self.device)
        mask = padded([[1] * len(row.prompt) for row in rows], 0, left=True).to(self.device)
        cache: Any = DynamicCache()
        self._choose(rows, self._forward(ids, mask, cache))
        self._enter(rows, mask, cache)
        self.rows += rows
        self._drop_done()

    def _enter(self, rows: Sequence[Row], mask: Tensor, cache: Any) -> None:
        """Put what was computed of new rows beside that of the others."""
        self._mask = mask if not self.rows else _joined_masks(self._mask, mask)
        if self.rows:
            _join(self._cache, cache)
        else:
            self._cache = cache

    def step(self) -> None:
        """Choose one more token for each row; those that are done leave."""
        import torch

        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._choose(self.rows, self._forward(last, self._mask, self._cache))
        self._drop_done()

    def drop(self, row: Row) -> None:
        """Take a row out that nobody waits for any more; one that its last token had ended at its
        length as well has stopped."""
        row.finish = "stop"
        self._drop_done()

    def clear(self) -> None:
        """Take all rows out."""
        self.rows, self._mask = [], None

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        tops, best = (found.tolist() for found in logits.max(-1))  # at once for all
        drawn = drawn_together([row.choose for row in rows], logits)
        for row, scores, top, token in zip(rows, logits, tops, drawn or best, strict=True):
            try:
                refuse_no_number(top)
                chosen = drawn is not None or row.choose.sampling.is_greedy
                row.take(token if chosen else row.choose(scores, [*row.prompt, *row.tokens]))
            except Exception as error:  # of one row: the others go on
                row.finish, row.error = "error", error

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Return the logits after the last of `ids`, [rows, vocabulary] in float32."""
        import torch

        more: dict[str, Any] = {cache_name(self._model): cache}
        if "position_ids" in self._takes:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        with torch.no_grad():
            output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _drop_done(self) -> None:
        import torch

        left = [index for index, row in enumerate(self.rows) if not row.finish]
        if len(left) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in left]
        if not left:
            self._mask = None
            return
        kept = torch.tensor(left, device=self._mask.device)
        mask = self._mask[kept]
        start = int(mask.argmax(-1).min())  # padding that no row needs any more
        self._mask = mask[:, start:]
        for layer in _filled(self._cache):
            layer.keys = layer.keys[kept.to(layer.keys.device), :, start:]
            layer.values = layer.values[kept.to(layer.values.device), :, start:]


def _filled(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if layer.keys is not None]


def _joined_masks(one: Tensor, other: Tensor) -> Tensor:
    import torch

    length = max(one.shape[1], other.shape[1])
    return torch.cat([_longer(mask, length, dim=1) for mask in (one, other)])


def _join(cache: Any, other: Any) -> None:
    """Put the rows of `other` behind those of `cache`."""
    import torch

    for ours, theirs in zip(_filled(cache), _filled(other), strict=True):
        length = max(ours.keys.shape[2], theirs.keys.shape[2])
        for name in ("keys", "values"):
            parts = [_longer(getattr(layer, name), length, dim=2) for layer in (ours, theirs)]
            setattr(ours, name, torch.cat(parts))


def _longer(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Return `tensor` with zeros before it, so that it is `length` long."""
    import torch

    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor
