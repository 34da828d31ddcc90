"""Attention over rows that hold several examples: each token sees its own example alone.

transformers lays a mask of all pairs of tokens over such a row, so that time and memory grow with
its square. Here attention is told where the examples begin, and nothing of a pair of two of them is
computed: in one call of torch's `varlen_attn` (flash attention, on CUDA in half precision, without
sinks), or example by example. Batches of another kind go to transformers' own function, as ever.

Where examples begin is what transformers calls `cu_seq_lens_q`, int32 [examples + 1]: 0, and the
place where each example ends. Some at the end may be empty.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import sinks
from .attention import STOCK, computed_by, configs_of

NAME = "quantadapt_packed"
STARTS, LONGEST = "cu_seq_lens_q", "max_length_q"
_WINDOWED = "sliding_attention"
_KINDS = {"full_attention", _WINDOWED, "linear_attention"}
"""Of layers, as configs name them. What those of other kinds see only transformers' masks tell."""
_WIDTH_MULTIPLE, _WIDEST = 8, 256
"""What flash attention takes."""
_OTHER = ("softcap", "position_bias")
"""What attention may be given that is not for either way of ours."""


class _Pass(threading.local):
    """What goes on in this thread.

    Attributes:
        packed: whether a packed row is on its way through the decoder.
        masks: whether it needs masks: attention was not told where examples begin, or makes or
            asks for one that shows more than who comes first.
        windows: whether masks with windows were asked for.
        windowed: whether attention was told of a window.
    """

    packed = False
    masks = False
    windows = False
    windowed = False


_PASS = _Pass()


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[bool]:
    """Let attention be computed here for rows that hold several examples; yield whether it is.

    It stays transformers' where users chose otherwise (eager, flash or flex attention), and where a
    config has layers of a kind that is not known here.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()  # type: ignore[operator]
    configs = configs_of(base, STOCK) + configs_of(base, sinks.NAME)
    if not configs or base.config.is_encoder_decoder or not all(map(_is_known, configs)):
        yield False
        return
    _register()
    decoder = base.base_model
    with ExitStack() as stack:
        stack.enter_context(computed_by(NAME, configs))
        before = decoder.register_forward_pre_hook(_entered, with_kwargs=True)
        after = decoder.register_forward_hook(_left, always_call=True)
        stack.callback(before.remove)
        stack.callback(after.remove)
        stack.enter_context(_nobody_looks_for_packed_rows())
        yield True


def is_lent(config: Any) -> bool:
    """Say whether a model with this config computes attention here."""
    return getattr(config, "_attn_implementation_internal", None) == NAME


@contextmanager
def watching() -> Iterator[Callable[[], bool]]:
    """Yield what says whether attention was told, of all packed rows inside, all that masks would
    have shown: some models do not hand on where examples begin, or how far a layer sees."""
    _PASS.masks = _PASS.windows = _PASS.windowed = False
    yield lambda: not _PASS.masks and (_PASS.windowed or not _PASS.windows)


def in_one_call(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether one call computes it for all examples of a row, without waiting for the GPU."""
    return _has_kernel(device, dtype) and not sinks.has_sinks(model)


def _is_known(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= _KINDS and not getattr(config, "attention_chunk_size", None)


def _entered(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    _PASS.packed = kwargs.get(STARTS) is not None


def _left(*_: Any) -> None:
    _PASS.packed = False


@contextmanager
def _nobody_looks_for_packed_rows() -> Iterator[None]:
    """transformers would look for them in the positions, and wait for the GPU to tell."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    look: Any = getattr(masking_utils, name, None)
    if look is None:
        yield
        return
    setattr(masking_utils, name, lambda *a, **k: None if _PASS.packed else look(*a, **k))
    try:
        yield
    finally:
        setattr(masking_utils, name, look)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock, masks = ALL_ATTENTION_FUNCTIONS[STOCK], ALL_MASK_ATTENTION_FUNCTIONS[STOCK]

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        whole = stock if kwargs.get("s_aux") is None else sinks.attention_with_sinks
        return attention_by_example(whole, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        if not _PASS.packed:
            return masks(*args, **kwargs)
        _PASS.masks |= bool(kwargs.get("use_vmap"))  # of a function of the model's own
        # Some models ask for all kinds of masks, whatever layers they have.
        kinds = getattr(kwargs.get("config"), "layer_types", None) or [_WINDOWED]
        _PASS.windows |= kwargs.get("local_size") is not None and _WINDOWED in kinds
        return None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention_by_example(
    stock: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, queries, heads, head_dim], as transformers' interface wants it.

    Args:
        stock: what computes it where no row holds several examples.
        query: [batch, heads, queries, head_dim]; `key` and `value` may have fewer heads.
        kwargs: among them where examples begin, and the `sliding_window` of tokens that each one
            sees, itself among them. Without the former `stock` computes it all.
    """
    starts = kwargs.get(STARTS)
    others = any(kwargs.get(name) is not None for name in _OTHER)
    alone = len(query) == 1 and query.shape[2] == key.shape[2]
    _PASS.windowed |= kwargs.get("sliding_window") is not None
    if starts is None or others or not alone or attention_mask is not None:
        _PASS.masks |= _PASS.packed
        return stock(module, query, key, value, attention_mask, **kwargs)
    causal = kwargs.get("is_causal")
    kwargs["is_causal"] = bool(getattr(module, "is_causal", True) if causal is None else causal)
    fits = max(query.shape[-1], value.shape[-1]) <= _WIDEST
    plain = kwargs.get("s_aux") is None and not kwargs.get("dropout")
    if fits and plain and _has_kernel(query.device, query.dtype):
        return _in_one_call(query, key, value, kwargs), None
    return _one_by_one(stock, module, (query, key, value), kwargs), None


def _one_by_one(
    stock: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    kwargs: Mapping[str, Any],
) -> Tensor:
    lengths = [length for length in kwargs[STARTS].diff().tolist() if length]
    window, causal, found = kwargs.get("sliding_window"), kwargs["is_causal"], []
    for parts in zip(*(torch.split(t, lengths, dim=2) for t in tensors), strict=True):
        length, mask = parts[0].shape[2], None
        if window is not None and length > window:
            mask = parts[0].new_ones(length, length, dtype=torch.bool).triu(1 - window)
            mask = mask.tril(0 if causal else window - 1)
        found.append(stock(module, *parts, mask, **kwargs)[0])
    return torch.cat(found, dim=1)


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    from torch.nn.attention import varlen

    call: Any = varlen.varlen_attn
    scaling, size = kwargs.get("scaling"), value.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scaling, "window_size": _window(kwargs)}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _parameters():
            options["enable_gqa"] = True
        else:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    width = -(-max(query.shape[-1], size) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    rows = [pad(t, (0, width - t.shape[-1]))[0].transpose(0, 1) for t in (query, key, value)]
    places = kwargs[STARTS], kwargs[STARTS], kwargs[LONGEST], kwargs[LONGEST]
    found: Tensor = call(*rows, *places, **options)
    return found[None, :, :, :size]


def _window(kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many tokens before and after itself each one sees, -1 for all."""
    window = kwargs.get("sliding_window")
    seen = -1 if window is None else window - 1
    return seen, 0 if kwargs["is_causal"] else seen


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return ampere and torch.backends.cuda.is_flash_attention_available() and bool(_parameters())


@cache
def _parameters() -> frozenset[str]:
    """Return the names of what `varlen_attn` takes; empty where there is none, or none of scaled
    attention with windows, as before torch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"scale", "window_size"} <= names else frozenset()
