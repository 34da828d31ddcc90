"""Write the bundled labelled examples.

``python -m quantadapt.demo.make_labelled`` writes the folders ``labelled/sequence`` and
``labelled/token`` beside this file, each with ``train.jsonl`` and ``eval.jsonl``: requests as in
``make_instructions``, with what kind of function they ask for, and their words with what each of
them is. Names and operand pairs of the evaluation examples are those that no training record uses.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .make_instructions import NAMES, OPERATIONS, REQUESTS, choices, digest, make_record

COUNTS = {"sequence": (160, 48), "token": (96, 32)}
"""Folder -> training and evaluation examples."""
KINDS = ["arithmetic"] * 4 + ["choice"] * 2 + ["test"] * 3 + ["collection"] * 7
"""What each of ``OPERATIONS`` is."""


def requests(held_out: bool) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Yield requests of one side of the split without end: text, kind, function name, operands."""
    names = choices(NAMES, held_out)
    for number in range(10**6):
        key = ("labelled", held_out, number)
        kinds = list(dict.fromkeys(KINDS))
        kind = kinds[number % len(kinds)]  # as many of each
        fitting = [one for one, is_ in zip(OPERATIONS, KINDS, strict=True) if is_ == kind]
        operation = fitting[digest("operation", *key) % len(fitting)]
        single = len(operation.operands[0]) == 1
        operands = operation.operands if single else choices(operation.operands, held_out)
        name = names[digest("name", *key) % len(names)]
        chosen = operands[digest("operands", *key) % len(operands)]
        form = digest("form", *key) % len(REQUESTS)
        yield make_record(operation, name, chosen, form)["instruction"], kind, name, chosen


def examples(folder: str, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yield the examples of one folder."""
    for text, kind, name, operands in requests(held_out):
        if folder == "sequence":
            yield {"text": text, "label": kind}
            continue
        words = re.findall(r"\w+|[^\w\s]", text)
        tags = {name: "name", **dict.fromkeys(operands, "operand")}
        yield {"tokens": words, "labels": [tags.get(word, "other") for word in words]}


def write(path: Path, folder: str, count: int, held_out: bool) -> None:
    """Write the first ``count`` examples of one side of the split as JSON lines."""
    chosen = zip(range(count), examples(folder, held_out), strict=False)
    path.write_bytes("".join(json.dumps(one) + "\n" for _, one in chosen).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Write the folders labelled/*.")
    folder = Path(__file__).resolve().parent / "labelled"
    parser.add_argument("--output", type=Path, default=folder, help="folder to write to")
    output = parser.parse_args(argv).output
    for name, (train, held_out) in COUNTS.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        write(output / name / "train.jsonl", name, train, held_out=False)
        write(output / name / "eval.jsonl", name, held_out, held_out=True)


if __name__ == "__main__":
    main()
