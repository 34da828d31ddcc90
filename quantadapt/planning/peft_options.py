"""The options of PEFT's config classes, read from their source.

Importing peft takes seconds; a plan, a help text and a JSON schema only need the names, defaults
and descriptions of dataclass fields. Those are read from the installed package with `ast`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}
_INTERNAL = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "task_type", "inference_mode", "runtime_config"}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One field of a PEFT config: name, annotation as written, default and help text."""

    name: str
    annotation: str
    default: str
    help: str

    def accepts(self, value: Any) -> bool:
        """Say whether `value` fits the annotation, as far as plain scalars go."""
        types = _scalar_types(self.annotation)
        if types is None:
            return True
        if isinstance(value, bool):
            return bool in types
        return isinstance(value, types)


def _scalar_types(annotation: str) -> tuple[type, ...] | None:
    """Return the types that a plain annotation allows, or None where it is not that plain."""
    text = annotation.replace("Optional[", "").replace("Union[", "").replace("]", "")
    text = text.replace("typing.", "")
    parts = [part.strip() for chunk in text.split("|") for part in chunk.split(",")]
    types: list[type] = [type(None)] if "Optional" in annotation else []
    for part in parts:
        if part == "None":
            types.append(type(None))
        elif part in _SCALARS:
            types.extend(_SCALARS[part])
        else:
            return None
    return tuple(types)


@cache
def peft_options(peft_type: str) -> dict[str, Option]:
    """Return name -> Option of the PEFT method `peft_type`, e.g. "LORA"; empty if unknown."""
    classes = _config_classes()
    name = _class_name(peft_type, classes)
    found: dict[str, Option] = {}
    for node in _lineage(name, classes):
        found |= {option.name: option for option in _fields(node)}
    return {n: option for n, option in found.items() if n not in _INTERNAL}


def _class_name(peft_type: str, classes: dict[str, ast.ClassDef]) -> str:
    wanted = f"{peft_type}config".replace("_", "").lower()
    return next((name for name in classes if name.lower() == wanted), "")


@cache
def _config_classes() -> dict[str, ast.ClassDef]:
    spec = find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0])
    files = [root / "config.py", *sorted((root / "tuners").rglob("config.py"))]
    files.append(root / "tuners" / "lycoris_utils.py")
    trees = [ast.parse(f.read_text(encoding="utf-8")) for f in files if f.exists()]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in nodes if "Config" in node.name}


def _lineage(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Yield the class and its bases, bases first."""
    if name in classes:
        for base in classes[name].bases:
            yield from _lineage(ast.unparse(base), classes)
        yield classes[name]


def _fields(node: ast.ClassDef) -> Iterator[Option]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            default, text = _default_and_help(item.value)
            yield Option(item.target.id, ast.unparse(item.annotation), default, text)


def _default_and_help(value: ast.expr | None) -> tuple[str, str]:
    if value is None:
        return "", ""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return ast.unparse(value), ""
    keywords = {k.arg: k.value for k in value.keywords}
    default = keywords.get("default", keywords.get("default_factory"))
    text = ""
    if isinstance(metadata := keywords.get("metadata"), ast.Dict):
        for key, entry in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                text = _constant_text(entry)
    return ("" if default is None else ast.unparse(default)), " ".join(text.split())


def _constant_text(node: ast.expr) -> str:
    try:
        return str(ast.literal_eval(node))
    except ValueError:
        return ""
