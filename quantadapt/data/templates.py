"""A chat template is a program that comes with a model: it gets so much time and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..inputs.patience import TooSlow, at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONCE = 2.0
"""Seconds of the processor that one chat may take; a usual one takes a thousandth."""
IN_ALL, EACH = 3.0, 0.02
"""Seconds that all chats may take together, and besides for each of them."""
MEMORY = 2**30
"""Bytes that writing a chat may take."""
_REPEATS = 1000
"""A template may multiply by a number in it that is no larger."""


def written_by_template(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    ask: bool = False,
) -> str:
    """Return a chat as the tokenizer's template writes it; `ask` opens an answer after it.

    Raises:
        TooSlow: the template takes too long, now or with all that it wrote before.
        ValueError: it could not be stopped, or takes too much memory. What else it raises.
    """
    with _allowance(tokenizer.get_chat_template(tools=tools)).spending():
        text = tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=ask
        )
    return str(text)


@dataclass
class _Allowance:
    """What one template has used so far."""

    spent: float = 0.0
    chats: int = 0
    failed: Exception | None = None

    @contextmanager
    def spending(self) -> Iterator[None]:
        if self.failed is not None:
            raise self.failed  # others would take as long
        if self.spent > IN_ALL + EACH * self.chats:
            raise TooSlow(f"it takes {self.spent / self.chats:.1f} s for each chat")
        self.chats += 1
        before = time.thread_time()
        try:
            with at_most(ONCE), _little_memory():
                yield
        except TooSlow as error:
            self.failed = error
            raise
        except MemoryError:
            self.failed = ValueError(f"it takes more than {MEMORY >> 30} GiB of memory")
            raise self.failed from None
        finally:
            self.spent += time.thread_time() - before


@lru_cache(maxsize=16)
def _allowance(template: str) -> _Allowance:
    """Return the allowance of a template.

    Raises ValueError where it raises to a power, or multiplies by more than a small number that
    stands in it. No time limit ends that: Python works on one large number until it is done. No
    template in use needs it.
    """
    from jinja2 import Environment

    tokens = [token for token in Environment().lex(template) if token[1] != "whitespace"]
    for index, (_, kind, sign) in enumerate(tokens):
        before, after = tokens[index - 1], tokens[min(index + 1, len(tokens) - 1)]
        if kind != "operator" or sign not in ("*", "**") or before[2] in ("(", ","):
            continue  # as in f(*arguments)
        if sign == "**":
            raise ValueError("it raises to a power (**), which can take for ever")
        if not any(_is_small(token) for token in (before, after)):
            raise ValueError("it multiplies by what may be a large number, which can take for ever")
    return _Allowance()


def _is_small(token: tuple[int, str, str]) -> bool:
    return token[1] == "integer" and len(token[2]) < 9 and int(token[2], 0) <= _REPEATS


_limited = threading.Lock()


@contextmanager
def _little_memory() -> Iterator[None]:
    """Raise MemoryError inside where this process takes `MEMORY` more than it has, on Linux. One
    thread at a time: the limit is the process's."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError):
        yield
        return
    with _limited:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
