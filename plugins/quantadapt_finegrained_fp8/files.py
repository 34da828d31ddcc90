"""What a file holds of a layer of a fine-grained FP8 checkpoint, read with care."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantadapt.errors import ModelError
from quantadapt_finegrained_fp8.layers import Block, BlockFP8Linear

_ALIASES = {"scale": "weight_scale_inv", "qscale_weight": "weight_scale_inv"}
"""What some checkpoints call the scales."""


def loaded(
    block: Block | None, static: bool, powers: bool, linear: nn.Linear, state: Mapping[str, Tensor]
) -> BlockFP8Linear:
    """Return the layer for what a file holds of it.

    Args:
        block: rows and columns that share a scale; None: one for the whole weight.
        static: whether it holds a scale of its inputs.
        powers: whether scales are powers of two, in a byte.
        linear: on the meta device.
        state: the tensors, without prefix.

    Raises:
        ModelError: one is missing, not known, or of another shape or dtype.
    """
    shape = linear.out_features, linear.in_features
    blocks = tuple(-(-size // side) for size, side in zip(shape, block or shape, strict=True))
    wanted: dict[str, tuple[int, ...]] = {"weight": shape, "weight_scale_inv": blocks}
    if static:
        wanted["activation_scale"] = (1,)
    held = _checked({_ALIASES.get(name, name): tensor for name, tensor in state.items()}, wanted)
    scales = held["weight_scale_inv"].reshape(blocks if block else ())
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if (scales.dtype == torch.float8_e8m0fnu) != powers:
        raise _wrong(f"its weight_scale_inv is {scales.dtype}, which its scale_fmt is not")
    bias = held.get("bias")
    return BlockFP8Linear(
        held["weight"],
        scales,
        block,
        None if bias is None else bias.to(linear.weight.dtype),
        held["activation_scale"].view(()) if static else None,
    )


def _checked(held: dict[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return `held`. Raises ModelError where a tensor is missing, not known, or of another shape
    than `wanted`, but for dimensions of one; or where the codes are of another dtype."""
    if missing := wanted.keys() - held.keys():
        raise _wrong(f"it has no {' and no '.join(sorted(missing))}")
    if unknown := held.keys() - wanted.keys() - {"bias"}:
        raise _wrong(f"it has {', '.join(sorted(unknown))}, which its format has no place for")
    for name, sizes in wanted.items():
        if [n for n in held[name].shape if n > 1] != [n for n in sizes if n > 1]:
            raise _wrong(f"its {name} is {list(held[name].shape)}, where {list(sizes)} is wanted")
    if held["weight"].dtype != torch.float8_e4m3fn:
        raise _wrong(f"its weight is {held['weight'].dtype}, no float8_e4m3fn")
    return held


def _wrong(what: str) -> ModelError:
    fix = "check that config.json and the weights belong together, or download them again"
    return ModelError(what, fix=fix)
