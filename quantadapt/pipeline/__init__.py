"""The pipeline: spec -> plan -> quantize -> attach -> train -> evaluate -> export."""

from __future__ import annotations

from .measuring import Listener
from .result import RunResult
from .running import run

__all__ = ["Listener", "RunResult", "run"]
