"""The train stage."""

from __future__ import annotations

from .figures import base_parameters
from .stage import TrainResult, problems, train

__all__ = ["TrainResult", "base_parameters", "problems", "train"]
