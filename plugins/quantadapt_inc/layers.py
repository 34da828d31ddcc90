"""INC's layers: what kind one is, what it holds, and what it lacks as INC makes it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt_inc import INC

MADE_BY = "quantadapt_inc"
"""Attribute of a layer: the quantizer that made it; the tensors do not tell everything."""


def is_fp8(module: nn.Module) -> bool:
    """Say whether `module` is INC's FP8 layer."""
    return type(module).__name__ == "PatchedLinear"


def in_qdq(module: Any) -> bool:
    """Say whether it is one that rounds and multiplies in plain PyTorch."""
    return is_fp8(module) and bool(module.use_qdq)


def divides_by_zero(module: Any) -> bool:
    """Say whether it is such a layer with inputs of scale 0, which makes nan of zeros."""
    return in_qdq(module) and not bool(module.quant_input.scale)


def is_integer(module: nn.Module) -> bool:
    """Say whether `module` is INC's integer layer, with AWQ's scale of the inputs or without."""
    layer = inner(module)
    return type(layer).__name__ == "INCWeightOnlyLinear" and bool(layer.use_optimum_format)


def inner(module: Any) -> Any:
    """Return what holds the weight: AWQ puts a scale of the inputs in front of it."""
    return module.linear if type(module).__name__ in ("MulLinear", "ScaledLinear") else module


def sizes(layer: Any) -> tuple[int, int]:
    """Return (in_features, out_features)."""
    return int(layer.in_features), int(layer.out_features)


@cache
def scaled_class() -> Any:
    """Return INC's `MulLinear` with a bias to look at."""
    from neural_compressor.torch.algorithms.weight_only.modules import MulLinear

    class ScaledLinear(MulLinear):  # type: ignore[misc]
        @property
        def bias(self) -> Any:
            return self.linear.bias

    return ScaledLinear


def integers(layer: Any) -> Tensor:
    """Return what `layer.recover()` does, without its loop over columns."""
    codes = (layer.qweight[:, None] >> _shifts(layer)[:, None]) & (2**layer.bits - 1)
    codes = codes.flatten(0, 1)[: layer.in_features]
    groups = layer.g_idx.long()
    weight: Tensor = ((codes - zero_points(layer)[groups]) * layer.scales[groups]).t()
    return weight.contiguous()


def zero_points(layer: Any) -> Tensor:
    """Return the zero points of an integer layer, [groups, out_features]."""
    stored = (layer.qzeros[:, :, None] >> _shifts(layer)).flatten(1)[:, : layer.out_features]
    zeros: Tensor = (stored + 1) & (2**layer.bits - 1)
    return zeros


def is_plain(layer: Any) -> bool:
    """Say whether groups of an integer layer follow each other and have one zero point, whatever a
    config says: INC's GPTQ may order columns by their weight, and a model be of several kinds. The
    tensors are looked at once, which waits for a GPU."""
    looked_at = vars(layer).get("_plain")
    there = [(tensor, _version(tensor)) for tensor in (layer.qzeros, layer.g_idx)]
    if looked_at is not None and all(
        old is new and before == now
        for (old, before), (new, now) in zip(looked_at[0], there, strict=True)
    ):
        return bool(looked_at[1])
    import torch

    groups = torch.arange(layer.in_features, device=layer.g_idx.device) // layer.group_size
    follow = torch.equal(layer.g_idx.long(), groups)
    plain = follow and bool((zero_points(layer) == 2 ** (layer.bits - 1)).all())
    vars(layer)["_plain"] = there, plain
    return plain


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shifts(layer: Any) -> Tensor:
    import torch

    steps = torch.arange(layer.n_pack, dtype=torch.int32, device=layer.qweight.device)
    return steps * int(layer.bits)


def complete(module: nn.Module, bias: Tensor | None, maker: INC) -> None:
    """Make a layer that INC made what facades and checkpoints need."""
    import torch

    setattr(module, MADE_BY, maker)
    layer = inner(module)
    if is_fp8(module):
        from neural_compressor.torch.algorithms.fp8_quant import save_load

        save_load.process_model_for_scalar_scale(module)  # puts scales into the state_dict
        if in_qdq(layer):  # in memory, rows of outputs, as those who read the codes want them
            layer.weight.data = layer.weight.data.t().contiguous().t()
        vars(module).update(orig_mod=None, orig_mod_parent=None, forward_orig=None)
        return
    if layer is not module:
        module.__class__ = scaled_class()
        layer.behind_scale = True
    layer.bias = bias  # INC rounds it to float16, and makes one where there is none
    layer._non_persistent_buffers_set.add("scale_bf16_to_fp8")  # not used
    if layer.g_idx is None:  # readers of GPTQ checkpoints want it
        del layer.g_idx
        groups = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
        layer.register_buffer("g_idx", groups.to(layer.scales.device))
