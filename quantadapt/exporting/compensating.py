"""Round a tuned weight so that the outputs of its layer stay what they are, on data.

A weight that is rounded to nearest by itself forgets what was learned: an adapter moves weights by
less than half a step. Here columns make up for what others were rounded by, as in GPTQ
(https://arxiv.org/abs/2210.17323), and are then looked at again, one by one, as in QuantEase
(https://arxiv.org/abs/2309.01885). And layers make up for what those before them were rounded by,
as in GPTAQ (https://arxiv.org/abs/2504.02692): with the inputs X that a layer will get, it is to
give what the tuned layer W gives with its own, Y. So V is chosen for the least ||X V^T - Y W^T||,
for which the moments X^T X and X^T Y suffice.

The error of the outputs gets small so, but not free of a drift back to the base: of very small
changes, `Grid.dithered` keeps more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import LayerInputs, open_experts, walk_blocks
from ..facade import QuantStack, QuantWeight, facades
from ..model.experts import SUFFIX, expert_stacks
from ..model.modules import make_linear
from ..protocols import Grid
from ..quantizing.state import state_of
from .merging import Write, bare_base, merged_model

if TYPE_CHECKING:
    from peft import PeftModel

    from ..quantizing.examples import Examples

Nearest = Callable[[Tensor, slice], Tensor]
"""Gets columns of a weight, [out_features, n], and which columns these are; returns the nearest
values that they can take. `Grid.nearest` of `quantadapt.protocols` is one."""

CHUNK = 128
"""Columns that are rounded before all others learn of it; the result depends on it by rounding."""
DAMPING = 0.01
"""Share of the mean of a moment's diagonal that is added to it: how little inputs are believed that
were hardly seen."""
SWEEPS = 10
FEW = 1e-3
"""Share of weights that a sweep has to change for another one to be worth it."""


@torch.no_grad()
def compensated(
    weight: Tensor,
    second_moment: Tensor,
    nearest: Nearest,
    *,
    cross_moment: Tensor | None = None,
    sweeps: int = SWEEPS,
) -> Tensor:
    """Return values of a grid that give the outputs of `weight`, as far as its inputs are known.

    Args:
        weight: floating point, [out_features, in_features].
        second_moment: X^T X of the inputs X, [in_features, in_features], e.g. that of
            `calibration.LayerInputs`; where it is 0, the weight is rounded to nearest.
        nearest: rounds columns onto the grid.
        cross_moment: X^T Y of these inputs and of those that the tuned layer gets at the same
            tokens, in the same shape; None: they are the same.
        sweeps: how often all columns are looked at again, at most.

    Returns:
        float32, [out_features, in_features], on the grid. In no row is the squared error of the
        outputs, damping included, larger than that of rounding the best weight to nearest.
    """
    moment = second_moment.to(weight.device, torch.float32)
    mean = moment.diagonal().mean()
    if not mean > 0:
        return nearest(weight.float(), slice(None)).float()
    order = moment.diagonal().argsort(descending=True)  # large inputs first
    moment = moment[order][:, order] / mean  # so that float32 suffices, whatever the inputs
    apart = None
    if cross_moment is not None:
        apart = cross_moment.to(moment)[order][:, order] / mean - moment
    moment.diagonal().add_(DAMPING)
    inverse, best, columns = _inverse(moment), weight.float()[:, order], order.tolist()
    if apart is not None:
        best = best + best @ apart.t() @ inverse

    def at(part: Tensor, place: int) -> Tensor:
        return nearest(part, slice(columns[place], columns[place] + 1)).float()

    plain = nearest(best[:, order.argsort()], slice(None)).float()[:, order]
    found = _descended(best, moment, _gptq(best, inverse, at), at, sweeps)
    worse = _errors(best, moment, found) > _errors(best, moment, plain)
    return torch.where(worse[:, None], plain, found)[:, order.argsort()]


def _errors(weight: Tensor, moment: Tensor, rounded: Tensor) -> Tensor:
    """Return the squared error of each output, summed over the inputs, [out_features]."""
    off = rounded - weight
    return ((off @ moment) * off).sum(1)


def _inverse(moment: Tensor) -> Tensor:
    """Return the inverse; where rounding leaves none, that of a moment that is damped more."""
    extra = 0.0
    while True:
        damped = moment + extra * torch.eye(len(moment), device=moment.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            if not torch.linalg.cholesky_ex(inverse).info:
                return inverse
        extra = max(10 * extra, 1e-3)


def _gptq(weight: Tensor, inverse: Tensor, at: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Round column by column; those to come make up for the error."""
    left, rounded = weight.clone(), torch.empty_like(weight)
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, len(factor), CHUNK):
        stop = min(start + CHUNK, len(factor))
        part, own = left[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for k in range(stop - start):
            value = at(part[:, k : k + 1], start + k)
            errors[:, k : k + 1] = (part[:, k : k + 1] - value) / own[k, k]
            part[:, k + 1 :] -= errors[:, k : k + 1] * own[k, k + 1 :]
            rounded[:, start + k : start + k + 1] = value
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def _descended(
    weight: Tensor,
    moment: Tensor,
    rounded: Tensor,
    at: Callable[[Tensor, int], Tensor],
    sweeps: int,
) -> Tensor:
    """Round each column to what is best while all others stay, again and again."""
    width, spread = len(moment), moment.diagonal()
    for _ in range(sweeps):
        moved = 0
        for start in range(0, width, CHUNK):
            stop = min(start + CHUNK, width)
            slope = (rounded - weight) @ moment[:, start:stop]
            for column in range(start, stop):
                before = rounded[:, column : column + 1]
                best = before - slope[:, column - start, None] / spread[column]
                value = at(best, column)
                change = value - before
                slope += change * moment[column, start:stop]
                moved += int(change.count_nonzero())
                before.copy_(value)  # adding the change would round, off the grid
        if moved < FEW * rounded.numel():
            break
    return rounded


# Models ------------------------------------------------------------------------------------------


@torch.no_grad()
def compensating(model: PeftModel, examples: Examples) -> Write:
    """Return a way to write merged weights into quantized layers, for `merged_model`: onto the
    scales that each layer has, chosen for the least error of the outputs on `examples`.

    Blocks are rounded one after the other, in dense copies, and each layer is shown what those
    before it have become. Experts are chosen by what is routed to them, one by one. What has no
    grid is quantized anew, and what no example can show (experts that the model runs in a way of
    its own) is rounded to nearest.

    Args:
        model: a PeftModel over facades; it stays as it is.
        examples: keyword arguments of its forward, as for `quantize`.
    """
    found = _weights(model, examples)

    def write(base: QuantWeight, copied: QuantWeight, weight: Tensor) -> None:
        if copied.has_grid:
            copied.repack(found.get(base, weight))
        else:
            copied.write(weight)

    return write


class _Place(NamedTuple):
    """Where the weight of a dense layer belongs: to these rows of a quantized one."""

    facade: QuantWeight
    rows: slice
    grid: Grid


def _weights(model: PeftModel, examples: Examples) -> dict[QuantWeight, Tensor]:
    """Return the merged weights of the quantized layers that the adapter changes, on their grids,
    in the dtype of these."""
    tuned = make_linear(merged_model(model, "dense")).eval()
    places = dict(_places(model, tuned))
    tensors = {id(tensor): tensor for tensor in (*tuned.parameters(), *tuned.buffers())}
    rounded = copy.deepcopy(tuned, tensors)
    made = {
        place.facade: torch.empty(place.facade.dequantize().shape, dtype=place.grid.dtype)
        for place in places.values()
    }

    def on_layer(name: str, linear: nn.Linear, inputs: LayerInputs) -> None:
        facade, rows, grid = places[name]
        nearest, moments = grid.nearest, (inputs.second_moment, inputs.cross_moment)
        weight = compensated(linear.weight, moments[0], nearest, cross_moment=moments[1])
        made[facade][rows] = weight.to(grid.dtype)
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)

    device = state_of(model).device
    walk_blocks(
        rounded, examples, on_layer=on_layer, names=list(places), device=device, beside=tuned
    )
    return made


