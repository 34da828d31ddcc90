"""A dense model with its tokenizer as one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ...remote_code import trusted
from .converter import CONVERT
from .families import (
    FAMILIES,
    Family,
    gguf_name,
    metadata,
    rope_factors,
    rotated_heads,
    unknown_in,
)
from .files import GGUFFile, NumberFormat, set_all
from .vocabulary import Vocabulary, kind_of, vocabulary

if TYPE_CHECKING:
    from torch import Tensor, nn


def write_model(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    numbers: NumberFormat,
    name: str,
    *,
    chats: bool = False,
) -> int:
    """Write a dense model of one of `FAMILIES`, and read every tensor again.

    Args:
        chats: it learnt chats as the template writes them, which llama.cpp is to begin so, too:
            else it begins them as other texts, as most templates do.

    Returns:
        How many tensors that were.

    Raises:
        ModelError: the model or its tokenizer is not known to be written rightly.
    """
    config = config_of(model)
    if unknown := unknown_in(config):
        raise ModelError(f"it cannot be written as GGUF: {'; '.join(unknown)}", fix=CONVERT)
    family = FAMILIES[config["model_type"]]
    file = GGUFFile(path, family.architecture, numbers)
    file.set("general.type", "model")
    file.set("general.name", name)
    set_all(file, metadata(family, config))
    file.set_file_type()
    _set_tokenizer(file, tokenizer, int(config["vocab_size"]), chats)
    for key, shape, make in _tensors(model, family, config):
        file.add(key, shape, make)
    file.write()
    return file.refuse_other()


def config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model; empty where it has none."""
    config: Any = getattr(model, "config", None)
    return dict(config.to_dict()) if hasattr(config, "to_dict") else {}


def read_model(path: Path, config: Any, device: str) -> nn.Module | None:
    """Return a model as transformers reads its GGUF file, in float32; None where that does not know
    the architecture.

    Args:
        config: that of the model which was written. A file does not tell transformers all.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES.get(config.model_type)
    if family is not None and family.read_as:
        kind = type(AutoConfig.for_model(family.read_as))
        config = kind.from_dict(config.to_dict() | {"model_type": family.read_as})
    options = {"gguf_file": path.name, "config": config, "trust_remote_code": trusted()}
    try:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, device_map={"": device}, **options
        )
    except (NotImplementedError, ValueError):
        if family is not None:
            raise
        return None
    return loaded.eval()


def rotated(weight: Tensor, heads: int) -> Tensor:
    """Return rows [heads * size, ...] so that the halves of each head, which turn together, become
    neighbours."""
    rest, half = weight.shape[1:], weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *rest).transpose(1, 2).reshape(weight.shape)


def _tensors(
    model: nn.Module, family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Yield name, shape and what returns it of each tensor; a head that is tied is left out."""
    import torch

    state = model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    lost = []
    for name, tensor in state.items():
        if name == "lm_head.weight" and tensor.data_ptr() == embedding.data_ptr():
            continue
        key, heads = gguf_name(family, name), rotated_heads(family, name, config)
        if key is None:
            lost.append(name)
            continue
        more = 1 if family.norms_add_one and name.endswith("norm.weight") else 0
        yield key, tuple(tensor.shape), _making(tensor, heads, more)
    if lost:
        what = f"llama.cpp has no place for {', '.join(lost[:3])} in such a model"
        raise ModelError(what, fix=CONVERT)
    if factors := rope_factors(config):
        yield "rope_freqs.weight", (len(factors),), lambda: torch.tensor(factors)


def _making(tensor: Tensor, heads: int | None, more: int) -> Callable[[], Tensor]:
    if more:
        return lambda: tensor.detach().float() + more
    return lambda: tensor.detach() if heads is None else rotated(tensor.detach(), heads)


def tokenizer_contents(tokenizer: Any) -> dict[str, Any]:
    """Return the contents of the tokenizer.json of a tokenizer; empty of one that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return dict(json.loads(backend.to_str())) if backend is not None else {}


def _set_tokenizer(file: GGUFFile, tokenizer: Any, rows: int, chats: bool) -> None:
    contents = tokenizer_contents(tokenizer)
    if (kind := kind_of(contents)) is None:
        what = "llama.cpp is not known to take text apart as its tokenizer does"
        raise ModelError(what if tokenizer else "it came without a tokenizer", fix=CONVERT)
    _set_vocabulary(file, vocabulary(contents, kind, rows))
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            key = {"unk": "unknown", "pad": "padding"}.get(name, name)
            file.set(f"tokenizer.ggml.{key}_token_id", int(token))
    ids = tokenizer("a").input_ids
    chat = _chat(tokenizer)
    begins = ids[:1] == [tokenizer.bos_token_id]
    if begins and chats and chat is not None:
        begins = chat.startswith(tokenizer.bos_token)
    file.set("tokenizer.ggml.add_bos_token", begins)
    file.set("tokenizer.ggml.add_eos_token", len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if kind.model == "llama":
        # A chat that begins with a token has no first text, and a space in front of each would be
        # one too many.
        special = chat is not None and chat.startswith(tuple(tokenizer.get_added_vocab()))
        prefix = kind.space_prefix and not (kind.at_start and special)
        file.set("tokenizer.ggml.add_space_prefix", prefix)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        file.set("tokenizer.chat_template", template)


def _chat(tokenizer: Any) -> str | None:
    """Return a chat as the template of a tokenizer writes it; None where it has none that can."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    try:
        said = [{"role": "user", "content": "a"}]
        return str(tokenizer.apply_chat_template(said, tokenize=False))
    except Exception:  # templates raise what they like
        return None


def _set_vocabulary(file: GGUFFile, found: Vocabulary) -> None:
    file.set("tokenizer.ggml.model", found.kind.model)
    file.set("tokenizer.ggml.pre", found.kind.pre)
    file.set("tokenizer.ggml.tokens", found.tokens)
    file.set("tokenizer.ggml.token_type", found.types)
    if found.kind.model == "llama":
        file.set("tokenizer.ggml.scores", found.scores)
    elif found.merges:
        file.set("tokenizer.ggml.merges", found.merges)
