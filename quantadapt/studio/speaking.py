"""An open model that answers with several voices: its base, and each of its adapters."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..generation.answers import context_of
from ..generation.prompts import LAYOUTS, PromptWriter, Turns
from ..generation.questions import Question
from ..generation.sampling import Sampling
from ..serving.worker import Event, Full, Job, Voice, Worker, active_of

if TYPE_CHECKING:
    from torch import nn

BASE = "base"
_MOST_AT_ONCE = 16
_PATIENCE = 0.25
"""Seconds after which it is looked whether somebody still waits."""


@dataclass(frozen=True)
class Said:
    """An answer so far.

    Attributes:
        tokens: how many it has.
        finish: "stop", "length", "stopped" by the reader, or "error"; empty while it goes on.
        note: what else is to be known of it: why there is no answer, for one.
    """

    text: str = ""
    tokens: int = 0
    finish: str = ""
    note: str = ""


@dataclass(eq=False)
class Speaker:
    """A model that is asked; `close` when it is not needed any more.

    Attributes:
        name: what it is called.
        questions: examples of what to ask.
        voices: what answers, by key -> its name for readers; the base first, if it is one of
            several.
    """

    name: str
    writer: PromptWriter
    worker: Worker
    context: int
    voices: dict[str, str]
    active: str
    questions: Sequence[Question] = ()

    @classmethod
    def open(
        cls,
        model: nn.Module,
        writer: PromptWriter,
        *,
        name: str,
        questions: Sequence[Question] = (),
    ) -> Speaker:
        """Return a speaker whose worker runs."""
        found: Any = model
        voices, active = {BASE: "the model"}, BASE
        keys: dict[str, Voice] = {BASE: None}
        if hasattr(model, "disable_adapter"):
            adapters = list(found.peft_config)
            keys |= {f"adapter {adapter}": adapter for adapter in adapters}
            many = len(adapters) > 1
            voices = {BASE: "base, without adapter"}
            voices |= {f"adapter {a}": f"with adapter {a}" if many else "tuned" for a in adapters}
            now = active_of(found)
            active = f"adapter {now}" if isinstance(now, str) else f"adapters {' and '.join(now)}"
            keys.setdefault(active, now)
            voices.setdefault(active, "tuned")
        worker = Worker(model, writer.tokenizer, keys, max_batch=_MOST_AT_ONCE)
        worker.start()
        return cls(name, writer, worker, context_of(model), voices, active, questions)

    @property
    def chats(self) -> bool:
        """Whether what was said before goes into the next prompt."""
        return self.writer.layout == "chat"

    @property
    def told(self) -> str:
        """How it is asked, in words."""
        layout = self.writer.layout
        words = LAYOUTS[layout] if layout else "as they stand"
        alone = "" if self.chats else " Every question stands by itself."
        return f"Prompts are written {words}.{alone}"

    @property
    def takes_system(self) -> bool:
        """Whether prompts can begin with what `system` says."""
        return self.writer.layout != "text"

    def close(self) -> None:
        """End the worker; whoever waits for an answer is told."""
        self.worker.stop()

    def answers(
        self,
        asked: Mapping[str, tuple[str, Turns]],
        sampling: Sampling,
        stopped: threading.Event,
    ) -> Iterator[dict[str, Said]]:
        """Yield what has been said so far, until all have ended or are `stopped`. Whoever closes
        the iterator stops them, too.

        Args:
            asked: (voice, turns) for each side of a talk.
        """
        events: queue.SimpleQueue[tuple[str, Event]] = queue.SimpleQueue()
        said, jobs = dict.fromkeys(asked, Said()), dict[str, Job]()
        for side, (voice, turns) in asked.items():
            found = self._job(side, voice, turns, sampling, events)
            if isinstance(found, Job):
                jobs[side] = found
            else:
                said[side] = found
        try:
            yield dict(said)
            while not all(one.finish for one in said.values()):
                for side, event in _waiting(events):
                    said[side] = _heard(said[side], event, jobs[side], sampling)
                if stopped.is_set():
                    said = {
                        side: one if one.finish else replace(one, finish="stopped")
                        for side, one in said.items()
                    }
                yield dict(said)
        finally:
            for job in jobs.values():
                job.cancelled.set()

    def _job(
        self,
        side: str,
        voice: str,
        turns: Turns,
        sampling: Sampling,
        events: queue.SimpleQueue[tuple[str, Event]],
    ) -> Job | Said:
        """Submit a job for one side; return why not where it cannot be asked."""
        try:
            ids = self.writer.ids(turns if self.takes_system else _text(turns))
        except DataError as error:
            return Said(finish="error", note=str(error))
        room = self.context - len(ids) if self.context else sampling.max_new_tokens
        if room < 1:
            what = f"the prompt has {len(ids):,} tokens; the model takes {self.context:,} with the"
            way = "shorten it, or begin a new chat" if self.chats else "shorten it"
            return Said(finish="error", note=f"{what} answer; {way}")
        sampling = sampling.model_copy(
            update={"max_new_tokens": min(sampling.max_new_tokens, room)}
        )
        job = Job(voice, ids, sampling, 0, lambda event: events.put((side, event)))
        try:
            self.worker.submit(job)
        except Full:
            return Said(finish="error", note="too many wait already; try again later")
        return job


def _text(turns: Turns) -> str:
    return "".join(str(turn["content"]) for turn in turns)


def _waiting(events: queue.SimpleQueue[tuple[str, Event]]) -> Iterator[tuple[str, Event]]:
    """Yield the next event, waiting a moment for it, and those that are there already."""
    with suppress(queue.Empty):
        yield events.get(timeout=_PATIENCE)
    while not events.empty():
        yield events.get()


def _heard(said: Said, event: Event, job: Job, wanted: Sampling) -> Said:
    if event.finish == "error":
        return replace(said, finish="error", note=event.text)
    cut = job.sampling.max_new_tokens < wanted.max_new_tokens
    note = "the model's context is full" if event.finish == "length" and cut else ""
    return Said(said.text + event.text, event.tokens or said.tokens, event.finish, note)
