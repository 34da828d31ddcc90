"""Data to measure on, as evaluators are given them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QuantadaptError
from ..protocols import Given

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.reading import HeldOut


def given_of(held_out: HeldOut, tokenizer: Any, max_examples: int) -> Given:
    """Return what evaluators are given: the first `max_examples` examples and prompts."""
    count = min(len(held_out.examples), max_examples)
    return Given(held_out.examples.select(range(count)), held_out.prompts[:count], tokenizer)


def held_out(
    data: str | Path | Dataset | HeldOut | None, tokenizer: Any, max_length: int | None = None
) -> HeldOut:
    """Return data to measure on: read if it is named; a Dataset is tokenized already.

    Args:
        max_length: longest example in tokens; 512 if that is not known.
    """
    from ..data.reading import MAX_LENGTH, HeldOut, read_held_out
    from ..spec import Spec

    if data is None or isinstance(data, str | Path):
        source = None if data is None else str(data)
        wanted = MAX_LENGTH if max_length is None else max_length
        length = Spec(data={"max_length": wanted}).data.max_length
        return read_held_out(source, needed(tokenizer), max_length=length)
    return data if isinstance(data, HeldOut) else HeldOut(data)


def held_out_data(
    data: str | Path | Dataset | HeldOut | None, tokenizer: Any, max_length: int | None = None
) -> Any:
    """Return the examples of `held_out`."""
    return held_out(data, tokenizer, max_length).examples


def needed(tokenizer: Any) -> Any:
    """Return the tokenizer. Raises QuantadaptError where the model came without one."""
    if tokenizer is None:
        fix = "pass tokenizer=..., or a tokenized Dataset as data"
        raise QuantadaptError("the model came without a tokenizer", fix=fix)
    return tokenizer
