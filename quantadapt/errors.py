"""Every error that quantadapt raises on purpose.

One base class, so that `except quantadapt.QuantadaptError` catches all of them, and one layout:
what is wrong, why, and what to do about it. The command line prints `str(error)` and exits with
`error.exit_code`; a traceback on the screen always means a bug.
"""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_REFUSED = 2
EXIT_OUT_OF_TIME = 124
"""`train.max_time` is over, as `timeout` has it."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What a run obeys by ending early, with 128 and the number of the signal."""

ENDED_EARLY = (EXIT_OUT_OF_TIME, *(128 + number for number in SIGNALS))
"""The exit codes of such a run."""

OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys: control characters but for tab and line feed, and those that set the
direction of writing."""


def visible(text: str) -> str:
    """Return text with whatever a terminal would obey spelled out, as in a Python string."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def warn(text: str, category: type[Warning], *, stacklevel: int) -> None:
    """Warn as `warnings.warn` does, with whatever a terminal would obey spelled out."""
    warnings.warn(visible(text), category, stacklevel=stacklevel + 1)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and the way out.

    Attributes:
        what: the sentence that names the mistake or the refusal.
        fix: what to do about it; empty where nothing can be done.
        where: the key, file or line that it is about, e.g. `adapter.r` or `train.jsonl:12`.
        rule: the id of the rule that refuses, where one does.
    """

    what: str
    fix: str = ""
    where: str = ""
    rule: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.rule:
            head += f" [rule {self.rule}]"
        return visible(f"{head}\n    fix: {self.fix}" if self.fix else head)


class QuantadaptError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = EXIT_FAILURE

    def __init__(self, what: str, *, fix: str = "", where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, fix, where),)
        super().__init__(str(self.problems[0]))


class ProblemsError(QuantadaptError):
    """Several problems, reported at once."""

    heading = "{count} found"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("")
        self.problems = tuple(problems)
        self.begin_with(self.heading)

    def begin_with(self, heading: str) -> None:
        """Let the text begin with `heading`; `{count}` in it is how many problems there are."""
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [heading.format(count=count), *(f"  - {problem}" for problem in self.problems)]
        self.args = ("\n".join(lines),)


class SpecError(ProblemsError):
    """The spec has unknown keys or values of the wrong type. Exit code 2."""

    exit_code = EXIT_REFUSED
    heading = "the spec cannot be used, {count}:"


class OptionsError(SpecError):
    """Options that belong to no spec, of a function or a command, cannot be used. Exit code 2."""

    heading = "these options cannot be used, {count}:"


class PlanRefused(ProblemsError):
    """Refused before any work started: mistakes, or rules that forbid it. Exit code 2."""

    exit_code = EXIT_REFUSED
    heading = "refused before any work started, {count}:"


class MergeRefused(PlanRefused):
    """A rule forbids this merge, or it keeps too little of what was learned. Raised alike by CLI,
    YAML and Python. Exit code 2.

    Attributes:
        figures: what was measured, by name; empty where a rule forbids it.
    """

    heading = "this merge is refused, {count}:"

    def __init__(
        self, problems: Sequence[Problem], figures: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(problems)
        self.figures = dict(figures or {})


class MissingDependency(QuantadaptError):
    """A library that a backend needs is not installed, or fails to import."""


class PluginError(QuantadaptError):
    """A plugin is broken, clashes with another, or declares something that cannot be."""


_TOLD = 12
"""So many mistakes in data are told; many files may be wrong in one way."""


class DataError(QuantadaptError):
    """The data cannot be read or used; `where` holds the file and, if known, the line."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> DataError:
        """Return one that tells of several problems, at least one; its text of the first 12."""
        error = cls(problems[0].what, fix=problems[0].fix, where=problems[0].where)
        if len(problems) > 1:
            lines = [f"the data cannot be used, {len(problems)} problems:"]
            lines += [f"  - {problem}" for problem in problems[:_TOLD]]
            left = len(problems) - _TOLD
            lines += [f"  and {left} more"] if left > 0 else []
            error.args = ("\n".join(lines),)
            error.problems = tuple(problems)
        return error


class NoneLeft(DataError):
    """All examples of the data are dropped; it says for which reasons."""


class DataWarning(UserWarning):
    """Many examples of a file are cut or dropped; the sentence counts them, with the reasons."""


class ModelError(QuantadaptError):
    """The model cannot be read or used."""


class NumbersError(ModelError):
    """Weights, or what a model predicts, hold NaN or infinity; nothing good can follow."""


class GpuTooSmall(ModelError):
    """The GPU does not hold what was to be made beside the model."""


class OutputError(QuantadaptError):
    """The output folder cannot be used, or writing to it failed; what was there is untouched."""


class EndpointError(QuantadaptError):
    """A model behind an endpoint does not answer, or refuses; what was done so far is kept."""


class FolderInUse(OutputError):
    """Another process is writing in the output folder; nothing was touched. Exit code 2."""

    exit_code = EXIT_REFUSED


class Interrupted(KeyboardInterrupt):
    """A run was told to end early, and left a checkpoint where it was training.

    Attributes:
        exit_code: 128 and the number of the signal, or `EXIT_OUT_OF_TIME`.
    """

    def __init__(self, what: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(what)


class TrainingError(QuantadaptError):
    """Training cannot go on, e.g. because the loss is no longer a number."""


class RewardError(TrainingError):
    """A reward function cannot be used, fails, takes too long, or returns no numbers."""


class SlowerWarning(UserWarning):
    """Something works as it should, but takes more time or memory than it might."""


def refuse_unknown(**given: tuple[Any, Collection[str]]) -> None:
    """Raise OptionsError where a value of an argument is none of those that there are.

    Args:
        given: the value and what may be said, by the argument's name.
    """
    wrong = {name: pair for name, pair in given.items() if pair[0] not in pair[1]}
    if wrong:
        raise OptionsError(
            [
                Problem(f"{value!r} is not possible", f"use {' or '.join(map(repr, known))}", name)
                for name, (value, known) in wrong.items()
            ]
        )


def refuse_below_one(**given: Any) -> None:
    """Raise OptionsError where a count is not a whole number of 1 or more, by argument."""
    fix = "write a whole number, 1 or more"
    wrong = {
        n: v
        for n, v in given.items()
        if isinstance(v, bool) or not isinstance(v, Integral) or v < 1
    }
    if wrong:
        raise OptionsError([Problem(f"{v!r} is not possible", fix, n) for n, v in wrong.items()])
