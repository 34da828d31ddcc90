"""A base that is streamed from CPU memory computes what it did before, whatever its backend."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_experts import BASE, KINDS, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.adapting.injecting import place_where_it_computes
from quantadapt.dependencies import missing_requirements
from quantadapt.errors import ModelError
from quantadapt.facade import facades, linear_facades, stack_facades
from quantadapt.model.held import held_tensors
from quantadapt.planning import plan
from quantadapt.registry import registry
from quantadapt.spec import Spec, TrainSpec
from quantadapt.streaming import Streamer, Traffic, bring_back, stream, streamer_of
from quantadapt.training import base_placement

LAYERS = 4
QUICK = {"aqlm": {"beam_size": 1, "max_epochs": 1}, "autoround": {"iters": 1}}
FEW = ("bnb-nf4", "hqq", "none", "torchao-int8")
"""Each keeps its tensors in another way."""
OTHERS = sorted(
    record.name
    for record in registry().backends()
    if "cpu" in record.devices and record.name not in FEW and not missing_requirements(record)
)


def llama(layers: int = LAYERS, size: int = 128, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def base(backend: str = "hqq", model: nn.Module | None = None) -> nn.Module:
    data = [{"input_ids": torch.arange(64).reshape(1, 64) + i} for i in range(4)]
    calibrates = registry().backend(backend).calibration
    return qa.quantize(
        llama() if model is None else model,
        backend,
        **QUICK.get(backend, {}),
        device="cpu",
        dtype="float32",
        calibration=data if calibrates else None,
    )


def streamed(model: nn.Module) -> Streamer:
    found = streamer_of(model)
    assert found is not None
    return found


def passes(model: Any) -> list[Tensor]:
    """Logits, and the gradient at the first block's input, which goes through every weight."""
    x = torch.linspace(-1, 1, 2 * 12 * 128).reshape(2, 12, 128).sin().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), x.grad]


def held(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor that a vendor's layer holds."""
    found = held_tensors([facade.own_vendor for _, facade in facades(model)])
    return {name: tensor.detach().clone() for name, tensor in found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def computes_the_same(backend: str) -> None:
    model = base(backend)
    whole, before, weights = passes(model), held(model), [f.dequantize() for _, f in facades(model)]
    stream(model)
    streamer = streamed(model)
    assert len(streamer.blocks) == LAYERS
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))
    read = [facade.dequantize() for _, facade in facades(model)]  # kept, while others come
    assert all(torch.equal(a, b) for a, b in zip(weights, read, strict=True))
    assert same(held(model), before)
    bring_back(model)
    assert streamer_of(model) is None
    assert same(held(model), before)
    assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))


@pytest.mark.parametrize("backend", FEW)
def test_a_streamed_base_computes_the_same(backend: str) -> None:
    computes_the_same(backend)


