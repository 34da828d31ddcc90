"""Stacks of experts in a sharded base: the same losses and gradients, half of them each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from test_experts import gradients, ids, made, quantized, with_lora
from test_sharding import held

pytestmark = pytest.mark.slow  # test_sharding shards layers in processes of its own
KINDS = ("qwen3-moe", "gpt-oss", "deepseek-v3")


def sharded(folder: str) -> dict[str, Any]:
    import quantadapt as qa
    from quantadapt.distributed import start
    from quantadapt.facade import stack_facades
    from quantadapt.planning import plan
    from quantadapt.quantizing import quantize_plan
    from quantadapt.sharding import is_sharded, shard
    from quantadapt.spec import Spec

    whole = {kind: quantized(kind) for kind in KINDS}
    start("cpu")
    found: dict[str, Any] = {}
    for kind, model in whole.items():
        found[kind] = []
        for adapter in ("lora", "dora"):
            tuned = [with_adapter(copy.deepcopy(model), adapter, share=s) for s in (False, True)]
            loss, right = gradients(tuned[0])
            again, mine = gradients(tuned[1])
            worst = max(float((mine[name] - right[name]).abs().max()) for name in right)
            found[kind].append((loss - again, worst, mine.keys() == right.keys()))
        tuned[1].gradient_checkpointing_enable({"use_reentrant": False})
        tuned[1].enable_input_require_grads()
        found[kind].append((loss - gradients(tuned[1])[0], 0.0, True))
        size = held(model)
        found[f"{kind} share"] = held(shard(model)) / size
    spec = Spec(model=folder, backend="hqq", device="cpu", train={"parallel": "fsdp"})
    loaded = quantize_plan(plan(spec, check_output=False))
    stacks = dict(stack_facades(loaded))
    whole_one = qa.quantize(folder, "hqq", device="cpu", dtype="float32")
    with torch.no_grad():
        logits = [m(input_ids=ids()).logits for m in (whole_one, loaded)]
    found["loaded"] = (is_sharded(loaded), len(stacks), torch.equal(*logits))
    return found


def with_adapter(model: Any, adapter: str, share: bool) -> Any:
    import quantadapt as qa
    from quantadapt.sharding import shard

    model = shard(model) if share else model
    if adapter == "lora":
        return with_lora(model)
    tuned = qa.attach(model, adapter, r=4)
    numbers = torch.Generator().manual_seed(2)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return tuned


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("experts")
    made("qwen3-moe").save_pretrained(folder / "model")  # type: ignore[operator]
    return in_processes(2, sharded, folder, str(folder / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(both: list[Any], kind: str) -> None:
    for found in both:
        assert found[kind] == [(0.0, 0.0, True)] * 3
        assert found[f"{kind} share"] < 0.8  # tiny tensors of tiny layers stay whole


def test_experts_are_sharded_while_they_load(both: list[Any]) -> None:
    assert [found["loaded"] for found in both] == [(True, 4, True)] * 2
