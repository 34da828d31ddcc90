"""The matrix: built from the planner's own functions, verified results kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantadapt import matrix
from quantadapt.capabilities import Merge, Rule
from quantadapt.errors import DataError, PlanRefused
from quantadapt.machine import Machine
from quantadapt.matrix import results
from quantadapt.matrix.tables import summary, to_markdown
from quantadapt.planning import plan
from quantadapt.protocols import AdapterTarget, Quantizer
from quantadapt.records import Adapter, Backend
from quantadapt.registry import registry
from quantadapt.spec import Spec


class Plain(Quantizer):
    """No options; only looked at, never run."""

    @property
    def target(self) -> AdapterTarget:
        raise AssertionError("the matrix asks no quantizer to work")

    def quantize(self, source: Any, **options: Any) -> Any:
        raise AssertionError("the matrix asks no quantizer to work")

    def save(self, model: Any, path: Any) -> None:
        raise AssertionError("the matrix asks no quantizer to work")

    bits: int = 4


class Demanding(Plain):
    bits: int


def backend(name: str = "b", **fields: Any) -> Backend:
    return Backend(name, "summary", fields.pop("quantizer", Plain), **fields)


def adapter(name: str = "a", **fields: Any) -> Adapter:
    return Adapter(name, "summary", "LORA", **fields)


@pytest.mark.parametrize(
    ("backend_merge", "adapter_merge", "word", "rules"),
    [
        (Merge.REQUANTIZE, Merge.REQUANTIZE, "requantize", ()),
        (Merge.DENSE, Merge.REQUANTIZE, "dense", ("b-merge-dense",)),
        (Merge.NEVER, Merge.REQUANTIZE, "never", ("b-merge-never",)),
        (Merge.REQUANTIZE, Merge.NEVER, "never", ("a-merge-never",)),
    ],
)
def test_a_cell_says_what_both_sides_allow(backend_merge, adapter_merge, word, rules):
    cell = matrix.declared_cell(backend(merge=backend_merge), adapter(merge=adapter_merge))
    assert (cell.word, cell.rules) == (word, rules)


def test_a_rule_refuses_its_cell_only():
    rule = Rule("b-no-a", {"adapter": ("a",)}, "because", "use c")
    cells = matrix.declared([backend(rules=(rule,))], [adapter(), adapter("c")])
    assert [(cell.word, cell.rules) for cell in cells] == [
        ("refused", ("b-no-a",)),
        ("dense", ("b-merge-dense",)),
    ]


def test_rules_about_the_machine_and_options_count():
    rule = Rule("b-4bit-cuda", {"device": ("cuda",), "backend.bits": (4,)}, "because", "use 8")
    subject = backend(rules=(rule,), devices=("cpu", "cuda"))
    assert matrix.declared_cell(subject, adapter(), device="cuda:1").rules == ("b-4bit-cuda",)
    assert matrix.declared_cell(subject, adapter(), device="cpu").word == "dense"


def test_a_device_or_dtype_that_is_not_declared_is_refused():
    subject = backend(devices=("cuda",), dtypes=("bfloat16",))
    cell = matrix.declared_cell(subject, adapter())
    assert cell.word == "refused"
    assert cell.rules == ("device", "dtype")


def test_a_backend_without_defaults_is_named():
    cell = matrix.declared_cell(backend(quantizer=Demanding), adapter())
    assert cell.word == "refused"
    assert "no default for bits" in cell.refusals[0].what


def test_options_change_what_is_declared():
    rule = Rule("b-2bit", {"backend.bits": (2,)}, "too coarse", "use more bits")
    subject = backend(rules=(rule,))
    assert matrix.declared_cell(subject, adapter()).word == "dense"
    assert matrix.declared_cell(subject, adapter(), options={"bits": 2}).rules == ("b-2bit",)
    wrong = matrix.declared_cell(subject, adapter(), options={"bit": 2})
    assert "b cannot have bit" in wrong.refusals[0].what


def test_the_dtype_is_one_that_the_backend_has():
    assert matrix.dtype_for(backend(), "cpu") == "float32"
    assert matrix.dtype_for(backend(), "cuda:1", "auto") == "bfloat16"
    half = backend(dtypes=("float16", "bfloat16"))
    assert matrix.dtype_for(half, "cpu") == "float16"
    assert matrix.dtype_for(half, "cpu", "float32") == "float32"
    assert matrix.declared([half], [adapter()])[0].word == "dense"


def test_options_that_are_defaults_do_not_count():
    assert matrix.without_defaults(backend(), {"bits": 4, "axis": 1}) == {"axis": 1}


def test_obstacles_are_mistakes_and_what_is_missing_but_no_rules():
    none, hqq = registry().backend("none"), registry().backend("hqq")
    assert matrix.obstacles(none, {}, "cpu", "float32") == []
    (wrong,) = matrix.obstacles(hqq, {"bitz": 3}, "cpu", "float32")
    assert (wrong.where, wrong.fix) == ("backend.bitz", "did you mean 'bits'?")


def test_the_planner_agrees_with_every_declared_cell():
    known, planned = registry(), list[str]()
    for cell in matrix.declared(known.backends(), known.adapters()):
        dtype = matrix.dtype_for(known.backend(cell.backend), "cpu")
        spec = Spec(backend=cell.backend, adapter=cell.adapter, dtype=dtype)
        try:
            made = plan(spec, machine=Machine())
        except PlanRefused as error:
            rules = {problem.rule for problem in error.problems if problem.rule}
            assert rules == {problem.rule for problem in cell.refusals}
            planned.append("refused" if rules else "not installed")
        else:
            assert cell.word != "refused"
            assert (made.merge == "never") == (cell.word == "never")
            planned.append(made.merge)
    assert {"refused", "dense", "never"} <= set(planned)


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


CELL = {"backend": "b", "adapter": "a", "declared": "dense", "verified": "passed",
        "merge_error": 2e-7}  # fmt: skip
GENERATED = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "2.0", "hqq": None}}


def test_verified_results_are_read(tmp_path: Path):
    part = results.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    assert part.cells[0].text() == "passed 2e-07"
    assert part.cells[0].merge_error == 2e-7
    assert part.origin == "2026-01-01, cpu, torch 2.0"


@pytest.mark.parametrize(
    "values",
    [{}, {"cells": 3}, {"cells": [{}]}, {"cells": [{**CELL, "verified": "perhaps"}]},
     {"cells": [{**CELL, "merge_error": "x"}]}, {"cells": ["x"]}],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_an_error(tmp_path: Path, values: dict[str, Any]):
    with pytest.raises(DataError, match="verified results"):
        results.read_verified(write(tmp_path / "m.json", **values))


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError):
        results.read_verified(path)
    with pytest.raises(DataError):
        results.read_verified(tmp_path / "missing.json")


def test_markdown_keeps_declared_and_verified_apart(tmp_path: Path):
    rule = Rule("b-no-a", {"adapter": ("a",)}, "because", "use c")
    cells = matrix.declared([backend(rules=(rule,))], [adapter(), adapter("c")])
    verified = results.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    text = to_markdown(cells, [verified])
    first, second = text.split("### Verified on CPU")
    assert "| backend | a | c |" in first
    assert "| b | refused [1] | dense [2] |" in first
    assert "- [1] `b-no-a`: because. Instead: use c." in first
    assert "On 2026-01-01, cpu, torch 2.0." in second
    assert "| b | passed 2e-07 |" in second
    assert "No results at hand." in to_markdown(cells, [])


def test_other_adapters_get_a_table_of_their_own(tmp_path: Path):
    cells = matrix.declared([backend(), backend("d")], [adapter("x"), adapter("lora")])
    lines = to_markdown(cells, []).splitlines()
    assert lines[2:6] == [
        "| backend | lora | experts |",
        "| --- | --- | --- |",
        "| b | dense [1] | dense |",
        "| d | dense [2] | dense |",
    ]
    assert lines[7] == "| adapter | b | d |"
    assert lines[9] == "| x | dense [1] | dense [2] |"


def found(adapter: str = "lora", verified: Any = "passed", **fields: Any) -> results.VerifiedCell:
    values = {
        "declared": "dense",
        "origin": {"device": "cpu", "versions": {"torch": "2"}},
        **fields,
    }
    return results.VerifiedCell(values.pop("backend", "b"), adapter, verified, **values)


def test_devices_options_and_troubles_are_told_apart():
    own = {"origin": {"device": "H200", "versions": {"torch": "2", "spam": "1"}}}
    part = results.Verified.of(
        [
            found("ia3"),
            found("lora", figures={"merge_error": 1e-7}),
            found("lora", options={"bits": 2}),
            found("lora", "crashed", backend="d", detail="killed by SIGSEGV"),
            found("lora", device="cuda", dtype="bfloat16", **own),
            found("lora", "not run", backend="d", device="cuda", detail="needs spam"),
        ]
    )
    cpu, cuda = part.by_device()
    assert [cell.title for cell in cpu.cells] == [
        "b x lora", "b x ia3", "b (bits=2) x lora", "d x lora"
    ]  # fmt: skip
    text = to_markdown([], [part])
    first, second = text.split("### Verified on CUDA")
    assert "On cpu, torch 2." in first
    assert "| b | passed 1e-07 | passed |" in first
    assert "| b (bits=2) | float32 | lora passed |" in first
    assert "- crashed: d x lora: killed by SIGSEGV" in first
    assert "- not run: d x lora: needs spam" in second
    assert cuda.where() == "CUDA"


def test_the_summary_names_what_is_not_as_declared():
    cells = matrix.declared([backend(), backend("d")], [adapter("lora"), adapter("dora")])
    parts = [
        results.Verified.of([found(), found("dora", "failed")]),
        results.Verified.of([found(device="cuda", declared="never"), found("dora", device="cuda")]),
    ]
    assert summary(cells, parts)[1:] == [
        ["b", "dense, never on CUDA", "dense, failed on CPU", "dense", "CPU, CUDA"],
        ["d", "dense", "dense", "dense", "nothing yet"],
    ]


def test_what_becomes_of_experts_is_a_column_and_has_to_agree() -> None:
    hqq, lora = registry().backend("hqq"), registry().adapter("lora")
    cell = matrix.declared_cell(hqq, lora)
    assert cell.experts
    assert cell.to_dict()["experts"]
    assert not matrix.declared_cell(registry().backend("none"), lora).experts

    def measured(share: float) -> results.VerifiedCell:
        facts = {"backend": "hqq", "declared": cell.word, "figures": {"experts_share": share}}
        return found(**facts)

    text = to_markdown([cell], [results.Verified.of([measured(0.987)])])
    assert "| backend | lora | experts |" in text
    assert f"| hqq | {cell.word} | quantized |" in text
    assert "| hqq | passed | 98.7% |" in text
    assert summary([cell], [])[1] == ["hqq", cell.word, "quantized", "nothing yet"]

    def told(share: float) -> list[str]:
        parts = [results.Verified.of([measured(share)])]
        return [t for t in results.disagreements(parts, [hqq], [lora]) if "experts" in t]

    assert told(0.987) == []
    assert told(0.2) == ["hqq x lora on cpu in float32: quantized 20% of models with experts"]


def test_json_holds_both_parts(tmp_path: Path):
    verified = results.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    made = json.loads(
        json.dumps(results.to_json(matrix.declared([backend()], [adapter()]), [verified]))
    )
    assert made["declared"][0]["declared"] == "dense"
    assert made["declared"][0]["merge_refusals"][0]["rule"] == "b-merge-dense"
    assert made["verified"][0]["generated"] == GENERATED
    assert made["verified"][0]["cells"][0]["merge_error"] == 2e-7


# Do results and declarations agree? ---------------------------------------------------------------

FIVE = [adapter(name) for name in matrix.MAIN]


def disagreements(*cells: results.VerifiedCell, **fields: Any) -> list[str]:
    return results.disagreements([results.Verified.of(cells)], [backend(**fields)], FIVE)


def test_results_that_agree():
    cells = [found(name) for name in matrix.MAIN]
    assert disagreements(*cells) == []
    assert disagreements(*cells, found(device="cuda", dtype="bfloat16")) == []
    assert disagreements(devices=("cuda",)) == []


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        (found(declared="requantize"), "declared dense now, requantize when verified"),
        (
            found(verified="failed", detail="test_x: off"),
            "b x lora on cpu in float32: failed. test",
        ),
        (found(verified="crashed"), "crashed"),
        (found(verified="not run"), "b x lora: not verified on cpu"),
        (found(options={"bits": 2}), "b x lora: not verified on cpu"),
        (found(backend="gone"), "gone x lora on cpu in float32: there is no such backend"),
        (found("gone"), "b x gone on cpu in float32: there is no such backend or adapter"),
        (found("ia3", options={"bit": 3}), "declared refused now, dense when verified"),
    ],
)
def test_each_disagreement_is_a_sentence(cell, sentence):
    others = [found(name) for name in matrix.MAIN if name != "lora"]
    lines = disagreements(*others, cell)
    assert any(sentence in line for line in lines), lines


def test_a_backend_without_results_is_named():
    names = ", ".join(matrix.MAIN)
    assert results.disagreements([], [backend()], FIVE) == [f"b x {names}: not verified on cpu"]


def test_what_is_bundled_agrees_with_what_is_declared():
    parts = results.bundled()
    assert "CPU" in [part.where() for part in parts]
    assert all(Path(part.source).read_text() == part.to_json() for part in parts)
    known = registry()
    ours = [b for b in known.backends() if known.provenance(b).distribution == "quantadapt"]
    lines = results.disagreements(parts, ours, known.adapters())
    assert not lines, "\n".join([*lines, f"verify these cells again: {results.HOW}"])
