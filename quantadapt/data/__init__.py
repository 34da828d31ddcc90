"""From files, folders and hub data sets to token ids with a loss mask, and to batches."""

from __future__ import annotations

from .reading import Data, HeldOut, Prompt, load_data, load_everything, load_held_out, read_held_out
from .report import DataReport, FileReport
from .tokens import encode_prompt, prompt_and_completion

__all__ = [
    "Data",
    "DataReport",
    "FileReport",
    "HeldOut",
    "Prompt",
    "encode_prompt",
    "load_data",
    "load_everything",
    "load_held_out",
    "prompt_and_completion",
    "read_held_out",
]
