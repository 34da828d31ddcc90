"""Names of files, and what a name that a user gives can mean: a path or a hub id."""

from __future__ import annotations

import errno
import os
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = "quantadapt.json"
"""What lies beside all that this package writes of a model."""
BASE = "base"
"""The folder of a base, beside that of its adapter."""
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
"""Of the files that training data are read from."""
_LONGEST_NAME = 255  # bytes, of most file systems


def is_local_path(source: str) -> bool:
    """Say whether `source` can only mean a file or folder, not a hub id (`owner/name`)."""
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in DATA_ENDINGS
    )


def path_problem(source: str) -> str:
    """Return why no file or folder can have that name; empty if one can."""
    if not source.strip():
        return "it is empty"
    if odd := sorted({sign for sign in source if not sign.isprintable()}):
        return f"it holds {odd[0]!r}, which is no sign of a name"
    if os.path.expanduser(source).startswith("~"):
        return "nobody here has that home folder"
    path = Path(source)
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"a part of it is longer than {_LONGEST_NAME} bytes"
    try:
        os.stat(os.path.expanduser(source))
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL):
            return (error.strerror or str(error)).lower()
    return ""


def is_entry(name: str) -> bool:
    """Say whether a file or folder can have that name in another folder, and only there."""
    return name not in ("", ".", "..") and Path(name).name == name and not path_problem(name)


def local_file(source: str, name: str) -> Path | None:
    """Return where a file of a checkpoint is on this machine: in its folder, or, of a hub id, in
    the hub's cache. None where it is not; nothing is downloaded."""
    file = Path(source).expanduser() / name
    if file.exists():
        return file
    if source.count("/") != 1 or is_local_path(source) or file.parent.exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name)
    except HFValidationError:  # no id of the hub
        return None
    return Path(found) if isinstance(found, str) else None


def out_of_reach(source: str) -> tuple[str, str]:
    """Return what is wrong, and what to do, where `source` names a model of the hub of which no
    config is on this machine and none was to be had; empty texts where it does not."""
    if Path(source).expanduser().exists() or local_file(source, "config.json"):
        return "", ""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = "no such folder is here, nor in the hub's cache, and the hub is off (HF_HUB_OFFLINE)"
        return what, "check the id, and leave HF_HUB_OFFLINE out once; or name a local folder"
    what = "no such folder is here, nor in the hub's cache, and the hub does not give it"
    return what, "check the id (owner/name), the network and your access; or name a local folder"


def cache_folder() -> Path:
    """Return where things are kept that can be made again: $QUANTADAPT_CACHE, or quantadapt in the
    user's cache folder. It need not be there yet."""
    if cache := os.environ.get("QUANTADAPT_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantadapt"
