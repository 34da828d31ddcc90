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
    that a prompt has the same tokens in training and when the model is asked; each as it stands
    behind the one before it, see `ids_behind`. What a chat template wrote stays as it is. An
    example without any trained text gets an empty mask.
    """
    texts = [[segment.text for segment in pieces.segments] for pieces in batch]
    behind = [text for each in texts for text in ("", *each[:-1])[: len(each)]]
    flat = iter(ids_behind(tokenizer, [text for each in texts for text in each], behind))
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


_TAIL = 32
"""Characters of a text that another one is tokenized behind, where no special token is near."""


def ids_behind(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], before: list[str]
) -> list[list[int]]:
    """Return the ids of each text as `token_ids`, but as it stands behind the text `before` it.

    Tokenizers in the manner of Llama 2's put a space in front of a text, which is none of it where
    it goes on behind another. Where tokens would span the border, there is a border all the same.
    An empty `before` is the beginning.
    """
    alone = token_ids(tokenizer, texts)
    if not any(before) or not _puts_space(tokenizer):
        return alone
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    todo = [place for place, text in enumerate(before) if text and texts[place]]
    for line in (False, True):  # behind a line is behind anything
        leads = ["\n" if line else _tail(before[place], special) for place in todo]
        both = [lead + texts[place] for lead, place in zip(leads, todo, strict=True)]
        found = zip(todo, token_ids(tokenizer, leads), token_ids(tokenizer, both), strict=True)
        left = []
        for place, lead, ids in found:
            if ids[: len(lead)] == lead:
                alone[place] = ids[len(lead) :]
            else:
                left.append(place)
        todo = left
    return alone


def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a text has other tokens alone than behind a line; no where lines are left out."""
    line, word, both = token_ids(tokenizer, ["\n", "x", "\nx"])
    return bool(line) and both[: len(line)] == line and both[len(line) :] != word


def _tail(text: str, special: Sequence[str]) -> str:
    """Return the end of a text, from its last special token on where one is near."""
    near = text[-4 * _TAIL :]
    starts = [near.rfind(token) for token in special if token in near]
    return near[max(starts) :] if starts else text[-_TAIL:]


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
