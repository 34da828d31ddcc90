"""AWQ's search: which columns of a weight to round more finely, and where to clip it.

As published (https://arxiv.org/abs/2306.00978), but for two things. The error of the outputs is
taken from the sum of x x^T, so that examples of any length count. And what scales may be moved into
is found by trying, so that no table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.calibration import first
from quantadapt.calibration.blocks import Block
from quantadapt_gptqmodel.codes import in_groups

RATIOS = 20
SHRINKS = 10
NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")
"""Their outputs multiply each other: an error in one of them alone says little."""
FOLDED = 2e-2
"""How much of a change in front of some layers may be left behind them: rounding, no more."""

Grid = Callable[[Tensor], Tensor]
"""Rounds weights of shape [..., group] to the grid of their group."""


@dataclass
class Inputs:
    """What is known of the inputs of some layers.

    Attributes:
        gram: sum of x x^T over all tokens, float32.
        total: sum of |x|.
        count: number of tokens.
    """

    gram: Tensor
    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add a batch of activations."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.gram += x.T @ x
        self.total += x.abs().sum(0)
        self.count += len(x)


@torch.no_grad()
def rescale_and_clip(block: Block, group_size: int, grid: Grid) -> None:
    """Change the weights of `block` in place as AWQ does before it rounds them.

    First, scales move from the layer in front (a norm, or a linear layer with nothing but products
    behind it) into the columns of those that follow, so that columns with large inputs are rounded
    more finely. The block still computes the same: what does not pass that test is left alone.
    Then each group's largest weights are clipped where that lowers the error of the outputs.
    """
    groups, folds = _trace(block)
    found = _inputs(block, groups)
    for names, fold in zip(groups, folds, strict=True):
        linears = [block.linears[name] for name in names]
        inputs = found[names[0]]
        if not inputs.count:
            continue
        size = linears[0].in_features if group_size < 0 else group_size
        if fold is not None:
            scales = _best_scales([linear.weight.float() for linear in linears], inputs, size, grid)
            fold(scales)
            inputs.gram /= scales[:, None] * scales
        for name, linear in zip(names, linears, strict=True):
            if not any(part in name.rpartition(".")[2] for part in NOT_CLIPPED):
                linear.weight.copy_(_clipped(linear.weight.float(), inputs.gram, size, grid))


Fold = Callable[[Tensor], None]


Place = tuple[int, int]
"""Where a tensor lies, and how many elements it has."""


def _trace(block: Block) -> tuple[list[list[str]], list[Fold | None]]:
    """Return the layers that share their input, and for each such group how scales get into it."""
    taken, makers, expected = _first_pass(block)
    groups: dict[Any, list[str]] = {}
    for name in block.linears:
        groups.setdefault(taken.get(name, name), []).append(name)
    folds = [
        # What the first example did not get to, an expert, say, cannot be tested.
        _working_fold(block, group, makers.get(at), expected) if at in taken.values() else None
        for at, group in groups.items()
    ]
    return list(groups.values()), folds


def _first_pass(
    block: Block,
) -> tuple[dict[str, Place], dict[Place, nn.Module], list[Tensor]]:
    """Return where each layer takes its input from, which module made what lies there, and the
    output, all of the first example."""
    taken: dict[str, Place] = {}
    makers: dict[Place, nn.Module] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def place(tensor: Tensor) -> Place:
        kept.append(tensor)
        return tensor.data_ptr(), tensor.numel()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name and args:
                taken.setdefault(name, place(args[0]))
            if isinstance(output, Tensor):
                makers.setdefault(place(output), module)

        return hook

    names = {id(linear): name for name, linear in block.linears.items()}
    with ExitStack() as hooks:
        for module in block.module.modules():
            hook = note(names.get(id(module), ""))
            hooks.callback(module.register_forward_hook(hook).remove)
        return taken, makers, [first(output) for output in block.run(1)]


def _working_fold(
    block: Block, group: list[str], maker: nn.Module | None, expected: list[Tensor]
) -> Fold | None:
    """Return the first of the candidates that leaves the output of the block as it is."""
    linears = [block.linears[name] for name in group]
    width = linears[0].in_features
    candidates: list[tuple[nn.Module, int]] = []
    weight = getattr(maker, "weight", None)
    if maker is not None and isinstance(weight, nn.Parameter) and weight.shape == (width,):
        candidates += [(maker, 0), (maker, 1)]  # some norms multiply by 1 + weight
    parent = group[0].rpartition(".")[0]
    for name, linear in block.linears.items():
        sibling = name.rpartition(".")[0] == parent and name not in group
        if sibling and linear.out_features == width:
            candidates.append((linear, 0))
    for module, offset in candidates:
        touched = [module, *linears]
        alone = _change(block, _fold(module, offset, []), touched, expected, width)
        together = _change(block, _fold(module, offset, linears), touched, expected, width)
        if together < FOLDED * alone:
            return _fold(module, offset, linears)
    return None


def _fold(module: nn.Module, offset: int, linears: list[nn.Linear]) -> Fold:
    """Return what divides the outputs of `module` by scales and multiplies the columns of
    `linears` by them."""

    def fold(scales: Tensor) -> None:
        weight: Any = module.weight
        rows = scales.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_((weight.float() + offset) / rows - offset)
        bias: Any = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.copy_(bias.float() / scales)
        for linear in linears:
            linear.weight.copy_(linear.weight.float() * scales)

    return fold


def _change(
    block: Block, fold: Fold, touched: list[nn.Module], expected: list[Tensor], width: int
) -> float:
    """Return how much `fold` changes the output; it is taken back. The scales are powers of two,
    which are free of rounding."""
    parameters = [p for module in touched for p in module.parameters()]
    before = [p.clone() for p in parameters]
    powers = torch.arange(width, device=parameters[0].device) % 3 - 1
    fold(2.0**powers)
    outputs = [first(output) for output in block.run(1)]
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    pairs = zip(outputs, expected, strict=True)
    return sum(float((found - wanted).float().norm()) for found, wanted in pairs)


def _inputs(block: Block, groups: list[list[str]]) -> dict[str, Inputs]:
    """Return what is known of the inputs of each group, by the name of its first layer."""
    found: dict[str, Inputs] = {}
    with ExitStack() as hooks:
        for names in groups:
            linear = block.linears[names[0]]
            device, width = linear.weight.device, linear.in_features
            inputs = Inputs(
                torch.zeros(width, width, device=device), torch.zeros(width, device=device)
            )
            found[names[0]] = inputs
            hooks.callback(linear.register_forward_hook(_adding(inputs.add)).remove)
        block.run_all()
    return found


def _adding(add: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda module, args, output: add(args[0])


def _best_scales(weights: list[Tensor], inputs: Inputs, size: int, grid: Grid) -> Tensor:
    """Return the scales of the columns, among a few, with the least error of the outputs."""
    stacked = torch.cat(weights)
    activation = inputs.total / inputs.count
    grouped = in_groups(stacked.abs(), size)
    share = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(-2).mean(0)
    best = torch.ones_like(activation)
    least = _error(_rounded(stacked, size, grid) - stacked, inputs.gram)
    for step in range(RATIOS):
        ratio = step / RATIOS
        scales = (activation**ratio / (share ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales /= (scales.max() * scales.min()).sqrt()
        error = _error(_rounded(stacked * scales, size, grid) / scales - stacked, inputs.gram)
        if error < least:
            best, least = scales, error
    return best


def _rounded(weight: Tensor, size: int, grid: Grid) -> Tensor:
    return grid(in_groups(weight, size)).flatten(-2)


def _error(difference: Tensor, gram: Tensor) -> float:
    """Return the squared error of the outputs."""
    return float(((difference @ gram) * difference).sum())


def _clipped(weight: Tensor, gram: Tensor, size: int, grid: Grid) -> Tensor:
    """Return `weight` with each group clipped where rounding it then costs less."""
    grouped = in_groups(weight, size).transpose(0, 1)  # [groups, out, size]
    tiled = gram.reshape(len(grouped), size, len(grouped), size)
    blocks = tiled.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    largest = grouped.abs().amax(-1, keepdim=True)
    best, least = largest, torch.full_like(largest, torch.inf)
    for step in range(SHRINKS):
        limit = largest * (1 - step / (2 * SHRINKS))
        difference = grid(grouped.clamp(-limit, limit)) - grouped
        error = ((difference @ blocks) * difference).sum(-1, keepdim=True)
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return grouped.clamp(-best, best).transpose(0, 1).flatten(-2)
