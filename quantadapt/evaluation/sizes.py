"""How large a checkpoint of a model is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def size_mib(model: nn.Module) -> float:
    """Return the size of everything that a checkpoint of `model` holds, in MiB."""
    tensors = [part for tensor in model.state_dict().values() for part in _parts(tensor)]
    sizes = {_place(t): t.numel() * t.element_size() for t in tensors}  # tied weights count once
    sizes.pop(0, None)
    return sum(sizes.values()) / 2**20


def _place(tensor: Tensor) -> int:
    """Return where a tensor lies; 0 for those of a sharded base, which have no memory of their own
    and count in the parameter that is sharded."""
    whole: Any = tensor
    return whole.data_ptr() if not hasattr(whole, "full_tensor") else id(whole)


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor subclass is made of, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
