"""Two processes that share the examples come to the numbers of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import in_processes

import quantadapt as qa
from quantadapt import evaluation
from quantadapt.distributed import start
from quantadapt.sharding import shard

COUNTS = (1, 4, 5, 7)
"""Examples; in batches of 2, some leave one process with a batch less than the other."""


def examples(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 1000, (5 + i,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "completion_mask": [0, 0] + [1] * (len(row) - 2)} for row in rows]


def perplexities(split: bool, sharded: bool) -> list[Any]:
    model = qa.quantize(None, "none", device="cpu")
    if split:
        start("cpu")
    if sharded:
        shard(model)
    found = []
    for count in COUNTS:
        one = evaluation.perplexity(model, examples(count), batch_size=2, split=split)
        found.append((one.loss, one.tokens))
    return found


def both() -> dict[str, list[Any]]:
    return {kind: perplexities(True, kind == "fsdp") for kind in ("ddp", "fsdp")}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, list[Any]]]:
    return in_processes(2, both, tmp_path_factory.mktemp("split"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(two, kind) -> None:
    expected = perplexities(False, False)
    for found in two:
        for (loss, tokens), (wanted, count) in zip(found[kind], expected, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-6)
            assert tokens == count
    assert two[0] == two[1]


def test_each_process_takes_its_part(monkeypatch) -> None:
    from quantadapt.distributed import World
    from quantadapt.evaluation.predictions import _batches

    rows = examples(7)
    parts = [_batches(rows, 2, World(rank, rank, 2), filled=True) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    taken = [ids for part in parts for batch in part for _, (ids, mask, *_) in batch if any(mask)]
    assert sorted(taken, key=len) == [row["input_ids"] for row in rows]
    lonely = [_batches(rows[:5], 2, World(rank, rank, 2), filled=True) for rank in range(2)]
    assert [len(part) for part in lonely] == [2, 2]
    assert not any(lonely[1][-1][0][1][1])
    assert len(_batches(rows[:5], 2, World(1, 1, 2), filled=False)) == 1
