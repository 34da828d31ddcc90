"""What all options classes share, and the figures that some return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

from ..folders.metrics import with_unit
from ..inputs.typed import Typed


class Options(Typed):
    """The options of a record: frozen, with every field something that users set.

    Field types, defaults and descriptions are what users see in `quantadapt backends show NAME` and
    the like, in the reference and in error messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Figure:
    """A number that an evaluation or an export found.

    Attributes:
        value: the number; nan or inf where there is none. A count is an int, and shown as one.
        unit: what it is counted in, e.g. "nats per token"; "share" is shown in percent, "MiB" as
            a size in the unit that fits it; empty where it has no unit.
        better: which way is better, "lower" or "higher"; empty where neither is.
        error: its standard error, where that is known; None elsewhere.
        scores: what it is the mean of, example by example, where there is such; the standard error
            of a change between two models is then that of the differences.
    """

    value: float
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""
    error: float | None = None
    scores: tuple[float, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return with_unit(self.value, self.unit, "{:.4g}".format)

    def since(self, before: Figure) -> Figure:
        """Return the change from `before`, with its standard error: over the same examples by their
        differences, else as of two figures that know nothing of each other."""
        error, count = None, len(self.scores)
        if count > 1 and count == len(before.scores):
            apart = [new - old for new, old in zip(self.scores, before.scores, strict=True)]
            mean = math.fsum(apart) / count
            error = math.sqrt(math.fsum((d - mean) ** 2 for d in apart) / (count - 1) / count)
        elif self.error is not None and before.error is not None:
            error = math.hypot(self.error, before.error)
        return Figure(self.value - before.value, self.unit, self.better, error)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data, without the scores."""
        found = {"value": self.value, "unit": self.unit, "better": self.better}
        return found if self.error is None else {**found, "error": self.error}
