"""Load what `save`, `merge` or a run wrote: adapters onto their bases, bases, merged models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..dependencies import in_turn
from ..errors import ModelError, QuantadaptError, warn
from ..folders.atomic import put_back
from ..inputs.documents import read_object
from ..machine import this_machine
from ..paths import is_local_path, path_problem
from ..planning.on_disk import quantization_of
from ..planning.streaming import Stream
from ..quantizing.state import state_of
from ..registry.blame import blaming_plugins
from ..registry.discovery import registry
from ..remote_code import trusted, trusting
from ..showing.quietly import quiet
from ..spec import Streaming
from ..stages import quantize
from .adapter_files import (
    CONFIG,
    adapter_places,
    check_adapters,
    peft_in_words,
    refuse_not_trained,
)
from .adapters import put_on
from .manifest import BASE, MANIFEST, MERGED, adapter_in, base_id_of, read_manifest
from .same_base import check_base, noted, refuse_altered

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from ..records import Adapter


class StreamedWarning(UserWarning):
    """A model is loaded whose base comes to the GPU block by block, so that answers are slow."""


@in_turn
@blaming_plugins
@quiet
def load(
    path: str | Path,
    *,
    base: str | nn.Module | None = None,
    device: str = "auto",
    stream: Literal["auto", "none", "experts", "all"] = "auto",
    stream_folder: str | None = None,
    force_base: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load what `save`, `merge` or a run wrote.

    Args:
        path: a run folder, an adapter folder, or a saved quantized or merged model.
        base: put the adapter onto this base instead of the recorded one: a path, which is quantized
            as recorded, or a model from `quantize`. Other options than recorded warn; other
            weights are refused.
        device: auto, cpu, cuda, ...
        stream: keep all quantized layers in CPU memory, or "experts", and copy them to the GPU
            block by block; auto: as the run did that trained the adapter, which is told.
        stream_folder: on a fast disk, to keep them in instead of CPU memory.
        force_base: take a base of other weights or another config.
        trust_remote_code: run Python code that comes with the model. It has to be said at each
            call; what the folder says of it does not count.

    Raises:
        ModelError: there is nothing to load, or the base is not the one that the adapter was
        trained on. PlanRefused: it needs code of its own.
        QuantadaptError: `base`, `device`, `stream` or `stream_folder` would have no effect.
    """
    if problem := path_problem(str(path)):
        raise ModelError(f"{path} is no path: {problem}", fix="check the path")
    with trusting(trust_remote_code):
        return _load(put_back(path), base, device, Streams(stream, stream_folder), force_base)


