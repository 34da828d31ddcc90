"""Save and load: adapters as plain PEFT folders, bases and merged models as checkpoints.

Beside each lies `quantadapt.json`, which says what base it belongs to. Everything is written to a
temporary folder first and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dependencies import in_turn
from ..errors import ModelError, OutputError, warn
from ..folders.atomic import atomic_folder, put_back, refuse_occupied, refuse_overlap
from ..inputs.documents import read_object
from ..paths import is_local_path, path_problem
from ..planning.on_disk import quantization_of
from ..protocols import Exporter, Figure
from ..quantizing.state import ModelState, state_of
from ..registry.discovery import registry
from ..remote_code import trusted, trusting
from ..showing.quietly import quiet
from ..stages import quantize
from .adapter_files import check_adapters, peft_in_words, refuse_not_trained
from .adapters import put_on, save_adapters
from .manifest import ADAPTER, BASE, MANIFEST, MERGED, adapter_in, read_manifest, write_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from .tuned import Tuned


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded onto a base that it was not trained on."""


@in_turn
def save(model: nn.Module, path: str | Path, *, overwrite: bool = False, base: bool = True) -> Path:
    """Save the adapter to `path/adapter`, or, without one, the quantized base to `path`.

    The adapter is a plain PEFT folder; `quantadapt.json` in it records the base. A base that was
    calibrated here, or rewritten by PiSSA or LoftQ, cannot be made again from that alone; it is
    saved too, to `path/base`.

    Args:
        model: what `quantize`, `attach` or `load` returned.
        path: a folder, which must not be one that the model was read from.
        overwrite: replace what an earlier `save` wrote there, a base too, and never anything else.
        base: False leaves such a base out, and one that is there as it is.

    Raises:
        OutputError: the folder holds something else; it is untouched.
    """
    state, root = state_of(model), Path(path).expanduser()
    final = root / ADAPTER if state.adapter else root
    saves_base = state.adapter is not None and _has_own_base(state)
    own_base = root / BASE
    refuse_overlap(final, [state.source])
    _refuse_foreign(final)
    refuse_occupied(final, overwrite)
    if state.adapter and (own_base / MANIFEST).exists() and base:
        if own_base.is_symlink():  # whose it is, and what else reads it, is not known
            fix = "remove the link, or choose another folder"
            raise OutputError("a link is in the way", fix=fix, where=str(own_base))
        refuse_occupied(own_base, overwrite)
    if saves_base and base:
        _refuse_foreign(own_base)
    with atomic_folder(final, overwrite=overwrite) as folder:
        more = {}
        if state.adapter:
            more = {"active": save_adapters(model, folder)}
        else:
            state.quantizer.save(model, folder)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(folder))
        write_manifest(folder, state, **more)
    if saves_base and base:  # afterwards: the base alone could be made again
        save_base(model, state, own_base, overwrite=overwrite)
    stale = overwrite and not saves_base and (own_base / MANIFEST).exists()
    if state.adapter and stale and not _lies_in(state.source, own_base):
        refuse_occupied(own_base, overwrite)
        shutil.rmtree(own_base)  # of an earlier adapter: `load` would put this one onto it
    return final


def _lies_in(source: str, folder: Path) -> bool:
    """Say whether a local checkpoint is `folder` or lies in it."""
    found = Path(source).expanduser()
    return bool(source) and found.exists() and found.resolve().is_relative_to(folder.resolve())


def _has_own_base(state: ModelState) -> bool:
    """Whether the base cannot be made again from its checkpoint and options alone."""
    if state.rewritten or state.own_base or state.calibration is not None:
        return True
    calibrates = state.backend.calibration and state.quantizer.needs_data
    return bool(state.source) and calibrates and quantization_of(state.source) is None


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        fix = "choose another folder, or empty it yourself"
        raise OutputError("it holds something that save did not write", fix=fix, where=str(folder))


def save_base(
    model: nn.Module, state: ModelState, folder: Path, *, overwrite: bool = False
) -> None:
    """Save the quantized base of `model`, adapter or not; `state` is the model's."""
    from .merging import bare_base

    base = model if state.adapter is None else bare_base(model)  # type: ignore[arg-type]
    with atomic_folder(folder, overwrite=overwrite) as made:
        state.quantizer.save(base, made)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(made))
        write_manifest(made, state, rewritten=state.rewritten)


class AdapterFolder(Exporter):
    """The adapter as PEFT's own folder. A run saves it before all other exports (`save`), so this
    copies it, with a base that cannot be made again beside it."""

    @property
    def planned(self) -> str:
        return ADAPTER

    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        base = tuned.adapter.parent / BASE
        if folder != tuned.adapter:
            shutil.copytree(tuned.adapter, folder, dirs_exist_ok=True)
            if (base / MANIFEST).exists():
                with atomic_folder(folder.parent / BASE) as beside:
                    shutil.copytree(base, beside, dirs_exist_ok=True)
        sizes = (file.stat().st_size for file in folder.rglob("*.safetensors"))
        return {"size": Figure(sum(sizes) / 2**20, "MiB")}


