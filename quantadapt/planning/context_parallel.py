"""What one row on several GPUs wants (`train.context_parallel_size`), before anything starts.

Each GPU has a part of the tokens, and in attention all tokens of a part of the heads. So heads have
to be as many as can be shared out, and a token must be seen by others in attention alone. What the
config does not tell is tried out before the first step (`training.context_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import Problem
from ..inputs.model_config import text_config, towers_in
from ..memory.shape import Shape
from ..protocols import Task
from ..spec import TrainSpec

WHERE = "train.context_parallel_size"
_LEAVE_OUT = f"leave {WHERE} out"
_FULL = "full_attention"
_WINDOW = "sliding_attention"
_BY_LENGTH = ("dynamic", "longrope")
"""Rotary positions that depend on how long the whole row is, which a process does not see."""


def context_problems(
    train: TrainSpec,
    task: Task,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    processes: int,
    longest: int = 0,
) -> list[Problem]:
    """Return why rows cannot be shared out among GPUs as `train` says; empty if they can.

    Args:
        config: the model's config.json. options: the adapter's.
        processes: how many there are.
        longest: tokens of the longest row, where that is known.
    """
    size = train.context_parallel_size
    if size == 1:
        return []
    return [
        *_process_problems(size, processes),
        *_training_problems(train, task, options),
        *(_model_problems(size, config, longest) if config else ()),
    ]


def row_shares(
    train: TrainSpec,
    task: Task,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    longest: int,
) -> tuple[int, ...]:
    """Return how many GPUs could share a row, of those that a machine may have."""
    return tuple(
        count
        for count in (2, 4, 8)
        if not context_problems(
            train.model_copy(update={"context_parallel_size": count}),
            *(task, config, options),
            processes=count,
            longest=longest,
        )
    )


def _process_problems(size: int, processes: int) -> Iterator[Problem]:
    if processes % size:
        count = "there is one" if processes == 1 else f"there are {processes}"
        what = f"{size} GPUs share a row, and {count}"
        fix = f"use --gpus {size}, or a multiple of it"
        yield Problem(what, fix, WHERE, "context-processes")


def _training_problems(
    train: TrainSpec, task: Task, options: Mapping[str, Any]
) -> Iterator[Problem]:
    name = type(task).__name__
    if not task.by_token:
        what = f"{name} learns from whole rows, of which each GPU would have a part"
        fix = f"{_LEAVE_OUT}, or use objective: sft or pretrain"
        yield Problem(what, fix, WHERE, "context-by-token")
    if options.get("alora_invocation_tokens"):
        what = "aLoRA looks for its invocation in the whole row"
        where = "adapter.alora_invocation_tokens"
        yield Problem(what, "use plain LoRA", where, "context-whole-row")


def _model_problems(size: int, config: Mapping[str, Any], longest: int) -> Iterator[Problem]:
    if why := _not_plain(config, longest):
        what = f"a row cannot be shared out: {why}"
        yield Problem(what, _LEAVE_OUT, WHERE, "context-plain-attention")
        return
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 1)
    keys = int(text.get("num_key_value_heads") or heads)
    if heads % size or (keys % size and size % keys):
        of_keys = f" and {keys} of keys" if keys != heads else ""
        what = f"the model has {heads} attention heads{of_keys}, which {size} GPUs cannot share out"
        fits = [n for n in range(2, size) if not (heads % n or (keys % n and n % keys))]
        fix = f"use {' or '.join(map(str, fits))}" if fits else _LEAVE_OUT
        yield Problem(what, fix, WHERE, "context-heads")


def _not_plain(config: Mapping[str, Any], longest: int) -> str:
    """Return why tokens of a model with this config meet elsewhere than in causal attention over
    the whole row, or have positions that depend on it; empty if they do not."""
    text = text_config(config)
    if config.get("is_encoder_decoder"):
        return "the model is an encoder-decoder model"
    if towers_in(config):
        return "the model sees or hears, and pictures stand across the parts"
    if Shape.of(config) is None:
        return "the model is not a decoder of plain attention that is known"
    if text.get("output_router_logits"):
        return "its routers are balanced over all tokens (output_router_logits)"
    if text.get("attn_logit_softcapping"):
        return "attention caps its logits (attn_logit_softcapping)"
    kinds = set(text.get("layer_types") or ())
    if others := kinds - {_FULL, _WINDOW}:
        return f"the model has layers of {', '.join(sorted(others))}"
    window = text.get("sliding_window")
    slides = _WINDOW in kinds if kinds else text.get("use_sliding_window", True)
    if slides and isinstance(window, int) and longest > window:
        return f"layers see {window:,} tokens back, and rows have up to {longest:,}"
    return next((f"its rotary positions are {n}" for n in _rotary(text) if n in _BY_LENGTH), "")


def _rotary(text: Mapping[str, Any]) -> Iterator[str]:
    """Yield the kinds of rotary positions; some models have one for each kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        given = text.get(name) or {}
        for each in (given, *(v for v in given.values() if isinstance(v, Mapping))):
            yield str(each.get("rope_type") or each.get("type") or "")
