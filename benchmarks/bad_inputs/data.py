"""Data files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from .cases import DATA, MODEL, TRAIN, Case, as_folder, at, nested, written

_TEXT = "".join(f'{{"text": "Line {n} says that {n} and {n} are {2 * n}."}}\n' for n in range(24))


def cases() -> Iterator[Case]:
    lines = {
        "nothing": "",
        "blank lines": "\n\n\n",
        "one line": '{"text": "only one"}\n',
        "a broken line": _TEXT + '{"text": "broken\n' + _TEXT,
        "a list for a row": _TEXT + "[1, 2]\n",
        "a text for a row": _TEXT + '"text"\n',
        "null for a row": _TEXT + "null\n",
        "other columns later": _TEXT + '{"words": "a"}\n',
        "a text that is a number": _TEXT + '{"text": 3}\n',
        "a text that is NaN": _TEXT + '{"text": NaN}\n',
        "a text that is null": _TEXT + '{"text": null}\n',
        "a text that is a list": _TEXT + '{"text": ["a"]}\n',
        "a text that is an object": _TEXT + '{"text": {"a": 1}}\n',
        "a text that is empty": '{"text": ""}\n' * 24,
        "unknown columns": '{"x": "a", "y": "b"}\n' * 24,
        "no columns": "{}\n" * 24,
        "a key twice": '{"text": "a", "text": "b"}\n' * 24,
        "deep nesting": _TEXT + '{"text": ' + nested(200_000) + "}\n",
        "a long number": _TEXT + '{"text": "a", "n": ' + "9" * 6000 + "}\n",
        "a lone surrogate": _TEXT + '{"text": "\\ud800"}\n',
        "control characters": '{"text": "a\\u0000\\u001b[31mb"}\n' * 24,
        "a line of 4 MB": _TEXT + json.dumps({"text": "word " * 800_000}) + "\n",
        "messages that are text": '{"messages": "hello"}\n' * 24,
        "messages that are empty": '{"messages": []}\n' * 24,
        "messages without roles": '{"messages": [{"content": "a"}]}\n' * 24,
        "messages of an unknown role": '{"messages": [{"role": "cat", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 24,
        "messages without an answer": '{"messages": [{"role": "user", "content": "a"}]}\n' * 24,
        "a role that is a number": '{"messages": [{"role": 1, "content": "a"}]}\n' * 24,
        "content that is a number": '{"messages": [{"role": "user", "content": 1}]}\n' * 24,
        "content with pictures": '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n' * 24,
        "conversations of nothing": '{"conversations": [{}]}\n' * 24,
        "a prompt without completion": '{"prompt": "a"}\n' * 24,
        "an empty completion": '{"prompt": "a", "completion": ""}\n' * 24,
        "a completion of a number": '{"prompt": "a", "completion": 3}\n' * 24,
        "oasst that is its own parent": '{"message_id": "a", "parent_id": "a", "role": "prompter", "text": "x"}\n' * 3,
        "oasst in a circle": '{"message_id": "a", "parent_id": "b", "role": "prompter", "text": "x"}\n{"message_id": "b", "parent_id": "a", "role": "assistant", "text": "x"}\n',
        "oasst without parents": '{"message_id": "b", "parent_id": "a", "role": "assistant", "text": "x"}\n',
        "alpaca of numbers": '{"instruction": 1, "output": 2}\n' * 24,
        "chosen and rejected": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 24,
        "labels": '{"text": "a", "label": 1}\n' * 24,
    }  # fmt: skip
    fine = ("a line of 4 MB", "control characters", "labels", "a lone surrogate", "a long number",
            "oasst without parents", "messages of an unknown role")  # fmt: skip
    for name, text in lines.items():
        wanted = "either" if name in fine else "refused"
        yield Case("data.jsonl", name, TRAIN, written(DATA, text), wanted)
        yield Case(
            "data.jsonl", name, ("data", DATA, "--model", MODEL), written(DATA, text), "either"
        )
    raws = {
        "not UTF-8": b'{"text": "\xff"}\n',
        "UTF-16": _TEXT.encode("utf-16"),
        "latin-1": '{"text": "ü"}\n'.encode("latin-1") * 24,
        "zero bytes": b"\0" * 1000,
        "a zip": b"PK\x03\x04" + bytes(range(256)),
        "gzip": b"\x1f\x8b" + bytes(range(256)),
    }
    for name, raw in raws.items():
        yield Case("data.jsonl", name, TRAIN, written(DATA, raw))
    others = {
        "data.json": {"nothing": "", "an object": '{"a": 1}', "a number": "3", "open": "[{", "deep": nested(200_000),
                      "a list of numbers": "[1, 2]", "NaN": "[NaN]"},
        "data.csv": {"nothing": "", "a header alone": "text\n", "more cells": "text\na,b\n", "fewer cells": "text,b\na\n",
                     "an open quote": 'text\n"a\n', "a column twice": "text,text\na,b\n", "a NUL": "text\na\0\n",
                     "no known column": "x,y\n1,2\n"},
        "data.parquet": {"nothing": "", "text": "hello", "a magic alone": "PAR1PAR1"},
        "data.txt": {"nothing": "", "blank": "\n \n", "a NUL": "a\0b"},
        "data.xlsx": {"text": "hello"},
        "data": {"text": "hello"},
    }  # fmt: skip
    for file, texts in others.items():
        arguments = tuple(file if a == DATA else a for a in TRAIN)
        for name, text in texts.items():
            yield Case(file, name, arguments, written(file, text))
    odd = {
        "a folder without data": lambda file: as_folder(file),
        "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
        "a named pipe": lambda file: (file.unlink(), os.mkfifo(file)),
        "a link to /dev/zero": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
        "missing": lambda file: file.unlink(),
    }
    for name, damage in odd.items():
        yield Case("data.jsonl", name, TRAIN, at(DATA, damage))
    columns = {
        "columns of nothing": "{text: nothing}",
        "columns of numbers": "{text: 3}",
        "unknown columns": "{x: text}",
    }
    for name, value in columns.items():
        yield Case("data.columns", name, (*TRAIN, "--set", f"data.columns={value}"))
