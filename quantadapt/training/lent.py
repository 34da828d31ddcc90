"""What is lent to a model while it trains on CUDA: Liger's kernels and cuDNN's attention, and no
search for packed rows.

Liger's fused RMSNorm, SwiGLU and RoPE come in for every architecture that liger-kernel knows, where
it is installed; otherwise the model stays as it is. Liger patches modules and the module that
defines them; both are put back.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..model.head import Head
from .figures import adapter_device, compute_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
        # The loss is computed without logits elsewhere, see `add_head_loss`.
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


def add_head_loss(base: Any) -> bool:
    """Let `base(..., labels=..., fused_lm_head=True)` return the loss alone; say if it can.

    It can where a frozen plain head turns the decoder's last hidden states into logits. Takes the
    arguments, and gives the `loss`, of a model that TRL's `add_fused_lm_head` was applied to; and
    `counted`, the number of labels that count, without which the device is waited for.
    """
    head = Head.of(base)
    if head is None or head.linear.weight.requires_grad:
        return False
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return False
    original = base.forward

    @wraps(type(base).forward)  # generate checks its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        counted: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutput

        labels, divisor = kwargs.pop("labels")[:, 1:].flatten(), kwargs.pop("num_items_in_batch")
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
        where = _counting(labels, counted)
        loss = head.loss(hidden[where], labels[where])
        return CausalLMOutput(loss=loss / (max(len(where), 1) if divisor is None else divisor))

    base.forward = types.MethodType(forward, base)
    return True


def _counting(labels: Tensor, count: int | None) -> Tensor:
    """Return the indices of the labels that count."""
    counts = labels != -100
    if count is None:
        return counts.nonzero()[:, 0]
    return counts.nonzero_static(size=count)[:, 0]


@contextmanager
def given_back(model: Any) -> Iterator[None]:
    """Undo what trainers leave on a model: forwards, hooks, token ids, mode."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    patchable = {id(m): m for m in (model, base)}.values()
    before = [(m, m.__dict__.get("forward")) for m in patchable]
    configs = [c for c in (base.config, getattr(base, "generation_config", None)) if c is not None]
    settings = [dict(config.__dict__) for config in configs]
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    training = model.training
    try:
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("_original_forward", None)
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        for module, known in hooks.items():  # TRL and Trainer each leave one on the embedding
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
        for config, values in zip(configs, settings, strict=True):
            config.__dict__.clear()
            config.__dict__.update(values)
        model.train(training)


@contextmanager
def fast_adapters(model: Any) -> Iterator[None]:
    """Let float32 adapters on a half-precision base use the tensor cores (TF32).

    TF32 has more mantissa bits than bfloat16 and as many as float16. A float32 base keeps full
    precision.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if adapter_device(model).type == "cuda" and compute_dtype(model) != torch.float32:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def quick_walks(model: Any) -> Iterator[None]:
    """Trainer calls `train` and `zero_grad` at every step, and each walks through all modules: that
    takes as long as several layers."""
    whole, trained = type(model), [p for p in model.parameters() if p.requires_grad]

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else whole.train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    whole.train(model)
    model.__dict__.update(train=train, zero_grad=zero_grad)
    try:
        yield
    finally:
        del model.__dict__["train"], model.__dict__["zero_grad"]
