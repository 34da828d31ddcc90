"""Are stacks of experts quantized, if the backend says so, and only then?"""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from ..matrix.results import QUANTIZED
from .bench import Bench
from .small_experts import KINDS, quantized_share
from .suite import Suite
from .tensors import assert_equal, assert_within, relative

if TYPE_CHECKING:
    from torch import nn

_STEPS = 6
_RATE = 5e-3


class ExpertsSuite(Suite):
    """Mixtures of experts without and with an adapter. A backend that leaves experts dense is shown
    them, too: the model has to work all the same."""

    @pytest.fixture(params=list(KINDS))
    def experts(self, request: pytest.FixtureRequest) -> str:
        """What the mixture of experts is like."""
        return str(request.param)

    def test_experts_are_quantized_as_declared(self, bench: Bench, experts: str) -> None:
        from ..facade import stack_facades

        model, declared = bench.experts(experts), bench.plan.quantizer.quantizes_experts
        share, stacks = quantized_share(model), dict(stack_facades(model))
        before = bench.figures.get("", {}).get("experts_share", 1.0)
        bench.note("", experts_share=min(share, before) if stacks else 0.0)
        if not declared:
            assert not stacks, (
                f"{sorted(stacks)} are quantized, and `quantizes_experts` of the quantizer says "
                "that they are not. Say that they are"
            )
            return
        fix = "`quantize` takes every stack that `model.experts.expert_stacks` yields"
        assert share >= QUANTIZED, f"{share:.1%} of the weights are quantized. {fix}"
        if bench.rescales:
            return
        what = "a dequantized stack differs from the original (relative, worst stack)"
        dense = bench.dense_experts(experts)
        errors = [relative(s.weight + 0, dense.get_parameter(n)) for n, s in stacks.items()]
        fix = "Its rows are those of all experts, one below the other"
        assert_within(max(errors), bench.tolerance.weight.error, what, fix)

    def test_experts_are_not_left_dense_without_need(self, bench: Bench) -> None:
        """A quantizer that works layer by layer can quantize experts as tall layers."""
        from ..layerwise import quantize_layerwise
        from ..model.experts import stacks_of
        from ..protocols import LayerwiseQuantizer

        quantizer = bench.plan.quantizer
        if quantizer.quantizes_experts or not isinstance(quantizer, LayerwiseQuantizer):
            return
        dense = copy.deepcopy(bench.dense_experts("qwen3-moe"))
        where: Any = {"device": bench.suite.device, "dtype": bench.torch_dtype, "skip": None}
        try:
            model = quantize_layerwise(quantizer, dense, **where)
        except Exception:
            return
        found = [name for module in model.modules() for name in stacks_of(module)]
        assert not found or not bench.suite.strict, (
            "`quantizes_experts` says no, and `quantize_linear` takes stacks of experts as tall "
            "layers. Leave `quantize` as LayerwiseQuantizer has it"
        )

    def test_experts_are_saved_and_loaded(self, bench: Bench, experts: str) -> None:
        from ..exporting.loading import load
        from ..exporting.saving import save

        model = bench.experts(experts)
        loaded = load(save(model, bench.folder() / "saved"), device=bench.suite.device)
        what = "the logits of a model with experts change by saving and loading"
        fix = "`load` reads the tensors of a stack as those of a layer"
        assert_equal(bench.logits(loaded), bench.logits(model), what, fix)

    def test_lora_on_experts_trains_and_is_merged(self, bench: Bench, experts: str) -> None:
        from ..exporting.merging import merged_model
        from ..facade import facades

        tuned, losses = _trained(bench, bench.experts(experts))
        assert losses[-1] < losses[0], f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"
        if bench.refusals("lora", "dense"):
            return
        merged = merged_model(tuned, "dense")
        assert not list(facades(merged)), "a dense merge leaves quantized layers behind"
        error = relative(bench.logits(merged), bench.logits(tuned))
        what = "merged, a model with LoRA on its experts has other logits: they differ"
        fix = "`dequantize` of the target gives what the layer computes with"
        assert_within(error, bench.tolerance.activations, what, fix)


def _trained(bench: Bench, base: nn.Module) -> tuple[Any, list[float]]:
    """Return a copy with a LoRA on layers and experts that took a few steps, and its losses."""
    import torch

    from ..stages import attach

    torch.manual_seed(0)
    tuned: Any = attach(copy.deepcopy(base), "lora", r=4)
    weights = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in weights), "LoRA does not reach the experts"
    optimizer = torch.optim.AdamW(weights.values(), lr=_RATE)
    losses = []
    for _ in range(_STEPS):
        loss = tuned.train()(input_ids=bench.ids, labels=bench.ids).loss
        loss.backward()
        without = [name for name, weight in weights.items() if weight.grad is None]
        assert not without, f"{without[:3]} get no gradient"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return tuned.eval(), losses
