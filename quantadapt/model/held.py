"""Every tensor that a vendor's layer holds, wherever the vendor keeps it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def held_tensors(holder: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every plain tensor that `holder` holds, each once, however deep, with its name from
    there: of a module its parameters and buffers, what stands in attributes, in containers and
    records of the vendor's, and inside of tensor subclasses."""
    seen: dict[int, Any] = {}
    waiting: list[tuple[str, Any]] = [("", holder)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__"):
            yield name, value
        waiting += [(f"{name}.{key}".strip("."), part) for key, part in _parts(value)][::-1]


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return what a vendor's module, tensor, container or record holds, by names."""
    if isinstance(value, nn.Module):
        states = value._parameters, value._buffers, value._modules
        own = (
            (key, part)
            for key, part in vars(value).items()
            if not isinstance(part, nn.Module) and key[:1] != "_"
        )
        return (*(item for state in states for item in state.items()), *own)
    if isinstance(value, Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        inside = [(name, getattr(value, name)) for name in names]
        return [*inside, *vars(value).items()]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return enumerate(value)
    home = type(value).__module__.partition(".")[0]
    is_record = hasattr(value, "__dict__") and not isinstance(value, type | nn.Module)
    if is_record and home not in sys.stdlib_module_names and home not in ("torch", "quantadapt"):
        fields: dict[str, Any] = vars(value)
        return list(fields.items())
    return ()
