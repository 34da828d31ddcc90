"""Reading a checkpoint ahead of quantizing: it overlaps, it is bounded, and it changes nothing."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from quantadapt_bnb import NF4
from quantadapt_hqq import HQQ
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, core_model_loading

from quantadapt.errors import ModelError, SlowerWarning
from quantadapt.loading import from_pretrained, read_ahead
from quantadapt.loading.read_ahead import ReadAhead, reading_ahead
from quantadapt.testing.small_demo import small_model

SMALL = str(small_model())
LINEARS = 14
LARGEST = 256 * 768 * 4  # bytes of a projection of its MLPs


class Watch:
    """Notes what threads read and what is quantized, and makes both slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, read: float = 0, quantize: float = 0):
        self.reads: list[tuple[float, float]] = []
        self.quantized: list[tuple[float, float]] = []
        self.alive: list[int] = []
        self._layers: list[weakref.ref[Tensor]] = []
        self._main = threading.get_ident()
        real_read, real_quantize = ReadAhead._read, HQQ.quantize_linear

        def reading(reader: ReadAhead, job: Any) -> Tensor:
            started = time.perf_counter()
            tensor = real_read(reader, job)
            time.sleep(read)
            assert threading.get_ident() != self._main
            if tensor.ndim == 2:
                self.reads.append((started, time.perf_counter()))
                self._layers.append(weakref.ref(tensor))
            return tensor

        def quantizing(quantizer: HQQ, linear: nn.Linear) -> nn.Module:
            started = time.perf_counter()
            time.sleep(quantize)
            self.alive.append(sum(t.nbytes for ref in self._layers if (t := ref()) is not None))
            vendor = real_quantize(quantizer, linear)
            self.quantized.append((started, time.perf_counter()))
            return vendor

        monkeypatch.setattr(ReadAhead, "_read", reading)
        monkeypatch.setattr(HQQ, "quantize_linear", quantizing)

    def overlapping(self) -> int:
        """Of the reads, count those during which a layer was quantized."""
        return sum(any(a < d and c < b for c, d in self.quantized) for a, b in self.reads)


def test_layers_are_read_while_others_are_quantized(monkeypatch) -> None:
    watch = Watch(monkeypatch, read=0.005, quantize=0.02)
    HQQ().quantize(SMALL, device="cpu", dtype=torch.float32)
    assert len(watch.quantized) == LINEARS
    assert len(watch.reads) >= LINEARS - 1  # the first may be wanted before a thread has begun
    assert watch.overlapping() >= LINEARS - 3


def test_no_more_is_read_than_the_bound(monkeypatch) -> None:
    watch = Watch(monkeypatch, quantize=0.005)
    monkeypatch.setattr(read_ahead, "AHEAD", 2 * LARGEST)
    HQQ().quantize(SMALL, device="cpu", dtype=torch.float32)
    assert LARGEST < max(watch.alive) <= 2 * LARGEST + LARGEST  # the last is being quantized


@pytest.mark.parametrize("ahead", [0, 2 * LARGEST, 2**28])
def test_the_model_is_the_one_without_reading_ahead(ahead, monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD", ahead)
    live, to = from_pretrained(SMALL), {"device": "cpu", "dtype": torch.bfloat16}
    found, expected = (HQQ().quantize(source, **to).state_dict() for source in (SMALL, live))
    assert sum(name.endswith("W_q") for name in found) == LINEARS
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# The reader --------------------------------------------------------------------------------------


def job(value: Tensor | Exception) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if isinstance(value, Exception):
            raise value
        return value

    return read


def add(reader: ReadAhead, value: Any, nbytes: int = 4) -> Callable[[], Tensor]:
    return reader.add(read_ahead._Read(torch.device("cpu"), job(value), job(value), nbytes))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_any_order_is_served(order, monkeypatch) -> None:
    """Converters that join tensors take them in another order."""
    monkeypatch.setattr(read_ahead, "AHEAD", 8)
    reader = ReadAhead("cpu")
    takes = [add(reader, torch.tensor(i)) for i in range(4)]
    assert [int(takes[i]()) for i in order] == order
    assert (reader.held, len(reader.coming)) == (0, 0)
    reader.close()


def test_a_tensor_beyond_the_bound_is_read_ahead_alone(monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD", 8)
    reader = ReadAhead("cpu")
    takes = [add(reader, torch.tensor(i), nbytes) for i, nbytes in enumerate([4, 100, 4, 4])]
    held = []
    for i, take in enumerate(takes):
        assert int(take()) == i
        held.append(reader.held)
    assert held == [100, 8, 4, 0]
    reader.close()


def test_an_error_shows_where_the_tensor_is_wanted() -> None:
    reader = ReadAhead("cpu")
    first, second = add(reader, torch.tensor(0)), add(reader, OSError("cut short"))
    assert int(first()) == 0
    with pytest.raises(OSError, match="cut short"):
        second()
    reader.close()


def test_transformers_is_left_as_it_was(tmp_path) -> None:
    before = core_model_loading.spawn_materialize
    with reading_ahead("cpu"):
        assert core_model_loading.spawn_materialize is not before
    with pytest.raises(ModelError):
        HQQ().quantize(str(tmp_path), device="cpu", dtype=torch.float32)
    assert core_model_loading.spawn_materialize is before


def test_loading_without_quantizing_is_left_to_transformers(monkeypatch) -> None:
    monkeypatch.setattr(ReadAhead, "add", partial(pytest.fail, "it was read ahead"))
    with reading_ahead("cpu"):
        from_pretrained(SMALL)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_transformers_that_reads_in_another_way_is_told(renamed, monkeypatch) -> None:
    if renamed:
        monkeypatch.delattr(core_model_loading, "spawn_materialize")
    words = f"loading is slower: transformers {transformers.__version__} does not call spawn_mat"
    with pytest.warns(SlowerWarning, match=words), reading_ahead("cpu"):
        pass  # a load that calls nothing of what is patched
    assert hasattr(core_model_loading, "spawn_materialize") != renamed


def test_an_ordinary_load_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        HQQ().quantize(SMALL, device="cpu", dtype=torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("quantizer", [HQQ(), NF4()], ids=repr)
def test_the_peak_on_a_gpu(quantizer, tmp_path) -> None:
    """Two blocks of an 8B model: at most 1 GiB more than the quantized model."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    quantizer.quantize(SMALL, device="cuda", dtype=torch.bfloat16)  # libraries allocate at first
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = quantizer.quantize(str(tmp_path), device="cuda", dtype=torch.bfloat16)
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    assert model.lm_head.weight.is_cuda
    assert after - before < 2**29
    assert peak - after < 2**30
