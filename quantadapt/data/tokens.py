"""From segments to token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a prompt, exactly as they stand in the training data."""
    ids: list[int] = token_ids(tokenizer, [text])[0]
    return [*_bos(tokenizer, text), *ids]


def prompt_and_completion(
    input_ids: Sequence[int], completion_mask: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Split an example into the untrained and the trained tokens, for encoder-decoder models."""
    pairs = list(zip(input_ids, completion_mask, strict=True))
    return [i for i, trained in pairs if not trained], [i for i, trained in pairs if trained]


def tokenize(
    batch: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (token ids, mask) per example: bos, the segments one by one, eos.

    Prompt and completion are tokenized apart, so that a prompt has the same tokens in training
    and when the model is asked. An example without any trained text gets an empty mask.
    """
    flat = iter(token_ids(tokenizer, [piece.text for pieces in batch for piece in pieces]))
    for pieces in batch:
        ids = _bos(tokenizer, pieces[0].text if pieces else "")
        mask = [0] * len(ids)
        for piece in pieces:
            tokens = next(flat)
            ids += tokens
            mask += [int(piece.trained)] * len(tokens)
        if all(piece.trained for piece in pieces):
            mask = [1] * len(ids)
        if any(piece.trained and piece.text for piece in pieces):
            ids, mask = _with_eos(ids, mask, pieces, tokenizer)
        else:
            mask = [0] * len(ids)
        yield ids, mask


def _with_eos(
    ids: list[int],
    mask: list[int],
    pieces: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
    """End the example with eos, unless the text does so by itself or goes on after it."""
    eos = tokenizer.eos_token_id
    last = max(index for index, value in enumerate(mask) if value) if any(mask) else -1
    ended = last >= 0 and ids[last] == eos
    if eos is None or ended or not pieces[-1].trained:
        return ids, mask
    return [*ids, int(eos)], [*mask, 1]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without bos and eos."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return [bos], or nothing where there is none or the text starts with it."""
    if tokenizer.bos_token_id is None or text.startswith(str(tokenizer.bos_token)):
        return []
    return [int(tokenizer.bos_token_id)]
