"""Which rows each process reads of an epoch, as accelerate's own sampler hands them out."""

from __future__ import annotations

from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from quantadapt.training.shared_rows import Evened


def read(rows: int, size: int, groups: int) -> list[list[list[int]]]:
    """Return the batches of each process."""
    made = []
    for index in range(groups):
        batches = BatchSampler(range(rows), size, drop_last=False)
        shard = BatchSamplerShard(Evened(batches, groups), groups, index, even_batches=False)
        made.append(list(shard))
        assert len(made[-1]) == len(shard)
    return made


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("rows", range(1, 45))
def test_all_rows_are_read_and_no_more_than_have_to_be(rows: int, size: int, groups: int) -> None:
    found = read(rows, size, groups)
    steps = {len(batches) for batches in found}
    assert steps == {-(-rows // (size * groups))}  # all make as many passes, as many as one would
    last = rows % (size * groups)
    counts = Counter(row for batches in found for batch in batches for row in batch)
    assert set(counts) == set(range(rows))
    assert sum(counts.values()) - rows == (max(groups - last, 0) if last else 0)
    for step, batches in enumerate(zip(*found, strict=True)):
        together = [row for batch in batches for row in batch]
        first = step * size * groups
        assert together[: rows - first] == list(range(first, min(first + size * groups, rows)))
        assert all(1 <= len(batch) <= size for batch in batches)
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
