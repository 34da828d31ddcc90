"""Adapter folders: adapter_config.json and the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cases import (
    EVAL,
    GENERATE,
    MERGE,
    MISSING,
    ONTO,
    RUN,
    WRONG,
    Case,
    all_of,
    at,
    documents,
    header,
    nested,
    with_tensors,
    with_value,
    words,
    written,
)

CONFIG, WEIGHTS = f"{RUN}/adapter/adapter_config.json", f"{RUN}/adapter/adapter_model.safetensors"
_COMMANDS = (EVAL, MERGE, ONTO)
_IRRELEVANT = ("base_model_name_or_path", "task_type", "inference_mode")


def cases() -> Iterator[Case]:
    for index, (name, damage) in enumerate(documents()):
        command = _COMMANDS[index % 3]
        yield Case("adapter_config.json", name, command, at(CONFIG, damage))
    for key in ("peft_type", "r", "lora_alpha", "target_modules", "bias", "rank_pattern",
                "init_lora_weights", "use_dora", "modules_to_save", "layers_to_transform"):  # fmt: skip
        for index, value in enumerate(WRONG):
            damage = with_value(CONFIG, key, value)
            name = f"{key} is {words(value)}"
            yield Case(
                "adapter_config.json", name, _COMMANDS[index % 3], damage, _wanted(key, value)
            )
    for key in _IRRELEVANT:
        for value in (None, 3, "text", [], "\0"):
            damage = with_value(CONFIG, key, value)
            yield Case("adapter_config.json", f"{key} is {words(value)}", EVAL, damage, "either")
    for kind in ("LOHA", "VERA", "IA3", "ADALORA", "PROMPT_TUNING", "BONE", "OFT", "XLORA", "NONE"):
        for command in _COMMANDS:
            yield Case(
                "adapter_config.json",
                f"peft_type is {kind}",
                command,
                with_value(CONFIG, "peft_type", kind),
            )
    catastrophic = r"(.*a?)*(.*b?)*(x+x+)+y"
    for key, value in (("target_modules", r"(.+)+(.+)+(.+)+(.+)+z"), ("target_modules", catastrophic),
                       ("exclude_modules", r"(.+)+(.+)+(.+)+(.+)+z"),
                       ("rank_pattern", {r"(.+)+(.+)+(.+)+(.+)+z": 2}),
                       ("target_modules", "("), ("target_modules", "[")):  # fmt: skip
        for command in _COMMANDS:
            wanted = "refused"
            yield Case(
                "regular expression",
                f"{key} is {words(value)}",
                command,
                with_value(CONFIG, key, value),
                wanted,
            )
    yield from _weights()


def _wanted(key: str, value: Any) -> str:
    fine = {
        "bias": ("none",),
        "rank_pattern": ({}, None, MISSING),
        "init_lora_weights": (True, MISSING, False),
        "use_dora": (None, False, MISSING),
        "modules_to_save": (None, MISSING, []),
        "layers_to_transform": (None, MISSING, []),
    }
    odd = {"lora_alpha": (3.5, 0, -1, 10**12, True, MISSING), "r": (MISSING,), "bias": (MISSING,),
           "init_lora_weights": (None,), "target_modules": (), "layers_to_transform": (0, True),
           "rank_pattern": ({"a": 1},)}  # fmt: skip
    same = any(value is known or (type(value) is type(known) and value == known)
               for known in (*fine.get(key, ()), *odd.get(key, ())))  # fmt: skip
    return "either" if same else "refused"


def _weights() -> Iterator[Case]:
    raw: dict[str, Callable[[Path], object]] = {
        "empty": lambda file: file.write_bytes(b""),
        "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
        "cut by one byte": lambda file: os.truncate(file, file.stat().st_size - 1),
        "random bytes": lambda file: file.write_bytes(bytes(range(256)) * 16),
        "missing": lambda file: file.unlink(),
        "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
        "a list as header": header(lambda h: b"[1]"),
        "a deeply nested header": header(lambda h: nested(200_000).encode()),
        "a pickle under its name": lambda file: file.write_bytes(
            b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
        ),
        "a pickle beside": lambda file: file.rename(file.with_suffix(".bin")),
        "a real pickle": _pickled,
    }
    for name, damage in raw.items():
        for command in _COMMANDS:
            yield Case("adapter_model.safetensors", name, command, at(WEIGHTS, damage))
    tensors: dict[str, Callable[[dict[str, Any]], Any]] = {
        "nan": lambda t: _one(t, "lora_B").view(-1)[:1].fill_(float("nan")),
        "inf": lambda t: _one(t, "lora_A").view(-1)[:1].fill_(float("inf")),
        "all nan": lambda t: [value.fill_(float("nan")) for value in t.values()],
        "no tensors": lambda t: t.clear(),
        "one tensor less": lambda t: t.pop(next(iter(t))),
        "one layer less": lambda t: [t.pop(k) for k in list(t) if "layers.0.self_attn.q_proj" in k],
        "a tensor more": lambda t: t.update(more=_one(t, "lora_A").clone()),
        "a layer more": lambda t: t.update({_key(t, "lora_A").replace("layers.0", "layers.9"): _one(t, "lora_A").clone()}),
        "another rank": lambda t: t.update({k: v[:2].clone() if "lora_A" in k else v[:, :2].clone() for k, v in t.items()}),
        "a transposed tensor": lambda t: t.update({_key(t, "lora_A"): _one(t, "lora_A").T.contiguous()}),
        "integers": lambda t: t.update({_key(t, "lora_A"): _one(t, "lora_A").int()}),
        "names without a prefix": lambda t: _renamed(t, lambda n: n.removeprefix("base_model.model.")),
        "names of another method": lambda t: _renamed(t, lambda n: n.replace("lora_", "hada_")),
    }  # fmt: skip
    for name, change in tensors.items():
        for command in _COMMANDS:
            wanted = "either" if name == "integers" else "refused"
            yield Case("adapter weights", name, command, with_tensors(WEIGHTS, change), wanted)
    nothing = all_of(written("bare/adapter_config.json", "{}"))
    yield Case("adapter folder", "not ours", ("eval", "bare"), nothing)
    yield Case("adapter folder", "not ours", ("merge", "bare", "--output", "out"), nothing)
    yield Case(
        "adapter folder", "empty", ("eval", "bare"), lambda folder: (folder / "bare").mkdir()
    )
    yield Case("adapter folder", "nothing wrong", EVAL, wanted="works")
    yield Case("adapter folder", "nothing wrong", MERGE, wanted="works")
    yield Case("adapter folder", "nothing wrong", ONTO, wanted="works")
    yield Case("adapter folder", "nothing wrong", GENERATE, wanted="works")


def _pickled(file: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def _key(tensors: dict[str, Any], part: str) -> str:
    return next(key for key in sorted(tensors) if part in key)


def _one(tensors: dict[str, Any], part: str) -> Any:
    return tensors[_key(tensors, part)]


def _renamed(tensors: dict[str, Any], rename: Callable[[str], str]) -> None:
    renamed = {rename(name): value for name, value in tensors.items()}
    tensors.clear()
    tensors.update(renamed)