class Streams(NamedTuple):
    """What of a base is kept elsewhere than on the GPU: in CPU memory, or in a folder on a disk."""

    which: Streaming = "none"
    folder: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those of `quantize`."""
        return {"stream": self.which, "stream_folder": self.folder}


def _load(
    folder: Path, base: str | nn.Module | None, device: str, streams: Streams, force_base: bool
) -> nn.Module:
    if (adapter := adapter_in(folder)) is not None:
        _refuse_other_place(base, device, streams)
        tuned: nn.Module = _load_adapter(adapter, base, device, streams, force_base)
        return tuned
    if base is not None:
        what = f"base has no effect: {folder} holds no adapter, but a whole model"
        raise QuantadaptError(what, fix="leave base out, or pass the folder of an adapter")
    if not (folder / "config.json").exists() and (folder / MERGED).is_dir():
        folder = folder / MERGED
    whole = streams._replace(which="none") if streams.which == "auto" else streams
    model = _load_whole(folder, device, whole)
    state = state_of(model)
    manifest = read_manifest(folder)
    state.max_length, state.pooling = manifest.get("max_length"), manifest.get("pooling", "")
    state.loaded_from = str(folder.resolve())
    return model


def _refuse_other_place(base: str | nn.Module | None, device: str, streams: Streams) -> None:
    """Raise QuantadaptError where a live base lies elsewhere: it stays there."""
    if base is None or isinstance(base, str):
        return
    given = {"stream_folder": streams.folder} if streams.folder else {}
    if streams.which not in ("auto", state_of(base).stream):
        given["stream"] = streams.which
    for name, value in given.items():
        what = f"{name}={value!r} has no effect: the adapter goes onto its base as it is"
        raise QuantadaptError(what, fix=f"leave {name} out, or pass it to quantize")
    if device == "auto":
        return
    there = state_of(base).device
    if _with_index(device) != _with_index(there):
        what = f"device={device!r} has no effect: the adapter goes where its base is, to {there}"
        raise QuantadaptError(what, fix=f"leave device out, or quantize the base on {device}")


def _with_index(device: str) -> str:
    return device if ":" in device or device == "cpu" else f"{device}:0"


def _load_whole(folder: Path, device: str, streams: Streams) -> nn.Module:
    """Load a saved base or merged model."""
    quantized = "quantization_config" in _config(folder)
    manifest = read_manifest(folder)
    return _quantized(
        str(folder),
        manifest["backend"] if quantized else "none",
        device=device,
        dtype=manifest["dtype"],
        # What is quantized in the files is known from them; of dense layers it has to be said.
        skip_modules=None if quantized else manifest.get("skip_modules"),
        **streams.options,
    )


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        what = "there is neither an adapter nor a model here"
        raise ModelError(what, fix="pass a folder that a run or save wrote", where=str(folder))
    return read_object(folder / "config.json")


def _load_adapter(
    folder: Path, base: str | nn.Module | None, device: str, streams: Streams, force_base: bool
) -> PeftModel:
    from peft import LoraConfig

    from ..adapting.merge_aware import forget_merge_aware, make_merge_aware
    from ..adapting.method import config_class
    from ..facade import facades
    from ..model.own_biases import biases_of, those_trained

    manifest = read_manifest(folder)
    adapter = _adapter_of(folder, manifest)
    with peft_in_words(folder):
        config: Any = config_class(adapter).from_pretrained(str(folder))
    model = _base_for(folder, manifest, base, device, streams, force_base)
    state = state_of(model)
    check_base(state, manifest, force=force_base)
    config.inference_mode = False
    if isinstance(config, LoraConfig) and state.rewritten:
        config.init_lora_weights = True  # the base has given its part to the adapter already
    forget_merge_aware(model, state)
    before = {id(facade.vendor) for _, facade in facades(model)}
    places = adapter_places(folder, manifest["active"]).values()
    biases = biases_of(model, *(read_object(place / CONFIG).get("bias") for place in places))
    peft_model = put_on(model, folder, manifest["active"], config=config, is_trainable=True)
    # PiSSA starts again from the base as it was, and so rewrites it again.
    state.rewritten |= any(id(facade.vendor) not in before for _, facade in facades(peft_model))
    options = manifest["adapter_options"]
    state.gain_adapter(adapter, options, learnt=True, biases=those_trained(biases))
    state.begun_elsewhere = manifest["begun_elsewhere"]
    state.max_length = manifest.get("max_length")
    state.pooling = manifest.get("pooling", "")
    if manifest.get("merge_aware"):
        make_merge_aware(peft_model)
    return peft_model


def _adapter_of(folder: Path, manifest: Mapping[str, Any]) -> Adapter:
    """Return which adapter lies in a folder. Raises ModelError where its files do not fit that,
    NumbersError where a weight is NaN or infinite."""
    if manifest["adapter"] is None:
        what = f"its {MANIFEST} says of no adapter, and there is one"
        raise ModelError(what, fix="restore the file", where=str(folder))
    adapter = registry().adapter(manifest["adapter"])
    check_adapters(folder, manifest, adapter)
    refuse_not_trained(folder, manifest["active"])
    return adapter


def _base_for(
    folder: Path,
    manifest: Mapping[str, Any],
    base: str | nn.Module | None,
    device: str,
    given: Streams,
    force_base: bool,
) -> nn.Module:
    """Return the base for the adapter in a folder: `base` itself, or what it names, or the one
    beside the adapter, or the recorded checkpoint, quantized as recorded. Raises ModelError where
    there is none, or where it is not the adapter's."""
    own_base = folder.parent / BASE
    if base is None:
        _refuse_mixed(folder, manifest, own_base)
    streams = given._replace(which=as_trained(given.which, manifest["stream"], device))
    if base is None and (own_base / MANIFEST).exists():
        refuse_altered(own_base, force=force_base)
        model = load_base(own_base, device, streams)
    elif base is None or isinstance(base, str):
        _refuse_missing_base(base or manifest["base"], folder)
        model = _made_again(base or manifest["base"], manifest, device, streams)
    else:
        return base
    stream = state_of(model).stream
    if given.which == "auto" and stream != "none":
        _tell_of_streaming(stream, given.folder)
    return model


