"""Beam search for the codes of additive quantization, with codebooks and scales fixed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding

COLUMNS = 128
"""How many columns of a weight the search looks at before it turns to the others."""


def search(
    left: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, beam_size: int
) -> Tensor:
    """Return better codes, [rows, in_groups, num_codebooks]: go through all groups, each codebook
    in turn, keeping the `beam_size` best codings so far.

    Args:
        left: what the codes leave of each row, [rows, in_groups, out_group_size, in_group_size];
            it is used up.
        codes: [rows, in_groups, num_codebooks].
    """
    rows, in_groups, out_size, in_size = left.shape
    at_once = max(1, COLUMNS // in_size)
    lefts = left.transpose(1, 2).reshape(rows, 1, out_size, in_groups * in_size)
    kept = codes[:, None].clone()
    errors = left.new_zeros(rows, 1)  # of each beam, against the start
    for first in range(0, in_groups, at_once):
        groups = slice(first, first + at_once)
        columns = slice(first * in_size, (first + at_once) * in_size)
        beams = _Beams(
            left=lefts[..., columns],
            pull=lefts @ moment[:, columns],
            codes=kept[:, :, groups],
            errors=errors,
            origin=torch.arange(lefts.shape[1], device=left.device).expand(rows, -1),
        )
        beams = _search_columns(beams, moment[columns, columns], codebooks, beam_size)
        # Within the columns only they are copied from beam to beam; the others follow now.
        errors = beams.errors
        lefts = _pick(lefts, beams.origin)
        lefts[..., columns] = beams.left
        kept = _pick(kept, beams.origin)
        kept[:, :, groups] = beams.codes
    return _pick(kept, errors.argmin(1, keepdim=True)).squeeze(1)


@dataclass
class _Beams:
    """The codings of each row that are kept, seen through some columns.

    Attributes:
        left: what they leave of the weight, [rows, beams, out_group_size, columns].
        pull: half of how fast the error falls as they grow; of the same shape.
        codes: [rows, beams, groups, num_codebooks].
        errors: [rows, beams].
        origin: which beam of those before these columns each goes on from, [rows, beams].
    """

    left: Tensor
    pull: Tensor
    codes: Tensor
    errors: Tensor
    origin: Tensor

    def go_on(self, parent: Tensor, errors: Tensor) -> _Beams:
        """Return the beams that are kept, each following its parent."""
        parts = (self.left, self.pull, self.codes, self.origin)
        left, pull, codes, origin = (_pick(part, parent) for part in parts)
        return _Beams(left, pull, codes, errors, origin)


def _search_columns(beams: _Beams, moment: Tensor, codebooks: Tensor, beam_size: int) -> _Beams:
    count, size, out_size, in_size = codebooks.shape
    entries = codebooks.flatten(2)
    rows, _, groups, _ = beams.codes.shape
    beams = replace(beams, left=beams.left.clone(), codes=beams.codes.clone())
    for group in range(groups):
        span = slice(group * in_size, (group + 1) * in_size)
        pressed = (codebooks @ moment[span, span]).flatten(2)
        norms = (pressed * entries).sum(2)
        for number in range(count):
            old = beams.codes[:, :, group, number]
            # The error with each entry in the place of the old one: |entry|^2 - 2 entry . without
            without = beams.pull[..., span].flatten(2) + embedding(old, pressed[number])
            costs = torch.addmm(norms[number], without.flatten(0, 1), entries[number].t(), alpha=-2)
            costs = costs.view(rows, -1, size)
            costs += beams.errors[..., None] - costs.gather(2, old[..., None])
            width = min(beam_size, costs[0].numel())
            errors, best = costs.flatten(1).topk(width, largest=False)
            beams = beams.go_on(best // size, errors)
            old, new = beams.codes[:, :, group, number], best % size
            change = embedding(old, entries[number]) - embedding(new, entries[number])
            change = change.view(rows, width, out_size, in_size)
            beams.left[..., span] += change
            beams.pull += change @ moment[span]
            beams.codes[:, :, group, number] = new
    return beams


def _pick(beams: Tensor, parent: Tensor) -> Tensor:
    """Return the beams [rows, width, ...] that go on, as they are where there is only one."""
    rows, width = beams.shape[:2]
    if width == parent.shape[1] == 1:
        return beams
    first = torch.arange(rows, device=beams.device)[:, None] * width
    picked = beams.flatten(0, 1).index_select(0, (first + parent).flatten())
    return picked.view(*parent.shape, *beams.shape[2:])