@pytest.mark.parametrize("backend", FEW)
def test_what_finds_no_room_to_come_back_stays_streamed(backend: str) -> None:
    """Training says so, and its own error is the one that is raised."""
    model = base(backend)
    whole, before, notes = passes(model), held(model), list[str]()
    clone, made = torch.Tensor.clone, list[int]()

    def full(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        streamer = streamer_of(model)
        if made and streamer is not None and len(streamer.blocks) == LAYERS - 1:
            made.append(1)  # of the second of the blocks that come back
            if len(made) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor, *args, **options)

    def fail() -> None:
        made.append(0)
        raise ArithmeticError

    gpu = patch.object(base_placement, "adapter_device", lambda _: torch.device("cuda"))
    fills, streams = patch.object(torch.Tensor, "clone", full), TrainSpec(stream="all")
    lent = base_placement.streamed(model, streams, notes.append)
    with gpu, fills, pytest.raises(ArithmeticError), lent:
        fail()
    assert notes == ["the GPU has no room for the whole base any more: it stays streamed"]
    assert len(streamed(model).blocks) == LAYERS - 1
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))
    bring_back(model)
    assert streamer_of(model) is None
    assert same(held(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_with_other_backends_it_computes_the_same(backend: str) -> None:
    computes_the_same(backend)


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def experts(kind: str) -> nn.Module:
    name, more = KINDS[kind]
    inside = {"moe_intermediate_size": 64} if "moe_intermediate_size" in more else {}
    sizes = {**BASE, **more, **inside, "hidden_size": 64, "head_dim": 16}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize(
    "backend",
    [
        *("hqq", "bnb-nf4"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("torchao-int8", "torchao-int4", "quanto", "mxfp4", "nvfp4")
        ),
    ],
)
def test_experts_compute_the_same(kind: str, backend: str) -> None:
    model = with_lora(qa.quantize(experts(kind), backend, device="cpu", dtype="float32"))
    expected = gradients(model)
    stream(model, "experts")
    vendors = list(streamed(model).vendors())
    assert [type(f).__name__ for _, f in facades(model) if f.own_vendor in vendors] == (
        ["QuantStack"] * len(dict(stack_facades(model)))
    )
    assert same(gradients(model), expected)
    stream(model, "all")  # what is left
    assert len(list(streamed(model).vendors())) > len(vendors)
    assert same(gradients(model), expected)
    assert same(gradients(bring_back(model)), expected)


def lora(model: nn.Module, **options: Any) -> Any:
    return qa.attach(model, "lora", r=4, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2, "memory": "min"},
}
MORE: dict[str, dict[str, Any]] = {
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    "validated": {"eval_steps": 1, "gradient_checkpointing": False},
    "through the quantizer": {"merge_aware": True},
}


def trained(model: Any, data: Any, tokenizer: Any, **options: Any) -> Any:
    if "eval_steps" in options:
        options["eval_data"] = data.select(range(4))
    return qa.train(
        model,
        data,
        tokenizer=tokenizer,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        **options,
    )


def at_rest(streamer: Streamer) -> bool:
    """Whether all of it is in CPU memory, and the device is left."""
    rows = {leaf.tensor.untyped_storage().data_ptr() for b in streamer.blocks for leaf in b.leaves}
    return rows == {block.row.data_ptr() for block in streamer.blocks} and not streamer._slots


def trains_the_same(options: dict[str, Any], tokenizer: Any, data: Any) -> None:
    found, adapters = [], []
    for streams in (False, True):
        model = lora(base("hqq", llama(3)))
        if streams:
            stream(model)
        result = trained(model, data, tokenizer, **options)
        found.append((result.losses, result.validation))
        adapters.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    assert found[0] == found[1]
    assert same(*adapters)
    assert result.streamed.gib > 0
    assert result.streamed.host_gib == streamed(model).nbytes / 2**30
    assert at_rest(streamed(model))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_gives_the_same_losses(options: Any, tokenizer: Any, random_data: Any) -> None:
    trains_the_same(options, tokenizer, random_data)


@pytest.mark.slow
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_other_settings_give_the_same_losses(
    options: Any, tokenizer: Any, random_data: Any
) -> None:
    trains_the_same(options, tokenizer, random_data)


def test_an_error_in_a_block_leaves_weights_whole(tokenizer: Any, random_data: Any) -> None:
    model = lora(base())
    before, first = held(model), gradients(model)
    stream(model)
    layer = model.get_base_model().model.layers[2]
    breaks = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(model, random_data, tokenizer)
    breaks.remove()
    assert at_rest(streamed(model))
    assert same(held(model), before)
    assert same(gradients(model), first)


def moved(streamer: Streamer) -> int:
    """How many blocks were copied since the last call."""
    count, streamer.traffic = streamer.traffic.nbytes // streamer.blocks[0].nbytes, Traffic()
    return int(count)


def test_what_is_on_the_device_is_not_copied_again() -> None:
    """Forward and backward turn where they end, so as many blocks as there are slots are still
    there twice in a step."""
    model = lora(base())
    for slots, each_step in ((2, 4), (3, 2), (4, 0)):
        stream(model, slots=slots)
        streamer = streamed(model)
        gradients(model)  # shows the order
        moved(streamer)
        for _ in range(3):
            gradients(model)
            assert moved(streamer) == each_step
        bring_back(model)


def test_the_next_block_is_on_its_way_while_one_computes(monkeypatch: Any) -> None:
    """Once the order is known no block is waited for that was not fetched before."""
    model = lora(base())
    stream(model)
    gradients(model)
    gradients(model)
    late, fetch = [], Streamer._fetch

    def fetched(streamer: Streamer, block: Any) -> None:
        late.append(
            streamer._current is not None
            and block is not streamer._after.get((streamer._before, streamer._current))
        )
        fetch(streamer, block)

    monkeypatch.setattr(Streamer, "_fetch", fetched)
    gradients(model)
    assert late == [False] * 4


def test_any_order_is_right() -> None:
    model = base("bnb-nf4")
    whole = {name: facade.dequantize() for name, facade in facades(model)}
    stream(model)
    layers = list(facades(model))
    order = torch.randperm(3 * len(layers), generator=torch.Generator().manual_seed(0)).tolist()
    for number in order:
        name, facade = layers[number % len(layers)]
        assert torch.equal(facade.dequantize(), whole[name])


def test_biases_stay_where_they_are_and_can_be_trained() -> None:
    model = llama(2, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape)
    model = qa.attach(base("hqq", model), "lora", bias="all", r=4)
    expected = gradients(model)
    assert any(name.endswith("q_proj.base_layer.bias") for name in expected)
    stream(model)
    assert same(gradients(model), expected)


def test_two_lists_of_blocks_are_streamed() -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=128, decoder_start_token_id=0, **sizes)
    torch.manual_seed(0)
    model = base("hqq", transformers.T5ForConditionalGeneration(config).eval())
    ids = torch.arange(3, 17).reshape(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        stream(model)
        assert len(streamed(model).blocks) == 4
        for _ in range(2):
            assert torch.equal(model(input_ids=ids, labels=ids).logits, expected)


def test_answers_are_the_same(tokenizer: Any) -> None:
    model = base()
    asked = {"max_new_tokens": 3, "tokenizer": tokenizer}
    expected = qa.generate(model, ["def f(", "import"], **asked)
    stream(model)
    assert qa.generate(model, ["def f(", "import"], **asked) == expected


def test_a_checkpoint_has_the_same_files(tmp_path: Path) -> None:
    for name in ("bnb-nf4", "hqq"):
        model = base(name)
        qa.save(model, tmp_path / "whole", overwrite=True)
        qa.save(stream(model), tmp_path / "streamed", overwrite=True)
        found = [load_file(tmp_path / of / "model.safetensors") for of in ("whole", "streamed")]
        assert same(*found)


MERGES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "dithered": {"kind": "requantize", "rounding": "dithered", "min_gain": 0},
}


