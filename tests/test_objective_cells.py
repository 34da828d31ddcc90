"""Every objective with five adapters on backends of each kind: short runs on the bundled data,
whose adapters are loaded again; on a GPU, too.

They go through quantadapt.objectives, quantadapt.rewarding and quantadapt.data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import OBJECTIVES, answered

import quantadapt as qa
from quantadapt.dependencies import missing_requirements
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model

torch.set_num_threads(1)
ADAPTERS = ("lora", "dora", "pissa", "vera", "ia3")
BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "hqq": {"bits": 4},
    "bnb-nf4": {},
    "torchao-int8": {},
    "gptq": {},
}
BETTER = {
    "sft": ("perplexity", "loss"),
    "pretrain": ("perplexity", "loss"),
    "distill": ("agreement", "kl"),
}
"""Objectives whose loss is also what an evaluation measures: it falls on held-out data."""
CELLS = [
    (objective, adapter, backend)
    for objective in OBJECTIVES
    for adapter in ADAPTERS
    for backend in BACKENDS
]
QUICK = (("orpo", "ia3", "hqq"), ("classify-tokens", "dora", "bnb-nf4"))


def test_each_objective_has_cells() -> None:
    assert {record.name for record in registry().records(qa.Objective)} == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("objective", "adapter", "backend"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
def test_a_cell(objective: str, adapter: str, backend: str, tmp_path: Path) -> None:
    learns(objective, adapter, backend, tmp_path, device="cpu", dtype="float32", close=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq", "gptq"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cell_on_a_gpu(objective: str, backend: str, tmp_path: Path) -> None:
    """Where the libraries of both are installed: a GPU is rented with some of them."""
    known = registry()
    for record in (known.record(qa.Objective, objective), known.record(qa.Backend, backend)):
        if missing := missing_requirements(record):
            pytest.skip(missing[0].what)
    learns(objective, "lora", backend, tmp_path, device="cuda", dtype="bfloat16", close=0.05)


def learns(
    objective: str, adapter: str, backend: str, folder: Path, *, device: str, dtype: str,
    close: float,
) -> None:  # fmt: skip
    """Run it for a few steps; every loss is a number and every step moves weights, what is measured
    is measured, and the adapter that lies in the folder is the one that was trained."""
    own = OBJECTIVES[objective]
    if objective == "distill":  # it brings back what was lost
        backend = "torchao-intx" if backend == "torchao-int8" else backend
    if objective in ("distill", "rloo") and adapter == "pissa":
        adapter = "hira"  # PiSSA's start is another model, and they look back to the one that was
    made = qa.run(
        qa.Spec(
            model=str(small_model(1)),
            backend={"name": backend, **BACKENDS.get(backend, {})},
            adapter=adapter,
            objective={"name": objective, **answered(folder, own)},
            data={"max_examples": 32, "max_length": 96, **own.get("data", {})},
            train={"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
            evaluate={"unquantized": False, "max_examples": 8, "samples": 0},
            export={"merge": "never"},
            device=device,
            dtype=dtype,
            output=str(folder / "run"),
        )
    )
    assert made.metrics["train"]["steps"] == 3
    assert not made.metrics["failed_evaluations"]
    logged = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged)
    if objective in BETTER:
        evaluation, figure = BETTER[objective]
        values = made.metrics["evaluations"][evaluation][figure]["values"]
        assert values["tuned"] < values["quantized"]
    trained = said(made.model)
    loaded = said(qa.load(folder / "run", device=device))
    assert torch.isfinite(trained).all()
    assert torch.equal(said(made.model), trained)  # what is compared does not move
    assert float((loaded - trained).abs().max()) <= close * max(1.0, float(trained.abs().max()))


def said(model: Any) -> torch.Tensor:
    """Return what a model makes of some tokens: its logits, or the states of one without a head."""
    place = next(model.parameters()).device
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor([[5, 9, 17, 33, 65]], device=place))
    made = found.logits if "logits" in found else found.last_hidden_state
    return made.float().cpu()
