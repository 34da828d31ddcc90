"""Several threads of one process: each gets what it would get alone."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils
from transformers.utils import logging as transformers_logging

import quantadapt as qa
from quantadapt.compiling import _dtype, results_in
from quantadapt.facade.frozen import is_recomputing, recomputing
from quantadapt.registry import registry
from quantadapt.remote_code import trusted, trusting
from quantadapt.testing.small_demo import small_model

THREADS = 8
IDS = torch.arange(3, 19)[None]
BACKENDS = [
    ("hqq", {"bits": 4}),
    ("none", {}),
    ("hqq", {"bits": 3}),
    ("torchao-int8", {}),
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.clone()


def work(folder: Path, number: int, data: Any) -> dict[str, Any]:
    """Quantize, attach, train, save, load, evaluate, merge; return what came of it."""
    backend, options = BACKENDS[number % len(BACKENDS)]
    out, seed = folder / str(number), number % len(BACKENDS)
    model = qa.quantize(small_model(), backend, device="cpu", **options)
    base = logits(model)
    tuned = qa.attach(model, "lora", r=2, seed=seed)
    start = {name: p.detach().clone() for name, p in tuned.named_parameters() if "lora_A" in name}
    qa.train(tuned, data, max_steps=2, seed=seed, per_device_train_batch_size=2)
    qa.save(tuned, out)
    loaded = qa.load(out, device="cpu")
    found = qa.evaluate(loaded, data, max_examples=4)
    qa.merge(tuned, out, data=data)
    merged = logits(qa.load(out / "merged", device="cpu"))
    return {"base": base, **start, "tuned": logits(loaded), "merged": merged, **found}


def in_threads(call: Callable[[int], Any]) -> list[Any]:
    """Begin the calls at once."""
    barrier = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        barrier.wait(30)
        return call(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def state() -> dict[str, Any]:
    """Return what the process shares, as it is now."""
    from transformers import core_model_loading

    return {
        "spawn": core_model_loading.spawn_materialize,
        "packed": masking_utils.find_packed_sequence_indices,
        "tracing": masking_utils.is_tracing,
        "dtype": torch.get_default_dtype(),
        "filters": list(warnings.filters),
        "level": logging.getLogger().level,
        "verbosity": transformers_logging.get_verbosity(),
        "environment": dict(os.environ),
        "kaiming": torch.nn.init.kaiming_uniform_,
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.slow
def test_eight_threads_get_what_each_would_get_alone(tmp_path: Path, random_data: Any) -> None:
    data = random_data.select(range(4))
    serial = [work(tmp_path / "serial", number, data) for number in range(len(BACKENDS))]
    before = state()
    found = in_threads(lambda number: work(tmp_path / "threads", number, data))
    for number, together in enumerate(found):
        alone = serial[number % len(BACKENDS)]
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            same = torch.equal(value, together[name]) if torch.is_tensor(value) else (
                value == together[name]
            )  # fmt: skip
            assert same, (number, name)
    assert state() == before
    again = qa.quantize(small_model(), "hqq", device="cpu", bits=4)
    assert torch.equal(logits(again), serial[0]["base"])


def test_a_model_of_transformers_is_loaded_as_ever_meanwhile() -> None:
    """Reading ahead takes over what this thread loads, and nothing that another does."""
    from quantadapt.loading.read_ahead import reading_ahead

    expected = logits(AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32))
    load = AutoModelForCausalLM.from_pretrained
    with (
        warnings.catch_warnings(record=True) as told,
        reading_ahead("cpu"),
        ThreadPoolExecutor(1) as pool,
    ):
        other = pool.submit(load, small_model(), dtype=torch.float32).result()
    assert "does not call spawn_materialize" in str(told[-1].message), "in this thread"
    assert torch.equal(logits(other), expected)


def test_what_is_lent_to_one_thread_is_not_lent_to_others() -> None:
    from quantadapt.training.lent import one_row_each

    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = masking_utils.find_packed_sequence_indices(positions)
    assert packed is not None
    with (
        one_row_each(pytest.fail),
        results_in(torch.bfloat16),
        recomputing(),
        trusting(True),
        ThreadPoolExecutor(1) as pool,
    ):
        assert masking_utils.find_packed_sequence_indices(positions) is None
        assert (_dtype(), is_recomputing(), trusted()) == (torch.bfloat16, True, True)
        there = pool.submit(masking_utils.find_packed_sequence_indices, positions).result()
        assert torch.equal(there, packed)
        asked = pool.submit(lambda: (_dtype(), is_recomputing(), trusted())).result()
        assert asked == (None, False, False)


def test_plugins_are_looked_for_once() -> None:
    registry.cache_clear()
    found = in_threads(lambda _: registry())
    assert all(one is found[0] for one in found)


def test_a_failure_leaves_the_turn_to_others() -> None:
    def call(number: int) -> str:
        if number % 2:
            with pytest.raises(qa.QuantadaptError):
                qa.quantize("/nowhere/at/all", "hqq")
            return "refused"
        return type(qa.quantize(small_model(), "hqq", device="cpu")).__name__

    assert in_threads(call) == ["LlamaForCausalLM", "refused"] * (THREADS // 2)
