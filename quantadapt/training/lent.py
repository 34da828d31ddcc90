"""What is lent to a model while it trains on CUDA: Liger's kernels and cuDNN's attention, and no
search for packed rows.

Liger's fused RMSNorm, SwiGLU and RoPE come in for every architecture that liger-kernel knows, where
it is installed; otherwise the model stays as it is. Liger patches modules and the module that
defines them; both are put back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PATCHED = ("forward", "extra_repr", "_get_name")


@contextmanager
def fused_kernels(model: Any) -> Iterator[bool]:
    """Patch a PeftModel or plain model for the duration of the block; yield whether it was done."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not _known(base):
        yield False
        return
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    definitions = vars(sys.modules[type(base).__module__])
    before = dict(definitions)
    own = {module: _patches(module) for module in base.modules()}
    try:
        # The loss is computed without logits elsewhere, see trainers.
        _apply_liger_kernel_to_instance(base, fused_linear_cross_entropy=False, cross_entropy=False)
        yield True
    finally:
        definitions.update(before)
        for module, kept in own.items():
            for name in _PATCHED:
                module.__dict__.pop(name, None)
            module.__dict__.update(kept)


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention from Hopper on, where it takes two thirds of flash attention's time
    (H200, forward and backward); elsewhere, and where it cannot be used, nothing changes."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        yield
        return
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield


@contextmanager
def one_row_each() -> Iterator[None]:
    """Tell transformers that no row of a batch holds several examples: it would look for them at
    every step, and wait for the GPU to tell. Nor does a CUDA graph that is recorded need a mask for
    the case that there are some."""
    from transformers import masking_utils

    answers = {"find_packed_sequence_indices": lambda _: None, "is_tracing": lambda *_: False}
    definitions = vars(masking_utils)
    before = {name: definitions[name] for name in answers if name in definitions}
    definitions.update({name: answers[name] for name in before})
    try:
        yield
    finally:
        definitions.update(before)


def _known(base: Any) -> bool:
    """Say whether liger-kernel is here, runs here, and knows this kind of model."""
    device = next(base.parameters()).device
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return getattr(base.config, "model_type", None) in MODEL_TYPE_TO_APPLY_LIGER_FN


def _patches(module: Any) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in _PATCHED if name in module.__dict__}
