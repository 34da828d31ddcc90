"""Liger's fused RMSNorm, SwiGLU and RoPE, lent to a model while it trains or answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .dependencies import in_words
from .model.experts import owns_stacks
from .model.patches import changed, put_back

if TYPE_CHECKING:
    import torch

    OnNote = Callable[[str], None]


@contextmanager
def fused_kernels(model: Any, on_note: OnNote) -> Iterator[bool]:
    """Lend Liger's fused RMSNorm, SwiGLU and RoPE on CUDA, where liger-kernel is installed and
    knows the architecture; yield whether it was done.

    Liger patches modules, and the module of Python that defines them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    lend = _liger(base, on_note)
    if lend is None:
        yield False
        return
    defined: Any = sys.modules[type(base).__module__]
    owners = [owner.__dict__ for owner in (defined, *base.modules())]
    before = [dict(own) for own in owners]
    patched: list[list[str]] = []
    try:
        try:
            # The loss is computed without logits elsewhere, see `add_head_loss`.
            lend(base, fused_linear_cross_entropy=False, cross_entropy=False)
            # Its experts look for their kernels for minutes, and make gradients of frozen weights.
            for module, was in zip(base.modules(), before[1:], strict=True):
                # PEFT's wrapper stands where it looks for them.
                if owns_stacks(getattr(module, "get_base_layer", lambda m=module: m)()):
                    put_back(vars(module), was, changed(vars(module), was))
        finally:
            patched = [changed(own, was) for own, was in zip(owners, before, strict=True)]
        if not any(patched[1:]):
            on_note(f"Liger's kernels are not used: {in_words('liger-kernel')} patched no layer")
        yield any(patched)
    finally:
        for own, was, names in zip(owners, before, patched, strict=True):
            put_back(own, was, names)


def _liger(base: Any, on_note: OnNote) -> Callable[..., None] | None:
    """Return what patches `base`, where Liger is here, runs here, and knows this kind of model."""
    if not _runs_liger(next(base.parameters()).device):
        return None
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        on_note(f"Liger's kernels are not used: {in_words('liger-kernel')}: {error}")
        return None
    known = getattr(base.config, "model_type", None) in MODEL_TYPE_TO_APPLY_LIGER_FN
    return _apply_liger_kernel_to_instance if known else None


def _runs_liger(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("liger_kernel") is not None
