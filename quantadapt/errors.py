"""Every error that quantadapt raises on purpose.

One base class, so that `except quantadapt.QuantadaptError` catches all of them, and one layout:
what is wrong, why, and what to do about it. The command line prints `str(error)` and exits with
`error.exit_code`; a traceback on the screen always means a bug.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_REFUSED = 2


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
        return f"{head}\n    fix: {self.fix}" if self.fix else head


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
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = [self.heading.format(count=count), *(f"  - {problem}" for problem in problems)]
        super().__init__("\n".join(lines))
        self.problems = tuple(problems)


class SpecError(ProblemsError):
    """The spec has unknown keys or values of the wrong type. Exit code 2."""

    exit_code = EXIT_REFUSED
    heading = "the spec cannot be used, {count}:"


class PlanRefused(ProblemsError):
    """Refused before any work started: mistakes, or rules that forbid it. Exit code 2."""

    exit_code = EXIT_REFUSED
    heading = "refused before any work started, {count}:"


class MergeRefused(PlanRefused):
    """A rule forbids this merge. Raised alike by CLI, YAML and Python. Exit code 2."""

    heading = "this merge is refused, {count}:"


class MissingDependency(QuantadaptError):
    """A library that a backend needs is not installed, or fails to import."""


class PluginError(QuantadaptError):
    """A plugin is broken, clashes with another, or declares something that cannot be."""


class DataError(QuantadaptError):
    """The data cannot be read or used; `where` holds the file and, if known, the line."""


class DataWarning(UserWarning):
    """Many examples of a file are cut or dropped; the sentence counts them, with the reasons."""


class ModelError(QuantadaptError):
    """The model cannot be read or used."""


class NumbersError(ModelError):
    """Weights, or what a model predicts, hold NaN or infinity; nothing good can follow."""


class OutputError(QuantadaptError):
    """The output folder cannot be used, or writing to it failed; what was there is untouched."""


class TrainingError(QuantadaptError):
    """Training cannot go on, e.g. because the loss is no longer a number."""


class SlowerWarning(UserWarning):
    """Something works as it should, but takes more time or memory than it might."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the known words where nothing is close."""
    words = sorted(known)
    longer = [repr(other) for other in words if other.startswith(f"{word}_")]
    if longer and word not in words:
        return f"did you mean {' or '.join(longer)}?"
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(words)}" if words else ""
