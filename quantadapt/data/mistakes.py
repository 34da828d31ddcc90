"""What is wrong with one row is often wrong with more of them: they are told at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ..errors import DataError, NoneLeft, Problem
from .report import DataReport

SECONDS = 5.0
"""So long it is looked for more."""
_KINDS, _PLACES = 5, 5
"""So many kinds of mistakes are told, and of each so many places."""
_VALUES = re.compile(r"\"[^\"]*\"|(?<= is )'[^']*'|\d[\d.,]*")
"""What differs between two mistakes of one kind."""


class _Placed(Protocol):
    @property
    def where(self) -> str:
        """Its file and line."""
        ...

    @property
    def file(self) -> str:
        """Its file."""
        ...


Given = TypeVar("Given", bound=_Placed)
Made = TypeVar("Made")
Raw = TypeVar("Raw")


def all_told(
    given: Sequence[Given],
    make: Callable[[Iterable[Given], DataReport], Iterable[Made]],
    report: DataReport,
) -> Iterator[Made]:
    """Yield what is made of rows, or of what those were made into, and count it in `report`.

    Raises:
        DataError: of a row, or of all in which something is wrong.
    """
    try:
        yield from make(given, report)
    except DataError as error:
        raise _with_others(error, given, make, report.max_length) from None


def _with_others(
    error: DataError,
    given: Sequence[Given],
    make: Callable[[Iterable[Given], DataReport], Iterable[Any]],
    max_length: int,
) -> DataError:
    """Return an error that tells what else is wrong, each row beside the first of its file, whose
    columns say what a file holds."""
    places = {one.where for one in given}
    if len(error.problems) > 1 or error.problems[0].where not in places:
        return error  # of no single row
    firsts: dict[str, Given] = {}
    found, end = dict[str, list[Problem]](), time.monotonic() + SECONDS
    for one in given:
        if time.monotonic() > end:
            break
        beside = [firsts[one.file]] if one.file in firsts else []
        problem = _wrong_with([*beside, one], make, max_length)
        if not beside and problem is None:
            firsts[one.file] = one
        if problem is not None:
            found.setdefault(_VALUES.sub("", problem.what), []).append(problem)
    return _of_kinds(found) if found else error


def each_made(given: Iterable[tuple[str, Raw]], make: Callable[[Raw, str], Made]) -> Iterator[Made]:
    """Yield what is made of each (place, what was read there).

    Raises:
        DataError: of one, or of all that nothing can be made of.
    """
    left = iter(given)
    for where, raw in left:
        try:
            made = make(raw, where)
        except DataError as error:
            raise _with_rest(error, left, make) from None
        yield made


def _with_rest(
    error: DataError, left: Iterator[tuple[str, Raw]], make: Callable[[Raw, str], Any]
) -> DataError:
    """Return an error that tells what else is wrong in what is left to read."""
    problems, end = [*error.problems], time.monotonic() + SECONDS
    try:
        for where, raw in left:
            if time.monotonic() > end:
                break
            with noted(problems):
                make(raw, where)
    except DataError as another:  # that ends the reading
        problems += another.problems
    found = dict[str, list[Problem]]()
    for problem in problems:
        found.setdefault(_VALUES.sub("", problem.what), []).append(problem)
    return _of_kinds(found)


@contextmanager
def noted(problems: list[Problem]) -> Iterator[None]:
    """Inside, what is wrong with data goes to `problems`, but not that none are left."""
    try:
        yield
    except NoneLeft:
        raise
    except DataError as error:
        problems += error.problems


def each_done(calls: Iterable[Callable[[], Made]]) -> list[Made]:
    """Return what the calls return, one for each file or part of the data.

    Raises:
        DataError: of one, or of all that cannot be done; where nothing is left of the first, of
            that alone, for what is left of others depends on it.
    """
    problems, found = list[Problem](), []
    for call in calls:
        try:
            with noted(problems):
                found.append(call())
        except NoneLeft:
            if not problems:
                raise
    if problems:
        raise DataError.of([*dict.fromkeys(problems)])  # a file may be both parts
    return found


def _of_kinds(found: Mapping[str, Sequence[Problem]]) -> DataError:
    """Return an error of problems by their kind, at least one."""
    told = [_told(problems) for problems in found.values()]
    more = len(told) - _KINDS
    if more > 0:
        told[_KINDS:] = [Problem(f"there are {more} more kinds of mistakes in these data")]
    return DataError.of(told)


def _wrong_with(
    given: Iterable[Given],
    make: Callable[[Iterable[Given], DataReport], Iterable[Any]],
    max_length: int,
) -> Problem | None:
    try:
        for _ in make(given, DataReport(max_length)):
            pass
    except DataError as error:
        return error.problems[0]
    return None


def _told(problems: Sequence[Problem]) -> Problem:
    """Return the first of problems of one kind, with the places of the others."""
    first, *others = dict.fromkeys(problem.where for problem in problems)
    if not others:
        return problems[0]
    file = first.rpartition(":")[0]
    shown = [other.removeprefix(f"{file}:") for other in others[:_PLACES]]
    left = len(others) - len(shown)
    also = ", ".join(shown) + (f" and {left:,} more" if left else "")
    return replace(problems[0], what=f"{problems[0].what}; likewise at {also}")