def _places(model: PeftModel, tuned: nn.Module) -> Iterator[tuple[str, _Place]]:
    """Yield (name, place) of the linear layers of `tuned` that the adapter has changed and that are
    to be rounded; experts are taken apart for it."""
    stacks: dict[str, tuple[QuantWeight, Grid]] = {}
    for name, facade in facades(bare_base(model)):
        if (grid := facade.target.grid(facade.vendor)) is None:
            continue
        if isinstance(facade, QuantStack):
            name = name.removesuffix(SUFFIX)
            dense = facade.stack.tall(tuned.get_parameter(name))
        else:
            dense = tuned.get_submodule(name).weight  # type: ignore[assignment]
        if torch.equal(dense, facade.dequantize()):
            continue
        if isinstance(facade, QuantStack):
            stacks[name] = facade, grid
        else:
            yield name, _Place(facade, slice(None), grid)
    others = tuple(stack.name for stack in expert_stacks(tuned, ()) if stack.name not in stacks)
    for opened in open_experts(tuned, others, lambda *_: None):
        owner, tall = stacks[opened.stack.name]
        height = opened.stack.rows // len(opened.layers)
        for index, name in enumerate(opened.layers):
            rows = slice(index * height, (index + 1) * height)
            zero = None if tall.zero is None else tall.zero[rows]
            yield name, _Place(owner, rows, replace(tall, scale=tall.scale[rows], zero=zero))
