"""Capabilities are data: merge kinds, rules, and the one function that turns them into refusals.

A backend or adapter declares rules; `refusals` compares them with the facts of a cell. The planner
raises what it returns, the matrix prints it, the docs render it, and the conformance suite proves
it in both directions. It imports nothing heavy and looks at nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .errors import PluginError, Problem

if TYPE_CHECKING:
    from .inputs.fingerprints import Fingerprint

KEEP = "keep the adapter beside the base (export.merge: never)"
"""The way out of every refused merge."""


class Merge(IntEnum):
    """What may become of adapter and base at the end. A cell gets min(backend, adapter)."""

    NEVER = 0
    """No merged weights are ever written; keep the adapter beside the base."""
    DENSE = 1
    """Merge into the dequantized weights and keep those dense."""
    REQUANTIZE = 2
    """As DENSE, and on request quantize the merged weights again with the same options. How much of
    what was learned that keeps is measured for each merge, see `export.min_gain`."""

    @property
    def words(self) -> str:
        """What becomes of a merge, for lists, tables and the reference."""
        dense = "into dense weights"
        never = "never, the adapter stays beside the base"
        return (never, dense, f"{dense}, or quantized again")[self]


class Patterns(tuple[str, ...]):
    """Values of a rule's condition, as file names are matched: `pissa_niter_*` is any of them."""

    __slots__ = ()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and any(fnmatchcase(value, pattern) for pattern in self)


class WhenGiven(tuple[str, ...]):
    """Values of a rule's condition that holds wherever an option is given, and not empty."""

    __slots__ = ()

    def __contains__(self, value: object) -> bool:
        return bool(value)


@dataclass(frozen=True)
class Rule:
    """A combination that is refused.

    Attributes:
        id: short and stable, e.g. `hqq-3bit-axis0`; shown to users and asserted by tests.
        when: fact name -> the values for which the rule applies. All have to match. Facts are
            `action` ("attach", "merge", "requantize", "onto", "shard"), `backend`, `adapter`,
            `device` ("cpu", "cuda", ...), `dtype` ("float32", ...), `backend.<option>`,
            `adapter.<option>`; for a rule of another kind of record also its own `<kind>` and
            `<kind>.<option>`. The values may be `Patterns`, or `WhenGiven`.
        reason: why it is refused, as a sentence.
        fix: what to do instead, as a sentence.
        policy: it would work, but is unsound; the conformance suite then tries the way out
            instead of looking for a failure.
    """

    id: str
    when: Mapping[str, tuple[Any, ...]]
    reason: str
    fix: str
    policy: bool = False

    def __post_init__(self) -> None:
        for name, values in self.when.items():  # of a text, `in` would take any part
            if isinstance(values, str) or not isinstance(values, Collection):
                what = f"{name} is {values!r}, not a tuple of values"
                raise PluginError(what, where=f"rule {self.id!r}")

    def applies(self, facts: Mapping[str, Any]) -> bool:
        """Say whether every condition holds."""
        return all(facts.get(name) in values for name, values in self.when.items())


@dataclass(frozen=True)
class Cell:
    """The facts about one combination of backend, adapter and machine.

    Attributes:
        device: "cpu", "cuda", "hpu", ...; without an index.
        dtype: torch's name of the compute dtype, e.g. "bfloat16".
        model: checkpoint folder or hub id of the base; empty where that is not known.
        fingerprint: what the base is known by, where that is known.
        others: kind of record -> name and options, where one of another kind is looked at, too.
    """

    backend: str
    adapter: str
    device: str = "cpu"
    dtype: str = "float32"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    fingerprint: Fingerprint | None = None
    others: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def beside(self, kind: str, name: str, options: Mapping[str, Any]) -> Cell:
        """Return the cell together with a record of another kind, e.g. an objective."""
        return replace(self, others={**self.others, kind: (name, options)})

    @property
    def where(self) -> str:
        """What problems with it are told of: "hqq x lora"."""
        return " x ".join([self.backend, self.adapter, *(name for name, _ in self.others.values())])

    def facts(self, action: str) -> dict[str, Any]:
        """Return the flat facts that `Rule.when` speaks of."""
        facts: dict[str, Any] = {
            "action": action,
            "backend": self.backend,
            "adapter": self.adapter,
            "device": self.device,
            "dtype": self.dtype,
        }
        facts |= {f"backend.{name}": value for name, value in self.backend_options.items()}
        facts |= {f"adapter.{name}": value for name, value in self.adapter_options.items()}
        for kind, (name, options) in self.others.items():
            facts |= {kind: name} | {f"{kind}.{key}": value for key, value in options.items()}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}


def refusals(cell: Cell, rules: Iterable[Rule], action: str = "attach") -> list[Problem]:
    """Return a problem for each rule that forbids `action` on `cell`; empty means allowed.

    A rule whose `when` names no action holds for attaching, and so for everything after it.
    """
    facts = cell.facts(action)
    return [
        Problem(rule.reason, rule.fix, where=cell.where, rule=rule.id)
        for rule in rules
        if rule.applies(facts) and ("action" in rule.when or action == "attach")
    ]
