"""The tokenizer of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..inputs.documents import shown
from ..paths import out_of_reach
from ..planning.on_disk import config_of
from ..remote_code import trusted

if TYPE_CHECKING:
    pass


OF_TOKENIZER = re.compile(r"tokenizer|^(vocab|merges)\.|^spiece\.|\.(spm|bpe|tiktoken)$", re.I)
"""What the files of a tokenizer are called, among those of a checkpoint."""


def load_tokenizer(source: str) -> Any:
    """Return the checkpoint's tokenizer, with a pad token. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    from ..loading.reading import refuse_code

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted())
    except Exception as error:  # as many kinds as there are tokenizers
        refuse_code(source, error)
        text = str(error).strip().splitlines() or [type(error).__name__]
        away, fix = out_of_reach(source)
        what = f"{away or 'its tokenizer cannot be loaded'}: {text[0].rstrip(' :')}"
        fix = fix or "put the tokenizer's files beside config.json"
        raise ModelError(what, fix=fix, where=source) from None
    refuse_code(source)  # transformers may have taken another tokenizer instead
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        what = f"model_max_length of its tokenizer is {shown(longest)}, no number"
        raise ModelError(what, fix="restore tokenizer_config.json", where=source)
    pad, rows = tokenizer.pad_token_id, (config_of(source) or {}).get("vocab_size")
    if pad is None or (isinstance(rows, int) and pad >= rows):  # one without a row of the embedding
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_tokenizer(source: str) -> Any:
    """Return the checkpoint's tokenizer as `load_tokenizer` does, or None where it has no files of
    one. Raises ModelError where those that it has are damaged."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
        return load_tokenizer(source) if any(map(OF_TOKENIZER.search, names)) else None
    try:
        return load_tokenizer(source)
    except ModelError:
        return None
