"""Compare tensors: relative errors, and digests of their bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def relative(found: Tensor, reference: Tensor) -> float:
    """Return the relative error of `found` in the Frobenius norm; inf where shapes differ, or for a
    NaN, which `max` over several errors would lose."""
    if found.shape != reference.shape:
        return math.inf
    found, reference = found.detach().float(), reference.detach().float()
    difference, norm = float((found - reference).norm()), float(reference.norm())
    error = difference / norm if norm else difference
    return math.inf if math.isnan(error) else error


def assert_within(error: float, allowed: float, what: str, fix: str) -> None:
    """Fail with a sentence, what is wrong and what to do, where `error` is more than `allowed`."""
    __tracebackhide__ = True
    assert error <= allowed, f"{what} by {error:.2g}, and {allowed:.2g} is allowed. {fix}"


def assert_equal(found: Tensor, reference: Tensor, what: str, fix: str) -> None:
    """Fail with a sentence where two tensors are not equal bit for bit."""
    __tracebackhide__ = True
    assert_within(change(found, reference), 0, what, fix)


def change(found: Tensor, reference: Tensor) -> float:
    """Return the largest absolute difference; 0 means equal bit for bit (but for signed zeros)."""
    if found.shape != reference.shape:
        return math.inf
    return float((found.detach() - reference.detach()).abs().max())


def digest(value: Any) -> str:
    """Return a digest of the bytes of a tensor, a tensor subclass, or plain data."""
    import torch

    hashed = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        for part in plain_tensors(value):
            flat = part.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            hashed.update(flat.numpy().tobytes())
    else:
        hashed.update(repr(value).encode())
    return hashed.hexdigest()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the ordinary tensors of which `tensor` is made."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
