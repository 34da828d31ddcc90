"""An adapter folder, looked at before PEFT reads it: its config, and whether its weights are
numbers."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ModelError, QuantadaptError
from ..inputs.documents import odd_numbers, read_object, reason, shown
from ..inputs.patterns import pattern_problems
from ..inputs.weights import file_in, read_header, refuse_link_out, refuse_pickles
from ..paths import ADAPTER_CONFIG
from ..planning.peft_options import INTERNAL, Option, peft_options
from ..records import Adapter

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
_NEEDED, _RANKS = ("r", "target_modules"), ("r", "init_r", "target_r")
_AGAIN = "restore it from where you have the folder from"


def adapter_places(folder: Path, active: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder of the saved adapters called `active`: the first lies in `folder`
    itself. Raises ModelError where a link leads out of it."""
    first, *others = active
    return {first: folder} | {name: file_in(folder, name) for name in others}


def refuse_several(active: Sequence[str], who: str) -> None:
    """Raise ModelError where adapters work together, of which `who` takes one."""
    if len(active) > 1:
        what = f"{len(active)} adapters are active, and {who} one"
        raise ModelError(what, fix="set one of them active, or merge them")


def configs_to_note(folder: Path, active: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return name -> what the configs in `folder` say of the adapters called `active`, but for what
    PEFT notes for itself."""
    configs = {
        name: read_object(at / CONFIG) for name, at in adapter_places(folder, active).items()
    }
    return {
        name: {key: value for key, value in config.items() if key not in INTERNAL}
        for name, config in configs.items()
    }


def copy_files(
    source: Path,
    target: Path,
    *,
    leave_out: Container[str] = (),
    copy: Callable[[Path, Path], object] = shutil.copy2,
) -> None:
    """Copy the files below a folder that others may have made.

    Args:
        leave_out: names of files that are not.
        copy: copies one file.

    Raises:
        ModelError: one is a link that leads out of it, whose contents are not meant to be handed
            on, or is no file, as a pipe, which may never end.
    """
    for root, folders, names in os.walk(source):
        above = Path(root)
        for name in (*folders, *names):
            refuse_link_out(above / name, source)
        into = target / above.relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name in leave_out:
                continue
            if not (above / name).is_file():
                what = f"{name} is no file that could be copied"
                raise ModelError(what, fix="remove it", where=root)
            copy(above / name, into / name)


def check_adapters(folder: Path, manifest: Mapping[str, Any], adapter: Adapter) -> None:
    """Look at the files of the active adapters, trained as `adapter`, in `folder`. No torch, no
    weights read.

    Args:
        manifest: what `read_manifest` returned for `folder`.

    Raises:
        ModelError: a link leads out of the folder; the config is that of another method, is not the
            one that was saved, has values that PEFT has no use for, or patterns that take for ever;
            or the weights are pickles or damaged.
    """
    for name, place in adapter_places(folder, manifest["active"]).items():
        _check_adapter(place, adapter, manifest["adapter_config"].get(name, {}))


def _check_adapter(folder: Path, adapter: Adapter, noted: Mapping[str, Any]) -> None:
    config = read_object(file_in(folder, CONFIG), fix=_AGAIN)
    for file in sorted(file for file in folder.iterdir() if file.is_symlink()):
        refuse_link_out(file, folder)  # the tokenizer's as well
    where = str(folder / CONFIG)
    if config.get("peft_type") != adapter.peft_type:
        what = f"its peft_type is {shown(config.get('peft_type'))}, and {adapter.name} was trained"
        raise ModelError(f"{what}, which is {adapter.peft_type}", fix=_AGAIN, where=where)
    known = peft_options(adapter)
    wrong = [
        f"{name} is {shown(value)}, not of type {known[name].annotation}"
        for name, value in config.items()
        if name in known and not _fits(known[name], value)
    ]
    wrong += [f"{name} is missing" for name in _NEEDED if name in known.keys() - config]
    if not _names_layers(targets := config.get("target_modules", "")):
        wrong.append(f"target_modules is {shown(targets)}, which names no layers")
    wrong += [f"{name} is no rank" for name in _RANKS if _is_no_rank(config, name)]
    wrong += [f"{name} is no finite number" for name in odd_numbers(config, finite=True)]
    wrong += [problem.what for problem in pattern_problems(config)]
    wrong = wrong or _not_as_saved(config, noted)
    if wrong:
        raise ModelError(f"it cannot be used: {'; '.join(wrong)}", fix=_AGAIN, where=where)
    refuse_pickles(folder, WEIGHTS)
    if not read_header(file_in(folder, WEIGHTS)):
        raise ModelError("it holds no tensors", fix=_AGAIN, where=str(folder / WEIGHTS))


def _not_as_saved(config: Mapping[str, Any], noted: Mapping[str, Any]) -> list[str]:
    """Return where a config differs from what was noted as it was saved. Other values go with the
    same weights, alpha for one, and another model comes of it."""
    return [
        f"{name} is {shown(config.get(name))}, and the adapter was saved with {shown(value)}"
        for name, value in noted.items()
        if _in_order(config.get(name)) != _in_order(value)
    ]


def _in_order(value: Any) -> Any:
    """Return a list of names in one order: PEFT writes sets as they come."""
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return sorted(value) if names else value


def _fits(option: Option, value: Any) -> bool:
    try:
        if ast.literal_eval(option.default) == value:
            return True  # not every default of PEFT is of the type that it is said to have
    except (ValueError, SyntaxError):
        pass
    return option.accepts(value)


def _names_layers(targets: Any) -> bool:
    """Say whether it is a pattern, or a list of names. Saving writes what was resolved."""
    names = targets if isinstance(targets, list) else [targets]
    return bool(names) and all(isinstance(name, str) for name in names)


def _is_no_rank(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    return isinstance(value, int) and (isinstance(value, bool) or not 0 <= value <= 2**16)


def refuse_not_trained(folder: Path, active: Sequence[str]) -> None:
    """Raise NumbersError where a weight of the adapters called `active` is NaN or infinite, naming
    the tensor."""
    from safetensors import safe_open

    from ..model.numbers import refuse_not_numbers

    fix = "train it again, with a lower learning rate"
    for place in adapter_places(folder, active).values():
        with safe_open(place / WEIGHTS, framework="pt") as opened:
            named = ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            refuse_not_numbers(named, where=str(place / WEIGHTS), fix=fix)


@contextmanager
def peft_in_words(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises about the files in `folder` into a ModelError."""
    try:
        yield
    except (QuantadaptError, MemoryError):
        raise
    except Exception as error:  # what is in the files decides what PEFT does
        what = f"the adapter does not fit this base, or is damaged: {reason(error)}"
        fix = "pass the base that it was trained on, and look whether its files are whole"
        raise ModelError(what, fix=fix, where=str(folder)) from error
