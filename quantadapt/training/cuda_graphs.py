"""Training passes of equal shape, replayed as CUDA graphs.

A step of a small model, or of a short batch, starts a few thousand kernels from Python, and the GPU
waits for them. The decoder's forward and backward of one shape of batch are recorded once and then
started as one (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). The same kernels run
on the same numbers. What cannot be recorded runs as it always has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapting.fused import FusedLoraLinear, free
from ..facade import single_stack_lora, stack_wrappers
from ..model.packed_attention import LONGEST, STARTS, in_one_call, is_lent
from ..model.recording import recording
from ..model.towers import towers_of
from ..sharding import is_sharded
from ..streaming import streamer_of
from .lent_to_trainers import balances_routers

SEEN_BEFORE = 2
"""So many passes of a shape run as ever, which compiles kernels and finds layers to join."""

MOST_SHAPES = 16
"""So many shapes are recorded; each keeps its kernels' arguments on the GPU."""

_OF_PACKED_ROWS = ("position_ids", "seq_idx", STARTS, "cu_seq_lens_k", LONGEST, "max_length_k")
_Key = tuple[tuple[str, Any], ...]


class Graphs:
    """Records and replays the passes of one model's decoder, once it is `on`.

    Args:
        model: all of its trained weights are plain fused LoRA, see `can_record`.
        on_note: told in a sentence where a pass cannot be recorded.
    """

    def __init__(self, model: Any, on_note: Callable[[str], None]) -> None:
        self.decoder = model.get_base_model().base_model
        self.eager: Callable[..., Any] = self.decoder.forward
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.device = self.weights[0].device
        dtype = model.get_input_embeddings().weight.dtype
        self.packs = is_lent(self.decoder.config) and in_one_call(model, self.device, dtype)
        self.on_note = on_note
        self.budget = 0
        self.on = False
        self._clear()

    def start(self, budget: int) -> None:
        """Record from now on, as long as no more than `budget` bytes are allocated."""
        self.budget, self.on = budget, True

    def stop(self) -> bool:
        """Record and replay no more, and give the memory back; say whether anything was there."""
        was_there, self.on = bool(self._recorded), False
        self._clear()
        return was_there

    def _clear(self) -> None:
        self._recorded: dict[_Key, _Recorded] = {}
        self._seen: Counter[_Key] = Counter()
        self._pool: Any = None
        self._gradients: list[Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        if args or kwargs.get("input_ids") is None or not self._is_plain(kwargs):
            return self.eager(*args, **kwargs)
        given = {name: kwargs[name] for name in ("input_ids", *_OF_PACKED_ROWS) if name in kwargs}
        recorded = self._recorded.get(_key(given)) or self._record(given)
        if recorded is None:
            return self.eager(**kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = _Replay.apply(recorded, given, *self.weights)  # type: ignore[no-untyped-call]
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        packed = self.packs and kwargs.get(STARTS) is not None
        known = ("input_ids", *(_OF_PACKED_ROWS if packed else ()))
        return (
            self.on
            # No mask, nor positions where one would be made of them; use_cache is False.
            and all(v is None or v is False for name, v in kwargs.items() if name not in known)
            and self.decoder.training
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self.device.type)
        )

    def _record(self, given: Mapping[str, Any]) -> _Recorded | None:
        """Return what is recorded for this shape, or None where it is too early or impossible."""
        key = _key(given)
        self._seen[key] += 1
        enough = self._seen[key] > SEEN_BEFORE and len(self._recorded) < MOST_SHAPES
        if not enough or not self._has_room():
            return None
        failed = ""
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            made = _Recorded(self.eager, given, self.weights, self._gradients, self._pool)
            self._recorded[key], self._gradients = made, made.gradients
        except RuntimeError as error:  # out of memory, or something that has to wait for the GPU
            failed = _reason(error.__context__ or error)  # recording could not be ended either
        if failed:
            # Out here, where the error and with it the frames of the pass are gone.
            self.on_note(f"CUDA graphs are not used: {failed}")
            self.stop()
            free(self.decoder)
        return self._recorded.get(key)

    def _has_room(self) -> bool:
        """Say whether the memory of a pass is there twice: that of graphs serves nothing else."""
        held = torch.cuda.memory_allocated(self.device)
        work = torch.cuda.max_memory_allocated(self.device) - held
        return bool(self._recorded) or self.budget - held >= 2 * work


def _key(given: Mapping[str, Any]) -> _Key:
    """Return what has to be equal for a pass to be replayed: shapes, and numbers themselves."""
    return tuple((n, v.shape if isinstance(v, Tensor) else v) for n, v in given.items())


class _Recorded:
    """Forward and backward for one shape of what the decoder is `given`, `input_ids` int64 [batch,
    length] among it; the latter leaves the gradients of `weights` in `gradients`, which are made if
    there are none yet.

    All that were recorded into one pool share its memory: between a forward and its backward,
    nothing else may be replayed.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        given: Mapping[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor] | None,
        pool: Any,
    ) -> None:
        self.given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        self.weights = weights
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with recording(self.forward, pool):
            hidden = run(**self.given, use_cache=False).last_hidden_state
        # Its gradient comes when nobody needs it any more, and takes its place. Without the graph
        # of autograd, so that later recordings can lie over what is saved there.
        self.hidden = hidden.detach()
        with recording(self.backward, pool):
            grads = torch.autograd.grad(hidden, weights, self.hidden)
            if gradients is None:
                gradients = [grad.contiguous() for grad in grads]
            else:
                torch._foreach_copy_(gradients, grads)
        self.gradients = gradients

    def replay_forward(self, given: Mapping[str, Any]) -> Tensor:
        """Replay it for what is `given` and return the hidden states. What the pass before left in
        `gradients` is kept elsewhere: the memory of the pool is that of a forward, too."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            if weight.grad is gradient:  # of a replay before, in the same step
                weight.grad = gradient.clone()
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                value.copy_(given[name])
        self.forward.replay()
        hidden: Tensor = self.hidden.detach()
        return hidden

    def replay_backward(self) -> None:
        """Replay it, and add to the gradients of the weights. Where there are none yet they are
        `gradients` themselves, until the next replay: a copy would be memory for all of them."""
        both = list(zip(self.weights, self.gradients, strict=True))
        self.backward.replay()
        added = [(w.grad, g) for w, g in both if w.grad is not None]
        if added:
            torch._foreach_add_([there for there, _ in added], [new for _, new in added])
        for weight, gradient in both:
            if weight.grad is None:
                weight.grad = gradient


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorded: _Recorded, given: Mapping[str, Any], *weights: Tensor
    ) -> Tensor:
        ctx.recorded = recorded
        return recorded.replay_forward(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        recorded: _Recorded = ctx.recorded
        recorded.hidden.copy_(grads[0])
        recorded.replay_backward()
        return None, None, *[None] * len(recorded.weights)


def can_record(model: Any) -> bool:
    """Say whether passes of `model` may be recorded: on CUDA, the same at each step, without the
    gathering of a sharded base, and with gradients for nothing but plain LoRA."""
    weights = [p for p in model.parameters() if p.requires_grad]
    plain: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, FusedLoraLinear) and (single := module.single_lora()) is not None:
            plain.update(module.parameters() if module.fuses(*single) else ())
    for wrapper in stack_wrappers(model):
        if (lora := single_stack_lora(wrapper)) is not None:
            plain |= {lora.a, lora.b}
    base = model.get_base_model()
    return (
        plain.issuperset(weights)
        and all(weight.is_cuda for weight in weights)
        and base.base_model is not base
        and not _draws_random_numbers(model)
        and not is_sharded(model)
        and streamer_of(model) is None  # a recorded pass would read slots, whatever is in them
        and not towers_of(base)  # pictures come in all sizes
        and not balances_routers(base)  # their loss wants more than hidden states
    )


def _draws_random_numbers(model: Any) -> bool:
    settings = vars(model.get_base_model().config.get_text_config()).items()
    rates = (v for k, v in settings if re.search("drop|jitter|noise", k) and isinstance(v, float))
    layers = (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    return any(rates) or any(layer.p > 0 for layer in layers)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
