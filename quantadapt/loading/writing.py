"""Which model its backend is writing just now: `save_pretrained`, which asks a quantized model's
backend to write it, is called by that in turn. And quantized experts, one by one in its files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inputs.documents import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = Callable[[], dict[str, Tensor] | None]
    Split = Callable[[nn.Module, int], Sequence[nn.Module] | None]

_local = threading.local()


def written_now() -> tuple[Any, Mapping[str, Any]]:
    """Return the model that a backend is writing in this thread, and with which options of
    `save_pretrained`; None and nothing where there is none."""
    found: tuple[Any, Mapping[str, Any]] = getattr(_local, "writing", (None, {}))
    return found


@contextmanager
def being_written(model: Any, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, a backend is writing `model`; with the options that there are already if it is
    so outside, too, and none are given."""
    before = written_now()
    if options is not None or before[0] is not model:
        _local.writing = model, options or {}
    try:
        yield
    finally:
        _local.writing = before


@contextmanager
def files_holding(
    model: nn.Module, state: Callable[[], dict[str, Tensor] | None]
) -> Iterator[None]:
    """Inside, the files of `model` get what `state` returns, in place of its `state_dict`, unless
    that is None. What a caller of `save_pretrained` gave it to write is written as it is."""
    writing, options = written_now()
    given = dict(options) if writing is model else {}
    if given.get("state_dict") is None:
        given["state_dict"] = state()
    with being_written(model, given):
        yield


def experts_apart(model: nn.Module, split: Split) -> AbstractContextManager[None]:
    """Inside, `model` is written with its quantized stacks taken apart, if the checkpoints of its
    kind hold experts one by one: so others read it.

    Args:
        model: with or without facades.
        split: of a vendor's module and a number, makes as many layers of its rows, whose tensors
            are named as in files; or None, where it cannot.
    """
    return files_holding(model, lambda: _apart(model, split))


def name_bfloat16(folder: Path) -> None:
    """Have the config in `folder` name bfloat16 in place of another dtype, which is what a format's
    own library unpacks its weights to, whatever all else is in: transformers, which reads a model
    in the dtype that its config names, would fail at the first product."""
    file = folder / "config.json"
    text = json.dumps(_in_bfloat16(read_object(file)), indent=2, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def _in_bfloat16(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config, and those of its parts, with that dtype."""
    made = {k: _in_bfloat16(v) if isinstance(v, dict) else v for k, v in values.items()}
    return made | ({"dtype": "bfloat16"} if made.get("dtype") in ("float32", "float16") else {})


def _apart(model: Any, split: Split) -> dict[str, Tensor] | None:
    """Return what is written of a model; None where no stack is taken apart."""
    from ..model.experts import stacks_of
    from .packed import layers_by_expert

    state: dict[str, Tensor] = {}
    gone: tuple[str, ...] = ()
    for module in model.modules():
        for key, stack in stacks_of(module).items():
            names, vendor = layers_by_expert(model, stack), module.get_submodule(key)
            layers = split(getattr(vendor, "vendor", vendor), len(names)) if names else None
            for name, layer in zip(names, layers or (), strict=bool(layers)):
                state |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
            gone += (f"{stack.module}.",) * bool(layers)
    if not gone:
        return None
    return {n: t for n, t in model.state_dict().items() if not n.startswith(gone)} | state
