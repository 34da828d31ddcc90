"""Are examples longer than the model has positions for? Those that are learnt, or kept as a table,
end somewhere, and what lies behind is an index error, which on a GPU ends the process. Rotary
positions go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..memory.shape import language_config
from .batches import SEQUENCES

if TYPE_CHECKING:
    from datasets import Dataset

_TABLE = (
    *("albert", "bert", "bert-generation", "big_bird", "biogpt", "codegen", "convbert", "ctrl"),
    *("deberta", "distilbert", "electra", "ernie", "flaubert", "fnet", "gpt2", "gpt_bigcode"),
    *("gpt_neo", "gptj", "megatron-bert", "mobilebert", "mra", "nystromformer", "openai-gpt"),
    *("opt", "rembert", "squeezebert", "xlm", "yoso"),
)
"""Model types of transformers that look positions up in a table."""
_AFTER_PADDING = ("camembert", "data2vec-text", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Those whose first position is the one behind that of the padding token."""
_COUNTS = ("max_position_embeddings", "n_positions")
"""What configs call it how many positions there are."""


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model with this config.json has positions for; None where they do
    not end, or that is not known."""
    kind = config.get("model_type")
    if kind not in (*_TABLE, *_AFTER_PADDING):
        return None
    count = next((config[name] for name in _COUNTS if isinstance(config.get(name), int)), 0)
    padding = config.get("pad_token_id", 1)
    before = int(padding or 0) + 1 if kind in _AFTER_PADDING else 0
    return int(count) - before if count else None


def made_for(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the language model of a config.json has been made for, which is what
    transformers goes by with scaled rotary positions, too; None where it does not say."""
    language = language_config(config)
    if (table := positions_of(language)) is not None:
        return table
    found = (language.get(name) for name in (*_COUNTS, "max_seq_len"))
    return next((count for count in found if isinstance(count, int) and count > 0), None)


def check_lengths(dataset: Dataset | None, config: Mapping[str, Any]) -> None:
    """Raise DataError where an example has more tokens than the model has positions.

    Args:
        dataset: columns of token ids have names that end in `ids`; each of the examples that are
            laid end to end in a row begins at position 0.
        config: the model's config.json.
    """
    positions = positions_of(config)
    if positions is not None and (found := _longer(dataset, positions)):
        fix = f"set data.max_length: {positions}, or shorten them"
        what = f"{found[0]} than the model has positions{found[1]}"
        raise DataError(what, fix=fix, where="data.max_length")


def beyond(dataset: Dataset | None, config: Mapping[str, Any]) -> str:
    """Return what is to be said where examples are longer than the model has been made for, though
    its positions go on; empty where none are. Arguments as of `check_lengths`."""
    positions = made_for(config)
    if positions is None or not (found := _longer(dataset, positions)):
        return ""
    why = "what it predicts behind them is a guess, unless its config.json scales its positions"
    return f"{found[0]} than the model has been made for{found[1]}; {why}"


def _longer(dataset: Dataset | None, positions: int) -> tuple[str, str] | None:
    """Return how many examples are longer than `positions`, and how long, in words."""
    names = getattr(dataset, "column_names", None) or ()
    for column in names if SEQUENCES not in names else ():
        lengths = _lengths(dataset, column) if column.endswith("ids") else []
        if longer := sum(length > positions for length in lengths):
            many = f"{longer} of {len(lengths)} examples are longer"
            return many, f": up to {max(lengths):,} tokens, and there are {positions:,} positions"
    return None


def _lengths(dataset: Any, column: str) -> list[int]:
    """Return how many tokens each example has there; nothing of a column that holds no lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        found = pc.list_value_length(dataset.with_format("arrow")[:][column]).to_pylist()
    except (TypeError, NotImplementedError, AttributeError, KeyError, pa.ArrowException):
        return []
    return [length or 0 for length in found]
