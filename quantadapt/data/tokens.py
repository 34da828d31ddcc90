"""From pieces of text to token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .pictures import Picture
from .pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt for samples, and what the data says after it.

    Attributes:
        templated: a chat template wrote the text, special tokens included.
        pictures: those that it has written something for.
    """

    text: str
    reference: str
    templated: bool = False
    pictures: Sequence[Picture] = ()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Prompt) -> list[int]:
    """Return the token ids of a prompt, exactly as they stand in the training data.

    They begin as the tokenizer begins a text by itself, with a bos token or without. A `Prompt`
    that a chat template wrote begins as that has it.
    """
    text = prompt if isinstance(prompt, str) else prompt.text
    ids = token_ids(tokenizer, [text])[0]
    templated = isinstance(prompt, Prompt) and prompt.templated
    return ids if templated else [*_opening(ids, opening_of(tokenizer)), *ids]


def prompt_and_completion(
    input_ids: Sequence[int], completion_mask: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Split an example into the untrained and the trained tokens, for encoder-decoder models."""
    pairs = list(zip(input_ids, completion_mask, strict=True))
    return [i for i, trained in pairs if not trained], [i for i, trained in pairs if trained]


def tokenize(
    batch: Sequence[Pieces], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (token ids, mask) per example: the segments one by one, between bos and eos.

    None of them has pictures, see `pixels.tokenized`. Prompt and completion are tokenized apart, so
    that a prompt has the same tokens in training and when the model is asked. What a chat template
    wrote stays as it is. An example without any trained text gets an empty mask.
    """
    flat = iter(token_ids(tokenizer, [s.text for pieces in batch for s in pieces.segments]))
    opening = opening_of(tokenizer)
    for pieces in batch:
        ids, mask = list[int](), list[int]()
        for segment in pieces.segments:
            tokens = next(flat)
            ids += tokens
            mask += [int(segment.trained)] * len(tokens)
        if not pieces.templated:
            first = _opening(ids, opening)
            whole = all(segment.trained for segment in pieces.segments)
            ids, mask = [*first, *ids], [int(whole)] * len(first) + mask
        if not pieces.learns:
            mask = [0] * len(ids)
        elif not pieces.templated:
            ids, mask = _with_eos(ids, mask, pieces, tokenizer)
        yield ids, mask


def _with_eos(
    ids: list[int], mask: list[int], pieces: Pieces, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """End the example with eos, unless the text does so by itself or goes on after it."""
    eos = tokenizer.eos_token_id
    last = max(index for index, value in enumerate(mask) if value) if any(mask) else -1
    ended = last >= 0 and ids[last] == eos
    if eos is None or ended or not pieces.segments[-1].trained:
        return ids, mask
    return [*ids, int(eos)], [*mask, 1]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without bos and eos."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text by itself: bos, something else, or nothing."""
    bare, whole = token_ids(tokenizer, ["x"])[0], list(tokenizer("x", verbose=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _opening(ids: Sequence[int], opening: list[int]) -> list[int]:
    """Return `opening`, or nothing where `ids` begin with it."""
    return [] if list(ids[: len(opening)]) == opening else opening
