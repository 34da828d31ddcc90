"""The train stage."""

from __future__ import annotations

from .stage import TrainResult, base_parameters, problems, train

__all__ = ["TrainResult", "base_parameters", "problems", "train"]
