"""Does the data hold tokens that the model has no embedding for? A tokenizer may have more of them
than the model it lies beside, after `add_tokens` without `resize_token_embeddings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def check_tokens(
    dataset: Dataset | None, rows: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise DataError where examples hold token ids that are no row of the embedding.

    Args:
        dataset: columns of token ids have names that end in `ids`.
        rows: of the model's embedding; None where that is not known.
        tokenizer: names the tokens in the message.
    """
    if rows is None or dataset is None:
        return
    for column in getattr(dataset, "column_names", None) or ():
        outside = column.endswith("ids") and _may_hold(dataset, column, rows)
        if outside and (found := _outside(dataset, column, rows)):
            raise _too_few(found, len(dataset), rows, tokenizer)


def _may_hold(dataset: Dataset, column: str, rows: int) -> bool:
    """Say whether an id outside of 0 to rows - 1 may be there, without looking at each example."""
    import pyarrow.compute as pc

    try:
        bounds = pc.min_max(pc.list_flatten(dataset.data.column(column))).as_py()
    except (TypeError, NotImplementedError, AttributeError, KeyError):  # it holds something else
        return False
    low, high = bounds["min"], bounds["max"]
    return isinstance(high, int) and (low < 0 or high >= rows)


def _outside(dataset: Dataset, column: str, rows: int) -> list[set[int]]:
    """Return the ids outside of the embedding, for each example that has some."""
    found = ({int(i) for i in ids if not 0 <= int(i) < rows} for ids in dataset[column])
    return [ids for ids in found if ids]


def _too_few(found: list[set[int]], examples: int, rows: int, tokenizer: Any) -> DataError:
    ids = sorted(set().union(*found))[:3]
    names = [tokenizer and i >= 0 and tokenizer.convert_ids_to_tokens(i) for i in ids]
    pairs = zip(ids, names, strict=True)
    some = ", ".join(f"{name!r} ({i})" if name else f"{i}" for i, name in pairs)
    what = f"{len(found)} of {examples} examples hold tokens that the model has no embedding for"
    known = len(tokenizer) if tokenizer is not None else 0
    if known <= rows:
        fix = f"tokenize them with the model's own tokenizer: its ids are 0 to {rows - 1}"
        return DataError(f"{what}: {some}; it has {rows}", fix=fix, where="input_ids")
    fix = (
        f"model.resize_token_embeddings({known}), save it with the tokenizer, and train the new "
        f"rows too: adapter.trainable_token_indices: {list(range(rows, known))[:8]}"
    )
    what += f": {some}; the tokenizer has {known} tokens, the embedding {rows}"
    return DataError(what, fix=fix, where="tokenizer")
