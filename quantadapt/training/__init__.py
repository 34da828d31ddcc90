"""The train stage."""

from __future__ import annotations

from .checking import problems
from .figures import base_parameters
from .stage import TrainResult, train

__all__ = ["TrainResult", "base_parameters", "problems", "train"]
