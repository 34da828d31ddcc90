"""What a calibrated base is made from, as a run knows it once its data are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..inputs.weights import check_weights
from ..paths import local_file
from ..planning.planned import Plan
from ..planning.reusing import EXAMPLES, LABELS, MODEL, settings_of
from .tokenizer import OF_TOKENIZER

if TYPE_CHECKING:
    from .examples import Examples

_READ_WITH = re.compile(
    r"^((generation_)?config|special_tokens_map|added_tokens)\.json$|^chat_template\.jinja$|\.py$"
)
"""What of a checkpoint is read with weights and tokenizer; a processor shows in the examples."""
_PIECE = 2**24


def makings(plan: Plan, examples: Examples | None, labels: Sequence[str]) -> dict[str, Any]:
    """Return all that the base of `plan` depends on, JSON-ready; see `planning.reusing.Making`.

    Args:
        examples: what the backend is shown.
        labels: what a classifier tells apart.
    """
    read = {MODEL: digest_of(plan.model), EXAMPLES: _digest(examples or []), LABELS: list(labels)}
    found: dict[str, Any] = json.loads(json.dumps(settings_of(plan) | read))
    return found


def digest_of(source: str) -> str:
    """Return what a checkpoint is known by to the bit: names and contents of its weights, config,
    tokenizer and code. Empty where it is not here, or not whole. It reads all of it, in a small
    part of the time that calibrating takes; a fingerprint, which looks at the first numbers of each
    tensor, does not see that some others were changed in place."""
    if not source or (config := local_file(source, "config.json")) is None:
        return ""
    found = sha256()
    try:
        for file in sorted(_files(config.parent)):
            found.update(f"{file.name} {_contents(file)};".encode("utf-8", "surrogatepass"))
    except (ModelError, OSError):
        return ""
    return found.hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    weights = set(check_weights(folder).values())
    for file in folder.iterdir():
        name = file.name
        other = OF_TOKENIZER.search(name) or _READ_WITH.search(name)
        if name in weights or (other and file.is_file()):
            yield file


def _contents(file: Path) -> str:
    """Return the digest of a file's contents."""
    found = sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _digest(examples: Examples) -> str:
    """Return what all the tensors of examples are known by: names, sizes and numbers."""
    import torch

    found = sha256()
    for example in examples:
        for name, tensor in sorted(example.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
