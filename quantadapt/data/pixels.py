"""What a model gets of the pictures of a chat: tokens that stand for them, and their pixels.

Both are the work of the model's processor (`loading.processors`), which a data set names for each
example. So whoever has an example can hand it to a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..inputs.documents import reason
from .pictures import Picture
from .pieces import Pieces, Segment
from .tokens import Prompt, encode_prompt, ids_behind

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

PICTURES, PROCESSOR, TYPES = "pictures", "processor", "token_type_ids"
"""Columns of a tokenized data set: the pictures of each example, what reads them, and how the names
of those end that say which tokens stand for them."""
PIXELS = "pixels"
"""In a batch: what the model gets of the pictures of each example."""


@dataclass(frozen=True)
class Seen:
    """The tokens of an example with pictures.

    Attributes:
        ids, mask: token ids, and 1 where one is learnt; those of pictures are none.
        types: more numbers for each token that the model wants, by the names of its arguments.
        standing: 1 for each token that stands for a part of a picture.
    """

    ids: list[int]
    mask: list[int]
    types: dict[str, list[int]]
    standing: list[int]


def tokenized(pieces: Pieces, tokenizer: PreTrainedTokenizerBase, where: str) -> Seen:
    """Return the tokens of a chat with pictures, segment by segment as `tokens.tokenize` does.

    Raises:
        DataError: the model reads no pictures, one cannot be read, or the text holds what stands
            for one.
    """
    processor, placeholder = reader_of(tokenizer, where)
    counts = [segment.text.count(placeholder) for segment in pieces.segments]
    if sum(counts) != len(pieces.pictures):
        times, count = sum(counts), len(pieces.pictures)
        what = f"{placeholder} stands {times} times in a chat of {count} pictures"
        raise DataError(what, fix="leave it out of the texts", where=where)
    images = iter([picture.opened() for picture in pieces.pictures])
    seen = Seen([], [], {}, [])
    standing = set(_standing_ids(processor))
    before = ""
    for segment, count in zip(pieces.segments, counts, strict=True):
        types: dict[str, list[int]] = {}
        if count:
            shown = [next(images) for _ in range(count)]
            ids, types = _with_images(processor, segment.text, shown, where)
        else:
            ids = ids_behind(tokenizer, [segment.text], [before])[0]
        before = segment.text
        for name in types.keys() - seen.types.keys():
            seen.types[name] = [0] * len(seen.ids)
        for name, numbers in seen.types.items():
            numbers += types.get(name, [0] * len(ids))
        stands = [int(token in standing) for token in ids] if count else [0] * len(ids)
        seen.ids.extend(ids)
        seen.standing.extend(stands)
        seen.mask.extend(int(segment.trained and not stand) for stand in stands)
    return seen


def reader_of(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[Any, str]:
    """Return the processor that a tokenizer came with, and what the chat template writes where a
    picture stands. Raises DataError where the model reads text alone."""
    from ..loading.processors import processor_at

    processor = processor_at(tokenizer.name_or_path)
    if processor is None or (placeholder := _placeholder(tokenizer.name_or_path)) is None:
        what = "it holds pictures, and the model reads text alone"
        fix = "use an image-text model, with the files of its processor; or remove the pictures"
        raise DataError(what, fix=fix, where=where)
    return processor, placeholder


@lru_cache(maxsize=4)
def _placeholder(source: str) -> str | None:
    """Return what the chat template of a processor writes where a picture stands, and the processor
    replaces."""
    from ..loading.processors import processor_at

    processor = processor_at(source)
    known = [getattr(processor, name, None) for name in ("boi_token", "image_token")]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program and may raise anything
        return None
    return next((str(token) for token in known if token and str(token) in text), None)


def _standing_ids(processor: Any) -> list[int]:
    """Return the tokens that stand for parts of pictures."""
    own = getattr(processor.tokenizer, "image_token_id", None)
    known = [own] if own is not None else getattr(processor, "image_token_ids", None)
    return [int(token) for token in known or [processor.image_token_id]]


def _with_images(
    processor: Any, text: str, images: list[Any], where: str
) -> tuple[list[int], dict[str, list[int]]]:
    try:
        out = processor(text=[text], images=[images], add_special_tokens=False)
    except Exception as error:  # of a size that it does not take, for one
        what = f"the processor does not take its pictures: {reason(error)}"
        raise DataError(
            what, fix="use other pictures, or leave the row out", where=where
        ) from error
    ids = [int(token) for token in out["input_ids"][0]]
    types = {name: list(map(int, out[name][0])) for name in out if name.endswith(TYPES)}
    return ids, types


class SeenPrompt(list[int]):
    """The token ids of a prompt with pictures.

    Attributes:
        inputs: what the model gets beside them.
    """

    def __init__(self, ids: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        super().__init__(ids)
        self.inputs = dict(inputs)


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str | Prompt) -> list[int]:
    """Return the token ids of a prompt, as `encode_prompt`; with pictures it is a `SeenPrompt`.

    Raises:
        DataError: as `tokenized`.
    """
    if isinstance(prompt, str) or not prompt.pictures:
        return encode_prompt(tokenizer, prompt)
    pieces = Pieces([Segment(prompt.text, False)], templated=True, pictures=prompt.pictures)
    seen = tokenized(pieces, tokenizer, "prompt")
    example = columns_of(pieces, seen, tokenizer, len(seen.ids))
    return SeenPrompt(seen.ids, {**pixels(example), **types_of([example], len(seen.ids))})


def inputs_of(prompt: Sequence[int]) -> dict[str, Tensor]:
    """Return what the model gets of the pictures of a prompt; empty where there are none."""
    return prompt.inputs if isinstance(prompt, SeenPrompt) else {}


def columns_of(
    pieces: Pieces, seen: Seen, tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, Any]:
    """Return what a data set keeps of an example of up to `length` tokens, beside those."""
    source = Path(tokenizer.name_or_path)
    return {
        PICTURES: [picture.stored() for picture in pieces.pictures],
        PROCESSOR: str(source.resolve() if source.is_dir() else tokenizer.name_or_path),
        **{name: numbers[:length] for name, numbers in seen.types.items()},
    }


def pixels(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the model gets of the pictures of an example: empty where it has none. Decodes
    them. Raises DataError."""
    import torch

    from ..loading.processors import processor_at

    if not example.get(PICTURES):
        return {}
    source = example[PROCESSOR]
    processor, placeholder = processor_at(source), _placeholder(source)
    images = [Picture.of(stored).opened() for stored in example[PICTURES]]
    text = [str(placeholder) * len(images)]
    found = processor(text=text, images=[images], add_special_tokens=False, return_tensors="pt")
    of_tokens = ("input_ids", "attention_mask", TYPES)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in tensors.items() if not name.endswith(of_tokens)}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `pixels` returned for several examples as one batch: one behind the other, those
    that are smaller filled up with zeros, as processors do."""
    import torch
    from torch.nn.functional import pad

    names = dict.fromkeys(name for part in parts for name in part)
    found = {}
    for name in names:
        tensors = [part[name] for part in parts if name in part]
        most = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        filled = []
        for tensor in tensors:
            room = [m - s for m, s in zip(most, tensor.shape[1:], strict=True)]
            filled.append(pad(tensor, [n for gap in reversed(room) for n in (0, gap)]))
        found[name] = torch.cat(filled)
    return found


def types_of(examples: Sequence[Mapping[str, Any]], length: int) -> dict[str, Tensor]:
    """Return the numbers for each token beside its id, int64 [batch, length], by name."""
    import torch

    names = dict.fromkeys(n for e in examples for n in e if n.endswith(TYPES) and e[n] is not None)
    found = {}
    for name in names:
        rows = torch.zeros(len(examples), length, dtype=torch.long)
        for row, example in zip(rows, examples, strict=True):
            numbers = example.get(name) or []
            row[: len(numbers)] = torch.as_tensor(numbers, dtype=torch.long)
        found[name] = rows
    return found