def merges_the_same(options: dict[str, Any], path: Path, tokenizer: Any, data: Any) -> None:
    model = lora(base("hqq", llama(3)), init_lora_weights=False)
    for name in ("whole", "streamed"):
        qa.merge(model, path / name, data=data, tokenizer=tokenizer, **options)
        stream(model)
    folders = [path / name / "merged" for name in ("whole", "streamed")]
    assert same(*(load_file(folder / "model.safetensors") for folder in folders))


@pytest.mark.slow
@pytest.mark.parametrize("options", MERGES.values(), ids=MERGES)
def test_a_merge_is_the_same(
    options: Any, tmp_path: Path, tokenizer: Any, random_data: Any
) -> None:
    merges_the_same(options, tmp_path, tokenizer, random_data)


def test_layers_that_are_written_are_right(tokenizer: Any) -> None:
    model = stream(base())
    name, facade = next(iter(linear_facades(model)))
    new = torch.randn(facade.out_features, facade.in_features)
    facade.write(new)
    alone = base()
    dict(linear_facades(alone))[name].write(new)
    assert all(torch.equal(a, b) for a, b in zip(passes(alone), passes(model), strict=True))
    bring_back(model)
    assert all(torch.equal(a, b) for a, b in zip(passes(alone), passes(model), strict=True))


def test_a_copy_is_whole() -> None:
    for backend in ("hqq", "torchao-int8"):
        model = stream(base(backend, llama(3)))
        before = held(model)
        copied = copy.deepcopy(model)
        assert streamer_of(copied) is None
        assert same(held(copied), before)
        rows = {block.row.data_ptr() for block in streamed(model).blocks}
        memory = [
            t.untyped_storage() for _, t in held_tensors([f.own_vendor for _, f in facades(copied)])
        ]
        assert not rows & {storage.data_ptr() for storage in memory}
        assert max(storage.nbytes() for storage in memory) <= 128 * 128 * 4
        bring_back(model)
        assert all(torch.equal(a, b) for a, b in zip(passes(model), passes(copied), strict=True))


