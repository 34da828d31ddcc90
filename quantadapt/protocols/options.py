"""What all options classes share, and the figures that some return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

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
        value: the number; nan or inf where there is none.
        unit: what it is counted in, e.g. "nats per token" or "MiB"; "share" is shown in percent;
            empty where it has no unit.
        better: which way is better, "lower" or "higher"; empty where neither is.
    """

    value: float
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{self.value:.1%}"
        return f"{self.value:.4g} {self.unit}".strip()
