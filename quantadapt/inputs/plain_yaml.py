"""YAML as people mean it: how files and `--set` values are read, and specs written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError as YAMLError

from ..errors import ModelError, Problem, SpecError
from .documents import read_text

MAX_VALUES = 100_000
"""More than any run has; a small file whose aliases repeat each other can come to billions."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads values as people mean them: 5e-2 is a number, 010 is ten,
    12:30 and 2024-01-01 are text, and so is every key. A key that is there twice is an error (for
    PyYAML the last one wins), and so are aliases that come to more than `MAX_VALUES` values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()  # type: ignore[no-untyped-call]
        if node is not None:
            _count(node, {}, set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong("a key is a list or a mapping; it has to be text", key)
            if key.value in seen:
                raise _wrong(f"the key {key.value!r} is there twice", key)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "").lower()
        try:
            return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else int(text)
        except ValueError:  # Python reads no more than some thousand digits
            raise _wrong("this number is too long", node) from None


def _wrong(what: str, node: yaml.Node) -> YAMLError:
    return yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark)


def _count(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """Return how many values a node comes to with its aliases written out. Raises YAMLError."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise _wrong("an alias stands inside of what it is an alias for", node)
    if id(node) not in counted:
        pairs = isinstance(node, yaml.MappingNode)
        inside = [part for pair in node.value for part in pair] if pairs else node.value
        within = above | {id(node)}
        counted[id(node)] = 1 + sum(_count(part, counted, within) for part in inside)
    if counted[id(node)] > MAX_VALUES:
        raise _wrong(f"with its aliases it comes to more than {MAX_VALUES} values", node)
    return counted[id(node)]


_NUMBERS = {
    "int": (r"[-+]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_kept = ("bool", "null", "merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in _kept]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _NUMBERS.items():
    _tag, _whole = f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _whole, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {  # a tag such as !!binary or !!set makes what no key takes
    tag: made
    for tag, made in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}


class _Dumper(yaml.SafeDumper):
    """Quotes what either of the loaders would take for a number."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def to_yaml(values: Any) -> str:
    """Return JSON-ready values as YAML that `parse` reads back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


def flow(value: Any) -> str:
    """Return a JSON-ready value on one line, as it may stand in YAML that `parse` reads back."""
    text: str = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf
    )
    return text.strip()[1:-1]


def compose(text: str) -> yaml.MappingNode:
    """Return the nodes of a YAML text that holds a mapping, which know where they stand."""
    node = yaml.compose(text, _Loader)
    assert isinstance(node, yaml.MappingNode)
    return node


def parse(text: str) -> Any:
    """Return what a YAML text holds. Raises YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise YAMLError("it is nested too deeply") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises SpecError naming file and line."""
    try:
        values = parse(read_text(Path(path), fix="check the path of the YAML file"))
    except ModelError as error:
        raise SpecError(error.problems) from None
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        raise SpecError([Problem(what, where=where)]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        fix = "write keys and values, e.g. `backend: hqq`"
        raise SpecError([Problem("the file holds no mapping", fix, where=str(path))])
    return values
