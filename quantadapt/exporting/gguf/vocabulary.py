"""A tokenizer as llama.cpp has it. Pure: works on the contents of a tokenizer.json.

llama.cpp splits text by rules of its own, which a file names. A tokenizer is written where it is
known to be one of these; others take llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as GGUF numbers them."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Mapping[str, tuple[str, bool]] = {
    _LLAMA3: ("llama-bpe", True),
    _LLAMA3.replace("{1,3}", ""): ("qwen2", False),
}
"""Pattern that text is split by -> llama.cpp's name of it, and whether a word that is a token as a
whole stays one, whatever the merges say."""
_SPACE = "\u2581"


@dataclass(frozen=True)
class Kind:
    """How llama.cpp takes text apart.

    Attributes:
        model: "gpt2", pairs of bytes by rank, or "llama", pairs by the score of what they make.
        pre: its name of how text is split before.
        space_prefix: whether a space is put in front of text.
        at_start: only in front of the first text, where llama.cpp would after special tokens, too.
    """

    model: str
    pre: str
    space_prefix: bool = False
    at_start: bool = False


def kind_of(tokenizer: Mapping[str, Any]) -> Kind | None:
    """Return llama.cpp's kind of a tokenizer.json; None where it is not known to have one."""
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        return _with_bytes_as_tokens(tokenizer)
    return _of_bytes(tokenizer, bool(model.get("ignore_merges")))


_COMPOSED = "NFC"
"""Of normalizers, the only one that llama.cpp can do without: text is hardly written otherwise."""


def _of_bytes(tokenizer: Mapping[str, Any], whole_words: bool) -> Kind | None:
    changes = _parts(tokenizer.get("normalizer"), "normalizers")
    if any(part.get("type") != _COMPOSED for part in changes):
        return None
    parts = list(_parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1].get("add_prefix_space"):
        return None
    splits_itself = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and splits_itself and not whole_words:
        return Kind("gpt2", "gpt-2")
    if kinds == ["Digits", "ByteLevel"] and splits_itself and not whole_words:
        return Kind("gpt2", "smollm") if parts[0].get("individual_digits") else None
    if kinds != ["Split", "ByteLevel"] or splits_itself:
        return None
    pattern = parts[0].get("pattern")
    found = _SPLITS.get(pattern.get("Regex", "")) if isinstance(pattern, Mapping) else None
    kept = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
    return Kind("gpt2", found[0]) if found and kept and found[1] == whole_words else None


def _with_bytes_as_tokens(tokenizer: Mapping[str, Any]) -> Kind | None:
    """Return the kind of one that was made from SentencePiece's: a space is a sign of its own."""
    before = list(_parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    changes = list(_parts(tokenizer.get("normalizer"), "normalizers"))
    kinds = [part.get("type") for part in changes]
    signs = kinds in (["Prepend", "Replace"], ["Replace"]) and _of_spaces(changes[-1])
    if signs and changes[-1].get("content") == _SPACE and all(map(_splits_at_spaces, before)):
        return Kind("llama", "default", space_prefix=kinds[0] == "Prepend")
    if not changes and [part.get("type") for part in before] == ["Metaspace"]:
        scheme = before[0].get("prepend_scheme", "always")
        if not before[0].get("split", True):
            return Kind("llama", "default", scheme != "never", at_start=scheme == "first")
    return None


def _splits_at_spaces(part: Mapping[str, Any]) -> bool:
    """Say whether it splits at spaces alone: where these have become signs, as Gemma's, nowhere."""
    return part.get("type") == "Split" and _of_spaces(part)


def _of_spaces(part: Mapping[str, Any]) -> bool:
    pattern = part.get("pattern")
    return isinstance(pattern, Mapping) and pattern.get("String") == " "


def _parts(value: Any, key: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        inner = value.get(key) if value.get("type") == "Sequence" else [value]
        yield from (part for part in inner or () if isinstance(part, Mapping))


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer: for each row of the embedding token, kind and score; and the
    merges, best first, of one that goes by ranks."""

    kind: Kind
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]


def vocabulary(tokenizer: Mapping[str, Any], kind: Kind, rows: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json for an embedding of `rows` rows.

    Raises:
        ModelError: a token has no row.
    """
    model = tokenizer["model"]
    ids: dict[str, int] = dict(model["vocab"])
    added = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or ()}
    ids |= {content: int(entry["id"]) for content, entry in added.items()}
    if (last := max(ids.values())) >= rows:
        what = f"its tokenizer has a token {last}, and the embedding has {rows} rows"
        raise ModelError(what, fix="resize the embedding before training")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types, scores = [UNUSED] * rows, [-1000.0] * rows
    for token, row in ids.items():
        tokens[row], types[row] = token, _type(token, added, model, kind)
        if kind.model == "llama" and types[row] == USER_DEFINED:
            tokens[row] = token.replace(_SPACE, " ")  # it is looked for in text as it comes
        scores[row] = -float(ranks.get(token, 0))
    joined = [f"{left} {right}" for left, right in merges]
    return Vocabulary(kind, tokens, types, scores, joined)


def _type(
    token: str, added: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], kind: Kind
) -> int:
    if kind.model == "llama" and token == model.get("unk_token"):
        return UNKNOWN
    if token in added:
        return CONTROL if added[token].get("special") else USER_DEFINED
    is_byte = kind.model == "llama" and len(token) == 6 and token.startswith("<0x")
    return BYTE if is_byte and token.endswith(">") else NORMAL
