"""Processors of image-text models: they turn pictures into numbers, and write tokens for them."""

from __future__ import annotations

import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingDependency, ModelError
from ..inputs.documents import read_object, reason
from ..inputs.weights import refuse_link_out
from ..remote_code import trusted
from .reading import read_config, refuse_code

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
         "chat_template.json", "chat_template.jinja")  # fmt: skip
"""What the files of a processor are called, beside those of its tokenizer."""


def processor_at(source: str) -> Any:
    """Return the processor of an image-text checkpoint; None where there is none.

    Args:
        source: folder or hub id; a tokenizer knows its own as `name_or_path`.

    Raises:
        ModelError: its files cannot be used. MissingDependency: Pillow is not installed.
    """
    return _processor_at(source, trusted()) if source and _has_one(source) else None


def copy_processor(source: str, folder: Path) -> None:
    """Copy the files of the processor of `source`, as they are, into `folder`, where they are
    missing. A tokenizer has its own way there."""
    for name in FILES if source and _has_one(source) else ():
        file = _file(source, name)
        if file is not None and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def _has_one(source: str) -> bool:
    return any(_file(source, name) is not None for name in FILES[:2])


def _file(source: str, name: str) -> Path | None:
    """Return a file of a checkpoint, or None; of a hub id that in the cache, or downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        file = folder / name
        if not file.is_file():
            return None
        refuse_link_out(file, folder)
        return file
    if folder.is_absolute() or source.startswith("."):
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository
        return None
    return Path(found) if found else None


@lru_cache(maxsize=4)
def _processor_at(source: str, trust: bool) -> Any:
    from transformers import AutoProcessor

    if find_spec("PIL") is None:
        what = "pictures are read with Pillow, which is not installed"
        fix = "pip install 'quantadapt[vision]'"
        raise MissingDependency(what, fix=fix, where=source)
    kind = _kind(source)
    reader: Any = AutoProcessor
    if kind is not None and (find_spec("torchvision") is None or not _tells_of_videos(source)):
        reader = without_videos(kind)
    try:
        found = reader.from_pretrained(source, trust_remote_code=trust)
    except Exception as error:  # what is in the files decides what transformers does
        refuse_code(source, error)
        what = f"its processor cannot be loaded: {reason(error)}"
        raise ModelError(what, fix="restore the files of the processor", where=source) from error
    if getattr(found, "image_processor", None) is None:
        return None
    if found.chat_template is None and getattr(found, "tokenizer", None) is not None:
        found.chat_template = found.tokenizer.chat_template
    return found


def _tells_of_videos(source: str) -> bool:
    """Say whether there is a file in which transformers finds how videos are read."""
    if any(_file(source, name) is not None for name in FILES[1:3]):
        return True
    file = _file(source, FILES[0])
    return file is not None and "video_processor" in read_object(file)


def _kind(source: str) -> Any:
    """Return transformers' class of the processor, as its files name it, or the model's kind."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for name in (*FILES[:2], "tokenizer_config.json"):
        file = _file(source, name)
        named = read_object(file).get("processor_class") if file else None
        if isinstance(named, str) and isinstance(kind := getattr(transformers, named, None), type):
            return kind
    if _file(source, "config.json") is None:
        return None
    kind = PROCESSOR_MAPPING.get(type(read_config(source)), None)
    return kind if isinstance(kind, type) else None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer into `folder`, and beside it the files of the processor that it came with,
    as they are."""
    tokenizer.save_pretrained(str(folder))
    copy_processor(tokenizer.name_or_path, folder)


def without_videos(kind: Any) -> Any:
    """Return a class of processor that reads no videos: transformers wants torchvision for those,
    and Pillow alone for pictures; and a checkpoint may not tell how they are read."""
    names = list(kind.get_attributes())
    if "video_processor" not in names:
        return kind
    names.remove("video_processor")

    def init(self: Any, *args: Any, chat_template: str | None = None, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False))
        kind.__init__(self, **given, chat_template=chat_template, **kwargs)

    made = {"__init__": init, "get_attributes": classmethod(lambda _: list(names))}
    return type(kind.__name__, (kind,), {**made, "__module__": kind.__module__})