@in_turn
@quiet
def load(
    path: str | Path,
    *,
    base: str | nn.Module | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load what `save`, `merge` or a run wrote.

    Args:
        path: a run folder, an adapter folder, or a saved quantized or merged model.
        base: put the adapter onto this base instead of the recorded one: a path, which is quantized
            as recorded, or a model from `quantize`. A base other than recorded warns.
        device: auto, cpu, cuda, ...
        trust_remote_code: run Python code that comes with the model. It has to be said at each
            call; what the folder says of it does not count.

    Raises:
        ModelError: there is nothing to load. PlanRefused: it needs code of its own.
    """
    if problem := path_problem(str(path)):
        raise ModelError(f"{path} is no path: {problem}", fix="check the path")
    with trusting(trust_remote_code):
        return _load(put_back(path), base, device)


def _load(folder: Path, base: str | nn.Module | None, device: str) -> nn.Module:
    if (adapter := adapter_in(folder)) is not None:
        tuned: nn.Module = _load_adapter(adapter, base, device)
        return tuned
    if not (folder / "config.json").exists() and (folder / MERGED).is_dir():
        folder = folder / MERGED
    model = _load_whole(folder, device)
    state = state_of(model)
    state.max_length = read_manifest(folder).get("max_length")
    state.loaded_from = str(folder.resolve())
    return model


def _load_whole(folder: Path, device: str) -> nn.Module:
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
    )


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        what = "there is neither an adapter nor a model here"
        raise ModelError(what, fix="pass a folder that a run or save wrote", where=str(folder))
    return read_object(folder / "config.json")


def _load_adapter(folder: Path, base: str | nn.Module | None, device: str) -> PeftModel:
    from peft import LoraConfig

    from ..adapting.fused import use_fused_layers
    from ..adapting.method import config_class
    from ..facade import facades

    manifest = read_manifest(folder)
    if manifest["adapter"] is None:
        what = f"its {MANIFEST} says of no adapter, and there is one"
        raise ModelError(what, fix="restore the file", where=str(folder))
    adapter = registry().adapter(manifest["adapter"])
    check_adapters(folder, manifest["active"], adapter)
    refuse_not_trained(folder, manifest["active"])
    with peft_in_words(folder):
        config: Any = config_class(adapter).from_pretrained(str(folder))
    if base is None and (folder.parent / BASE / MANIFEST).exists():
        model = load_base(folder.parent / BASE, device)
    elif base is None or isinstance(base, str):
        _refuse_missing_base(base or manifest["base"], folder)
        model = _quantized(
            base or manifest["base"],
            manifest["backend"],
            device=device,
            dtype=manifest["dtype"],
            skip_modules=manifest["skip_modules"],
            new_modules=manifest["new_modules"],
            unused_modules=manifest["unused_modules"],
            **manifest["options"],
        )
    else:
        model = base
    state = state_of(model)
    _warn_other_base(state, manifest)
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        use_fused_layers(config)
        if state.rewritten:  # the base has given its part to the adapter already
            config.init_lora_weights = True
    before = {id(facade.vendor) for _, facade in facades(model)}
    peft_model = put_on(model, folder, manifest["active"], config=config, is_trainable=True)
    # PiSSA starts again from the base as it was, and so rewrites it again.
    state.rewritten |= any(id(facade.vendor) not in before for _, facade in facades(peft_model))
    state.adapter = adapter
    state.adapter_options = dict(manifest["adapter_options"])
    state.max_length = manifest.get("max_length")
    return peft_model


def _quantized(source: str, backend: str, **options: Any) -> nn.Module:
    """`quantize`, with code of the checkpoint if whoever loads this trusts that."""
    return quantize(source, backend, trust_remote_code=trusted(), **options)


def _refuse_missing_base(base: str, adapter: Path) -> None:
    if is_local_path(base) and not Path(base).expanduser().exists():
        what = f"its base {base} is not there, seen from {Path.cwd()}"
        fix = "go to the folder in which it was trained, or in Python pass base=... to load"
        raise ModelError(what, fix=fix, where=str(adapter))


def load_base(folder: Path, device: str) -> nn.Module:
    """Load what `save_base` wrote, under the name and options that it was made from."""
    manifest = read_manifest(folder)
    model = _load_whole(folder, device)
    state = state_of(model)
    state.source, state.rewritten = manifest["base"], manifest.get("rewritten", False)
    state.own_base = True
    state.quantizer = state.backend.quantizer(**manifest["options"])
    return model


def _warn_other_base(state: ModelState, manifest: Mapping[str, Any]) -> None:
    now = state.manifest()
    differing = [
        f"{key} {manifest.get(key)!r}, now {now[key]!r}"
        for key in ("base", "backend", "options", "dtype")
        if manifest.get(key) != now[key]
    ]
    if differing:
        text = f"the adapter was trained on another base: {'; '.join(differing)}"
        warn(text, BaseMismatchWarning, stacklevel=4)
