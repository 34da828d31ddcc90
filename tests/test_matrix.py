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


def test_the_planner_agrees_with_every_declared_cell():
    known = registry()
    for cell in matrix.declared(known.backends(), known.adapters()):
        spec = Spec(backend=cell.backend, adapter=cell.adapter)
        try:
            made = plan(spec, machine=Machine())
        except PlanRefused as error:
            rules = {problem.rule for problem in error.problems}
            not_installed = all("needs" in problem.what for problem in error.problems)
            assert not_installed or rules >= set(cell.rules)
            assert not_installed or cell.word == "refused"
        else:
            assert cell.word == ("never" if made.merge == "never" else "requantize")


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


CELL = {"backend": "b", "adapter": "a", "declared": "dense", "verified": "passed",
        "merge_error": 2e-7}  # fmt: skip
GENERATED = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "2.0", "hqq": None}}


def test_verified_results_are_read(tmp_path: Path):
    found = matrix.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    assert found.cells[0].text() == "passed 2e-07"
    assert found.origin == "2026-01-01, cpu, torch 2.0"


@pytest.mark.parametrize(
    "values",
    [{}, {"cells": 3}, {"cells": [{}]}, {"cells": [{**CELL, "verified": "perhaps"}]},
     {"cells": [{**CELL, "merge_error": "x"}]}, {"cells": ["x"]}],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_an_error(tmp_path: Path, values: dict[str, Any]):
    with pytest.raises(DataError, match="verified results"):
        matrix.read_verified(write(tmp_path / "m.json", **values))


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError):
        matrix.read_verified(path)
    with pytest.raises(DataError):
        matrix.read_verified(tmp_path / "missing.json")


def test_what_is_bundled_can_be_read():
    assert all(part.cells for part in matrix.bundled())


def test_markdown_keeps_declared_and_verified_apart(tmp_path: Path):
    rule = Rule("b-no-a", {"adapter": ("a",)}, "because", "use c")
    cells = matrix.declared([backend(rules=(rule,))], [adapter(), adapter("c")])
    verified = matrix.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    text = matrix.to_markdown(cells, [verified])
    first, second = text.split("### Verified")
    assert "| a | refused [1] |" in first
    assert "- [1] `b-no-a`: because. Instead: use c." in first
    assert "| c | dense [2] |" in first
    assert "On 2026-01-01, cpu, torch 2.0." in second
    assert "| a | passed 2e-07 |" in second
    assert "No results at hand." in matrix.to_markdown(cells, [])


def test_json_holds_both_parts(tmp_path: Path):
    verified = matrix.read_verified(write(tmp_path / "m.json", generated=GENERATED, cells=[CELL]))
    made = json.loads(
        json.dumps(matrix.to_json(matrix.declared([backend()], [adapter()]), [verified]))
    )
    assert made["declared"][0]["declared"] == "dense"
    assert made["declared"][0]["merge_refusals"][0]["rule"] == "b-merge-dense"
    assert made["verified"][0]["generated"] == GENERATED
    assert made["verified"][0]["cells"][0]["merge_error"] == 2e-7
