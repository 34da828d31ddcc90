"""From rows of any format to examples of three shapes: text, prompt and completion, or a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ..inputs.likely_names import did_you_mean
from ..spec import DataSpec
from .files import FORMATS, RECOGNIZED, Row, kind_of
from .pictures import COLUMNS, pictures_in, placed
from .report import DataReport, FileReport

Shape = Literal["text", "prompt-completion", "messages"]

OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "functions", *COLUMNS),
    "sharegpt": ("system", "tools", *COLUMNS),
    "oasst": ("rank", "deleted"),
    "alpaca": ("input",),
    "dolly": ("context",),
    "prompt-completion": ("tools", *COLUMNS),
}
"""Format -> the columns that it takes if they are there."""
_OTHER_TASKS = {
    ("chosen", "rejected"): "pairs of a better and a worse answer, as for DPO",
    ("label",): "examples with a label, as for a classifier or KTO",
    ("labels",): "examples with labels, as for a classifier",
}
"""Columns of data that are for another task than to learn text."""


@dataclass(frozen=True)
class Example(Row):
    """A row in one of three shapes: its values hold `text`; `prompt` and `completion`; or
    `messages` and, perhaps, `tools`. The row's other columns are there, too."""

    shape: Shape = "text"


def examples(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[Example]:
    """Yield what the rows hold, file by file, and count rows in `report`.

    Raises:
        DataError: no format is known for the columns, or a row is not as its format has it.
    """
    for file, group in groupby(rows, key=lambda row: row.file):
        found, columns = report.of(file), {str(k): v for k, v in spec.columns.items()}
        ours = named(group, columns, found)
        first = next(ours)
        found.format = spec.format if spec.format != "auto" else format_of(first, columns)
        known = {*FORMATS[found.format], *OPTIONAL.get(found.format, ())}
        told = telling_unused(chain([first], ours), known, found)
        for example in _MAKERS[found.format](told, found):
            yield _with_pictures(example, spec)


def _with_pictures(example: Example, spec: DataSpec) -> Example:
    """Return an example whose chat holds its pictures where they stand, see `pictures.placed`. A
    prompt with pictures becomes a chat."""
    values, where = example.values, example.where
    given = [v for name in COLUMNS for v in _in_column(values.get(name), name, where)]
    turns: Any = None
    if example.shape == "messages":
        turns = from_json(values.get("messages"), "'messages'", where)
    elif given and example.shape == "prompt-completion":
        asked = {"role": "user", "content": values["prompt"]}
        turns = [asked, {"role": "assistant", "content": values["completion"]}]
    if not isinstance(turns, list):
        return example
    root = Path(spec.image_folder or Path(example.file).parent).expanduser()
    found = placed(turns, given, root=root, most=spec.max_pixels or 0, where=where)
    if found is turns:
        return example
    return replace(example, values={**values, "messages": found}, shape="messages")


def _in_column(value: Any, name: str, where: str) -> list[Any]:
    """Return the pictures in a column: one, several, or in a CSV file a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = from_json(value, repr(name), where)
    return pictures_in(value)


def named(rows: Iterable[Row], columns: Mapping[str, str], report: FileReport) -> Iterator[Row]:
    """Yield the rows under our names for their columns, and count them."""
    theirs = set(columns.values())
    for row in rows:
        report.rows += 1
        values = {k: v for k, v in row.values.items() if k not in theirs}
        values |= {ours: row.values[_found(name, row)] for ours, name in columns.items()}
        yield Row(values, row.where)


def telling_unused(
    rows: Iterable[Row], known: Collection[str], report: FileReport
) -> Iterator[Row]:
    """Yield the rows, and note in the report what columns they have that are not `known`; some may
    have one that the first has not."""
    for row in rows:
        for name in row.values:
            if name not in known and str(name) not in report.unused:
                report.unused.append(str(name))
        yield row


def _found(column: str, row: Row) -> str:
    if column not in row.values:
        names = [str(name) for name in row.values]
        what = f"data.columns names {column!r}, which is not there, found {listed(names)}"
        raise DataError(what, fix=did_you_mean(column, names), where=row.where)
    return column


def format_of(row: Row, mapping: Mapping[str, str] | None = None) -> str:
    """Return the format whose columns `row` has; one of those named in `mapping` goes first.

    Raises:
        DataError: none fits, or the data look as if they were for another task.
    """
    mapping = mapping or {}
    fitting = [name for name, needed in FORMATS.items() if all(c in row.values for c in needed)]
    fitting.sort(key=lambda name: not any(column in mapping for column in FORMATS[name]))
    prompt = row.values.get("prompt")
    if "completion" not in row.values and isinstance(prompt, dict) and "replies" in prompt:
        return "oasst"
    if not mapping and "oasst" not in fitting:
        _refuse_other_tasks(row, fitting)
    if fitting:
        return fitting[0]
    fix = f"name yours in data.columns, e.g. {{prompt: question, completion: answer}}; {RECOGNIZED}"
    what = f"no known columns, found {listed(row.values)}"
    raise DataError(what, fix=fix, where=row.where)


def _refuse_other_tasks(row: Row, fitting: Sequence[str]) -> None:
    for columns, what in _OTHER_TASKS.items():
        if not all(column in row.values for column in columns):
            continue
        learns = {"chosen": "dpo", "label": "classify", "labels": "classify-tokens"}[columns[0]]
        way = f"set objective: {learns}{' or kto' if columns == ('label',) else ''}; "
        anyway = "to learn text all the same, say which columns hold it, e.g. data.columns: "
        example = "{prompt: prompt, completion: chosen}" if len(columns) > 1 else "{text: text}"
        if fitting and len(columns) == 1:
            anyway, example = "to learn the text all the same, set data.format: ", fitting[0]
        found = f"the columns {listed(columns)} belong to {what}, which this does not learn"
        found = found if len(columns) > 1 else found.replace("the columns", "the column", 1)
        raise DataError(found, fix=f"{way}{anyway}{example}", where=row.where)


def listed(names: Iterable[Any]) -> str:
    """Return names of columns as they stand in messages."""
    return ", ".join(map(repr, names)) or "none"


def text_in(row: Row, column: str) -> str:
    """Return the text in a column. Raises DataError where it is missing or something else."""
    if column not in row.values:
        fix = "every example needs the same columns; set data.format if they were misread"
        what = f"the column {column!r} is missing, found {listed(row.values)}"
        raise DataError(what, fix=fix, where=row.where)
    return checked_text(row.values[column], repr(column), row.where)


MAX_CHARACTERS = 2**24
"""Longer texts are no examples but files that were not taken apart."""


def checked_text(value: Any, name: str, where: str) -> str:
    """Return `value` if it is text that can be tokenized, else raise DataError."""
    if not isinstance(value, str):
        fix = "write text in double quotes, or leave the example out"
        raise DataError(f"{name} is {kind_of(value)}, expected text", fix=fix, where=where)
    if len(value) > MAX_CHARACTERS:
        fix = "take it apart into examples"
        what = f"{name} holds {len(value):,} characters, more than {MAX_CHARACTERS:,}"
        raise DataError(what, fix=fix, where=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half a surrogate pair", where=where) from None
    return value


def from_json(value: Any, name: str, where: str) -> Any:
    """Return `value`, or what it says where it is JSON in a text. Raises DataError where it cannot
    be written as JSON again: templates do so."""
    try:
        made = json.loads(value) if isinstance(value, str) else value
        json.dumps(made, default=str)
        return made
    except (ValueError, RecursionError) as error:
        fix = "write a list or an object, or the JSON of one"
        what = f"{name} cannot be read as JSON: {error}"
        raise DataError(what, fix=fix, where=where) from None


# What a format makes of the rows of a file ------------------------------------------------------

_Maker = Callable[[Iterable[Row], FileReport], Iterator[Example]]


def _example(row: Row, shape: Shape, **values: Any) -> Example:
    return Example({**row.values, **values}, row.where, shape)


def _text(rows: Iterable[Row], _: FileReport) -> Iterator[Example]:
    for row in rows:
        yield _example(row, "text", text=text_in(row, "text"))


def _prompt_completion(rows: Iterable[Row], _: FileReport) -> Iterator[Example]:
    """Prompt and completion are texts, or both are lists of turns."""
    for row in rows:
        prompt, completion = row.values.get("prompt"), row.values.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            yield chat(row, prompt, completion)
        else:
            yield pair(row, text_in(row, "prompt"), text_in(row, "completion"))


def pair(row: Row, prompt: str, completion: str) -> Example:
    """Return an example of a prompt and its completion."""
    return _example(row, "prompt-completion", prompt=prompt, completion=completion)


def chat(row: Row, prompt: Sequence[Any], completion: Sequence[Any]) -> Example:
    """Return an example of the turns of a chat, of which those of the prompt are not learnt."""
    given = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
    return _example(row, "messages", messages=[*given, *completion])


def _instructions(given: str, answer: str) -> _Maker:
    """Return the maker for an instruction, perhaps with an input `given`, and an `answer`."""

    def make(rows: Iterable[Row], _: FileReport) -> Iterator[Example]:
        for row in rows:
            more = text_in(row, given) if row.values.get(given) is not None else ""
            yield pair(row, _instruction(text_in(row, "instruction"), more), text_in(row, answer))

    return make


def _instruction(instruction: str, given: str) -> str:
    head = f"### Instruction:\n{instruction}\n\n"
    return f"{head}### Input:\n{given}\n\n### Response:\n" if given else f"{head}### Response:\n"


def _self_instruct(rows: Iterable[Row], report: FileReport) -> Iterator[Example]:
    """Every instance of an instruction is an example."""
    for row in rows:
        instances = from_json(row.values.get("instances"), "'instances'", row.where)
        if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
            what = "'instances' is missing or no list of objects"
            fix = 'write [{"input": "...", "output": "..."}]'
            raise DataError(what, fix=fix, where=row.where)
        if not instances:
            report.dropped["with no instance"] += 1
        for values in instances:
            made = Row({**row.values, **values}, row.where)
            yield from _instructions("input", "output")([made], report)


def _messages(rows: Iterable[Row], _: FileReport) -> Iterator[Example]:
    for row in rows:
        tools = row.values.get("tools") or row.values.get("functions")
        yield _example(row, "messages", tools=tools)


_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **{"observation": "tool", "tool": "tool", "system": "system", "assistant": "assistant"},
}


def _sharegpt(rows: Iterable[Row], _: FileReport) -> Iterator[Example]:
    for row in rows:
        turns = row.values.get("conversations")
        if not isinstance(turns, list):
            fix = 'write [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]'
            raise DataError("'conversations' is no list of turns", fix=fix, where=row.where)
        made = [_sharegpt_turn(turn, number, row.where) for number, turn in enumerate(turns, 1)]
        if system := row.values.get("system"):
            made.insert(0, {"role": "system", "content": system})
        tools = row.values.get("tools")
        yield _example(row, "messages", messages=made, tools=tools)


def _sharegpt_turn(turn: Any, number: int, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    more = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = from_json(turn.get("value"), f"the call in turn {number}", where)
        calls = calls if isinstance(calls, list) else [calls]
        made = [{"type": "function", "function": call} for call in calls]
        return {**more, "role": "assistant", "content": "", "tool_calls": made}
    role = _SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        what = f"turn {number} is from {turn['from']!r}"
        fix = f"use one of {', '.join((*_SHAREGPT, 'function_call'))}"
        raise DataError(what, fix=fix, where=where)
    return {**more, "role": role, "content": turn.get("value")}


def _oasst(rows: Iterable[Row], report: FileReport) -> Iterator[Example]:
    """Every path from a root to a leaf is a chat.

    Of replies that people have ranked only the best goes on; of others all do. A reply that
    several paths share is learnt in the first of them alone.
    """
    messages, replies = _tree(rows, report)
    seen: set[str] = set()
    waiting, below = list(reversed(replies.get("", []))), list[str]()
    reached = 0
    while waiting:
        name, reached = waiting.pop(), reached + 1
        answers = replies.get(name, [])
        following = _best(answers, messages)
        waiting += reversed(following)
        below += set(answers) - set(following)
        if not following:
            path = _path(name, messages)
            turns = [_oasst_turn(row, name in seen) for name, row in path.items()]
            yield _example(next(iter(path.values())), "messages", messages=turns)
            seen.update(path)
    lower = 0
    while below:
        lower += 1
        below += replies.get(below.pop(), [])
    for counts, what, count in (
        (report.remarks, "messages are not used: people ranked another reply above", lower),
        (report.dropped, "that answer one that is not there", len(messages) - reached - lower),
    ):
        counts.update({what: count} if count else {})


def _tree(rows: Iterable[Row], report: FileReport) -> tuple[dict[str, Row], dict[str, list[str]]]:
    """Return the messages and the replies to each, by message_id; roots reply to an empty one."""
    messages: dict[str, Row] = {}
    replies: dict[str, list[str]] = {}
    for row in _flat(rows):
        name = text_in(row, "message_id")
        parent = text_in(row, "parent_id") if row.values.get("parent_id") is not None else ""
        if name in messages:
            what = f"the message_id {name!r} is there twice, first in {messages[name].where}"
            raise DataError(what, where=row.where)
        if row.values.get("deleted") is True:
            report.remarks["messages are not used: they are marked as deleted"] += 1
            continue
        messages[name] = row
        replies.setdefault(parent, []).append(name)
    return messages, replies


def _path(leaf: str, messages: Mapping[str, Row]) -> dict[str, Row]:
    """Return the messages from the root to `leaf`."""
    names, name = [], leaf
    while name:
        names.append(name)
        name = messages[name].values.get("parent_id") or ""
    return {name: messages[name] for name in reversed(names)}


def _best(names: list[str], messages: Mapping[str, Row]) -> list[str]:
    """Return the reply ranked best, or all where none is ranked."""
    ranks = {name: messages[name].values.get("rank") for name in names}
    ranked = {name: rank for name, rank in ranks.items() if isinstance(rank, int | float)}
    return [min(ranked, key=lambda name: ranked[name])] if ranked else names


def _oasst_turn(row: Row, seen: bool) -> dict[str, Any]:
    role = row.values.get("role")
    role = {"prompter": "user"}.get(role, role) if isinstance(role, str) else role
    turn = {"role": role, "content": text_in(row, "text")}
    return {**turn, "weight": 0} if seen and role == "assistant" else turn


def _flat(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield messages one by one, also those of trees: `{prompt: {..., replies: [...]}}`."""
    for row in rows:
        prompt = row.values.get("prompt")
        if not isinstance(prompt, dict):
            yield row
            continue
        waiting: list[tuple[Any, str | None]] = [(prompt, None)]
        while waiting:
            message, parent = waiting.pop()
            if not isinstance(message, dict):
                raise DataError("a reply is no object", where=row.where)
            name = message.get("message_id")
            yield Row({**message, "parent_id": parent}, row.where)
            replies = message.get("replies") or []
            if not isinstance(replies, list):
                raise DataError("'replies' is no list", where=row.where)
            waiting += [(reply, name) for reply in reversed(replies)]


_MAKERS: dict[str, _Maker] = {
    "text": _text,
    "prompt-completion": _prompt_completion,
    "alpaca": _instructions("input", "output"),
    "dolly": _instructions("context", "response"),
    "self-instruct": _self_instruct,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "oasst": _oasst,
}
