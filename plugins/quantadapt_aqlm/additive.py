"""Additive quantization of one weight: what `quantadapt_aqlm` makes codes and codebooks with.

A weight W [out, in] is cut into groups of `out_group_size` x `in_group_size` numbers. A group is
the sum of one entry from each codebook, times the scale of its rows (arXiv:2401.06118). What is
made small is the error of the layer's outputs, tr((W - V) H (W - V)^T), where H = X^T X comes from
calibration:

1. start: residual k-means on the groups, one codebook after the other;
2. codebooks: least squares with the codes fixed (conjugate gradients); scales: closed form;
3. codes: beam search through the groups with the codebooks fixed (`beam_search`); go to 2 while
   it pays.

Everything is batched over rows and runs on the device where W is. Nothing here knows of models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantadapt_aqlm.beam_search import search

if TYPE_CHECKING:
    from quantadapt_aqlm import AQLM

LEAST_DAMPING, DAMPING = 0.01, 10.0
"""What is added to H's diagonal, in units of its median: the first, plus the second times inputs
per calibration row, up to 1. The fewer rows, the less H says about text that is not among them."""
CHUNK = {"cpu": 2**22, "cuda": 2**27}
"""How many numbers the largest temporary tensor may hold."""


@dataclass(frozen=True)
class Additive:
    """A quantized weight.

    Attributes:
        codes: int64 [out_groups, in_groups, num_codebooks].
        codebooks: [num_codebooks, codebook_size, out_group_size, in_group_size].
        scales: [out_groups].
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        return ungrouped(_sums(self.codes, self.codebooks) * self.scales[:, None, None, None])

    def packed(self, nbits: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of `aqlm.QuantizedLinear`, with codebooks and scales in `dtype`."""
        from aqlm.utils import pack_int_data

        return {
            "codes": pack_int_data(self.codes.clone(), nbits).clone(),
            "codebooks": self.codebooks.to(dtype),
            "scales": self.scales[:, None, None, None].to(dtype),
        }


def grouped(weight: Tensor, codebooks: Tensor) -> Tensor:
    """Return a view [out_groups, in_groups, out_group_size, in_group_size] of a weight."""
    *_, out_size, in_size = codebooks.shape
    rows, columns = weight.shape
    parts = weight.reshape(rows // out_size, out_size, columns // in_size, in_size)
    return parts.transpose(1, 2)


def ungrouped(groups: Tensor) -> Tensor:
    """Return the weight of which `groups` are the groups."""
    out_groups, in_groups, out_size, in_size = groups.shape
    return groups.transpose(1, 2).reshape(out_groups * out_size, in_groups * in_size)


def _sums(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Return the sum of the entries that the codes choose, grouped."""
    columns = codes.flatten(0, 1).unbind(1)
    groups = torch.zeros((), device=codes.device)
    for codebook, column in zip(codebooks, columns, strict=True):
        groups = groups + codebook.index_select(0, column)
    return groups.view(*codes.shape[:2], *codebooks.shape[2:])


def quantize_weight(
    weight: Tensor,
    second_moment: Tensor,
    rows: int,
    options: AQLM,
    *,
    seed: int,
    storage: torch.dtype,
) -> Additive:
    """Return additive codes for a weight.

    Args:
        weight: [out_features, in_features].
        second_moment: H = X^T X of the layer's inputs, float32, on the weight's device.
        rows: how many rows X has.
        options: sizes, and how hard to try.
        seed: for the k-means start.
        storage: codebooks and scales are rounded to it, and the codes fitted to the rounded ones.
    """
    weight = weight.float()
    moment = _damped(second_moment, rows)
    found = _start(weight, moment, options, torch.Generator().manual_seed(seed))
    error = _error(weight, moment, found)
    for _ in range(options.max_epochs):
        found = _refine(weight, moment, found, options.steps_per_epoch)
        found = _beam_search(weight, moment, found, options.beam_size)
        before, error = error, _error(weight, moment, found)
        if error > before * (1 - options.relative_mse_tolerance):
            break
    found = _refine(weight, moment, found, options.steps_per_epoch)
    return _rounded(weight, moment, found, options.beam_size, storage)


def _damped(second_moment: Tensor, rows: int) -> Tensor:
    """Return H in units of its median diagonal, damped; the identity where nothing was measured."""
    size = second_moment.shape[0]
    identity = torch.eye(size, device=second_moment.device)
    diagonal = second_moment.diagonal()
    if not bool((diagonal > 0).any()):
        return identity
    damping = min(1.0, LEAST_DAMPING + DAMPING * size / max(rows, 1))
    return second_moment.float() / diagonal[diagonal > 0].median() + damping * identity


def _error(weight: Tensor, moment: Tensor, found: Additive) -> float:
    difference = weight - found.dequantize()
    return float(((difference @ moment) * difference).sum(dtype=torch.float64))


def _rounded(
    weight: Tensor, moment: Tensor, found: Additive, beam_size: int, storage: torch.dtype
) -> Additive:
    found = replace(found, codebooks=found.codebooks.to(storage).float())
    found = replace(found, scales=_scales(weight, moment, found).to(storage).float())
    return _beam_search(weight, moment, found, beam_size)


# Start -----------------------------------------------------------------------------------------


def _start(weight: Tensor, moment: Tensor, options: AQLM, generator: torch.Generator) -> Additive:
    """Return the residual k-means start: each codebook clusters what the ones before leave."""
    size = 2**options.nbits_per_codebook
    shape = (options.num_codebooks, size, options.out_group_size, options.in_group_size)
    codebooks = weight.new_zeros(shape)
    groups = grouped(weight, codebooks)
    scales = groups.square().mean(dim=(1, 2, 3)).sqrt().clamp_min(1e-12)
    points = (groups / scales[:, None, None, None]).flatten(0, 1).flatten(1)
    energy = moment.diagonal().reshape(-1, options.in_group_size).mean(1)
    weights = (scales.square()[:, None] * energy).flatten()
    codes = []
    for number in range(options.num_codebooks):
        centers, code = _kmeans(points, weights, size, options.init_max_iter, generator)
        codebooks[number] = centers.reshape(shape[1:])
        codes.append(code)
        points = points - centers[code]
    return Additive(torch.stack(codes, -1).reshape(*groups.shape[:2], -1), codebooks, scales)


def _kmeans(
    points: Tensor, weights: Tensor, size: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return centers [size, d] and the center of each point, by weighted Lloyd iterations."""
    count = points.shape[0]
    order = torch.randperm(count, generator=generator)
    chosen = order.repeat(-(-size // count))[:size].to(points.device)
    centers = points[chosen]
    codes = _nearest(points, centers)
    for _ in range(iterations):
        total = _sum_by(codes, weights[:, None], size)
        means = _sum_by(codes, weights[:, None] * points, size) / total.clamp_min(1e-30)
        empty = total.squeeze(1) <= 0
        centers = torch.where(empty[:, None], centers, means)
        if number := int(empty.sum()):  # to where the points are worst off
            distance = weights * (points - centers[codes]).square().sum(1)
            centers[empty] = points[distance.topk(min(number, count)).indices].repeat(
                -(-number // count), 1
            )[:number]
        codes = _nearest(points, centers)
    return centers, codes


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    half_norms = centers.square().sum(1) / 2
    parts = torch.split(points, _at_once(points, centers.shape[0]))
    return torch.cat([torch.addmm(half_norms, p, centers.t(), alpha=-1).argmin(1) for p in parts])


def _at_once(tensor: Tensor, width: int) -> int:
    """Return how many rows of `width` numbers to work on at a time."""
    return max(1, CHUNK.get(tensor.device.type, CHUNK["cpu"]) // width)


def _sum_by(codes: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sums of the rows of `values` that have the same code, [size, ...]."""
    sums = values.new_zeros(size, *values.shape[1:])
    if values.is_cuda:  # index_add_ would add in an order of its own there, index_put_ does not
        return sums.index_put_((codes,), values.contiguous(), accumulate=True)
    return sums.index_add_(0, codes, values)


# Codebooks and scales, with the codes fixed ----------------------------------------------------


def _refine(weight: Tensor, moment: Tensor, found: Additive, steps: int) -> Additive:
    found = replace(found, codebooks=_codebooks(weight, moment, found, steps))
    return replace(found, scales=_scales(weight, moment, found))


def _scales(weight: Tensor, moment: Tensor, found: Additive) -> Tensor:
    """Return the scales that are best for these codes and codebooks."""
    direction = ungrouped(_sums(found.codes, found.codebooks))
    out_size = found.codebooks.shape[2]
    pressed = direction @ moment
    along = (pressed * weight).sum(1).reshape(-1, out_size).sum(1)
    length = (pressed * direction).sum(1).reshape(-1, out_size).sum(1)
    return torch.where(length > 0, along / length.clamp_min(1e-30), found.scales)


def _codebooks(weight: Tensor, moment: Tensor, found: Additive, steps: int) -> Tensor:
    """Return codebooks improved by preconditioned conjugate gradients; the error is quadratic."""
    inverse = _preconditioner(moment, found)
    codebooks = found.codebooks.clone()
    residual = _gradient(weight - found.dequantize(), moment, found)
    step = torch.zeros_like(codebooks)
    last = 0.0
    for number in range(steps):
        scaled = residual @ inverse
        size = float((residual * scaled).sum(dtype=torch.float64))
        if not size > 0:
            break
        step = scaled + step * (size / last if number else 0.0)
        last = size
        pushed = _gradient(replace(found, codebooks=step).dequantize(), moment, found)
        curvature = float((step * pushed).sum(dtype=torch.float64))
        if not curvature > 0:
            break
        codebooks += step * (size / curvature)
        residual -= pushed * (size / curvature)
    return codebooks


def _gradient(difference: Tensor, moment: Tensor, found: Additive) -> Tensor:
    """Return how the output error falls with each codebook entry, for W - V = `difference`."""
    groups = grouped(difference @ moment, found.codebooks) * found.scales[:, None, None, None]
    flat = groups.reshape(-1, *groups.shape[2:])
    size = found.codebooks.shape[1]
    codes = found.codes.flatten(0, 1)
    return torch.stack([_sum_by(column, flat, size) for column in codes.unbind(1)])


def _preconditioner(moment: Tensor, found: Additive) -> Tensor:
    """Return, for each entry, the inverse of its own block of the normal equations."""
    count, size, _, in_size = found.codebooks.shape
    out_groups, in_groups, _ = found.codes.shape
    blocks = diagonal_blocks(moment, in_size)
    weights = found.scales.square()[:, None].expand(out_groups, in_groups).reshape(-1)
    position = torch.arange(in_groups, device=moment.device)
    inverses = []
    for number in range(count):
        places = (found.codes[..., number] * in_groups + position).flatten()
        share = _sum_by(places, weights, size * in_groups).reshape(size, in_groups)
        own = (share @ blocks.flatten(1)).reshape(size, in_size, in_size)
        floor = own.diagonal(dim1=1, dim2=2).mean() * 1e-3 + 1e-30
        own = own + floor * torch.eye(in_size, device=moment.device)
        inverses.append(torch.linalg.inv(own))
    return torch.stack(inverses)


def diagonal_blocks(moment: Tensor, size: int) -> Tensor:
    """Return the blocks [n, size, size] on the diagonal of a square matrix."""
    parts = moment.reshape(moment.shape[0] // size, size, -1, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


# Codes, with codebooks and scales fixed --------------------------------------------------------


def _beam_search(weight: Tensor, moment: Tensor, found: Additive, beam_size: int) -> Additive:
    """Return better codes. Rows do not depend on each other, so they are searched in chunks."""
    size, out_size = found.codebooks.shape[1:3]
    chunk = _at_once(weight, beam_size * max(size, weight.shape[1] * out_size))
    # In units of its scale, a row's groups are sums of plain entries.
    left = grouped(weight - found.dequantize(), found.codebooks) / _units(found.scales)
    pairs = zip(torch.split(left, chunk), torch.split(found.codes, chunk), strict=True)
    codes = [search(part, moment, code, found.codebooks, beam_size) for part, code in pairs]
    return replace(found, codes=torch.cat(codes))


def _units(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)[:, None, None, None]
