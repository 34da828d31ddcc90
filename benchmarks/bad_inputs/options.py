"""What a user writes: YAML files, `--set`, flags, paths; and a system that does not give."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from .cases import (
    DATA,
    EVAL,
    MERGE,
    MODEL,
    PLAN,
    QUANTIZE,
    RUN,
    TRAIN,
    Case,
    documents,
    failing,
    limited,
    written,
)

_NUMBERS = ("nan", "inf", "-1", "9" * 40, "many", "null", "true")
_CONFIG = ("plan", "run.yaml")


def cases() -> Iterator[Case]:
    yield from _yaml()
    yield from _numbers()
    yield from _paths()
    yield from _system()


def _yaml() -> Iterator[Case]:
    bomb = ['a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x"]']
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    texts = {
        "anchors that expand": "\n".join(bomb),
        "anchors that expand in a known key": "\n".join([*bomb, "skip_modules: *a11"]),
        "merge keys that expand": "x: &x {a: 1}\n"
        + "\n".join(f"y{n}: &y{n} {{<<: [*x, *x]}}" for n in range(50)),
        "an anchor to itself": "a: &a [*a]",
        "a mapping that holds itself": "backend: &b {name: hqq, more: *b}",
        "deep nesting": "a: " + "[" * 20_000,
        "deep nesting in braces": "a: " + "{b: " * 20_000,
        "deep indentation": "\n".join(" " * n + f"k{n}:" for n in range(3000)),
        "a python object": "model: !!python/object/apply:os.system [true]",
        "an unknown tag": "model: !thing x",
        "a number as key": "1: 2\n",
        "null as key": "~: 2\n",
        "true as key": "on: 2\n",
        "a list as key": "[a, b]: 2\n",
        "a mapping as key": "{a: b}: 2\n",
        "a date as key": "2020-01-01: 2\n",
        "a float as key": ".nan: 2\n",
        "a number as key of the backend": "backend: {name: hqq, 1: 2}\n",
        "true as key of the adapter": "adapter: {name: lora, on: 2}\n",
        "null as key of train": "train: {~: 2}\n",
        "a list as key of data": "data: {[a]: 2}\n",
        "a key twice": "model: model\nmodel: model\n",
        "a key twice, inside": "train: {max_steps: 1, max_steps: 2}\n",
        "tabs": "train:\n\tmax_steps: 1\n",
        "two documents": "model: model\n---\nmodel: model\n",
        "control characters": 'model: "mo\x07del"\n',
        "a NUL": "model: mo\0del\n",
        "a lone surrogate": 'model: "\\ud800"\n',
        "no end": 'model: "model\n',
        "binary": "model: !!binary aGVsbG8=\n",
        "a set": "model: !!set {a, b}\n",
        "a time": "model: 2001-12-14t21:59:43.10-05:00\n",
        "a name of a megabyte": "model: " + "a" * 2**20,
        "a key of a megabyte": "a" * 2**20 + ": 1",
        "an unknown key": "modell: model\n",
        "a list for the backend": "backend: [hqq]\n",
        "a number for the backend": "backend: 3\n",
        "null for the adapter": "adapter: null\n",
        "a text for train": "train: fast\n",
        "a name that is no text": "backend: {name: 3}\n",
        "a mapping for an option": "backend: {name: hqq, bits: {a: 1}}\n",
        "a date for an option": "backend: {name: hqq, bits: 2020-01-01}\n",
        "a sexagesimal": "train: {max_steps: 1:30}\n",
        "an octal": "train: {max_steps: 0o}\n",
    }
    for name, text in texts.items():
        yield Case("YAML", name, _CONFIG, written("run.yaml", text), _yaml_wanted(name))
    for name, damage in documents():

        def made(folder: Path, damage=damage) -> None:
            (folder / "run.yaml").write_text("model: model\n")
            damage(folder / "run.yaml")

        wanted = (
            "either" if name in ("empty", "null", "no object inside", "cut in half") else "refused"
        )
        yield Case("YAML", name, _CONFIG, made, wanted)
    regex = r"(.+)+(.+)+(.+)+(.+)+z"
    for command in (TRAIN, PLAN):
        for key in ("target_modules", "exclude_modules"):
            wanted = "either" if command is PLAN else "refused"
            yield Case(
                "regular expression",
                f"{key} for {command[0]}",
                (*command, "--set", f"adapter.{key}={regex}"),
                wanted=wanted,
            )
        yield Case(
            "regular expression",
            f"rank_pattern for {command[0]}",
            (*command, "--set", f"adapter.rank_pattern={{'{regex}': 2}}"),
            wanted="either" if command is PLAN else "refused",
        )


def _yaml_wanted(name: str) -> str:
    fine = ("merge keys that expand", "a time")  # what looks like a time is text
    return "either" if name in fine else "refused"


def _numbers() -> Iterator[Case]:
    for key in ("train.max_steps", "train.num_train_epochs", "train.learning_rate", "train.memory",
                "train.per_device_train_batch_size", "train.warmup_ratio", "train.max_grad_norm",
                "train.weight_decay", "data.max_length", "data.eval_fraction", "seed",
                "adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "backend.bits",
                "backend.group_size", "evaluate.batch_size", "evaluate.max_new_tokens"):  # fmt: skip
        for value in _NUMBERS:
            yield Case(
                "numbers in options",
                f"{key}={value[:20]}",
                (*PLAN, "--set", f"{key}={value}"),
                wanted=_number(key, value),
            )
    for key, value in (("seed", 2**32), ("seed", 2**63), ("seed", 2**64), ("seed", 10**30),
                       ("data.max_length", 10**12), ("adapter.r", 10**9), ("adapter.lora_dropout", 1.0),
                       ("adapter.lora_dropout", 2), ("train.learning_rate", 1e300),
                       ("train.gradient_accumulation_steps", 10**9), ("train.save_steps", 10**30),
                       ("train.logging_steps", 10**30), ("train.max_steps", 10**30),
                       ("train.num_train_epochs", 1e300), ("data.eval_fraction", 0.9999999)):  # fmt: skip
        # so many steps are done as told: time ends them
        limit = ("--set", f"train.max_{'time=0.01' if key == 'train.max_steps' else 'steps=1'}")
        yield Case(
            "numbers in options",
            f"{key}={value}",
            (*TRAIN, *limit, "--set", f"{key}={value}"),
            wanted="refused"
            if key in ("seed", "adapter.r", "adapter.lora_dropout") and value != 1.0
            else "either",
        )
    flags = {
        "--seed": ("x", "-1", "nan", str(2**64), "1.5"),
        "--max-steps": ("x", "-2", "1.5", "0x10"),
        "--lr": ("nan", "inf", "-1", "0", "x", "1e400"),
        "--device": ("gpu", "cuda:99", "cuda:-1", "", "cpu:x", "\n"),
        "--dtype": ("float8", "", "int4"),
        "--merge": ("maybe", ""),
        "--backend": ("", "hqq ", "HQQ", "../hqq", "\n", "a" * 5000),
        "--adapter": ("", "LoRA!", "\n"),
        "--gpus": ("0", "-1", "x"),
        "--card": ("0", "-1", "nan", "inf", "x"),
        "--set": ("", "=", "a", "a=", ".=1", "..=1", "model.x=1", "train.=1", "backend=", "train=[1]",
                  "adapter.r=!!python/name:os.system", "data.path=\0"),
    }  # fmt: skip
    for flag, values in flags.items():
        for value in values:
            if "\0" in value:
                continue
            wanted = (
                "either" if (flag, value) in (("--set", "a="), ("--device", "cpu:x")) else "refused"
            )
            yield Case("flags", f"{flag} {value[:20]!r}", (*PLAN, flag, value), wanted=wanted)
    for flag, value in (("--max-examples", "0"), ("--max-examples", "-1"), ("--batch-size", "0"),
                        ("--batch-size", str(10**30)), ("--max-new-tokens", "0"), ("--set", "perplexity.x=1"),
                        ("--set", "x"), ("--evaluation", ""), ("--evaluation", "nothing")):  # fmt: skip
        wanted = "either" if value == str(10**30) else "refused"
        yield Case("flags", f"eval {flag} {value}", (*EVAL, flag, value), wanted=wanted)


def _number(key: str, value: str) -> str:
    if key == "train.memory" and value == "9" * 40:
        return "either"
    if value == "-1" and key == "train.max_steps":
        return "works"
    if value == "9" * 40:
        fine = ("train.learning_rate", "train.num_train_epochs", "train.weight_decay",
                "train.max_grad_norm", "adapter.lora_alpha", "data.max_length")  # fmt: skip
        return (
            "either"
            if key in fine or key.startswith(("train.", "evaluate.", "data."))
            else "refused"
        )
    if value == "-1" and key == "adapter.lora_alpha":
        return "either"
    if value == "null" and key in ("backend.group_size",):
        return "either"
    return "refused"


def _paths() -> Iterator[Case]:
    names = {
        "too long": "a" * 300,
        "too long, below a folder": "model/" + "a" * 300,
        "with an escape": "mo\x1b[31mdel",
        "a link to itself": "loop",
        "below a link to itself": "loop/model",
        "below a file": "data.jsonl/model",
        "a file": "file.txt",
        "empty": "",
        "a device": "/dev/null",
        "a named pipe": "pipe",
        "of surrogates": "mo\udcffdel",
        "~nobody": "~nobody-there/x",
    }

    def damage(folder: Path) -> None:
        (folder / "loop").symlink_to("loop")
        (folder / "broken").symlink_to("nowhere")
        (folder / "file.txt").write_text("text")
        os.mkfifo(folder / "pipe")

    for name, path in names.items():
        # below a file: it might be the id of a model on the hub, too
        wanted = "either" if name == "below a file" else "refused"
        yield Case(
            "paths", f"model {name}", ("plan", "--model", path, "--data", DATA), damage, wanted
        )
        yield Case(
            "paths",
            f"data {name}",
            ("plan", "--model", MODEL, "--data", path),
            damage,
            _path_wanted(name),
        )
        yield Case(
            "paths",
            f"output {name}",
            ("run", "--model", MODEL, "--data", DATA, "--output", path, *TRAIN[7:]),
            damage,
            _output_wanted(name),
        )
        yield Case(
            "paths",
            f"calibration {name}",
            ("plan", "--model", MODEL, "--data", DATA, "--set", f"data.calibration_path={path!r}"),
            damage,
            "either",
        )
        yield Case(
            "paths", f"quantize {name}", ("quantize", path, "--output", "out"), damage, "refused"
        )
        yield Case(
            "paths",
            f"quantize into {name}",
            ("quantize", MODEL, "--output", path),
            damage,
            _output_wanted(name),
        )
        yield Case("paths", f"eval {name}", ("eval", path), damage, "refused")
        yield Case("paths", f"merge {name}", ("merge", path, "--output", "out"), damage, "refused")
        yield Case(
            "paths",
            f"merge onto {name}",
            ("merge", RUN, "--onto", path, "--output", "out"),
            damage,
            "refused",
        )
        yield Case("paths", f"config {name}", ("plan", path), damage, "refused")
        wanted = "works" if name == "a file" else "refused"  # of text, which data may be
        yield Case("paths", f"data of eval {name}", (*EVAL[:2], "--data", path), damage, wanted)
    for command in (TRAIN, QUANTIZE, MERGE):
        yield Case(
            "paths", "output is the model", tuple("model" if a == "out" else a for a in command)
        )
        yield Case(
            "paths",
            "output is in the model",
            tuple("model/out" if a == "out" else a for a in command),
            wanted="either",
        )


def _path_wanted(name: str) -> str:
    return "either" if name in ("empty", "a file", "below a file") else "refused"


def _output_wanted(name: str) -> str:
    return (
        "either"
        if name
        in (
            "with a newline",
            "with an escape",
            "empty",
            "of surrogates",
            "a broken link",
            "~nobody",
        )
        else "refused"
    )


def _system() -> Iterator[Case]:
    for command in (TRAIN, QUANTIZE, MERGE):
        for size in (0, 100, 4096, 20_000):
            yield Case(
                "system", f"files of at most {size} bytes", command, before=limited("FSIZE", size)
            )
        for code in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EIO,
            errno.EMFILE,
        ):
            for function in ("mkdir", "replace", "rename"):
                name = f"{function}: {os.strerror(code).lower()}"
                wanted = "refused" if function == "mkdir" else "either"
                yield Case("system", name, command, before=failing(function, code), wanted=wanted)
        yield Case(
            "system", "few open files", command, before=limited("NOFILE", 24), wanted="either"
        )
