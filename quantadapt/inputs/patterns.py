"""Regular expressions among an adapter's options: are they some, and do they come to an end?"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import Problem
from .patience import TooSlow, at_most, in_main_thread

PATIENCE = 2.0
"""Seconds of the processor."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
_PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
_NAMES = tuple(
    name.format(layer)
    for layer in (0, 10)
    for name in (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.block_sparse_moe.experts.7.down_proj",
        "model.language_model.layers.{}.mlp.shared_expert.gate_proj",
        "transformer.h.{}.attn.c_attn",
        "decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias",
        "lm_head",
    )
)
"""Names such as models have; what takes long with these does with others."""


def pattern_problems(options: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the regular expressions among an adapter's options: those that are
    none, and those that take for ever. Each is tried on names such as models have."""
    found = []
    for key in _PATTERNS:
        given = options.get(key)
        patterns = given if key == "layers_pattern" and isinstance(given, list) else [given]
        for pattern in patterns:
            if isinstance(pattern, str):
                found += _pattern_problem(key, pattern)
    for key in _PATTERN_KEYS:
        if isinstance(options.get(key), dict):
            for pattern in options[key]:
                found += _pattern_problem(key, rf"(.*\.)?({pattern})$")
    return found


def _pattern_problem(key: str, pattern: str) -> list[Problem]:
    where, fix = f"adapter.{key}", "list the endings of names, e.g. [q_proj, v_proj]"
    try:
        _try(pattern)
    except TooSlow:
        what = f"the pattern {pattern!r} takes for ever on the names of layers"
        return [Problem(what, f"{fix}, or repeat no group that repeats something itself", where)]
    except (re.error, RecursionError, OverflowError) as error:
        return [Problem(f"{pattern!r} is no regular expression: {error}", fix, where)]
    return []


_CODE = """
import re, sys
compiled = re.compile(sys.argv[1])
for name in sys.argv[2:]:
    compiled.fullmatch(name), compiled.match(name)
"""


def _try(pattern: str) -> None:
    """Match names such as models have. Raises TooSlow."""
    compiled = re.compile(pattern)
    if in_main_thread():
        with at_most(PATIENCE):
            for name in _NAMES:
                compiled.fullmatch(name)
                compiled.match(name)
        return
    try:  # nothing ends it in this thread
        command = [sys.executable, "-c", _CODE, pattern, *_NAMES]
        subprocess.run(command, capture_output=True, timeout=5 * PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise TooSlow from None
