"""Are refusals raised before any work, and is everything that is refused really impossible?"""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal
from unittest.mock import patch

import pytest

from ..capabilities import Rule
from ..errors import MergeRefused, PlanRefused
from ..machine import Machine, this_machine
from ..planning.stage import plan
from ..registry.discovery import registry
from ..spec import Spec
from .bench import Bench
from .suite import Suite, cells
from .tensors import relative

KINDS: tuple[Literal["dense", "requantize"], ...] = ("dense", "requantize")


class RefusalSuite(Suite):
    """What the backend and the suite's adapters declare to be impossible."""

    @cells("all")
    def test_plan_agrees_with_the_rules(self, bench: Bench, adapter: str) -> None:
        """`plan` refuses exactly the cells that rules refuse, naming rule, reason and fix."""
        refused = bench.refusals(adapter, "attach")
        spec = bench.spec(adapter, export={"merge": "never"})
        if not refused:
            plan(spec)
            return
        with pytest.raises(PlanRefused) as caught:
            plan(spec)
        _assert_named(caught.value, [problem.rule for problem in refused])

    @cells("attach")
    def test_plan_agrees_with_the_declared_merges(self, bench: Bench, adapter: str) -> None:
        for kind in KINDS:
            refused = bench.refusals(adapter, kind)
            spec = bench.spec(adapter, export={"merge": kind})
            if not refused:
                assert plan(spec).merge == kind
                continue
            with pytest.raises(MergeRefused) as caught:
                plan(spec)
            _assert_named(caught.value, [problem.rule for problem in refused])
            assert plan(bench.spec(adapter, export={"merge": "auto"})).merge != kind

    @cells("attach")
    def test_refused_merges_touch_nothing(self, bench: Bench, adapter: str) -> None:
        """Neither a run nor `merge` on a live model gets as far as reading or writing weights."""
        from ..exporting.stage import check_merge, merge
        from ..pipeline import run
        from ..quantizing.state import state_of

        for kind in KINDS:
            if not bench.refusals(adapter, kind):
                continue
            folder = bench.folder() / "run"
            with _no_model_is_read(), pytest.raises(MergeRefused):
                run(bench.spec(adapter, export={"merge": kind}, output=str(folder)))
            model = bench.trained(adapter).model
            with _nothing_is_merged(), pytest.raises(MergeRefused):
                check_merge(state_of(model), kind)
            with _nothing_is_merged(), pytest.raises(MergeRefused):
                merge(model, folder, kind=kind)
            assert not folder.exists(), "a refused merge leaves a folder behind"

    @cells("attach")
    def test_refused_bases_are_refused(self, bench: Bench, adapter: str) -> None:
        """Merging onto the unquantized base is refused before anything is read."""
        from ..exporting.onto import merge_onto
        from ..exporting.saving import save

        if refused := bench.refusals(adapter, "onto"):
            folder = bench.folder()
            saved = save(bench.trained(adapter).model, folder, base=False)
            with _no_model_is_read(), pytest.raises(MergeRefused) as caught:
                merge_onto(saved, bench.source, folder, device=bench.suite.device)
            _assert_named(caught.value, [problem.rule for problem in refused])
            assert not (folder / "merged").exists(), "a refused merge leaves a folder behind"

    def test_every_rule_of_the_backend_refuses(self, bench: Bench) -> None:
        for rule in bench.record.rules:
            assert rule.reason, f"rule {rule.id} has no reason. Say why it refuses"
            assert rule.fix, f"rule {rule.id} has no fix. Say what to do instead"
            if rule.when.get("action") == ("onto",):
                continue  # no plan merges onto another base; the adapters' tests see to it
            specs = list(_specs(bench, rule))
            fix = "`when` names options and values that there are"
            assert specs, f"no spec meets rule {rule.id}: it can never apply. {fix}"
            for spec, machine in specs:
                _assert_refused(spec, machine, rule)

    # Strict: a refusal of something that works is a failure ------------------------------------

    @cells("all")
    def test_refused_cells_do_not_work(self, bench: Bench, adapter: str) -> None:
        refused = bench.refusals(adapter, "attach")
        if refused and bench.suite.strict and not is_policy(bench, adapter, refused):
            _assert_fails(try_to_train(bench, adapter), [p.rule for p in refused])

    @cells("attach")
    @pytest.mark.parametrize("kind", KINDS)
    def test_refused_merges_do_not_work(self, bench: Bench, adapter: str, kind: Any) -> None:
        refused = bench.refusals(adapter, kind)
        if refused and bench.suite.strict and not is_policy(bench, adapter, refused):
            _assert_fails(try_to_merge(bench, adapter, kind), [p.rule for p in refused])

    def test_what_the_backends_rules_refuse_does_not_work(self, bench: Bench) -> None:
        if not bench.suite.strict:
            return
        for rule in bench.record.rules:
            for spec, _ in _specs(bench, rule):
                if _is_here(spec.device) and "action" not in rule.when and not rule.policy:
                    _assert_fails(try_spec(bench, spec), [rule.id])


