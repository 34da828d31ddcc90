"""Answers to prompts: to all of them in batches, or to one of them word by word."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.batches import padded
from ..data.pixels import encoded, inputs_of
from ..data.tokens import Prompt
from ..dependencies import errors_only
from ..errors import DataError, ModelError, warn
from ..evaluation.predictions import device_of, evaluating, is_encoder_decoder
from .rows import Row, Rows, base_of, takes_rows
from .sampling import Sampling, refuse_no_number
from .text import TextSoFar

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class LongPromptWarning(UserWarning):
    """A prompt leaves less room for its answer than was asked for."""


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: without special tokens.
        tokens: how many it has.
        prompt_tokens: how many the prompt had.
        finish: "stop" where the model, or a text of `stop`, ended it; "length" where
            `max_new_tokens` did.
        ids: its tokens, with the one by which the model ended it.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    ids: tuple[int, ...] = field(default=(), repr=False, compare=False)


def greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """Continue every prompt with the likeliest tokens, up to eos or `max_new_tokens`.

    Returns only what is new, without special tokens. Nothing is sampled, so the same model
    gives the same text again.
    """
    ids = [encoded(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return [answer.text for answer in answers(model, tokenizer, ids, sampling)]


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    first: int = 0,
) -> Iterator[Answer]:
    """Yield the answers to prompts of token ids in their order, each as soon as those before it are
    there, too. `first` is the number of the first prompt, which its draws depend on."""
    _refuse_silent(model)
    _tell_of_length(model, prompts, sampling)
    with evaluating(model), errors_only("transformers"):
        if not takes_rows(model) or any(map(inputs_of, prompts)):
            yield from _one_by_one(model, tokenizer, prompts, sampling, first)
            return
        yield from _in_rows(model, tokenizer, prompts, sampling, batch_size, first)


def _in_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    first: int,
) -> Iterator[Answer]:
    from .slots import rows_for

    batch, most = rows_for(model), context_of(model)
    ends = end_ids(model, tokenizer, sampling.stop)
    waiting = [
        (
            Row(ids, sampling.chooser(number), _room(sampling, ids, most), ends),
            TextSoFar(tokenizer, sampling.stop),
        )
        for number, ids in enumerate(prompts, first)
    ]
    started = given = 0
    while given < len(waiting):
        room = batch_size - len(batch.rows)
        batch.add([row for row, _ in waiting[started : started + room]])
        started += room
        for row, text in waiting[given:started]:
            _read(batch, row, text)
        while given < len(waiting) and waiting[given][0].finish:
            row, text = waiting[given]
            if row.error is not None:
                raise row.error
            ids = (*row.tokens, *([] if row.end is None else [row.end]))
            yield Answer(text.text, len(row.tokens), len(row.prompt), row.finish, ids)
            given += 1
        if batch.rows and (len(batch.rows) == batch_size or started >= len(waiting)):
            batch.step()


def _read(batch: Rows, row: Row, text: TextSoFar) -> str:
    """Turn the new tokens of a row into text; a text that ends the answer takes the row out."""
    new = text.add(row.tokens[len(text.tokens) :], last=bool(row.finish))
    if text.ended:
        batch.drop(row)
    return new


def streamed(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """Yield an answer to a prompt of token ids in pieces of text, as they come."""
    from .slots import rows_for

    _refuse_silent(model)
    _tell_of_length(model, [ids], sampling)
    with evaluating(model), errors_only("transformers"):
        if not takes_rows(model) or inputs_of(ids):
            yield next(_one_by_one(model, tokenizer, [ids], sampling)).text
            return
        batch, text = rows_for(model), TextSoFar(tokenizer, sampling.stop)
        ends = end_ids(model, tokenizer, sampling.stop)
        row = Row(ids, sampling.chooser(), _room(sampling, ids, context_of(model)), ends)
        batch.add([row])
        while True:
            if piece := _read(batch, row, text):
                yield piece
            if row.error is not None:
                raise row.error
            if row.finish:
                return
            batch.step()


def end_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> frozenset[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's, and special ones that
    `stop` names, which never become text."""
    config = getattr(base_of(model), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    special = tokenizer.all_special_tokens if stop else ()
    found += [tokenizer.convert_tokens_to_ids(text) for text in stop if text in special]
    return frozenset(int(token) for token in found if token is not None)


def _refuse_silent(model: nn.Module) -> None:
    if not getattr(base_of(model), "can_generate", lambda: False)():
        what = f"{type(base_of(model)).__name__} does not generate text"
        raise ModelError(what, fix="use a causal language model")


def _tell_of_length(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    config: Any = getattr(base_of(model), "config", None)
    most = getattr(
        getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", 0
    )
    longest = max(map(len, prompts), default=0)
    if not most or longest + sampling.max_new_tokens <= most:
        return
    if longest >= most:
        what = f"a prompt has {longest:,} tokens, the model is made for {most:,}"
        raise DataError(what, fix="shorten it", where="prompt")
    what = f"prompt and answer have {most:,} tokens together at most, for which the model is made"
    warn(f"{what}; longer answers are cut", LongPromptWarning, stacklevel=4)


def context_of(model: nn.Module) -> int:
    """Return how many tokens prompt and answer may have together; 0 where that is not known."""
    config: Any = getattr(base_of(model), "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def _room(sampling: Sampling, ids: Sequence[int], most: int) -> int:
    """Return how long the answer to a prompt may be."""
    return min(sampling.max_new_tokens, most - len(ids)) if most else sampling.max_new_tokens


def _one_by_one(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    first: int = 0,
) -> Iterator[Answer]:
    """Yield the answers of transformers' own `generate`: encoder-decoder models, those whose state
    is not keys and values alone, and prompts with pictures."""
    import torch
    from transformers import LogitsProcessorList

    encoder_decoder, eos = is_encoder_decoder(model), tokenizer.eos_token_id
    ends = end_ids(model, tokenizer, sampling.stop)
    for number, ids in enumerate(prompts, first):
        seen = {name: value.to(device_of(model)) for name, value in inputs_of(ids).items()}
        if encoder_decoder and eos is not None:
            ids = [*ids, eos]
        inputs = padded([list(ids)], 0).to(device_of(model))
        config = _config(model, sampling, ends)
        most = 0 if encoder_decoder else context_of(model)
        config.max_new_tokens = _room(sampling, ids, most)
        with torch.no_grad(), _seeded(sampling, number, device_of(model)):
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=LogitsProcessorList([_checked]),
                tokenizer=tokenizer if config.stop_strings else None,
                **seen,
            )
        # What a decoder begins with is no part of the answer, whatever comes before.
        new = output[0, 1 if encoder_decoder else len(ids) :].tolist()
        by_end = bool(new) and new[-1] in ends
        said = new[:-1] if by_end else new
        text = TextSoFar(tokenizer, sampling.stop)
        text.add(said, last=True)
        finish = "stop" if text.ended or by_end else "length"
        yield Answer(text.text, len(said), len(ids), finish, (*new,))


def _checked(_: Any, logits: Any) -> Any:
    """Return logits as they are. Raises NumbersError."""
    refuse_no_number(float(logits.max()))
    return logits


def _config(model: Any, sampling: Sampling, ends: frozenset[int]) -> Any:
    """Return the model's own generation config with these options in place of its own."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    draws = sampling.draws
    config.do_sample, config.num_beams, config.max_length = draws, 1, None
    config.temperature = sampling.temperature if draws else None
    config.top_p, config.min_p = (sampling.top_p, sampling.min_p or None) if draws else (None, None)
    config.top_k, config.typical_p = (sampling.top_k or 0) if draws else None, None
    config.repetition_penalty = sampling.repetition_penalty
    config.max_new_tokens = sampling.max_new_tokens
    config.stop_strings = [text for text in sampling.stop if text] or None
    config.eos_token_id = sorted(ends) or None
    if config.pad_token_id is None:
        config.pad_token_id = min(ends, default=None)
    return config


@contextmanager
def _seeded(sampling: Sampling, number: int, device: Any) -> Iterator[None]:
    """Draw from the seed inside, and leave the process's random numbers as they were."""
    import torch

    if not sampling.draws or sampling.seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((sampling.seed + number) % 2**63)
        yield
