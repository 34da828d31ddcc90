"""Trackers, `train.report_to`: transformers' callbacks for tensorboard, trackio, wandb and others.

One that cannot begin ends the run before it has cost anything. One that fails later is told and
left out: what has been trained is worth more than its curve elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import TrainingError

PROJECT = "quantadapt"
"""What runs are listed under, where a tracker knows projects."""
_WHERE = "train.report_to"


def run_name(output: Path) -> str:
    """Return a name for a run that no other has: trackers add to a run whose name they know."""
    return f"{output.name}-{datetime.now():%Y%m%d-%H%M%S}"


def spare(trainer: Any, note: Callable[[str], None]) -> None:
    """See to it that no tracker of `trainer` ends its training."""
    from transformers.integrations import integration_utils

    names = {kind: name for name, kind in integration_utils.INTEGRATION_TO_CALLBACK.items()}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [
        _Spared(callback, names[type(callback)], note) if type(callback) in names else callback
        for callback in callbacks
    ]


class _Spared:
    """A tracker that is called as long as it works."""

    def __init__(self, tracker: Any, name: str, note: Callable[[str], None]) -> None:
        self.tracker, self.name, self.note = tracker, name, note
        self.failed = False

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *args, **kwargs: self._call(event, *args, **kwargs)

    def _call(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if event == "on_train_begin":
                fix = f"see what {self.name} wants, or leave it out"
                what = f"{self.name} cannot begin: {reason}"
                raise TrainingError(what, fix=fix, where=_WHERE) from error
            self.failed = True
            self.note(f"{self.name} gets nothing more of this run, for it failed: {reason}")
