"""Dense weights of codes in 32-bit words that lie as [in_features, out_features], as GPTQ and AWQ
have them. What Inductor makes of them loads a word, a scale and zeros for each weight, across rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def whole_words(bits: int, group_size: int, across: bool) -> bool:
    """Say whether `dense_of_words` takes such codes: groups have to be of whole words."""
    return bits in ((4,) if across else (2, 4, 8)) and not group_size * bits % 32


def dense_of_words(
    packed: Tensor,
    zeros: Tensor,
    scales: Tensor,
    bits: int,
    added: int,
    across: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the weight, (code - zero - added) scale, by a kernel of Triton's: [rows, columns].

    Args:
        packed: int32 [columns bits / 32, rows], words of neighbouring columns; if `across`,
            [columns, rows bits / 32], words of neighbouring rows, the even ones first.
        zeros: int32 [groups, rows bits / 32], words of neighbouring rows, ordered as in `packed`.
        scales: [groups, rows]; all groups have as many columns.
        dtype: of the result, which is rounded to that of the scales first; None for just that.
    """
    from .triton_dense import dense_of_words as by_triton

    return by_triton(packed, zeros, scales, bits, added, across, dtype)
