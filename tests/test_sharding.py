"""A sharded base computes what the whole one does, whatever the backend, and is half as large."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes

from quantadapt.dependencies import missing_requirements
from quantadapt.errors import ModelError, PlanRefused
from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.registry import registry
from quantadapt.spec import Spec

IDS = torch.arange(24).reshape(2, 12)
FEW = ("bnb-nf4", "hqq", "none", "torchao-int8")
"""Each keeps its tensors in another way."""
OTHERS = sorted(
    record.name
    for record in registry().backends()
    if "cpu" in record.devices and record.name not in FEW and not missing_requirements(record)
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A Llama of two layers with random weights, and the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from quantadapt import demo

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return str(folder)


def passes(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradient at the first block's input, which goes through every weight."""
    x = torch.linspace(-1, 1, 2 * 12 * 128).reshape(2, 12, 128).sin().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), x.grad]


def held(model: Any) -> int:
    """Bytes of quantized layers in this process's memory."""
    from quantadapt.facade import facades
    from quantadapt.model.held import held_tensors
    from quantadapt.sharding import PACKED

    leaves = [t for _, t in held_tensors([facade.vendor for _, facade in facades(model)])]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in leaves}
    shares = [
        p.to_local().nbytes for n, p in model.named_parameters() if n.split(".")[-1] == PACKED
    ]
    return sum(storages.values()) + sum(shares)


def computed(tiny: str, backends: Sequence[str]) -> dict[str, Any]:
    import quantadapt as qa
    from quantadapt.distributed import start
    from quantadapt.facade import facades
    from quantadapt.sharding import shard

    data = [{"input_ids": torch.arange(64).reshape(1, 64) + i} for i in range(4)]
    models = {}
    for name in backends:  # before the processes meet: some vendors would calibrate together
        record = registry().backend(name)
        models[name] = qa.quantize(tiny, name, calibration=data if record.calibration else None)
    found = {}
    start("cpu")
    for name, model in models.items():
        before, size, (_, facade) = passes(model), held(model), next(facades(model))
        weight = facade.dequantize().clone()
        shard(model)
        read = facade.dequantize()
        pairs = [*zip(before, passes(model), strict=True), *zip(before, passes(model), strict=True)]
        found[name] = {
            "equal": [torch.equal(a, b) for a, b in pairs],
            "read": torch.equal(read, weight),
            "share": held(model) / size,
        }
    return found


def few(tiny: str) -> dict[str, Any]:
    return computed(tiny, FEW) | {"loaded": load_sharded(tiny)}


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory) -> list[dict[str, Any]]:
    return in_processes(2, few, tmp_path_factory.mktemp("sharded"), tiny)


@pytest.fixture(scope="module")
def sharded_others(tiny, tmp_path_factory) -> list[dict[str, Any]]:
    return in_processes(2, computed, tmp_path_factory.mktemp("others"), tiny, OTHERS)


@pytest.mark.parametrize("backend", FEW)
def test_a_sharded_base_computes_the_same(sharded, backend) -> None:
    assert_the_same(sharded, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_other_backends_compute_the_same(sharded_others, backend) -> None:
    assert_the_same(sharded_others, backend)


def assert_the_same(sharded: list[dict[str, Any]], backend: str) -> None:
    for found in sharded:
        assert found[backend]["equal"] == [True] * 4
        assert found[backend]["read"]
        assert 0.5 <= found[backend]["share"] < 0.65


def load_sharded(tiny: str) -> dict[str, Any]:
    import quantadapt as qa
    from quantadapt import layerwise, sharding
    from quantadapt.evaluation.sizes import size_mib
    from quantadapt.facade import facades
    from quantadapt.quantizing import quantize_plan

    made = plan(Spec(model=tiny, backend="hqq", train={"parallel": "fsdp"}), check_output=False)
    whole = layerwise.quantize_layerwise(made.quantizer, tiny, device="cpu", dtype=torch.float32)
    model = quantize_plan(made)
    ids = IDS.repeat(1, 2)
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
        expected = whole.generate(ids, max_new_tokens=4, do_sample=False)
    with pytest.raises(ModelError, match="cannot be rewritten"):
        next(facades(model))[1].requantize(torch.zeros(128, 128))
    losses = []
    for base in (qa.quantize(tiny, "hqq"), model):  # DoRA reads the weights when it is attached
        tuned = qa.attach(base, "dora", r=2)
        losses.append(tuned(input_ids=IDS, labels=IDS).loss.item())
    return {
        "dora": losses,
        "same": torch.equal(text, expected),
        "sharded": sharding.is_sharded(model),
        "head": type(model.lm_head.weight).__name__,
        "mib": size_mib(model) / size_mib(whole),
    }


def test_a_base_is_sharded_while_it_loads(sharded) -> None:
    for one in sharded:
        found = one["loaded"]
        assert found["same"]
        assert found["sharded"]
        assert found["head"] == "DTensor"
        assert found["dora"][0] == found["dora"][1]
        assert found["mib"] == pytest.approx(1, abs=0.05)


def test_blocks_are_handed_over_one_by_one(tiny) -> None:
    import quantadapt as qa
    from quantadapt.loading import watching_blocks

    handed: list[tuple[int, int]] = []

    def done(block: Any, vendors: list[Any]) -> None:
        alive = sum(type(m).__name__ == "HQQLinear" for v in made for m in v)
        made.append(vendors)
        handed.append((len(vendors), alive))

    made: list[list[Any]] = []
    with watching_blocks(done):
        qa.quantize(tiny, "hqq")
    assert handed == [(7, 0), (7, 7)]


TWO_CARDS = Machine(cuda=((9, 0), (9, 0)))


def refused(processes: int = 2, machine: Machine = TWO_CARDS, **values: Any) -> str:
    spec = Spec(**{"train": {"parallel": "fsdp"}} | values)
    with pytest.raises(PlanRefused) as caught:
        plan(spec, machine=machine, processes=processes, check_output=False)
    return str(caught.value)


def test_what_cannot_be_sharded_is_refused_before_the_start(tmp_path: Path) -> None:
    assert "[rule fsdp-keeps-the-base]" in refused(adapter="pissa")
    assert "modules_to_save" in refused(adapter={"name": "lora", "modules_to_save": ["lm_head"]})
    assert "[rule fsdp-no-merge]" in refused(export={"merge": "dense"})
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    assert "[rule fsdp-decoders-only]" in refused(model=str(tmp_path))


def test_processes_and_devices_have_to_match() -> None:
    assert "use --gpus 2" in refused(processes=4)
    assert "want one each" in refused(device="cuda:1")
    assert "there are none" in refused(machine=Machine())
    assert "not on mps" in refused(device="mps")


def test_a_backend_can_refuse_to_shard() -> None:
    from quantadapt.capabilities import Cell, Rule, refusals

    rule = Rule("x-whole", {"action": ("shard",)}, "it is one piece", "use ddp")
    cell = Cell(backend="x", adapter="lora")
    assert refusals(cell, [rule], "shard")[0].rule == "x-whole"
    assert refusals(cell, [rule]) == []


def test_the_plan_says_how_processes_work() -> None:
    made = plan(Spec(train={"parallel": "fsdp"}), machine=TWO_CARDS, processes=2)
    assert (made.processes, made.parallel, made.device, made.merge) == (
        2,
        "fsdp",
        "cuda:0",
        "never",
    )
    assert made.merge_refusals[0].rule == "fsdp-no-merge"
    assert plan(Spec(), machine=TWO_CARDS, processes=2).parallel == "ddp"
    assert plan(Spec(train={"parallel": "fsdp"}), machine=Machine()).parallel == "none"
