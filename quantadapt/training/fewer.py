"""What goes through a model beside the steps of training, with as many examples at a time as memory
holds: the reference of an objective, answers before a step, and what is noted of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..distributed.talking import tell_main
from ..distributed.world import world
from ..errors import TrainingError

if TYPE_CHECKING:
    from ..spec import TrainSpec
    from .memory_fit import MemoryFit

_Made = TypeVar("_Made")
_FIX = (
    "lower train.per_device_train_batch_size or data.max_length, or use a base with fewer bits, or"
    " one that processes do not share"
)


@dataclass
class Fewer:
    """Halves how many examples go through the model at a time where memory runs out, in this
    process alone: nobody may wait for it within the work, which is begun again.

    Attributes:
        spec: of the training.
        tell: told in a sentence.
        fit: of a run that trains; None before that.
        most: by what is done, how many at a time since memory ran out.
    """

    spec: TrainSpec
    tell: Callable[[str], None] = lambda _: None
    fit: MemoryFit | None = None
    most: dict[str, int] = field(default_factory=dict)

    def of(
        self, model: Any, work: Callable[[int], _Made], size: int, kind: str, what: str
    ) -> _Made:
        """Return what `work` makes, given how many examples go through the model at a time.

        Args:
            work: does all of it, and may be begun again; tells other processes nothing before the
                last of it has gone through the model.
            size: at most.
            kind: what is lowered from there on. what: it in words.

        Raises:
            TrainingError: memory runs out, and other processes wait for the rest of a pass.
        """
        import torch

        from ..adapting.fused import free
        from .figures import adapter_device
        from .random_state import RandomState

        state = RandomState.of(adapter_device(model))
        while True:
            now = min(self.most.get(kind, size), size)
            try:
                return work(now)
            except torch.OutOfMemoryError as error:
                if self._waits(model):
                    words = f"the GPU has run out of memory in {what}, in a pass that the processes"
                    words += " of this run make together, so that none can begin it again"
                    raise TrainingError(words, fix=_FIX, where="train") from error
                without = self.fit.give_back() if self.fit is not None else []
                if now == 1 and not without:
                    raise
            # Out here, where the error and with it the frames of the work are gone.
            if not without:
                self.most[kind] = -(-now // 2)
            free(model)
            state.put_back()
            words = " and ".join(without) or f"{self.most[kind]} examples at a time"
            self._note(f"out of memory in {what}: from here on {words}")

    def _waits(self, model: Any) -> bool:
        from ..sharding import is_sharded

        return world().size > 1 and (self.spec.context_parallel_size > 1 or is_sharded(model))

    def _note(self, text: str) -> None:
        if self.fit is not None:
            self.fit.note(text)
            return
        self.tell(text)
        tell_main(f"{text} (process {world().rank})")
