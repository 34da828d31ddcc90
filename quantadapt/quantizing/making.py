"""What a calibrated base is made from, as a run knows it once its data are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ..inputs.fingerprints import fingerprint_of
from ..planning.planned import Plan
from ..planning.reusing import EXAMPLES, LABELS, MODEL, settings_of

if TYPE_CHECKING:
    from .examples import Examples


def makings(plan: Plan, examples: Examples | None, labels: Sequence[str]) -> dict[str, Any]:
    """Return all that the base of `plan` depends on, JSON-ready; see `planning.reusing.Making`.

    Args:
        examples: what the backend is shown.
        labels: what a classifier tells apart.
    """
    known = plan.fingerprint or fingerprint_of(plan.model)
    model = plan.model if known is None else f"{known.config} {known.weights}"
    read = {MODEL: model, EXAMPLES: _digest(examples or []), LABELS: list(labels)}
    found: dict[str, Any] = json.loads(json.dumps(settings_of(plan) | read))
    return found


def _digest(examples: Examples) -> str:
    """Return what all the tensors of examples are known by: names, sizes and numbers."""
    found = sha256()
    for example in examples:
        for name, tensor in sorted(example.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            found.update(tensor.contiguous().view(-1).cpu().float().numpy().tobytes())
    return found.hexdigest()[:32]
