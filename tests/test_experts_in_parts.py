"""Where memory is short, a stack of experts is dequantized a few experts at a time."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocations import peak_of
from parameters import slow_but
from quantadapt_torchao import Int4
from quantadapt_torchao.tiles import TILES
from test_experts_grouped import EXPERTS, KINDS, experts_of, inputs, results
from test_memory_experts import QWEN3_30B, work
from transformers import AutoModelForCausalLM, GptOssConfig

import quantadapt as qa
from quantadapt.calibration.experts import ExpertsWarning
from quantadapt.facade import QuantExperts, QuantStack, densify, read_in_parts, stack_facades
from quantadapt.memory import GIB, Setting, Workload, experts
from quantadapt.memory.shape import Shape
from quantadapt.registry import registry
from quantadapt.spec import TrainSpec
from quantadapt.streaming import bring_back, stream
from quantadapt.training.figures import dequantize_share
from quantadapt.training.recomputing import Recomputer

READS_ROWS = (
    *("bnb-nf4", "bnb-fp4", "bnb-int8", "mxfp4", "nvfp4", "hqq"),
    *("torchao-int8", "torchao-fp8", "quanto", "eetq", "finegrained-fp8"),
)


def quantized(kind: str, backend: str = "bnb-nf4", **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind]), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    return qa.quantize(model, backend, dtype="float32", device="cpu", **options)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many experts each part was that has been dequantized."""
    counts: list[int] = []
    of_experts = QuantStack.of_experts

    def counted(self: QuantStack, first: int, last: int) -> torch.Tensor:
        counts.append(last - first)
        return of_experts(self, first, last)

    monkeypatch.setattr(QuantStack, "of_experts", counted)
    return counts


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *((name, {}) for name in READS_ROWS),
        ("bnb-nf4", {"double_quant": False}),
        *(("hqq", {"bits": bits, "group_size": 32}) for bits in (8, 3, 2)),
        ("hqq", {"group_size": None}),
        ("torchao-int4", {"group_size": 32}),
        ("torchao-intx", {"bits": 3, "group_size": 32}),
        *(("quanto", {"weights": kind}) for kind in ("int4", "int2", "float8")),
        *(("finegrained-fp8", {"weight_block_size": size}) for size in ((32, 32), (96, 64), None)),
        ("compressed-tensors", {"group_size": 32}),
        ("compressed-tensors", {"group_size": 32, "scheme": "W4A16_ASYM"}),
        *(("compressed-tensors", {"scheme": kind}) for kind in ("W8A8", "FP8_BLOCK", "NVFP4A16")),
    ],
)
def test_rows_are_those_of_the_whole_weight(backend: str, options: dict[str, Any]) -> None:
    assert registry().backend(backend).quantizer().target.reads_rows
    stacks = dict(stack_facades(quantized("silu", backend, skip_misfits=True, **options)))
    assert stacks
    for stack in stacks.values():
        whole, rows = stack.dequantize(), stack.stack.out_features
        for first, last in ((0, rows), (rows, 3 * rows), (1, rows), (3 * rows, 4 * rows)):
            assert torch.equal(stack.dequantize_rows(first, last), whole[first:last])


@pytest.mark.parametrize(
    "backend_and_options",
    slow_but(
        [
            ("gptq", {"group_size": 32}),
            ("gptq", {"group_size": 32, "bits": 3}),
            ("gptq", {"group_size": 32, "desc_act": True}),
            ("awq", {"group_size": 32}),
            ("autoround", {"group_size": 32, "iters": 1}),
            ("aqlm", {"num_codebooks": 2, "nbits_per_codebook": 4, "max_epochs": 1}),
        ],
        ("gptq", {"group_size": 32}),
    ),
)
def test_rows_of_calibrated_stacks_are_those_of_the_whole_weight(
    backend_and_options: tuple[str, dict[str, Any]],
) -> None:
    backend, options = backend_and_options
    text = [{"input_ids": torch.arange(128).view(1, -1) % 60 + 1}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExpertsWarning)
        model = quantized("silu", backend, calibration=text, skip_misfits=True, **options)
    assert registry().backend(backend).quantizer(**options).target.reads_rows
    stacks = dict(stack_facades(model))
    assert len(stacks) == 2
    for stack in stacks.values():
        whole, rows = stack.dequantize(), stack.stack.out_features
        for first, last in ((0, rows), (rows, 3 * rows), (5, rows), (3 * rows, 4 * rows)):
            assert torch.equal(stack.dequantize_rows(first, last), whole[first:last])


