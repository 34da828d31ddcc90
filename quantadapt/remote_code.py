"""Code that a checkpoint brings along: it runs only where `trust_remote_code` says so.

A spec, a flag or an argument says so, for one call; nothing that lies in a folder can. What reads a
checkpoint asks `trusted()` and hands the answer to transformers, which then never asks on stdin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from .errors import ModelError, Problem
from .inputs.documents import read_object
from .paths import local_file, path_problem

FIX = (
    "read that code, and where you trust it say so: trust_remote_code: true in the spec, "
    "--trust-remote-code, or trust_remote_code=True"
)
Function = TypeVar("Function", bound=Callable[..., Any])

_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Inside, and in this thread, code of checkpoints runs if `trust`."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def as_the_spec_says(function: Function) -> Function:
    """Let a function whose first argument is a spec or a plan run code of checkpoints if that spec
    says so."""

    @wraps(function)
    def under(said: Any, *args: Any, **kwargs: Any) -> Any:
        with trusting(getattr(said, "spec", said).trust_remote_code):
            return function(said, *args, **kwargs)

    return under  # type: ignore[return-value]


def trusted() -> bool:
    """Say whether code of checkpoints may run here and now."""
    return _trusted.get()


def refusal(source: str, what: str = "the model brings code of its own along") -> Problem:
    """Return the problem of a checkpoint whose code would have to run."""
    return Problem(f"{what}, which is not run unless asked for", FIX, where=source)


def code_problems(source: str) -> list[Problem]:
    """Return why a checkpoint cannot be read without code of its own; empty where it can, or where
    that code may run.

    Looks at local files and the hub's cache alone, and imports nothing.
    """
    if trusted():
        return []
    return [
        refusal(source, f"{file} wants to run {name}") for file, name, own in _code(source) if own
    ]


def code_notes(source: str) -> list[str]:
    """Return sentences about code that a checkpoint names, and that is run or is not needed."""
    found = _code(source)
    if not found:
        return []
    if trusted():
        return ["code that comes with the model is run, as trust_remote_code says"]
    if any(own for _, _, own in found):
        return []
    return ["code that comes with the model is not run: transformers has this model itself"]


def _code(source: str) -> list[tuple[str, str, bool]]:
    """Return (file, what it names, whether transformers has nothing of its own for it)."""
    config, tokenizer = _read(source, "config.json"), _read(source, "tokenizer_config.json")
    found: list[tuple[str, str, bool]] = []
    if named := _names(config.get("auto_map")):
        own = not _known("model", str(config.get("model_type")))
        found.append(("config.json", named, own))
    if named := _names(tokenizer.get("auto_map")):
        kind = tokenizer.get("tokenizer_class") or config.get("tokenizer_class")
        own = not _known("tokenizer", str(kind).removesuffix("Fast"))
        found.append(("tokenizer_config.json", named, own))
    for value in (config.get(key) for key in _KERNELS):
        names = value.values() if isinstance(value, Mapping) else [value]
        hub = [name for name in names if isinstance(name, str) and "/" in name]  # a hub id
        found += [("config.json", f"the kernels of {name}", True) for name in hub]
    return found


_KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)


def _names(auto_map: Any) -> str:
    """Return the classes that an `auto_map` names."""
    values = list(auto_map.values()) if isinstance(auto_map, Mapping) else [auto_map]
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list | tuple) else [value]
    return ", ".join(dict.fromkeys(str(value) for value in flat if value))


def _read(source: str, name: str) -> dict[str, Any]:
    file = None if path_problem(source) else local_file(source, name)
    try:
        return read_object(file) if file else {}
    except ModelError:  # of which reading it tells
        return {}


_TABLES = {
    "model": ("auto_mappings.py", "configuration_auto.py"),
    "tokenizer": ("tokenization_auto.py",),
}
_ANY_TOKENIZER = {"PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"}


def _known(kind: str, name: str) -> bool:
    """Say whether transformers has a model type, or a class of tokenizers, of that name."""
    return (kind == "tokenizer" and name in _ANY_TOKENIZER) or f'"{name}"' in _table(kind)


@cache
def _table(kind: str) -> str:
    """Return the source of the tables of transformers that name what it has: importing it takes
    seconds."""
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    if not places:
        return ""
    files = [Path(places[0]) / "models" / "auto" / name for name in _TABLES[kind]]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
