"""Which backend goes with which adapter: declared by rules, verified by the conformance suite."""

from __future__ import annotations

from .declared import (
    MAIN,
    MEANING,
    DeclaredCell,
    backend_title,
    declared,
    declared_cell,
    dtype_for,
    footnotes,
    main_first,
    obstacles,
    preferred_dtype,
    without_defaults,
)

__all__ = [
    "MAIN",
    "MEANING",
    "DeclaredCell",
    "backend_title",
    "declared",
    "declared_cell",
    "dtype_for",
    "footnotes",
    "main_first",
    "obstacles",
    "preferred_dtype",
    "without_defaults",
]
