"""Passes recorded as CUDA graphs: the same losses and weights, whatever the batches look like."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from processes import in_processes, wants_two_gpus
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.merge_aware import make_merge_aware
from quantadapt.data.batches import PackedCollator
from quantadapt.model import packed_attention
from quantadapt.model.recording import recording
from quantadapt.training import cuda_graphs, lent
from quantadapt.training.cuda_graphs import can_record
from quantadapt.training.memory_fit import MemoryFit

VOCABULARY, BATCH = 2048, 2


def tiny_llama(device: str = "cpu", **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        **settings,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16)


def adapted(device: str = "cpu", settings=None, method: str = "lora", **options):
    base = tiny_llama(device, **(settings or {}))
    base = qa.quantize(base, "bnb-nf4", device=device, dtype="bfloat16")
    torch.manual_seed(1)
    return qa.attach(base, method, init_lora_weights=False, **options)


def rows(lengths: list[int]) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [[1] * n for n in lengths]})


def train(data: Dataset, **options):
    """Return the result, the trained weights and what was noted."""
    model, notes = adapted("cuda"), []
    result = qa.train(
        model,
        data,
        tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
        on_note=notes.append,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        logging_steps=1,
        **options,
    )
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return result, weights, notes


@pytest.mark.cuda
def test_a_recording_that_fails_leaves_everything_as_it_was() -> None:
    """What quantizes on the default stream would not wait for another that became current."""
    stream, numbers = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError), recording(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda").sum().item()  # waits for the GPU
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), numbers)
    assert float(torch.rand(8, device="cuda").sum()) > 0


def test_only_plain_lora_on_cuda_is_recorded(monkeypatch) -> None:
    model = adapted()
    assert not can_record(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert can_record(model)
    with monkeypatch.context() as sharded:
        sharded.setattr(cuda_graphs, "is_sharded", lambda _: True)
        assert not can_record(model)
    with monkeypatch.context() as bare:  # nothing below the model with the head
        bare.setattr(LlamaForCausalLM, "base_model_prefix", "")
        assert not can_record(model)
    assert not can_record(adapted(lora_bias=True))
    assert not can_record(adapted(lora_dropout=0.1))
    assert not can_record(adapted(settings={"attention_dropout": 0.1}))
    assert not can_record(adapted(settings={"output_router_logits": True}))
    assert not can_record(adapted(modules_to_save=["lm_head"]))
    extra = qa.attach(qa.quantize(tiny_llama(), "bnb-nf4", dtype="bfloat16"), "ia3")
    assert not can_record(extra)
    for method in ("lora", "dora"):  # PEFT's own forward makes rounded DoRA
        make_merge_aware(rounded := adapted(method=method))
        assert can_record(rounded) == (method == "lora")


def test_lora_on_experts_is_recorded(monkeypatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = qa.quantize(MixtralForCausalLM(config), "bnb-nf4", dtype="bfloat16")
    model = qa.attach(model, "lora", r=4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert can_record(model)


def test_gradients_of_replays_are_kept_without_a_copy_and_added_up() -> None:
    recorded = cuda_graphs._Recorded.__new__(cuda_graphs._Recorded)
    weights = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    recorded.weights, recorded.gradients = weights, [torch.zeros(2), torch.zeros(3)]

    class Forward:
        def replay(self) -> None:  # what it makes may lie over the gradients of the pass before
            for gradient in recorded.gradients:
                gradient.fill_(float("nan"))

    class Backward:
        def replay(self) -> None:
            for i, gradient in enumerate(recorded.gradients, 1):
                gradient.fill_(i)

    def replay() -> None:
        recorded.replay_forward({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
        recorded.replay_backward()

    recorded.forward, recorded.backward = Forward(), Backward()
    recorded.given, recorded.hidden = {"input_ids": torch.zeros(1, 1).long()}, torch.zeros(1)
    replay()
    assert all(w.grad is g for w, g in zip(weights, recorded.gradients, strict=True))
    for weight in weights:
        weight.grad.mul_(10)  # clipped, say
    for times in (11, 12):  # further passes of the same step
        replay()
        assert weights[0].grad.tolist() == [times] * 2
    assert weights[1].grad.tolist() == [24] * 3
    weights[0].grad = None  # the next step
    replay()
    assert weights[0].grad is recorded.gradients[0]
    assert weights[0].grad.tolist() == [1, 1]
    assert weights[1].grad.tolist() == [26] * 3


def test_a_forward_that_somebody_has_patched_is_given_back() -> None:
    model = adapted()
    decoder = model.get_base_model().base_model
    for before in (None, decoder.forward):
        if before is not None:
            decoder.forward = before
        with lent.graphed(model, print) as graphs:
            assert decoder.forward == graphs.forward
        assert decoder.__dict__.get("forward") is before


def test_only_ids_are_recorded_no_mask_and_no_positions() -> None:
    model = adapted().train()
    graphs = cuda_graphs.Graphs(model, print)
    graphs.on = True
    positions = torch.arange(4)[None]
    assert graphs._is_plain({"input_ids": positions, "attention_mask": None, "use_cache": False})
    for name in ("position_ids", "attention_mask"):
        assert not graphs._is_plain({"input_ids": positions, name: positions})
    assert not graphs._is_plain({"input_ids": positions, "use_cache": True})


@pytest.fixture
def replays(monkeypatch) -> list[torch.Size]:
    """The shapes of the batches that are replayed, in their order."""
    return counted_replays(monkeypatch)


def counted_replays(monkeypatch) -> list[torch.Size]:
    seen: list[torch.Size] = []
    forward = cuda_graphs._Replay.forward

    def counted(ctx, recorded, given, *weights):
        seen.append(given["input_ids"].shape)
        return forward(ctx, recorded, given, *weights)

    monkeypatch.setattr(cuda_graphs._Replay, "forward", staticmethod(counted))
    return seen


LENGTHS = {
    "equal": [64] * 16,
    "several shapes": [64, 64, 128, 128] * 5,
    "a smaller batch at the end": [64] * 13,
}


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("recompute", [False, True])
def test_replayed_steps_are_the_same(lengths, recompute, replays) -> None:
    options = {"num_train_epochs": 2, "gradient_checkpointing": recompute}
    plain, weights, _ = train(rows(lengths), cuda_graphs=False, **options)
    assert replays == []
    graphed, found, notes = train(rows(lengths), **options)
    assert notes == []
    assert len(replays) >= plain.steps // 2
    assert_same(plain, weights, graphed, found)


def assert_same(plain, weights, graphed, found) -> None:
    assert [step for step, _ in graphed.losses] == [step for step, _ in plain.losses]
    for (_, expected), (_, loss) in zip(plain.losses, graphed.losses, strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
    for name, expected in weights.items():
        error = float((found[name] - expected).norm() / expected.norm())
        assert error < 2e-2, (name, error)


PACKED = [24, 40, 64, 32, 32, 64] * 4


@pytest.mark.cuda
def test_packed_rows_are_replayed_with_the_examples_of_the_batch(replays) -> None:
    options = {"packing": True, "num_train_epochs": 6, "gradient_checkpointing": True}
    plain = train(rows(PACKED), cuda_graphs=False, **options)
    assert replays == []
    graphed = train(rows(PACKED), **options)
    assert "attention of packed rows: torch's varlen_attn" in graphed[2]
    assert not [note for note in graphed[2] if "CUDA graphs are not used" in note]
    assert len(replays) >= graphed[0].steps // 3
    assert_same(*plain[:2], *graphed[:2])


def test_packed_rows_are_recorded_where_one_call_computes_their_attention(monkeypatch) -> None:
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda *_: True)
    model = adapted().train()
    batch = PackedCollator(0, 64, few_shapes=True)([{
        "input_ids": [*range(9)], "completion_mask": [1] * 9, "seq_lengths": [5, 4]
    }])  # fmt: skip
    given = {n: v for n, v in batch.items() if n not in ("labels", "counted", "tokens")}
    graphs = cuda_graphs.Graphs(model, print)
    graphs.on = True
    assert not graphs._is_plain({**given, "use_cache": False})
    with packed_attention.packed_attention(model):
        graphs = cuda_graphs.Graphs(model, print)
        graphs.on = True
        assert graphs._is_plain({**given, "use_cache": False})
        assert not graphs._is_plain({**given, "attention_mask": given["input_ids"]})
        assert not graphs._is_plain({"input_ids": given["input_ids"], "position_ids": given})


def test_a_recorded_pass_is_that_of_equal_shapes_and_numbers() -> None:
    def key(lengths: list[int]) -> tuple:
        row = {"input_ids": [0] * sum(lengths), "completion_mask": [1] * sum(lengths)}
        batch = PackedCollator(0, 32, few_shapes=True)([{**row, "seq_lengths": lengths}])
        return cuda_graphs._key(batch)

    def shape(lengths: list[int]) -> tuple:
        return tuple(pair for pair in key(lengths) if pair[0] not in ("counted", "tokens"))

    assert shape([9, 10, 11]) == shape([15, 15]) == shape([12, 3, 12])
    assert shape([17, 13]) != shape([15, 15])  # the longest
    assert shape([4] * 8) != shape([8] * 4)  # how many
    assert shape([8] * 4) != shape([8] * 5)  # how long in all


@pytest.mark.cuda
def test_gradients_of_replays_add_up(replays) -> None:
    options = {"max_steps": 6, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    plain = train(rows([64] * 48), cuda_graphs=False, **options)
    graphed = train(rows([64] * 48), **options)
    assert len(replays) >= 20
    assert_same(*plain[:2], *graphed[:2])


@pytest.mark.cuda
def test_what_cannot_be_recorded_runs_as_ever(monkeypatch, replays) -> None:
    from transformers.models.llama import modeling_llama

    plain = train(rows([64] * 16), cuda_graphs=False, gradient_checkpointing=True)
    forward = modeling_llama.LlamaMLP.forward

    def waiting(self, x):
        assert math.isfinite(float(x.sum()))  # waits for the GPU
        return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", waiting)
    options = {"gradient_checkpointing": True, "use_liger_kernel": False}
    result, weights, notes = train(rows([64] * 16), **options)
    assert replays == []
    assert [note for note in notes if "CUDA graphs are not used" in note] == notes != []
    assert_same(*plain[:2], result, weights)


@pytest.mark.cuda
def test_without_room_nothing_is_recorded(monkeypatch, replays) -> None:
    monkeypatch.setattr(MemoryFit, "budget", lambda _: 0)
    _, _, notes = train(rows([64] * 16), gradient_checkpointing=True)
    assert (replays, notes) == ([], [])


@pytest.mark.cuda
def test_running_out_of_memory_gives_the_graphs_up_first(monkeypatch, replays) -> None:
    plain = train(rows([64] * 16), cuda_graphs=False, gradient_checkpointing=True)
    replay = cuda_graphs._Replay.backward

    def short(ctx, *grads):
        if len(replays) == 2:
            raise torch.OutOfMemoryError("none left")
        return replay(ctx, *grads)

    monkeypatch.setattr(cuda_graphs._Replay, "backward", staticmethod(short))
    result, weights, notes = train(rows([64] * 16), gradient_checkpointing=True)
    assert len(replays) == 2
    assert notes == ["out of memory at step 4: from here on without CUDA graphs"]
    assert_same(*plain[:2], result, weights)


def train_twice() -> tuple[int, str, list[float], list[float]]:
    """In one of two processes: how often a pass was replayed, the notes, and both runs' losses."""
    from quantadapt.distributed import start, world

    start(f"cuda:{world().local_rank}")
    options = {"gradient_checkpointing": True, "parallel": "ddp"}
    plain, *_ = train(rows([64] * 32), cuda_graphs=False, **options)
    with pytest.MonkeyPatch.context() as patched:
        replayed = counted_replays(patched)
        graphed, _, notes = train(rows([64] * 32), **options)
    losses = ([loss for _, loss in result.losses] for result in (plain, graphed))
    return len(replayed), "".join(notes), *losses


@pytest.mark.cuda
@wants_two_gpus
def test_passes_are_recorded_beside_other_processes(tmp_path) -> None:
    for count, notes, plain, graphed in in_processes(2, train_twice, tmp_path):
        assert (count, notes, len(plain)) == (6, "", 8)
        assert graphed == pytest.approx(plain, rel=2e-3)


@pytest.mark.cuda
def test_a_recording_that_fails_leaves_the_process_as_it_was() -> None:
    graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError), recording(torch.cuda.CUDAGraph()):
        torch.rand(3, device="cuda").tolist()  # which waits for the GPU
    torch.manual_seed(0)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    with recording(graph):
        y = 2 * x
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [8, 8, 8]
