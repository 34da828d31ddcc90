"""The options of adapters: the fields of their config classes, read from the source.

Importing peft takes seconds; a plan, a help text and a JSON schema only need the names, defaults
and descriptions of dataclass fields. Those are read with `ast` from the installed package, PEFT or
that of a plugin.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from ..errors import Problem
from ..records import Adapter

_SCALARS: dict[str, Any] = {
    "int": StrictInt,
    "float": StrictFloat | StrictInt,
    "bool": StrictBool,
    "str": StrictStr,
    "None": None,
}
_UNLISTED = {"init_lora_weights": ("lora_ga",)}
"""What PEFT takes besides what its annotation lists."""
INTERNAL = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "task_type", "inference_mode", "runtime_config"}  # fmt: skip
"""What PEFT notes for itself in its configs: no options."""


@dataclass(frozen=True)
class Option:
    """One field of a PEFT config: name, annotation as written, default and help text."""

    name: str
    annotation: str
    default: str
    help: str

    def accepts(self, value: Any) -> bool:
        """Say whether `value`, of plain types, fits the annotation; what is no plain type itself
        takes anything."""
        if value in _UNLISTED.get(self.name, ()):
            return True
        try:
            _validator(self.annotation).validate_python(value)
        except ValidationError:
            return False
        return True

    @property
    def choices(self) -> list[str]:
        """The texts that the annotation lists; empty where any will do."""
        tree = ast.parse(self.annotation, mode="eval")
        listed = [node for node in ast.walk(tree) if _is_literal(node)]
        nodes = [part for node in listed for part in ast.walk(node.slice)]  # type: ignore[attr-defined]
        found = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        return [*found, *_UNLISTED.get(self.name, ())]

    @property
    def takes_list(self) -> bool:
        """Whether it is a list, of which a single text is none."""
        return "list[str]" in self.annotation.lower() and not self.accepts("")


@cache
def _validator(annotation: str) -> TypeAdapter[Any]:
    return TypeAdapter(_type(ast.parse(annotation, mode="eval").body))


def _type(node: ast.expr) -> Any:
    """Return the type that an annotation names. Other classes are those of PEFT's own options in
    options, which are written as mappings."""
    if isinstance(node, ast.BinOp):
        return Union[_type(node.left), _type(node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2].lower()
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "literal":
            return Union[tuple(_literal(ast.literal_eval(part)) for part in parts)]  # noqa: UP007
        types = tuple(_type(part) for part in parts)
        if name in ("optional", "union"):
            types = (*types, None) if name == "optional" else types
            return Union[types]  # noqa: UP007
        containers = {"list": list, "dict": dict, "tuple": tuple, "set": list}
        return containers[name][types] if name in containers else Any  # type: ignore[index]
    name = ast.unparse(node).rpartition(".")[2]
    if name in _SCALARS:
        return _SCALARS[name]
    mapping = name.endswith("Config") or name.lower() == "dict"
    return dict[str, Any] if mapping else list[Any] if name.lower() == "list" else Any


def _literal(value: Any) -> Any:
    """Return the type of one value. PEFT writes `pissa_niter_[number of iters]` for a pattern."""
    text, bracket, _ = value.partition("[") if isinstance(value, str) else ("", "", "")
    if bracket:
        return Annotated[str, Field(pattern=rf"^{re.escape(text)}\d+$")]
    return Literal[value]


def _is_literal(node: ast.AST) -> bool:
    named = isinstance(node, ast.Subscript) and ast.unparse(node.value)
    return bool(named) and str(named).rpartition(".")[2] == "Literal"


def peft_options(adapter: Adapter) -> dict[str, Option]:
    """Return name -> Option of the adapter's config class; empty if it cannot be found."""
    return _options(*_place(adapter))


def option_values(adapter: Adapter, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` and the defaults of those that they leave out, as far as these are plain."""
    found: dict[str, Any] = {}
    for name, option in peft_options(adapter).items():
        with suppress(ValueError, SyntaxError):  # a call, or no default
            found[name] = ast.literal_eval(option.default)
    return found | dict(options)


def method_problems(adapter: Adapter) -> list[Problem]:
    """Return why PEFT could not make anything of the adapter's record; empty if it can."""
    known = shipped(adapter.peft_type)
    if not adapter.method:
        what = f"the installed PEFT has no method {adapter.peft_type}"
        return [] if known else [Problem(what, "pip install --upgrade peft", where="adapter")]
    found: list[tuple[str, str]] = []
    if known:
        found.append((f"PEFT has a method {adapter.peft_type} itself", "give it another peft_type"))
    for field in ("config", "method"):
        module, _, name = getattr(adapter, field).partition(":")
        if _class(module, name) is None:
            what = f"its {field}, {module}:{name}, cannot be found or read"
            found.append((what, "name the module and the class as they are imported"))
        elif field == "config" and "target_modules" not in peft_options(adapter):
            fix = "add a field: target_modules: list[str] | str | None = None"
            found.append((f"its config, {module}:{name}, has no target_modules", fix))
    return [Problem(f"adapter {adapter.name!r}: {what}", fix, "adapter") for what, fix in found]


def _place(adapter: Adapter) -> tuple[str, str]:
    """Return module and name of the adapter's config class."""
    module, _, name = adapter.config.partition(":")
    return (module, name) if adapter.method else ("peft", shipped(adapter.peft_type))


@cache
def shipped(peft_type: str) -> str:
    """Return what PEFT calls the config class of one of its own methods; "" if it has none."""
    wanted = f"{peft_type}config".replace("_", "").lower()
    module = _module("peft")
    names = _imports(module) if module else ()
    return next((name for name in names if name.lower() == wanted), "")


@cache
def _options(module: str, name: str) -> dict[str, Option]:
    """Return the fields of a config class, those of its bases first."""
    if (found := _class(module, name)) is None or found[1].name == "PeftConfig":
        return {}  # what PEFT's own base has is none of the users' business
    home, node = found
    options: dict[str, Option] = {}
    for base in node.bases:
        there, _, base_name = ast.unparse(base).rpartition(".")
        options |= _options(there or home, base_name)
    options |= {option.name: option for option in _fields(node)}
    return {n: option for n, option in options.items() if n not in INTERNAL}


# Source files, found and read without importing anything --------------------------------------


class _Module(NamedTuple):
    package: str
    tree: ast.Module


def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Return a class and the module that defines it, wherever `module` imports it from."""
    if (found := _module(module)) is None:
        return None
    for node in found.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    there, original = _imports(found).get(name, ("", ""))
    return _class(there, original) if there else None


def _imports(module: _Module) -> dict[str, tuple[str, str]]:
    """Return name -> (module, name there) of what a module imports by `from ... import`."""
    found = {}
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom):
            there = resolve_name("." * node.level + (node.module or ""), module.package)
            for alias in node.names:
                found[alias.asname or alias.name] = (there, alias.name)
    return found


@cache
def _module(name: str) -> _Module | None:
    """Return a module's syntax tree. `find_spec` would import the packages that it is in."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # a module that somebody made by hand
        spec = None
    if spec is None:
        return None
    if not rest and spec.origin:
        files = [Path(spec.origin)]
    else:
        places = [Path(root, *rest) for root in spec.submodule_search_locations or ()]
        files = [file for p in places for file in (p / "__init__.py", p.with_suffix(".py"))]
    file = next((file for file in files if file.suffix == ".py" and file.is_file()), None)
    if file is None:
        return None
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        return _Module(package, ast.parse(file.read_text(encoding="utf-8")))
    except (SyntaxError, ValueError):
        return None


# Fields ------------------------------------------------------------------------------------------


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