def base_of(model: PeftModel) -> nn.Module | None:
    """Return the base of `model` as it was without the adapter; None where training or the
    adapter's start has changed it, and it cannot be made again."""
    from ..model.own_biases import may_train_biases
    from .merging import bare_base

    state = state_of(model)
    if not state.rewritten and not may_train_biases(model):
        return bare_base(model)
    if not state.source or (state.backend.calibration and quantization_of(state.source) is None):
        return None
    return _made_again(state.source, state.manifest(), state.device, Streams(state.stream))


def as_trained(stream: Streaming, noted: Stream, device: str) -> Stream:
    """Return what of a base to stream, where `noted` is what was streamed while it was trained."""
    if stream != "auto":
        return stream
    there = this_machine().default_device if device == "auto" else device
    return noted if there.startswith("cuda") else "none"


def _tell_of_streaming(stream: Stream, folder: str | None) -> None:
    place = "CPU memory" if folder is None else folder
    parts = "the experts are" if stream == "experts" else "the base is"
    what = (
        f"{parts} streamed from {place}, as while it was trained: each token of an answer takes"
        " a copy of it. Where the GPU has room for it, say so: stream: none"
    )
    warn(what, StreamedWarning, stacklevel=7)


def _made_again(
    source: str, manifest: Mapping[str, Any], device: str, streams: Streams
) -> nn.Module:
    """Return the checkpoint `source`, quantized as `manifest` says."""
    return _quantized(
        source,
        manifest["backend"],
        device=device,
        dtype=manifest["dtype"],
        skip_modules=manifest["skip_modules"],
        new_modules=manifest["new_modules"],
        unused_modules=manifest["unused_modules"],
        head=manifest["head"],
        labels=manifest["labels"],
        **streams.options,
        **manifest["options"],
    )


def _quantized(source: str, backend: str, **options: Any) -> nn.Module:
    """`quantize`, with code of the checkpoint if whoever loads this trusts that."""
    return quantize(source, backend, trust_remote_code=trusted(), **options)


def _refuse_mixed(folder: Path, manifest: Mapping[str, Any], own_base: Path) -> None:
    """Raise ModelError where the base beside an adapter is not the one that it was saved with."""
    if base_id_of(own_base) == manifest["base_id"]:
        return
    what = f"the base in {own_base} is not the one that it was saved with"
    if not (own_base / MANIFEST).exists():
        what = f"its own base, which was saved with it, is not in {own_base}"
    fix = "save both again (a run: --resume), copy them together, or pass base=... to load"
    raise ModelError(what, fix=fix, where=str(folder))


def _refuse_missing_base(base: str, adapter: Path) -> None:
    if not base:
        what = "its base was a module in memory, which no folder names"
        raise ModelError(what, fix="in Python pass it to load, base=...", where=str(adapter))
    if is_local_path(base) and not Path(base).expanduser().exists():
        what = f"its base {base} is not there, seen from {Path.cwd()}"
        fix = "go to the folder in which it was trained, or in Python pass base=... to load"
        raise ModelError(what, fix=fix, where=str(adapter))


def load_base(folder: Path, device: str, streams: Streams | None = None) -> nn.Module:
    """Load what `save_base` wrote, under the name and options that it was made from."""
    manifest = read_manifest(folder)
    model = _load_whole(folder, device, streams or Streams())
    state = state_of(model)
    state.source, state.rewritten = manifest["base"], manifest.get("rewritten", False)
    state.own_base, state.base_id = True, manifest["base_id"]
    state.changed = manifest["changed"]
    model.name_or_path = manifest["base"]  # type: ignore[assignment]  # PEFT notes it
    state.fingerprint = noted(manifest)
    state.head, state.labels = manifest["head"], tuple(manifest["labels"])
    for name in ("skip_modules", "new_modules", "unused_modules", "begun_at_random"):
        setattr(state, name, tuple(manifest[name]))  # of what it was made from
    state.quantizer = state.backend.quantizer(**manifest["options"])
    return model
