"""The models of a run, one after the other, as they are measured: the base as it was, quantized,
tuned, and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Problem, SpecError
from ..exporting.manifest import MANIFEST, MERGED, adapter_in, read_manifest
from ..folders.atomic import put_back
from ..folders.metrics import MODELS
from ..inputs.likely_names import did_you_mean
from ..paths import path_problem
from ..planning.on_disk import quantization_of
from ..remote_code import trusted
from .flags import parted
from .models import open_model

if TYPE_CHECKING:
    from torch import nn

_KEEPS_BASE = ("gaussian", "eva")
"""Starts of LoRA with a name that take nothing out of the base."""


def chosen_models(path: str, wanted: Sequence[str], *, everything: bool) -> list[str]:
    """Return which models to measure, in their order.

    Args:
        path: a run folder, an adapter, or a model, which is the only one of its kind.
        wanted: names of `MODELS`, perhaps with commas between them; if empty, the one at `path`.
        everything: if `wanted` is empty, all that there are.

    Raises:
        SpecError: a name is none, or the run has no such model.
    """
    absent = _absent(path)
    there = [name for name in MODELS if name not in absent]
    names = [name.strip() for words in wanted for name in words.split(",") if name.strip()]
    if not names:
        one = "tuned" if "tuned" in there else there[0]
        return there if everything else [one]
    problems = []
    for name in names:
        if name not in MODELS:
            what, fix = f"{name!r} is no model of a run", did_you_mean(name, MODELS)
            problems.append(Problem(what, fix, "--models"))
        elif name in absent:
            fix = f"choose of {', '.join(there)}"
            problems.append(Problem(f"there is no {name} model: {absent[name]}", fix, "--models"))
    if problems:
        raise SpecError(problems)
    return [name for name in MODELS if name in names]


def _absent(path: str) -> dict[str, str]:
    """Return which models there are none of, and why."""
    if path_problem(path) or adapter_in(put_back(path)) is None:
        kind = _kind_of_checkpoint(path)
        return {name: f"{path} is no run" for name in MODELS if name != kind}
    made, absent = _manifest(path), dict[str, str]()
    base = made.get("base")
    if not base:
        absent["unquantized"] = "nothing says what the base was made from"
    elif quantization_of(base) is not None:
        absent["unquantized"] = "the base came quantized"
    start = (made.get("adapter_options") or {}).get("init_lora_weights")
    if isinstance(start, str) and start not in _KEEPS_BASE:
        absent["quantized"] = f"the adapter starts with {start}, which changed the base"
    if not (Path(path).expanduser() / MERGED / "config.json").is_file():
        absent["merged"] = "the run wrote none"
    return absent


def _manifest(path: str) -> Mapping[str, Any]:
    folder = adapter_in(put_back(path))
    assert folder is not None
    return read_manifest(folder) if (folder / MANIFEST).exists() else {}


def _kind_of_checkpoint(path: str) -> str:
    if (put_back(path) / MANIFEST).exists() and Path(path).name == MERGED:
        return "merged"
    return "unquantized" if quantization_of(path) is None else "quantized"


def opened_models(
    path: str, names: Sequence[str], device: str | None, *, force_base: bool, stream: str
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the models of `chosen_models`, loaded one after the other; each has to be let go of
    before the next is asked for."""
    from ..model.own_biases import without_adapter

    own = [name for name in names if name in ("quantized", "tuned")]
    run = adapter_in(put_back(path)) is not None
    if not run:
        yield names[0], open_model(path, device, force_base, stream)
        return
    if "unquantized" in names:
        yield "unquantized", _dense(path, device or "auto", stream)
    if own:
        model = open_model(path, device, force_base, stream)
        for name in own:
            with without_adapter(model) if name == "quantized" else nullcontext():
                yield name, model
        del model
    if "merged" in names:
        yield "merged", open_model(str(Path(path).expanduser() / MERGED), device, stream=stream)


def _dense(path: str, device: str, stream: str) -> nn.Module:
    from ..exporting.loading import as_trained
    from ..stages import quantize

    made = _manifest(path)
    which, folder = parted(stream)
    return quantize(
        made["base"],
        "none",
        device=device,
        dtype=made.get("dtype") or "auto",
        stream=as_trained(which, made.get("stream", "none"), device),  # type: ignore[arg-type]
        stream_folder=folder,
        new_modules=made.get("new_modules") or (),
        unused_modules=made.get("unused_modules") or (),
        trust_remote_code=trusted(),
    )
