"""YAML that people are to read: values are changed where they stand, and all comments stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .plain_yaml import compose, flow, parse


def changed(text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return a YAML text that says `before` in such a way that it says `after`.

    A key that is new stands at the end of its mapping; one that is gone goes with its whole
    mapping, which is written anew.
    """
    for path, value in _differences(before, after):
        text = _with(text, path, value)
    if parse(text) != after:
        raise AssertionError(f"this does not say what was meant:\n{text}")
    return text


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[list[str], Any]]:
    """Return path -> value of what `after` says otherwise, each as far down as can be."""
    found: list[tuple[list[str], Any]] = []
    for key, value in after.items():
        was = before.get(key)
        if isinstance(was, Mapping) and isinstance(value, Mapping) and set(was) <= set(value):
            found += [([key, *rest], inner) for rest, inner in _differences(was, value)]
        elif key not in before or was != value:
            found.append(([key], value))
    return found


def _with(text: str, path: list[str], value: Any) -> str:
    """Return `text` with one value more, or another one."""
    node = compose(text)
    for index, key in enumerate(path):
        inner = next((child for name, child in node.value if name.value == key), None)
        if inner is None:
            for name in reversed(path[index + 1 :]):
                value = {name: value}
            return _added(text, node, f"{flow(key)}: {flow(value)}")
        node = inner
    return text[: node.start_mark.index] + flow(value) + text[_end(node) :]


def _added(text: str, mapping: yaml.MappingNode, entry: str) -> str:
    """Return `text` with an entry at the end of a mapping that is there."""
    end = _end(mapping)
    if mapping.flow_style:
        comma = ", " if mapping.value else ""
        return f"{text[: end - 1]}{comma}{entry}{text[end - 1 :]}"
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * mapping.start_mark.column
    return f"{text[:line_end]}\n{indent}{entry}{text[line_end:]}"


def _end(node: yaml.Node) -> int:
    """Return where a node ends; the mark of a block stands behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[-1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
