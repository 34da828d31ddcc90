"""Write the bundled pairs of a right and a wrong answer.

``python -m quantadapt.demo.make_preferences`` writes ``preferences/train.jsonl`` and
``preferences/eval.jsonl`` beside this file. The requests are those of ``make_instructions``, in the
layout that the instruction data has; the rejected answer does another operation on the same
operands. Names and operand pairs of the evaluation pairs are those that no training record uses.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .make_instructions import (
    NAMES,
    OPERATIONS,
    REQUESTS,
    Operation,
    Record,
    choices,
    digest,
    make_record,
)

TRAIN_PAIRS = 128
EVAL_PAIRS = 32
PROMPT = "### Instruction:\n{}\n\n### Response:\n"


def others(operation: Operation) -> list[Operation]:
    """Return the operations that take the same operands."""
    return [o for o in OPERATIONS if o.operands == operation.operands and o is not operation]


def pairs(held_out: bool) -> Iterator[Record]:
    """Yield pairs of one side of the split without end, all operations in turn."""
    names = choices(NAMES, held_out)
    for number in range(10**6):
        operation = OPERATIONS[number % len(OPERATIONS)]
        key = ("preference", held_out, number)
        single = len(operation.operands[0]) == 1
        operands = operation.operands if single else choices(operation.operands, held_out)
        wrong = others(operation)
        made = [
            make_record(
                answer,
                names[digest("name", *key) % len(names)],
                operands[digest("operands", *key) % len(operands)],
                digest("form", *key) % len(REQUESTS),
            )
            for answer in (operation, wrong[digest("wrong", *key) % len(wrong)])
        ]
        yield {
            "prompt": PROMPT.format(made[0]["instruction"]),
            "chosen": made[0]["output"],
            "rejected": made[1]["output"],
        }


def write_pairs(path: Path, count: int, held_out: bool) -> None:
    """Write the first ``count`` pairs of one side of the split as JSON lines."""
    chosen = zip(range(count), pairs(held_out), strict=False)
    text = "".join(json.dumps(record) + "\n" for _, record in chosen)
    path.write_bytes(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write preferences/train.jsonl and eval.jsonl.")
    folder = Path(__file__).resolve().parent / "preferences"
    parser.add_argument("--output", type=Path, default=folder, help="folder to write to")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    write_pairs(output / "train.jsonl", TRAIN_PAIRS, held_out=False)
    write_pairs(output / "eval.jsonl", EVAL_PAIRS, held_out=True)


if __name__ == "__main__":
    main()
