"""What a suite does not verify as it is run here, and why: an honest end of its output."""

from __future__ import annotations

import os
from typing import Any

from ..machine import this_machine
from ..registry.discovery import registry
from .adapter_suite import AdapterSuite
from .bench import Bench
from .experts_suite import ExpertsSuite
from .refusal_suite import KINDS, RefusalSuite
from .target_suite import TargetSuite

PARTS = {
    TargetSuite: "the layers without an adapter",
    ExpertsSuite: "mixtures of experts",
    AdapterSuite: "training, saving and merging adapters",
    RefusalSuite: "the refusals",
}

Reasons = list[tuple[str, str]]


def unverified(bench: Bench) -> Reasons:
    """Return what and why, for everything that is known before the tests."""
    return [*_refused(bench), *_unproved(bench), *_not_here(bench), *_not_asked_for(bench)]


def _refused(bench: Bench) -> Reasons:
    """Return the cells that no test looks into because a rule refuses them."""
    found: dict[tuple[str, str], list[str]] = {}
    for action, what in (("attach", "{}"), *((kind, f"{kind} merge of {{}}") for kind in KINDS)):
        for adapter in bench.suite.adapters:
            if action != "attach" and bench.refusals(adapter, "attach"):
                continue
            if refused := bench.refusals(adapter, action):
                rules = ", ".join(dict.fromkeys(problem.rule for problem in refused))
                found.setdefault((what, f"refused by rule {rules}"), []).append(adapter)
    return [(what.format(", ".join(names)), why) for (what, why), names in found.items()]


def _unproved(bench: Bench) -> Reasons:
    """Return the rules of which nobody shows that they are needed."""
    suite = bench.suite
    if not issubclass(suite, RefusalSuite):
        return []
    adapters = [registry().adapter(name) for name in suite.adapters]
    rules = [*bench.record.rules, *(rule for adapter in adapters for rule in adapter.rules)]
    if not suite.strict:
        return [("that what is refused does not work", "strict mode is off")] if rules else []
    what = "that what rule {} refuses does not work"
    found = []
    for rule in rules:
        devices = [device for device in rule.when.get("device", ()) if not _is_here(device)]
        if rule.policy:
            found.append((what.format(rule.id), "it would: the rule is a decision"))
        elif devices:
            where = f" on {' or '.join(devices)}"
            found.append((what.format(rule.id) + where, "there is no such device here"))
    return list(dict.fromkeys(found))


def _not_here(bench: Bench) -> Reasons:
    """Return the devices and the libraries that are missing."""
    found = list(getattr(bench.suite, "left_out", {}).items())
    used = bench.suite.device.partition(":")[0]
    others = [device for device in bench.record.devices if device != used]
    if absent := [device for device in others if device == "cuda" and not _is_here(device)]:
        found.append((", ".join(absent), "there is no such device here"))
    if rest := [device for device in others if device not in absent]:
        found.append((", ".join(rest), "not asked for (--device)"))
    return found


def _not_asked_for(bench: Bench) -> Reasons:
    suite, record = bench.suite, bench.record
    found = [
        (what, f"{part.__name__} is no part of this class")
        for part, what in PARTS.items()
        if not issubclass(suite, part)
    ]
    left_out: Any = getattr(suite, "left_out", {})
    others = {a.name for a in registry().adapters()} - {*suite.adapters, *left_out}
    if others and issubclass(suite, AdapterSuite):
        found.append((f"{len(others)} other adapters", "not asked for (--all-adapters)"))
    if dtypes := [dtype for dtype in record.dtypes if dtype != suite.dtype]:
        found.append((f"adapters in {', '.join(dtypes)}", "not asked for (--dtype)"))
    if options := list(record.quantizer.model_fields):
        why = "not asked for (--backend-options)"
        found.append((f"other values of {', '.join(options)}", why))
    if "QUANTADAPT_TESTING_MODEL" not in os.environ:
        why = "not asked for (QUANTADAPT_TESTING_MODEL)"
        found.append(("other models than two layers of the demo", why))
    return found


def _is_here(device: str) -> bool:
    return device == "cpu" or (device.startswith("cuda") and bool(this_machine().cuda))
