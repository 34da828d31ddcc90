"""What a run will do, or why not: `plan` decides everything before any work starts.

Pure: it imports no torch, downloads nothing and loads no model.
"""

from __future__ import annotations

from .refusals import WAY_OUT, attach_refusals, make_cell, merge_refusals, onto_refusals
from .stage import MergePlan, Plan, plan, task_for

__all__ = [
    "WAY_OUT",
    "MergePlan",
    "Plan",
    "attach_refusals",
    "make_cell",
    "merge_refusals",
    "onto_refusals",
    "plan",
    "task_for",
]
