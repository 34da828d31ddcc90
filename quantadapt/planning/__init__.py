"""What a run will do, or why not: `plan` decides everything before any work starts.

Pure: it imports no torch, downloads nothing and loads no model.
"""

from __future__ import annotations

from .exports import PlannedExport
from .planned import MergePlan, Plan
from .refusals import WAY_OUT, attach_refusals, make_cell, merge_refusals, onto_refusals
from .stage import completed, evaluators, plan, plan_adapter, task_for

__all__ = [
    "WAY_OUT",
    "MergePlan",
    "Plan",
    "PlannedExport",
    "attach_refusals",
    "completed",
    "evaluators",
    "make_cell",
    "merge_refusals",
    "onto_refusals",
    "plan",
    "plan_adapter",
    "task_for",
]