def test_rows_of_partial_blocks_are_those_of_the_whole_weight() -> None:
    """Blocks of 64 that go on in the next row, or in the next expert."""
    linear = torch.nn.Linear(96, 7, bias=False)
    quantizer = registry().backend("bnb-nf4").quantizer()
    made, target = quantizer.quantize_linear(linear), quantizer.target
    whole = target.dequantize(made)
    for first, last in ((0, 2), (1, 3), (2, 6), (5, 7)):
        assert torch.equal(target.dequantize_rows(made, first, last), whole[first:last])


def test_rows_of_tiles_are_those_of_the_whole_weight() -> None:
    """torchao's int4 on CUDA, which has them in tiles of eight rows; here with random codes."""
    torch.manual_seed(0)
    rows, columns, size = 48, 128, 32
    weight = type(TILES, (), {})()
    weight.shape, weight.block_size = torch.Size((rows, columns)), (1, size)
    words = (rows // 8, columns // 64, 32, 2)
    weight.qdata = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32)
    weight.scale_and_zero = torch.randn(columns // size, rows, 2).bfloat16()
    module, target = SimpleNamespace(weight=weight), Int4().target
    whole = target.dequantize(module)
    assert whole.shape == (rows, columns)
    for first, last in ((0, 16), (16, 48), (3, 9)):
        assert torch.equal(target.dequantize_rows(module, first, last), whole[first:last])


@pytest.mark.parametrize("kind", ["silu", "clamped, biases, transposed"])
@pytest.mark.parametrize(("adapter", "none"), [("lora", False), ("lora", True), ("dora", True)])
def test_experts_in_parts_compute_the_same(
    kind: str, adapter: str, none: bool, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, and three of four; with LoRA or DoRA, forward and backward, to the bit."""
    tuned = qa.attach(quantized(kind), adapter, r=4)
    trained = [p for n, p in tuned.named_parameters() if p.requires_grad and ".experts." in n]
    assert len(trained) == (4 if adapter == "lora" else 6)
    for n, weight in enumerate(trained):
        values = torch.linspace(-n, n + 1, weight.numel()).sin().view(weight.shape)
        weight.data.copy_(values / 5)
    names = ("mlp.experts", "moe.experts")
    layer = next(m for n, m in tuned.named_modules() if n.endswith(names))
    given = inputs(none)
    expected = results(layer, given, trained)
    assert not read
    read_in_parts(tuned, True)
    for part, most in ((1, 1), (3 * 4 * 128 * 64, 3)):
        monkeypatch.setattr(experts, "PART", part)
        found = results(layer, given, trained)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        # The last expert gets no token, and is not read; each pass reads all others.
        assert max(read) == most
        read.clear()


def test_experts_that_no_token_comes_to_are_not_read(
    read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = experts_of(quantized("silu"))
    read_in_parts(made, True)
    monkeypatch.setattr(experts, "PART", 1)
    with torch.no_grad():
        hidden = torch.randn(5, 64)
        made(hidden, torch.tensor([[1, 3]] * 5), torch.ones(5, 2))
    assert read == [1] * 4  # two experts, two stacks


def test_what_memory_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the stack less, forward and backward."""
    made = experts_of(quantized("silu", "bnb-int8"))
    given = inputs()
    stack = 4 * EXPERTS * 256 * 64  # bytes of the larger one
    whole = peak_of(lambda: results(made, given))
    read_in_parts(made, True)
    monkeypatch.setattr(experts, "PART", stack // EXPERTS)
    parts = peak_of(lambda: results(made, given))
    assert whole - parts > stack * (1 - 1 / EXPERTS)


def test_backends_that_read_whole_weights_do_so_still(
    read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = experts_of(quantized("silu", "inc", method="rtn", group_size=32))
    expected = results(made, inputs())
    read_in_parts(made, True)
    monkeypatch.setattr(experts, "PART", 1)
    assert all(torch.equal(a, b) for a, b in zip(results(made, inputs()), expected, strict=True))
    assert not read


def test_who_asks_for_it() -> None:
    """The setting that takes the least memory, and a base that is streamed; and no dense copy."""
    model = quantized("silu")
    made = experts_of(model)
    recomputer = Recomputer(model)
    for offload in (True, False):
        recomputer.apply(Setting(1, offload, 1))
        assert made.in_parts is offload
    stream(model)
    assert made.in_parts
    recomputer.apply(Setting(1, False, 1))
    assert made.in_parts
    bring_back(model)
    assert not made.in_parts
    read_in_parts(model, True)
    plain = experts_of(densify(model))
    assert not isinstance(plain, QuantExperts)
    assert "in_parts" not in vars(plain)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("many small", "lora"), ("clamped, biases, transposed", "lora"), ("many small", "dora")],
)
def test_every_setting_gives_the_same_gradients(
    kind: str, adapter: str, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed or not, inputs in CPU memory or not, in parts or whole: to the bit."""
    monkeypatch.setattr(experts, "PART", 1)
    tuned = qa.attach(quantized(kind), adapter, r=4)
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.linspace(-1, 1, weight.numel()).cos().view(weight.shape) / 9)
    recomputer = Recomputer(tuned.train())
    tuned.enable_input_require_grads()
    found = []
    for setting in (Setting(0, False, 1), Setting(1, False, 1), Setting(1, True, 1)):
        recomputer.apply(setting)
        loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)])
        assert bool(read) == setting.offload
        tuned.zero_grad()
    assert len(found[0]) > 8
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_what_dequantizing_takes_is_measured_as_it_was_done(
    offload: bool, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step, on a card that holds no whole stack."""
    model = quantized("silu")
    monkeypatch.setattr(experts, "PART", 1)
    fit = SimpleNamespace(setting=Setting(1, offload, 1), recomputer=SimpleNamespace(count=1))
    trainer: Any = SimpleNamespace(
        model=model,
        memory_fit=fit,
        state=SimpleNamespace(global_step=2),
        progress=SimpleNamespace(first_step=1, seconds=9.0),
    )
    whole: list[str] = []
    dequantize = QuantStack.dequantize
    monkeypatch.setattr(QuantStack, "dequantize", lambda s: whole.append("") or dequantize(s))
    assert dequantize_share(trainer, TrainSpec()) is not None
    assert len(read) == (2 * 2 * EXPERTS if offload else 0)  # twice, two stacks
    assert bool(whole) != offload


@pytest.mark.cuda
def test_on_a_gpu_parts_compute_the_same(read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding: products of other sizes are summed in other orders."""
    model = AutoModelForCausalLM.from_config(KINDS["silu"], dtype=torch.bfloat16).cuda()
    made = experts_of(qa.quantize(model, "bnb-nf4", dtype="bfloat16", device="cuda"))
    hidden, index, weights = (tensor.detach().cuda() for tensor in inputs(none=True))
    given = hidden.bfloat16().requires_grad_(), index, weights.requires_grad_()
    expected = results(made, given)
    read_in_parts(made, True)
    monkeypatch.setattr(experts, "PART", 1)
    for found, right in zip(results(made, given), expected, strict=True):
        assert float((found - right).float().norm() / right.float().norm()) < 5e-3
    assert read
    read.clear()
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        made(*(tensor.detach() for tensor in given))  # would fail where it waited
    assert not read


# --- as it is predicted ---------------------------------------------------------------------------


def test_a_plan_counts_parts_where_they_are_taken() -> None:
    """A part of Qwen3-30B-A3B is 42 of the 128 experts of the first stack, or 85 of the second.
    What it makes is there beside what all make."""
    each, tokens = 2048 * 768, 64
    rows = 8 * tokens
    least, more = Setting(11, True, 4), Setting(11, False, 4)
    can = work(in_parts=True)
    small = replace(can, batch=1, length=tokens)
    whole = replace(small, in_parts=False)
    again = rows * (2048 + 2 * 768) + 42 * 2 * each + rows * 2 * 768 * 42 // 128
    inside = rows * (2 * 2048 + 3 * 768) + 85 * each + rows * 2048 * 85 // 128
    for made, expected in (
        (small, max(again, inside)),
        (whole, rows * (2048 + 2 * 768) + 128 * 2 * each),
    ):
        assert made.backward_bytes(tokens, offload=True) == 2 * (tokens * 2 * 2048 + expected)
    assert small.peak(more) == whole.peak(more)
    streamed = replace(small, streamed="all")
    assert streamed.parts(more)["working"] < replace(whole, streamed="all").parts(more)["working"]
    assert replace(small, dora=True).peak(least) < replace(whole, dora=True).peak(least)
    for other in ({"rounds": True}, {"shards": 2}):
        assert replace(small, **other).peak(least) == replace(whole, **other).peak(least)
    assert Shape.of(QWEN3_30B) is not None


def test_gpt_oss_fits_what_others_publish() -> None:
    """12.8 GiB at 1 x 2048, with LoRA of rank 16 on attention, in nf4: in parts alone."""
    shape = Shape.of(GptOssConfig(num_local_experts=32, num_hidden_layers=24).to_dict())
    bits = dict.fromkeys(shape.linears, 4.127)
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    sizes = {"dtype_bytes": 2, "batch": 1, "length": 2048, "in_parts": True}
    made = Workload(shape, bits, attention, 16, "adamw_torch_fused", **sizes)
    least = Setting(23, True, 1)
    assert made.peak(least) / GIB < 12.8 < replace(made, in_parts=False).peak(least) / GIB
