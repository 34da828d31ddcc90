"""A model answers: prompts, chats and files of them, in batches that rows join and leave."""

from __future__ import annotations

from .answers import Answer, answers, greedy, streamed
from .prompts import PromptWriter, layout_of
from .sampling import Sampling

__all__ = ["Answer", "PromptWriter", "Sampling", "answers", "greedy", "layout_of", "streamed"]
