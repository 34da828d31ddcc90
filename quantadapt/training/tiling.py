"""MLPs over tiles of tokens, so that what is inside them never stands whole; attention by heads.

Of a long row, the numbers inside one MLP are the most that a recomputed layer holds at a time. An
MLP sees each token by itself, so its forward and backward go through the tokens tile by tile
(https://arxiv.org/abs/2506.13996): it keeps its input alone, and a tile is computed again in its
backward. A layer that is recomputed leaves its MLP out then, unless a norm follows, so nothing is
computed more often; weights are dequantized once more for each tile. Attention goes through such a
row by groups of heads, see `model.head_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from ..facade import kept
from ..memory.passes import tile_of
from .random_state import RandomState

NAMES = ("mlp", "feed_forward")
"""What decoder layers call their MLP."""

Run = Callable[[Tensor], Tensor]


class Tiles:
    """The MLPs of some decoder layers, which go through long rows tile by tile while this is `on`.

    Args:
        hidden: size of the hidden states.
        layers: the decoder layers; experts, and what mixes tokens or draws random numbers, stay as
            they are.
    """

    def __init__(self, layers: list[nn.Module], hidden: int) -> None:
        self.on, self.hidden = False, hidden
        found = (getattr(layer, name, None) for layer in layers for name in NAMES)
        self.mlps = [
            mlp for mlp in found if isinstance(mlp, nn.Module) and _sees_single_tokens(mlp)
        ]

    def turn(self, on: bool) -> None:
        """Go tile by tile from here on, or not."""
        self.on = on

    def is_long(self, tokens: int) -> bool:
        """Say whether so many tokens go tile by tile now."""
        return self.on and tokens > 2 * tile_of(self.hidden)

    def lend(self) -> None:
        """Put a forward in front of that of each MLP, whatever it is."""
        for mlp in self.mlps:
            mlp.__dict__["forward"] = self._forward(mlp, mlp.forward)

    def _forward(self, mlp: nn.Module, whole: Run) -> Run:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_long, tile = self.is_long(x.numel() // x.shape[-1]), tile_of(self.hidden)
            if not is_long or args or kwargs or _draws(mlp):
                return whole(x, *args, **kwargs)
            if not torch.is_grad_enabled():
                return _over_tiles(whole, x, tile)
            weights = [weight for weight in mlp.parameters() if weight.requires_grad]
            x, keeper = kept(x)
            y: Tensor = _Tiled.apply(x, whole, tile, keeper, *weights)  # type: ignore[no-untyped-call]
            return y

        return forward


def _sees_single_tokens(mlp: nn.Module) -> bool:
    """Say whether it is an MLP and nothing more: routers tell what they did beside."""
    return not any(isinstance(part, _ConvNd) or hasattr(part, "experts") for part in mlp.modules())


def _draws(mlp: nn.Module) -> bool:
    """Say whether it has dropout, which in tiles would be another."""
    return any(isinstance(m, _DropoutNd) and m.p > 0 and m.training for m in mlp.modules())


def _tiles(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _over_tiles(
    run: Run, x: Tensor, size: int, before: Callable[[], None] = lambda: None
) -> Tensor:
    """Return run(x), [..., features], computed for `size` tokens at a time; `before` is called
    before each."""
    flat, out = x.reshape(-1, x.shape[-1]), None
    for rows in _tiles(len(flat), size):
        before()
        y = run(flat[None, rows])[0]
        if out is None:
            out = y.new_empty(len(flat), y.shape[-1])
        out[rows] = y
    assert out is not None
    return out.view(*x.shape[:-1], -1)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, size: int, keeper: Any, *weights: Tensor) -> Tensor:
        ctx.run, ctx.size, ctx.keeper, ctx.weights = run, size, keeper, weights
        kind = x.device.type
        casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.autocast = partial(torch.autocast, kind, dtype, enabled=casts)
        ctx.save_for_backward(*(() if keeper is not None else (x,)))
        states = [RandomState.of(x.device)]

        def before() -> None:
            states.append(states[-1] if states[-1].is_now() else RandomState.of(x.device))

        y = _over_tiles(run, x, size, before)
        ctx.states = [] if states[0].is_now() else states[1:]
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors if ctx.keeper is None else ctx.keeper.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(ctx.weights)
        now = RandomState.of(dy.device) if ctx.states else None
        for rows, state in zip_longest(_tiles(len(flat), ctx.size), ctx.states):
            # Adapters may draw, too, what no module tells: the same as in forward.
            if state is not None:
                state.put_back()
            part = flat[None, rows].detach().requires_grad_(dx is not None)
            with torch.enable_grad(), ctx.autocast():
                made = get_gradient_edge(ctx.run(part))  # the output itself is of no use here
            wanted = [*([part] if dx is not None else []), *ctx.weights]
            found = list(torch.autograd.grad([made], wanted, [dy[None, rows]], allow_unused=True))
            del made
            if dx is not None:
                dx[rows] = found.pop(0)[0]
            sums = [_sum(one, other) for one, other in zip(sums, found, strict=True)]
        if now is not None:
            now.put_back()
        dx = None if dx is None else dx.view(x.shape)
        return dx, None, None, None, *sums


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
