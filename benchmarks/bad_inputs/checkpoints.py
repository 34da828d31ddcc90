"""Checkpoints: config.json, safetensors files, their index, tokenizers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cases import (
    EVAL_MODEL,
    EVAL_QUANTIZED,
    MODEL,
    ONTO,
    PLAN,
    QUANTIZE,
    TRAIN,
    WRONG,
    Case,
    all_of,
    as_folder,
    at,
    documents,
    header,
    nested,
    with_tensors,
    with_value,
    words,
    written,
)

CONFIG, WEIGHTS = f"{MODEL}/config.json", f"{MODEL}/model.safetensors"
INDEX = f"{MODEL}/model.safetensors.index.json"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size", "head_dim", "max_position_embeddings")  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _configs()
    yield from _weights()
    yield from _indexes()
    yield from _tokenizers()


def _configs() -> Iterator[Case]:
    for name, damage in documents():
        for command in (PLAN, QUANTIZE):
            yield Case("config.json", name, command, at(CONFIG, damage))
    for key in _SIZES:
        for index, value in enumerate(WRONG):
            command = (PLAN, QUANTIZE)[index % 2]
            damage = with_value(CONFIG, key, value)
            yield Case(
                "config.json", f"{key} is {words(value)}", command, damage, _size(key, value)
            )
    for key in ("model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "architectures",
                "quantization_config", "rope_parameters", "dtype", "attention_bias"):  # fmt: skip
        for value in WRONG:
            damage = with_value(CONFIG, key, value)
            yield Case(
                "config.json", f"{key} is {words(value)}", QUANTIZE, damage, _other(key, value)
            )
    huge = {
        "10 million layers": {"num_hidden_layers": 10**7},
        "1000 layers": {"num_hidden_layers": 1000},
        "one layer of two": {"num_hidden_layers": 1},
        "hidden_size of 10 million": {"hidden_size": 10**7},
        "a vocabulary of a billion": {"vocab_size": 10**9},
        "a smaller vocabulary": {"vocab_size": 100},
        "a hundred thousand heads": {"num_attention_heads": 10**5},
        "heads that do not divide": {"num_attention_heads": 7, "head_dim": None},
        "more key heads than heads": {"num_key_value_heads": 8},
        "another model_type": {"model_type": "gpt2"},
        "an encoder-decoder": {"model_type": "t5"},
        "a vision model": {"model_type": "vit"},
        "remote code": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}},
        "remote code of another repository": {"auto_map": {"AutoModel": "other/repo--evil.M"}},
        "an unknown quantization": {"quantization_config": {"quant_method": "magic"}},
        "gptq without a bit of it": {"quantization_config": {"quant_method": "gptq"}},
        "gptq of -4 bits": {"quantization_config": {"quant_method": "gptq", "bits": -4}},
        "bnb of the wrong types": {"quantization_config": {"quant_method": "bitsandbytes",
                                                           "load_in_4bit": "maybe"}},
        "our own, of nonsense": {"quantization_config": {"quant_method": "hqq", "bits": "x"}},
        "quant_method is a list": {"quantization_config": {"quant_method": ["hqq"]}},
        "quant_method is null": {"quantization_config": {"quant_method": None}},
    }  # fmt: skip
    for name, values in huge.items():
        damage = all_of(*(with_value(CONFIG, key, value) for key, value in values.items()))
        for command in (PLAN, QUANTIZE):
            wanted = "either" if command is PLAN or "remote" in name else "refused"
            yield Case("config.json", name, command, damage, wanted)
    for method in ("gptq", "awq", "bitsandbytes", "hqq", "torchao", "quanto", "aqlm", "auto-round",
                   "eetq", "inc", "fp8", "compressed-tensors"):  # fmt: skip
        for more in ({}, {"bits": "4", "group_size": []}):
            value = {"quant_method": method, **more}
            damage = with_value(CONFIG, "quantization_config", value)
            name = f"quantization_config of {method} with {more or 'nothing else'}"
            yield Case("config.json", name, EVAL_MODEL, damage)


def _size(key: str, value: Any) -> str:
    if key in ("head_dim", "num_key_value_heads") and (
        value is None or not isinstance(value, (str, int, float, list, dict))
    ):
        return "either"
    if key in ("max_position_embeddings",) and (
        value == 10**12 or not isinstance(value, (int, float, str, list, dict, type(None)))
    ):
        return "either"
    return (
        "refused"
        if isinstance(value, (str, float, list, dict)) or value in (True, -1, 0)
        else "either"
    )


def _other(key: str, value: Any) -> str:
    """What each of these may be is for transformers to say; nothing is quantized by a text."""
    plain = isinstance(value, (str, int, float, list, dict)) and key == "quantization_config"
    return "refused" if plain else "either"


def _weights() -> Iterator[Case]:
    raw: dict[str, Callable[[Path], object]] = {
        "empty": lambda file: file.write_bytes(b""),
        "seven bytes": lambda file: file.write_bytes(b"\x01" * 7),
        "cut by one byte": lambda file: os.truncate(file, file.stat().st_size - 1),
        "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
        "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
        "a header of 2^63 bytes": lambda file: _overwrite(file, struct.pack("<Q", 2**63)),
        "a header of 200 MB": lambda file: _sparse(file, 2 * 10**8),
        "a header of 0 bytes": lambda file: _overwrite(file, struct.pack("<Q", 0)),
        "a header that is no JSON": lambda file: _overwrite(file, b"\xff" * 8, at=8),
        "a pickle": lambda file: file.write_bytes(
            b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
        ),
        "a folder": as_folder,
        "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
        "a link to /dev/zero": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
        "a named pipe": lambda file: (file.unlink(), os.mkfifo(file)),
        "missing": lambda file: file.unlink(),
    }
    headers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a list as header": lambda h: b"[1, 2]",
        "a deeply nested header": lambda h: nested(200_000).encode(),
        "an offset of text": lambda h: _first(h).update(data_offsets=["0", "8"]),
        "one offset": lambda h: _first(h).update(data_offsets=[0]),
        "no offsets": lambda h: _first(h).pop("data_offsets"),
        "offsets below 0": lambda h: _first(h).update(data_offsets=[-8, 0]),
        "offsets that overlap": lambda h: _first(h).update(data_offsets=[64, 128]),
        "offsets of NaN": lambda h: _first(h).update(data_offsets=[float("nan"), 8]),
        "offsets of 10^18": lambda h: _first(h).update(data_offsets=[0, 10**18]),
        "an unknown dtype": lambda h: _first(h).update(dtype="F7"),
        "a dtype of another size": lambda h: _first(h).update(dtype="F16"),
        "a wrong shape": lambda h: _first(h).update(shape=[3]),
        "a shape of text": lambda h: _first(h).update(shape="big"),
        "a shape below 0": lambda h: _first(h).update(shape=[-1, -64]),
        "no tensors": lambda h: b"{}",
        "a tensor that is null": lambda h: h.update({"lm_head.weight": None}),
        "metadata that is a list": lambda h: h.update({"__metadata__": []}),
        "metadata of numbers": lambda h: h.update({"__metadata__": {"format": 1}}),
        "no metadata": lambda h: h.pop("__metadata__", None) and None,
        "a format of numpy": lambda h: h.update({"__metadata__": {"format": "np"}}),
    }
    for name, damage in raw.items():
        for command in (PLAN, QUANTIZE):
            wanted = "either" if command is PLAN and name == "missing" else "refused"
            yield Case("model.safetensors", name, command, at(WEIGHTS, damage), wanted)
    for name, change in headers.items():
        for command in (QUANTIZE, ONTO):
            wanted = "either" if "metadata" in name or "numpy" in name else "refused"
            yield Case("model.safetensors", name, command, at(WEIGHTS, header(change)), wanted)
    yield from _wrong_numbers()
    layer = "model.layers.0.self_attn.q_proj.weight"
    tensors: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a missing layer": lambda t: t.pop(layer),
        "a missing norm": lambda t: t.pop("model.norm.weight"),
        "a missing embedding": lambda t: t.pop("model.embed_tokens.weight"),
        "a missing head": lambda t: t.pop("lm_head.weight"),
        "a transposed layer": lambda t: t.update({layer: t[layer][:32].T.contiguous()}),
        "a flat layer": lambda t: t.update({layer: t[layer].flatten()}),
        "an empty layer": lambda t: t.update({layer: t[layer][:0].clone()}),
        "integers for weights": lambda t: t.update({layer: t[layer].int()}),
        "all names prefixed": lambda t: _renamed(t, lambda name: f"wrapped.{name}"),
        "names of another model": lambda t: _renamed(t, lambda name: name.replace("layers", "h")),
    }
    for name, change in tensors.items():
        for command in (QUANTIZE, EVAL_MODEL, ONTO):
            wanted = "either" if name == "integers for weights" else "refused"
            yield Case("tensors", name, command, with_tensors(WEIGHTS, change), wanted)
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        damage = lambda folder, name=name: (folder / WEIGHTS).rename(folder / MODEL / name)  # noqa: E731
        for command in (PLAN, QUANTIZE, ONTO):
            yield Case("pickles", name, command, damage)
    damage = lambda folder: (folder / WEIGHTS).rename(folder / MODEL / "adapter_model.safetensors")  # noqa: E731
    yield Case("model.safetensors", "under another name", QUANTIZE, damage)


def _wrong_numbers() -> Iterator[Case]:
    names = ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight",
             "model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight")  # fmt: skip
    for name in names:
        for value in ("nan", "inf", "-inf"):
            change = lambda t, name=name, value=value: t[name].view(-1)[5:6].fill_(float(value))  # noqa: E731
            damage = with_tensors(WEIGHTS, change)
            for command in (QUANTIZE, TRAIN, EVAL_MODEL, ONTO)[: 4 if value == "nan" else 2]:
                yield Case("numbers", f"{value} in {name}", command, damage)
    for command in (
        ("quantize", MODEL, "-o", "out", "-b", b)
        for b in ("none", "bnb-nf4", "bnb-int8", "torchao-int8", "quanto")
    ):

        def broken(tensors: dict[str, Any]) -> None:
            tensors["model.layers.1.self_attn.q_proj.weight"].view(-1)[5:6].fill_(float("nan"))

        yield Case(
            "numbers", f"nan in a layer, {command[-1]}", command, with_tensors(WEIGHTS, broken)
        )
    for name in ("W_q", "scale", "zero", "norm.weight"):

        def change(tensors: dict[str, Any], name: str = name) -> None:
            key = next((key for key in sorted(tensors) if key.endswith(name)), None)
            if key is None or not tensors[key].is_floating_point():
                key = "model.norm.weight"
            tensors[key].view(-1)[:1].fill_(float("nan"))

        yield Case(
            "numbers",
            f"nan in {name} of a quantized base",
            EVAL_QUANTIZED,
            with_tensors("quantized/model.safetensors", change),
        )


def _indexes() -> Iterator[Case]:
    def sharded(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / WEIGHTS)
            first = {k: v for k, v in tensors.items() if "layers.0" in k}
            rest = {k: v for k, v in tensors.items() if k not in first}
            names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
            for name, part in zip(names, (first, rest), strict=True):
                save_file(part, folder / MODEL / name, metadata={"format": "pt"})
            (folder / WEIGHTS).unlink()
            weight_map = dict.fromkeys(first, names[0]) | dict.fromkeys(rest, names[1])
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            save_file({"victim": tensors["model.norm.weight"]}, folder / "victim.safetensors")
            changed = change(index, folder)
            text = changed if isinstance(changed, str) else json.dumps(index)
            (folder / INDEX).write_text(text)

        return damage

    def to(name: str) -> Callable[[dict[str, Any], Path], Any]:
        """Let the first tensor lie in another file."""

        def change(index: dict[str, Any], folder: Path) -> None:
            first = next(iter(index["weight_map"]))
            index["weight_map"][first] = name.replace("HERE", str(folder))

        return change

    def linked(target: str) -> Callable[[dict[str, Any], Path], Any]:
        def change(index: dict[str, Any], folder: Path) -> None:
            shard = folder / MODEL / "model-00001-of-00002.safetensors"
            shard.rename(folder / "elsewhere.safetensors")
            shard.symlink_to(target.replace("HERE", str(folder)))

        return change

    first = "model-00001-of-00002.safetensors"
    changes: dict[str, Callable[[dict[str, Any], Path], Any]] = {
        "an absolute path": to("HERE/victim.safetensors"),
        "a path above": to("../victim.safetensors"),
        "a path above, hidden": to("sub/../../victim.safetensors"),
        "a path with a backslash": to("..\\victim.safetensors"),
        "/etc/passwd": to("/etc/passwd"),
        "a missing shard": to("model-00003-of-00002.safetensors"),
        "the config as shard": to("config.json"),
        "the index as shard": to("model.safetensors.index.json"),
        "a shard of no name": to(""),
        "a dot": to("."),
        "a NUL": to("a\0b.safetensors"),
        "a newline": to("a\nb.safetensors"),
        "a name too long": to("a" * 300 + ".safetensors"),
        "a shard that lacks it": to("model-00002-of-00002.safetensors"),
        "a link out of the folder": linked("../elsewhere.safetensors"),
        "an absolute link": linked("HERE/elsewhere.safetensors"),
        "a link to itself": linked(first),
        "a number for a file": lambda i, f: i["weight_map"].update({next(iter(i["weight_map"])): 3}),
        "null for a file": lambda i, f: i["weight_map"].update({next(iter(i["weight_map"])): None}),
        "no weight_map": lambda i, f: i.pop("weight_map") and None,
        "an empty weight_map": lambda i, f: i["weight_map"].clear(),
        "a list as weight_map": lambda i, f: i.update(weight_map=[1, 2]),
        "half of the names": lambda i, f: [i["weight_map"].pop(k) for k in list(i["weight_map"])[::2]] and None,
        "a name that no file has": lambda i, f: i["weight_map"].update({"no.such.weight": first}),
        "a list": lambda i, f: "[]",
        "nothing": lambda i, f: "",
        "half of it": lambda i, f: json.dumps(i)[: len(json.dumps(i)) // 2],
        "deep nesting": lambda i, f: nested(200_000),
    }  # fmt: skip
    for name, change in changes.items():
        for command in (PLAN, QUANTIZE, ONTO):
            # the files hold all that the index leaves out
            fine = command is PLAN or name in ("a name that no file has", "half of the names")
            wanted = "either" if fine else "refused"
            yield Case("index", name, command, sharded(change), wanted)
    yield Case("index", "nothing wrong", QUANTIZE, sharded(lambda i, f: None), "works")


def _tokenizers() -> Iterator[Case]:
    plain = ("tokenizer.json", "tokenizer_config.json")
    for name, damage in documents():
        for file in plain:
            required = file == "tokenizer.json" or name not in ("missing", "no object inside")
            wanted = "refused" if required and file == "tokenizer.json" else "either"
            yield Case(file, name, TRAIN, at(f"{MODEL}/{file}", damage), wanted)
        yield Case(
            "generation_config.json",
            name,
            QUANTIZE,
            at(f"{MODEL}/generation_config.json", damage),
            "either",
        )
    changes = {
        "model_max_length is text": ("tokenizer_config.json", "model_max_length", "long"),
        "eos_token is a number": ("tokenizer_config.json", "eos_token", 3),
        "eos_token is null": ("tokenizer_config.json", "eos_token", None),
        "pad_token is unknown": ("tokenizer_config.json", "pad_token", "<never-seen>"),
        "an unknown class": ("tokenizer_config.json", "tokenizer_class", "NoSuchTokenizer"),
        "a class that is a number": ("tokenizer_config.json", "tokenizer_class", 3),
        "remote code": ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.T", None]}),
        "a model of an unknown type": ("tokenizer.json", "model", {"type": "Magic"}),
        "an empty vocabulary": ("tokenizer.json", "model", {"type": "BPE", "vocab": {}, "merges": []}),
        "ids beyond the model": ("tokenizer.json", "added_tokens",
                                 [{"id": 10**6, "content": "<x>", "single_word": False, "lstrip": False,
                                   "rstrip": False, "normalized": False, "special": True}]),
    }  # fmt: skip
    for name, (file, key, value) in changes.items():
        wanted = "refused" if file == "tokenizer.json" and "beyond" not in name else "either"
        yield Case("tokenizer", name, TRAIN, with_value(f"{MODEL}/{file}", key, value), wanted)
    chat = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    templates = {
        "a syntax error": "{% for %}",
        "an unknown filter": "{{ messages | nothing }}",
        "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "a huge power": "{{ 10 ** (10 ** 10) }}",
        "a huge power, hidden": "{% set n = 10 ** 10 %}{{ messages | length ** n }}{{ 3** n }}",
        "a huge text": "{{ 'a' * 10 ** 12 }}",
        "an escape from the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "an attribute of none": "{{ messages[0].nothing.more }}",
        "an exception": "{{ raise_exception('no') }}",
        "nothing": "",
        "no content": "always the same",
        "a division by zero": "{{ 1 / 0 }}",
        "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "an import": "{% include '/etc/passwd' %}",
        "a number": "\0",
    }
    for name, template in templates.items():
        damage = all_of(
            written(f"{MODEL}/chat_template.jinja", template), written("data.jsonl", chat * 24)
        )
        wanted = "either" if name == "nothing" else "refused"
        yield Case("chat template", name, TRAIN, damage, wanted)


def _first(values: dict[str, Any]) -> dict[str, Any]:
    return values[next(name for name in values if name != "__metadata__")]


def _overwrite(file: Path, raw: bytes, at: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(raw)] = raw
    file.write_bytes(content)


def _sparse(file: Path, length: int) -> None:
    file.write_bytes(struct.pack("<Q", length))
    os.truncate(file, length + 8)


def _renamed(tensors: dict[str, Any], rename: Callable[[str], str]) -> None:
    renamed = {rename(name): value for name, value in tensors.items()}
    tensors.clear()
    tensors.update(renamed)