def test_what_would_break_it_is_refused() -> None:
    model = stream(base("hqq", llama(2)))
    with pytest.raises(ModelError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(ModelError, match="neither moved nor cast"):
        model.to(torch.bfloat16)
    model.to("cpu")  # where it computes
    bring_back(model).to(torch.bfloat16)
    with pytest.raises(ModelError, match="no quantized stacks of experts"):
        stream(base("hqq", llama(2)), "experts")
    dense = llama(1)
    with pytest.raises(ModelError, match="stands in a list of blocks"):
        stream(base("hqq", nn.Sequential(dense.model.layers[0].mlp)))


def test_without_a_gpu_nothing_is_streamed_and_that_is_said(
    tokenizer: Any, random_data: Any
) -> None:
    notes: list[str] = []
    model = lora(base("hqq", llama(2)))
    result = trained(model, random_data, tokenizer, stream="all", on_note=notes.append)
    assert result.streamed is None
    assert len([note for note in notes if "train.stream has no effect here" in note]) == 1


def trained_on(model: Any) -> set[str]:
    """The devices of what is trained."""
    return {p.device.type for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ["lora", "vera", "ia3"])
def test_adapters_go_where_a_streamed_base_computes(adapter: str) -> None:
    model = qa.attach(stream(base("hqq", llama(2))), adapter)
    assert trained_on(model) == {"cpu"}
    streamed(model).device = torch.device("meta")  # PEFT leaves alone what is there, so only now
    place_where_it_computes(model)
    assert trained_on(model) == {"meta"}


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4"])
def test_on_a_card_adapters_go_where_a_streamed_base_computes(
    backend: str, tokenizer: Any, random_data: Any
) -> None:
    """PEFT finds hqq's codes, and would leave them beside those, in CPU memory."""
    plain = trained(on_card(backend), random_data, tokenizer, cuda_graphs=False)
    quantized = qa.quantize(llama(8, 512), backend, device="cuda", dtype="bfloat16")
    model = lora(stream(quantized))
    assert trained_on(model) == {"cuda"}
    assert trained(model, random_data, tokenizer).losses[0] == plain.losses[0]


def on_card(backend: str) -> Any:
    return lora(qa.quantize(llama(8, 512), backend, device="cuda", dtype="bfloat16"))


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["bnb-nf4", "hqq", "torchao-int8", "torchao-int4", "none"])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"memory": "min"}])
def test_on_a_card_training_gives_the_same_losses(
    backend: str, options: Any, tokenizer: Any, random_data: Any
) -> None:
    plain = trained(on_card(backend), random_data, tokenizer, cuda_graphs=False, **options)
    model = on_card(backend)
    before = held(model)
    found = trained(model, random_data, tokenizer, stream="all", **options)
    assert found.losses[0] == plain.losses[0]
    assert found.losses[1][1] == pytest.approx(plain.losses[1][1], rel=1e-4)
    assert found.streamed.gib > 0
    assert streamer_of(model) is None
    assert same(held(model), before)
    del before
    gc.collect()
    whole = torch.cuda.memory_allocated()
    stream(model)
    assert torch.cuda.memory_allocated() < whole - 0.9 * streamed(model).nbytes
    assert all(block.row.is_pinned() for block in streamed(model).blocks)
    assert next(facades(model))[1].dequantize().is_cuda


@pytest.mark.cuda
def test_on_a_card_it_is_never_whole_while_it_loads(tmp_path: Path) -> None:
    from quantadapt.loading import read_ahead
    from quantadapt.quantizing import quantize_plan

    llama(24, 2048).bfloat16().save_pretrained(tmp_path)  # type: ignore[operator]
    spec = Spec(model=str(tmp_path), backend="none", device="cuda", train={"stream": "all"})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = quantize_plan(plan(spec, check_output=False))
    peak = torch.cuda.max_memory_allocated() - before
    tables = sum(p.nbytes for n, p in model.named_parameters() if "embed" in n or "head" in n)
    block = streamed(model).blocks[0].nbytes
    assert streamed(model).nbytes == 24 * block
    assert peak < tables + 1.1 * read_ahead.AHEAD + 4 * block < 0.7 * streamed(model).nbytes
