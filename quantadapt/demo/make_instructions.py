"""Write the bundled instruction data set.

``python -m quantadapt.demo.make_instructions`` writes ``train.jsonl`` and ``eval.jsonl`` beside
this file: requests for a small Python function, answered in one fixed style. Everything is made
from the word lists below; choices come from SHA-256 digests, so every interpreter writes the
same bytes. The evaluation records use function names and operand pairs that no training record
uses.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Record = dict[str, str]

TRAIN_RECORDS = 1520
EVAL_RECORDS = 96
HOLD_OUT_ONE_IN = 8

VERBS = "add build call check create find format get handle load make map parse read remove"
VERBS += " replace run send set start test wait wrap write"
SUBJECTS = "address block buffer child code data date field file filename format frame group"
SUBJECTS += " handler header host info instance key line link local lock message method mode"
SUBJECTS += " module month name node path pattern point prefix process protocol request result"
SUBJECTS += " root server source state string text thread token type url user"
NUMBERS = "base count index length level max min offset pos size start time timeout value width"
LISTS = "bytes flags items lines names options values"
ELEMENTS = "char code data item key line name prefix text token value"

NAMES = [f"{verb}_{subject}" for verb in VERBS.split() for subject in SUBJECTS.split()]
NUMBER_PAIRS = list(permutations(NUMBERS.split(), 2))
MEMBER_PAIRS = [(element, items) for element in ELEMENTS.split() for items in LISTS.split()]
SINGLES = [(items,) for items in LISTS.split()]


@dataclass(frozen=True)
class Operation:
    """What a function does: the words of the request, the docstring and the expression."""

    request: str
    docstring: str
    expression: str
    operands: Sequence[tuple[str, ...]]


OPERATIONS = (
    Operation("adds {0} and {1}", "the sum of {0} and {1}", "{0} + {1}", NUMBER_PAIRS),
    Operation("subtracts {1} from {0}", "{0} minus {1}", "{0} - {1}", NUMBER_PAIRS),
    Operation("multiplies {0} by {1}", "{0} times {1}", "{0} * {1}", NUMBER_PAIRS),
    Operation("divides {0} by {1}", "{0} divided by {1}", "{0} / {1}", NUMBER_PAIRS),
    Operation(
        "finds the larger of {0} and {1}",
        "the larger of {0} and {1}",
        "max({0}, {1})",
        [pair for pair in NUMBER_PAIRS if not {"max", "min"} & set(pair)],
    ),
    Operation(
        "finds the smaller of {0} and {1}",
        "the smaller of {0} and {1}",
        "min({0}, {1})",
        [pair for pair in NUMBER_PAIRS if not {"max", "min"} & set(pair)],
    ),
    Operation(
        "tests if {0} and {1} are equal", "true if {0} equals {1}", "{0} == {1}", NUMBER_PAIRS
    ),
    Operation(
        "tests if {0} is less than {1}",
        "true if {0} is less than {1}",
        "{0} < {1}",
        NUMBER_PAIRS,
    ),
    Operation("tests if {0} is in {1}", "true if {0} is in {1}", "{0} in {1}", MEMBER_PAIRS),
    Operation(
        "removes {0} from {1}",
        "the {1} without {0}",
        "[x for x in {1} if x != {0}]",
        MEMBER_PAIRS,
    ),
    Operation("joins the {1} with {0}", "the {1} joined by {0}", "{0}.join({1})", MEMBER_PAIRS),
    Operation("counts the {0}", "the number of {0}", "len({0})", SINGLES),
    Operation("sorts the {0}", "the {0} in order", "sorted({0})", SINGLES),
    Operation("gets the first of the {0}", "the first of the {0}", "{0}[0]", SINGLES),
    Operation("gets the last of the {0}", "the last of the {0}", "{0}[-1]", SINGLES),
    Operation("reads the set of {0}", "the set of {0}", "set({0})", SINGLES),
)

REQUESTS = (
    "Write a Python function named {name} that {request}.",
    "Write the function {name}. It {request}.",
    "Create a function called {name} which {request}.",
    "Define {name}, a function that {request}.",
    "A function that {request} is needed. Name it {name}.",
)
REQUEST_WITH_INPUT = "Complete the function so that it {request}."


def digest(*key: object) -> int:
    """Return a number that depends on the key alone."""
    return int(hashlib.sha256("/".join(map(str, key)).encode()).hexdigest(), 16)


def is_held_out(thing: object) -> bool:
    """Tell whether a function name or an operand pair belongs to the evaluation records."""
    return digest("held out", thing) % HOLD_OUT_ONE_IN == 0


def choices(options: Sequence[T], held_out: bool) -> list[T]:
    """Return the options of one side of the split."""
    return [option for option in options if is_held_out(option) == held_out]


def make_record(operation: Operation, name: str, operands: tuple[str, ...], form: int) -> Record:
    """Return one record; the form picks the wording, or the variant with an input."""
    signature = f"def {name}({', '.join(operands)}):"
    request = operation.request.format(*operands)
    body = f'    """Return {operation.docstring.format(*operands)}."""\n'
    body += f"    return {operation.expression.format(*operands)}"
    with_input = form == len(REQUESTS)
    template = REQUEST_WITH_INPUT if with_input else REQUESTS[form]
    return {
        "instruction": template.format(name=name, request=request),
        "input": signature if with_input else "",
        "output": f"{signature}\n{body}",
    }


def records(held_out: bool) -> Iterator[Record]:
    """Yield distinct records of one side of the split without end, all operations in turn."""
    names = choices(NAMES, held_out)
    seen = set()
    for number in range(10**6):
        operation = OPERATIONS[number % len(OPERATIONS)]
        single = len(operation.operands[0]) == 1
        operands = operation.operands if single else choices(operation.operands, held_out)
        key = (held_out, number)
        record = make_record(
            operation,
            names[digest("name", *key) % len(names)],
            operands[digest("operands", *key) % len(operands)],
            digest("form", *key) % (len(REQUESTS) + 1),
        )
        if (identity := (record["instruction"], record["input"])) not in seen:
            seen.add(identity)
            yield record


def write_records(path: Path, count: int, held_out: bool) -> None:
    """Write the first ``count`` records of one side of the split as JSON lines."""
    chosen = zip(range(count), records(held_out), strict=False)
    text = "".join(json.dumps(record) + "\n" for _, record in chosen)
    path.write_bytes(text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write train.jsonl and eval.jsonl.")
    folder = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=folder, help="folder to write to")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    write_records(output / "train.jsonl", TRAIN_RECORDS, held_out=False)
    write_records(output / "eval.jsonl", EVAL_RECORDS, held_out=True)


if __name__ == "__main__":
    main()