def is_policy(bench: Bench, adapter: str, refused: list[Any]) -> bool:
    """Say whether one of the rules that refuse is a decision, not an impossibility."""
    rules = (*bench.record.rules, *registry().adapter(adapter).rules)
    decided = {rule.id for rule in rules if rule.policy}
    return any(problem.rule in decided for problem in refused)


def try_to_train(bench: Bench, adapter: str) -> str:
    """Attach and train past the rules; return what went wrong, "" if it worked."""
    try:
        losses = bench.trained(adapter).losses
    except Exception as error:
        return repr(error)
    return "" if losses[-1] < losses[0] else f"the loss went from {losses[0]} to {losses[-1]}"


def try_to_merge(bench: Bench, adapter: str, kind: Literal["dense", "requantize"]) -> str:
    """Merge past the rules; return what went wrong, "" if the merged model is right."""
    from ..exporting.merging import merged_model

    try:
        trained = bench.trained(adapter)
        error = relative(bench.logits(merged_model(trained.model, kind)), trained.tuned)
    except Exception as error_:
        return repr(error_)
    rounding = bench.tolerance.activations
    allowed = rounding if kind == "dense" else rounding + 3 * bench.tolerance.weight.error
    return "" if error <= allowed else f"the logits change by {error:.1e}"


def try_spec(bench: Bench, spec: Spec) -> str:
    """Quantize as `spec` says, past the rules, and train; return what went wrong."""
    suite = type(
        "Tried",
        (bench.suite,),
        {
            "options": spec.backend.options,
            "device": spec.device,
            "dtype": spec.dtype,
            "adapter_options": {spec.adapter.name: spec.adapter.options},
        },
    )
    tried = Bench(suite)
    try:
        with patch("quantadapt.planning.combining.attach_refusals", return_value=[]):
            return try_to_train(tried, spec.adapter.name)
    finally:
        tried.close()


def _assert_fails(what_went_wrong: str, rules: list[str]) -> None:
    assert what_went_wrong, (
        f"rule {', '.join(rules)} refuses something that works: it attaches, trains, and gives the "
        f"right numbers. Take the rule away or narrow it"
    )


def _assert_named(error: PlanRefused, rules: list[str]) -> None:
    """The refusal names each rule, with a reason and a way out, in the text that users see."""
    found = {problem.rule: problem for problem in error.problems}
    for rule in rules:
        assert rule in found, f"it is refused, but not by rule {rule}: {error}"
        assert found[rule].fix, f"rule {rule} has no fix. Say what to do instead"
        for text in (rule, found[rule].what, found[rule].fix):
            assert text in str(error), f"the refusal by rule {rule} lacks {text!r}: {error}"


def _assert_refused(spec: Spec, machine: Machine, rule: Rule) -> None:
    fix = "Do its conditions hold together? All of them have to"
    try:
        plan(spec, machine=machine)
    except PlanRefused as error:
        _assert_named(error, [rule.id])
    else:
        pytest.fail(f"rule {rule.id} does not refuse what its `when` says. {fix}", pytrace=False)


def _specs(bench: Bench, rule: Rule) -> Iterator[tuple[Spec, Machine]]:
    """Yield a spec, and a machine to plan it for, for each combination of facts in `rule.when`."""
    facts = {name: values for name, values in rule.when.items() if name != "action"}
    for values in product(*facts.values()):
        yield from _spec(bench, dict(zip(facts, values, strict=True)), rule)


def _spec(bench: Bench, facts: dict[str, Any], rule: Rule) -> Iterator[tuple[Spec, Machine]]:
    if facts.get("backend", bench.suite.backend) != bench.suite.backend:
        return
    device = facts.get("device", bench.suite.device)
    if device not in bench.record.devices:
        return
    options = {**bench.suite.options, **_options(facts, "backend.")}
    adapter = facts.get("adapter", "lora")
    actions = rule.when.get("action", ())
    merge = next((a for a in ("requantize", "merge") if a in actions), "never")
    yield (
        bench.spec(
            adapter,
            backend={"name": bench.suite.backend, **options},
            **_adapter(adapter, _options(facts, "adapter.")),
            device=device,
            dtype=facts.get("dtype", bench.suite.dtype),
            export={"merge": {"merge": "dense"}.get(merge, merge)},
        ),
        Machine(cuda=((9, 0),)) if device.startswith("cuda") else Machine(),
    )


def _adapter(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"adapter": {"name": name, **options}} if options else {}


def _options(facts: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in facts.items() if n.startswith(prefix)}


def _is_here(device: str) -> bool:
    return device == "cpu" or (device.startswith("cuda") and bool(this_machine().cuda))


def _no_model_is_read() -> Any:
    failure = AssertionError("a model was read although the merge is refused")
    return patch("quantadapt.loading.reading.from_pretrained", side_effect=failure)


def _nothing_is_merged() -> Any:
    failure = AssertionError("weights were merged although the merge is refused")
    return patch("quantadapt.exporting.merging.merged_model", side_effect=failure)
