"""The one thread that runs the model: requests join the batch as they come and leave it when they
are answered, whatever adapter each of them asks for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.pixels import inputs_of
from ..evaluation.predictions import evaluating
from ..generation.answers import answers, end_ids
from ..generation.rows import Row, takes_rows
from ..generation.sampling import Sampling
from ..generation.text import TextSoFar
from ..model.own_biases import without_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("quantadapt")

Voice = str | tuple[str, ...] | None
"""What answers: an adapter, several that work together, or the base alone."""
STOPPING = "the server is stopping"


@dataclass(frozen=True)
class Event:
    """What becomes of a job: more text, or its end.

    Attributes:
        text: what is new.
        finish: "stop", "length", or "error" with the reason in `text`; empty while it goes on.
        tokens: how many the answer has so far.
    """

    text: str
    finish: str = ""
    tokens: int = 0


@dataclass(eq=False)
class Job:
    """One answer that somebody waits for.

    Attributes:
        name: the model that is asked, see `Worker.names`.
        tell: called in the worker's thread with each `Event`; must not block.
        cancelled: set by whoever does not wait any more.
    """

    name: str
    ids: Sequence[int]
    sampling: Sampling
    number: int
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


def active_of(model: Any) -> str | tuple[str, ...]:
    """Return the adapter that a PeftModel computes with, or those that work together."""
    first, *others = model.active_adapters
    return (first, *others) if others else first


class Full(Exception):
    """So many wait already that no more are taken."""


class Worker:
    """Answers jobs in a thread of its own.

    Args:
        model: with or without adapters.
        names: what requests call the models: the name of an adapter, those of several that work
            together, or None for the base alone.
        max_batch: most answers that are made at the same time.
        max_waiting: most jobs that wait for a place.

    Attributes:
        max_waiting: as above.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        names: Mapping[str, Voice],
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
    ) -> None:
        self.names, self.tokenizer, self.max_waiting = dict(names), tokenizer, max_waiting
        self._model, self._max_batch = model, max_batch
        self._jobs: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="quantadapt-worker", daemon=True)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def halt(self) -> None:
        """Answer nobody any more: whoever waits is told that the server is stopping."""
        self._stopped.set()
        with suppress(queue.Full):  # then it is not waiting for a job
            self._jobs.put_nowait(None)

    def stop(self) -> None:
        """As `halt`; returns when the thread has ended."""
        self.halt()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Full."""
        if self._stopped.is_set():
            job.tell(Event(STOPPING, "error"))
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Full from None

    # In the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        with evaluating(self._model):
            if takes_rows(self._model):
                self._together()
            else:
                self._one_by_one()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                job.tell(Event(STOPPING, "error"))

    def _together(self) -> None:
        batches = {name: _Batch(self._model, self.tokenizer) for name in self.names}
        while not self._stopped.is_set():
            busy = sum(len(batch.jobs) for batch in batches.values())
            for job in self._new(not busy, self._max_batch - busy):
                if inputs_of(job.ids):
                    self._answer(job)  # pictures go through the model by themselves
                else:
                    batches[job.name].waiting.append(job)
            for name, batch in batches.items():
                if batch.waiting or batch.jobs:
                    with self._speaking(name):
                        batch.go_on()
        for batch in batches.values():
            batch.fail(STOPPING)

    def _one_by_one(self) -> None:
        """Where a model cannot answer several in one batch."""
        while not self._stopped.is_set():
            for job in self._new(True, 1):
                self._answer(job)

    def _answer(self, job: Job) -> None:
        """Answer a job by itself, at once."""
        given = self._model, self.tokenizer, [job.ids], job.sampling
        try:
            with self._speaking(job.name):
                found = next(answers(*given, first=job.number))
            job.tell(Event(found.text, found.finish, found.tokens))
        except Exception as error:
            _fail([job], error)

    def _new(self, wait: bool, most: int) -> Iterator[Job]:
        """Yield jobs that wait, at most so many; where nothing else is to do, wait for one."""
        for index in range(most):
            try:
                job = self._jobs.get(block=wait and index == 0)
            except queue.Empty:
                return
            if job is None:
                return
            if not job.cancelled.is_set():
                yield job

    @contextmanager
    def _speaking(self, name: str) -> Iterator[None]:
        """Let the adapter answer that goes by this name, or the base alone."""
        adapter, model = self.names[name], self._model
        switchable: Any = model if hasattr(model, "disable_adapter") else None
        with ExitStack() as stack:
            if adapter is None:
                stack.enter_context(without_adapter(model))
            elif switchable is not None and active_of(switchable) != adapter:
                if isinstance(adapter, str):
                    switchable.set_adapter(adapter)
                else:  # a PeftModel itself has one at a time
                    switchable.base_model.set_adapter([*adapter])
                for parameter in switchable.parameters():  # PEFT makes those of the active train
                    parameter.requires_grad_(False)
            yield


class _Batch:
    """The jobs that one adapter answers."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        from ..generation.slots import rows_for

        self._model, self._tokenizer = model, tokenizer
        self._rows = rows_for(model)
        self.waiting: list[Job] = []
        self.jobs: dict[Row, tuple[Job, TextSoFar]] = {}

    def go_on(self) -> None:
        """Take in whoever waits, choose one more token for everybody, and tell."""
        try:
            for row, (job, _) in list(self.jobs.items()):
                if job.cancelled.is_set():
                    self._rows.drop(row)
                    del self.jobs[row]
            if self.jobs:
                self._rows.step()
            self._take_in()
        except Exception as error:
            self.fail(error)
            return
        for row, (job, text) in list(self.jobs.items()):
            self._tell(row, job, text)

    def _take_in(self) -> None:
        new = {}
        for job in self.waiting:
            asked = job.sampling
            ends = end_ids(self._model, self._tokenizer, asked.stop)
            row = Row(job.ids, asked.chooser(job.number), asked.max_new_tokens, ends)
            new[row] = (job, TextSoFar(self._tokenizer, asked.stop))
        self.waiting = []
        self.jobs |= new
        self._rows.add(list(new))

    def _tell(self, row: Row, job: Job, text: TextSoFar) -> None:
        piece = text.add(row.tokens[len(text.tokens) :], last=bool(row.finish))
        if text.ended:
            self._rows.drop(row)
        if row.error is not None:
            _fail([job], row.error)
        elif piece or row.finish:
            job.tell(Event(piece, row.finish, len(row.tokens)))
        if row.finish:
            del self.jobs[row]

    def fail(self, error: Exception | str) -> None:
        """Tell everybody that no answer comes, and begin with an empty batch."""
        _fail([job for job, _ in self.jobs.values()] + self.waiting, error)
        self.jobs, self.waiting = {}, []
        self._rows.clear()


def _fail(jobs: Sequence[Job], error: Exception | str) -> None:
    if isinstance(error, Exception):
        logger.warning("an answer failed", exc_info=error)
        error = f"{type(error).__name__}: {error}"
    for job in jobs:
        job.tell(Event(error, "error"))
