"""The pipeline: spec -> plan -> quantize -> attach -> train -> evaluate -> export."""

from __future__ import annotations

from .measuring import Listener
from .running import RunResult, run

__all__ = ["Listener", "RunResult", "run"]
