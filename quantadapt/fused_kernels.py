"""Liger's fused RMSNorm, SwiGLU and RoPE, lent to a model while it trains or answers.

Liger patches whatever stands where it looks: a layer that PEFT has put in the place of a norm, too,
whose adapter would then count for nothing; and an MLP whatever its activation. Those are put back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

from .compiling import has_triton
from .dependencies import in_words
from .model.experts import owns_stacks
from .model.patches import changed, patched, put_back

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    names_of: list[list[str]] = []
    try:
        try:
            why = _lend(lend, base)
            pairs = list(zip(owners, before, strict=True))
            if why:
                for own, was in pairs:
                    put_back(own, was, changed(own, was))
            elif not any(changed(own, was) for own, was in pairs[1:]):
                why = "patched no layer"
            _put_back_what_differs(base, before[1:], on_note)
        finally:
            names_of = [changed(own, was) for own, was in zip(owners, before, strict=True)]
        if why:
            on_note(f"Liger's kernels are not used: {in_words('liger-kernel')} {why}")
        with _frozen_norms():
            yield any(names_of)
    finally:
        for own, was, names in zip(owners, before, names_of, strict=True):
            put_back(own, was, names)


@contextmanager
def _frozen_norms() -> Iterator[None]:
    """Have Liger's norms take our backward where their weight is frozen, in a Liger that has them
    as we know them."""
    name = "LigerRMSNormFunction"
    with ExitStack() as stack:
        if has_triton():
            with suppress(ImportError):
                from liger_kernel.transformers import rms_norm

                from .model.frozen_norm import FrozenNorm

                if getattr(rms_norm, name, None) is FrozenNorm.__base__:
                    stack.enter_context(patched(rms_norm, **{name: FrozenNorm}))
        yield


def _lend(lend: Callable[..., None], base: nn.Module) -> str:
    """Have Liger patch `base`; return why it fails, where it does not fit transformers' version."""
    try:
        # The loss is computed without logits elsewhere, see `add_head_loss`.
        with _copies_by_its_name(base):
            lend(base, fused_linear_cross_entropy=False, cross_entropy=False)
    except (ImportError, AttributeError) as error:
        return f"fails: {error}"
    return ""


def _put_back_what_differs(base: nn.Module, before: list[dict[str, Any]], on_note: OnNote) -> None:
    """Put back the modules of `base` that would compute something else, or are ours to compute."""
    device, others = next(base.parameters()).device, set()
    for module, was in zip(base.modules(), before, strict=True):
        if not (names := changed(vars(module), was)):
            continue
        if _is_of_peft(module) or _has_experts(module):
            put_back(vars(module), was, names)
        elif "forward" in names and _computes_otherwise(module, device):
            put_back(vars(module), was, names)
            others.add(type(module).__name__)
    if others:
        kinds = ", ".join(sorted(others))
        on_note(f"Liger's kernels are not used in {kinds}: the activation is another there")


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


@contextmanager
def _copies_by_its_name(base: nn.Module) -> Iterator[None]:
    """Show Liger the copies of norms that are trained whole by the name that it knows."""
    from peft.utils.other import ModulesToSaveWrapper

    known = "default"
    found = [m.modules_to_save for m in base.modules() if isinstance(m, ModulesToSaveWrapper)]
    unknown = [copies for copies in found if len(copies) and known not in copies]
    for copies in unknown:
        copies._modules[known] = next(iter(copies.values()))
    try:
        yield
    finally:
        for copies in unknown:
            del copies._modules[known]


def _is_of_peft(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _has_experts(module: Any) -> bool:
    """Say whether it is what Liger's experts would stand in for, which look for their kernels for
    minutes, and make gradients of frozen weights."""
    return owns_stacks(getattr(module, "get_base_layer", lambda: module)())


def _computes_otherwise(mlp: nn.Module, device: torch.device) -> bool:
    """Say whether an MLP that is patched has another activation than the kernel. Found by trying,
    with nothing in the places of its linear layers; what has none is no MLP."""
    import torch
    from torch import nn

    bare, parts = copy.copy(mlp), dict(mlp.named_children())
    linears = [name for name, part in parts.items() if _has_weights(part)]
    if not linears:
        return False
    vars(bare)["_modules"] = parts | {name: nn.Identity() for name in linears}
    x = torch.linspace(-3, 3, 64, device=device)[None]
    with torch.no_grad(), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        try:
            own = type(mlp).forward(bare, x)
        except Exception:  # no MLP, but something with more than one input
            return False
        try:
            made = vars(mlp)["forward"].__func__(bare, x)
        except Exception:
            return True
    return not torch.allclose(made, own, rtol=1e-5, atol=2e-4)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _runs_liger(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("liger_kernel") is not None
