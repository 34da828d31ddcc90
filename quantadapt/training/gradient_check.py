"""Training stops at the first gradient that is no number, before it reaches the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError

_FIX = "lower train.learning_rate, use dtype bfloat16 instead of float16, or check the data"


class GradientCheck:
    """Looks at the norm of the gradients of each step.

    Waiting for a GPU at each step would leave it idle while the next one is prepared. So a fused
    optimizer is told on the GPU to skip a bad step (`found_inf`, as a GradScaler tells it), and
    the error comes one step later. Other optimizers have to wait.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, Any] | None = None

    def see(self, norm: Any, step: int, optimizer: Any) -> None:
        """Check the norm, a tensor or float, of the gradients that step number `step` is to take.

        Raises:
            TrainingError: it is no number, or that of the step before was none.
        """
        self.settle()
        finite = torch.isfinite(torch.as_tensor(norm)).all()
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if finite.is_cuda and getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = (~finite).float()
            answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            answer.copy_(finite, non_blocking=True)
            self._pending = step, answer, torch.cuda.current_stream().record_event()
        elif not finite:
            raise _error(step)

    def settle(self) -> None:
        """Wait for the answer about the step seen last. Raises TrainingError if it is bad."""
        if self._pending is None:
            return
        (step, finite, event), self._pending = self._pending, None
        event.synchronize()
        if not finite:
            raise _error(step)


def _error(step: int) -> TrainingError:
    what = f"the loss or its gradient is no number any more at step {step}"
    return TrainingError(what, fix=_FIX, where="train")
