"""Pairs are judged by a model behind an endpoint, twice each, and every word of it is kept."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import OutputError
from ..folders.lines import lines_file, lines_in
from ..generation.files import checksum
from ..inputs.documents import validated
from ..inputs.typed import Typed
from .endpoint import Endpoint
from .pairs import Pair
from .verdicts import ORDERS, SYSTEM, Order, Verdict, messages, read_verdict

JUDGEMENTS = "judgements.jsonl"

Given = TypeVar("Given")
Made = TypeVar("Made")


class Judgement(Typed):
    """A line of the file of judgements: what the judge says of a pair that is shown in an order."""

    pair: str
    order: Order
    verdict: Verdict
    said: str = ""


def read_judgements(path: Path) -> dict[tuple[str, Order], Verdict]:
    """Return the verdicts that were written to `path` so far, by pair and order; none where there
    is no file.

    Raises:
        OutputError: a line is no judgement.
    """
    fix, found = "put the file back as it was, or let the judge judge anew", {}
    for number, line in enumerate(lines_in(path), 1):
        said = validated(Judgement, line, OutputError, fix=fix, where=f"{path}:{number}")
        found[said.pair, said.order] = said.verdict
    return found


def judge_pairs(
    pairs: Sequence[Pair],
    endpoint: Endpoint,
    path: Path,
    *,
    with_reference: bool = False,
    parallel: int = 4,
    told: Callable[[int], Callable[[], None]] = lambda begun: lambda: None,
) -> None:
    """Write what the judge says of each pair, in both orders, into `path`, a line each; what an
    interrupted call has written is gone on with.

    Args:
        parallel: how many questions are open at the endpoint at the same time.
        told: called with the number of judgements that are there already; what it returns is called
            after each further one.

    Raises:
        EndpointError: it does not answer; what it has said so far is kept.
        OutputError: other pairs, or another judge, were begun there.
    """
    wanted = [(pair, order) for pair in pairs for order in ORDERS]
    made_with = {
        "judge": endpoint.model,
        "endpoint": endpoint.url,
        "instructions": SYSTEM,
        "with_reference": with_reference,
        "pairs": checksum([{"id": pair.id} for pair in pairs]),
    }
    with lines_file(path, made_with, len(wanted), what="judgements") as lines:
        left = wanted[lines.done :]
        advance = told(lines.done)

        def said(item: Any) -> str:
            return endpoint.ask(messages(*item, with_reference=with_reference))

        answers = in_order(said, left, parallel)
        for (pair, order), text in zip(left, answers, strict=True):
            verdict = read_verdict(text, order)
            lines.add({"pair": pair.id, "order": order, "verdict": verdict, "said": text})
            advance()


def in_order(
    function: Callable[[Given], Made], items: Sequence[Given], parallel: int
) -> Iterator[Made]:
    """Yield what `function` makes of each item, in their order, with so many threads. They are
    daemons: nobody who stops has to wait for those that wait. What one raises is raised here."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, bool, Any]] = queue.SimpleQueue()
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, True, function(items[index])))
            except BaseException as error:
                ended.set()  # nobody begins anything any more
                done.put((index, False, error))

    for index in range(len(items)):
        waiting.put(index)
    for _ in range(min(parallel, len(items))):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, tuple[bool, Any]] = {}
    try:
        for index in range(len(items)):
            while index not in found:
                number, well, made = done.get()
                found[number] = (well, made)
            well, made = found.pop(index)
            if not well:
                raise made
            yield made
    finally:
        ended.set()
