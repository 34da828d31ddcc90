"""DoRA on stacks of experts, against PEFT's own DoRA on a linear layer for each expert."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_of
from parameters import slow_but
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_experts import error, gradients, ids, logits, made, quantized
from test_experts_grouped import KINDS as GROUPED
from test_experts_grouped import experts_of, inputs, model, own_forward, rel, results
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.saving import NotPeftWarning
from quantadapt.facade import densify, fused_experts
from quantadapt.memory.experts import Experts

KINDS = ("qwen3-moe", "gpt-oss")
OWN = 1e-6
"""Of one forward and backward in float32, relative to the largest number."""


def shaken(tuned: Any, seed: int = 2) -> Any:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return tuned


def with_dora(kind: str, backend: str = "hqq", **options: Any) -> Any:
    return shaken(qa.attach(quantized(kind, backend), "dora", r=4, **options))


class PerExpert(nn.Module):
    """The experts of one block as linear layers, with PEFT's DoRA on each."""

    def __init__(self, experts: Any, wrappers: dict[str, Any]) -> None:
        super().__init__()
        dense: Any = densify(copy.deepcopy(nn.ModuleList([experts])))[0]  # type: ignore[index]
        self.count, self.has_bias, self.gate = dense.num_experts, dense.has_bias, dense._apply_gate
        for name in wrappers:
            stored = dense.get_parameter(name)
            weight = stored.transpose(1, 2) if dense.is_transposed else stored
            layers = nn.ModuleList()
            for e in range(self.count):
                linear = nn.Linear(weight.shape[2], weight.shape[1], bias=self.has_bias)
                linear.weight.data = weight[e].detach().clone()
                if self.has_bias:
                    linear.bias.data = getattr(dense, f"{name}_bias")[e].detach().clone()
                layers.append(linear)
            setattr(self, name, layers)
        config = LoraConfig(r=4, lora_alpha=32, use_dora=True, target_modules=r".*\d+")
        self.tuned: Any = [get_peft_model(copy.copy(self), config)]
        for name, wrapper in wrappers.items():
            for e, layer in enumerate(getattr(self, name)):
                a, b, magnitude = by_expert(wrapper, e)
                layer.lora_A["default"].weight.data = a.detach().clone()
                layer.lora_B["default"].weight.data = b.detach().clone()
                layer.lora_magnitude_vector["default"].weight.data = magnitude.detach().clone()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        made = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for e, share in zip(index[token].tolist(), weights[token], strict=True):
                y = self.gate(self.gate_up_proj[e](hidden[token : token + 1]))
                made = made.index_add(0, torch.tensor([token]), share * self.down_proj[e](y))
        return made


def by_expert(wrapper: Any, e: int, of: str = "data") -> tuple[Tensor, Tensor, Tensor]:
    """A, B and magnitude of one expert (or their gradients), as PEFT keeps those of a layer."""
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    magnitude = wrapper.lora_magnitude_vector["default"].weight
    a, b, magnitude = (getattr(tensor, of) for tensor in (a, b, magnitude))
    rank = len(a) // len(magnitude)
    return a[e * rank : (e + 1) * rank], b.view(len(b), rank, -1)[:, :, e], magnitude[e]


def wrappers_of(outer: Any) -> dict[str, Any]:
    found = {}
    while hasattr(outer, "parameter_name"):
        found[outer.parameter_name] = outer
        outer = outer.base_layer
    return {name: found[name] for name in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize("backend", slow_but(["hqq", "none"], "hqq"))
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_dora_on_each_expert(kind: str, backend: str) -> None:
    tuned = with_dora(kind, backend)
    outer = tuned.base_model.model.model.layers[0].mlp.experts
    wrappers = wrappers_of(outer)
    reference = PerExpert(outer.get_base_layer(), wrappers)
    numbers = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 32, generator=numbers)
    index = torch.stack([torch.randperm(4, generator=numbers)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=numbers)
    upstream = torch.randn(9, 32, generator=numbers)
    found = []
    for module in (outer, reference):
        inputs = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = module(inputs[0], index, inputs[1])
        (y * upstream).sum().backward()
        found.append((y, inputs[0].grad, inputs[1].grad))
    for mine, right in zip(*found, strict=True):
        assert close(mine, right)
    for name, wrapper in wrappers.items():
        for e, layer in enumerate(getattr(reference, name)):
            parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
            for mine, part in zip(by_expert(wrapper, e, "grad"), parts, strict=True):
                assert close(mine, part["default"].weight.grad)


def close(found: Tensor, right: Tensor) -> bool:
    return bool((found - right).abs().max() <= 10 * OWN * right.abs().max().clamp(min=1))


@pytest.mark.parametrize("backend", slow_but(["hqq", "none"], "hqq"))
@pytest.mark.parametrize("kind", KINDS)
def test_attached_it_changes_nothing_and_switched_off_it_is_not_there(kind, backend) -> None:
    base = quantized(kind, backend)
    before = logits(base)
    tuned = qa.attach(base, "dora", r=4)
    assert error(logits(tuned), before) < 1e-6
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert sum("experts" in n and "lora_magnitude_vector" in n for n in names) == 2 * 2
    assert error(logits(shaken(tuned)), before) > 1e-2
    with tuned.disable_adapter():
        assert error(logits(tuned), before) < 1e-6


@pytest.mark.parametrize("backend", slow_but(["hqq", "none"], "hqq"))
@pytest.mark.parametrize("kind", [*KINDS, "llama4"])
def test_merged_it_answers_the_same(kind: str, backend: str) -> None:
    tuned = with_dora(kind, backend)
    right = logits(tuned)
    assert error(logits(merged_model(tuned, "dense")), right) < 1e-5


def test_merged_in_place_and_taken_out_again_the_base_is_what_it_was() -> None:
    tuned = with_dora("qwen3-moe", "none")
    right = logits(tuned)
    before = copy.deepcopy(tuned.state_dict())
    tuned.merge_adapter()
    assert error(logits(tuned), right) < 1e-5
    tuned.unmerge_adapter()
    for name, tensor in tuned.state_dict().items():
        assert error(tensor, before[name]) < 1e-5, name


@pytest.mark.parametrize("backend", slow_but(["hqq", "none"], "hqq"))
def test_saved_and_loaded_it_answers_the_same(backend: str, tmp_path: Path) -> None:
    qa.save(quantized("qwen3-moe", backend), tmp_path / "base")
    tuned = shaken(qa.attach(qa.load(tmp_path / "base"), "dora", r=4))
    with pytest.warns(NotPeftWarning, match="quantadapt merge"):
        qa.save(tuned, tmp_path / "tuned")
    names = safe_open(tmp_path / "tuned" / "adapter" / "adapter_model.safetensors", "pt").keys()
    own = "base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"
    assert own in names
    assert torch.equal(logits(qa.load(tmp_path / "tuned")), logits(tuned))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_onto_the_base_each_experts_weight_is_pefts_of_its_layer(kind, tmp_path) -> None:
    """m (W + s B A) / ‖W + s B A‖ by hand, in float64, of the files that transformers loads."""
    base = made(kind)
    base.save_pretrained(tmp_path / "base")
    tuned = shaken(qa.attach(qa.quantize(str(tmp_path / "base"), "hqq", bits=8), "dora", r=4))
    saved = qa.save(tuned, tmp_path / "tuned")
    qa.merge_onto(saved, str(tmp_path / "base"), tmp_path, check=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for n, layer in enumerate(tuned.base_model.model.model.layers):
        for name, wrapper in wrappers_of(layer.mlp.experts).items():
            key = f"model.layers.{n}.mlp.experts.{name}"
            turned = base.model.layers[n].mlp.experts.is_transposed
            for e, stored in enumerate(base.state_dict()[key].double()):
                a, b, magnitude = (part.double() for part in by_expert(wrapper, e))
                weight = (stored.T if turned else stored) + wrapper.scaling["default"] * b @ a
                right = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
                assert error(found[key][e].double(), right.T if turned else right) < 1e-6


@pytest.mark.parametrize("backend", slow_but(["hqq", "none"], "hqq"))
def test_two_adapters_add_up_as_pefts_do(backend: str) -> None:
    """DoRA beside LoRA: W + ((c - 1) W + c s B A) + s' B' A', by hand."""
    tuned = with_dora("qwen3-moe", backend)
    config = LoraConfig(
        r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[]
    )
    tuned.add_adapter("other", config)
    tuned.base_model.set_adapter(["default", "other"])
    shaken(tuned, 5)
    right = logits(tuned)
    outer = tuned.base_model.model.model.layers[0].mlp.experts
    wrapper = wrappers_of(outer)["down_proj"]
    weight = wrapper.get_param().detach() + 0
    a, b = wrapper.lora_A["other"].weight, wrapper.lora_B["other"].weight
    delta = torch.einsum("ore,eri->eoi", b.view(32, 4, 4), a.view(4, 4, 32)) * 2
    assert error(wrapper.get_delta_weight("other"), delta) < 1e-6
    of_dora = wrapper.get_delta_weight("default")
    norms = (weight + of_dora).norm(dim=2)
    assert error(norms, wrapper.lora_magnitude_vector["default"].weight) < 1e-5
    assert error(logits(merged_model(tuned, "dense")), right) < 1e-4


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("none", [False, True])
def test_gradients_are_those_of_the_weights_that_it_stands_for(
    kind: str, none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own experts, dense, with W' = c (W + s B A): what the gradient of W' comes to
    for A, B and the magnitudes, where c counts as a constant but for these."""
    monkeypatch.setattr(fused_experts, "run_composed", None)  # one function, as LoRA
    tuned = shaken(qa.attach(model(GROUPED[kind]), "dora", r=4, lora_alpha=12))
    outer = next(m for n, m in tuned.named_modules() if n.endswith(("mlp.experts", "moe.experts")))
    wrappers, experts = wrappers_of(outer), experts_of(tuned)
    dense = experts_of(densify(copy.deepcopy(nn.ModuleList([experts]))))
    leaves, parts = [], {}
    for name, wrapper in wrappers.items():
        stored = dense.get_parameter(name)
        w = stored.transpose(1, 2) if dense.is_transposed else stored
        a = wrapper.lora_A["default"].weight.view(4, 4, -1)
        b = wrapper.lora_B["default"].weight.view(-1, 4, 4).permute(2, 0, 1)
        whole = (w + 3 * b @ a).detach()
        norms = whole.norm(dim=2, keepdim=True)
        c = wrapper.lora_magnitude_vector["default"].weight.detach().unsqueeze(2) / norms
        changed = c * whole
        stored.data = changed.transpose(1, 2) if dense.is_transposed else changed
        leaves.append(stored.requires_grad_())
        parts[name] = (whole, norms, c, a.detach(), b.detach())
    for bias in ("gate_up_proj_bias", "down_proj_bias"):
        if hasattr(dense, bias):
            getattr(dense, bias).requires_grad_(False)
    expected = results(own_forward(dense), inputs(none), leaves)
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    trained = [getattr(w, n)["default"].weight for w in wrappers.values() for n in names]
    found = results(outer, inputs(none), trained)
    for mine, right in zip(found[:3], expected[:3], strict=True):
        assert rel(mine, right) < OWN
    for n, (whole, norms, c, a, b) in enumerate(parts.values()):
        gradient = expected[3 + n]
        gradient = gradient.transpose(1, 2) if dense.is_transposed else gradient
        of_a = 3 * b.transpose(1, 2) @ (c * gradient)
        of_b = 3 * (c * gradient) @ a.transpose(1, 2)
        of_magnitude = (gradient * whole / norms).sum(2)
        rows = of_b.permute(1, 2, 0).flatten(1)
        for mine, right in zip(
            found[3 + 3 * n :], (of_a.flatten(0, 1), rows, of_magnitude), strict=False
        ):
            assert rel(mine, right) < 2 * OWN


def test_a_graph_that_is_kept_gives_its_gradients_again() -> None:
    tuned = shaken(qa.attach(model(GROUPED["silu"]), "dora", r=4))
    outer = next(m for n, m in tuned.named_modules() if n.endswith("mlp.experts"))
    trained = [p for n, p in outer.named_parameters() if "lora_" in n]
    loss = outer(*inputs()).square().sum()
    first, second = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputed_layers_give_the_same_gradients() -> None:
    plain, recomputed = with_dora("qwen3-moe"), with_dora("qwen3-moe")
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed.enable_input_require_grads()
    loss, right = gradients(plain)
    again, found = gradients(recomputed)
    assert abs(loss - again) < 1e-6
    assert max(float((found[name] - right[name]).abs().max()) for name in right) < 1e-6


def test_it_takes_the_memory_that_is_foreseen_beside_lora() -> None:
    tokens, peaks = 1200, []
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, 4, generator=generator).topk(2).indices
    hidden = torch.randn(tokens, 64, generator=generator).requires_grad_()
    weights = torch.rand(tokens, 2, generator=generator).requires_grad_()
    for adapter in ("lora", "dora"):
        tuned = qa.attach(model(GROUPED["silu"]), adapter, r=4)
        outer = next(m for n, m in tuned.named_modules() if n.endswith("mlp.experts"))
        trained = [p for n, p in outer.named_parameters() if "lora_" in n]
        run = partial(results, outer, (hidden, index, weights), trained)
        run()  # what is made once
        peaks.append(peak_of(run))
    sizes = Experts.of(GROUPED["silu"].to_dict())
    assert sizes is not None
    foreseen = [sizes.backward_numbers(tokens, 64, dora=dora) for dora in (False, True)]
    more = 4 * (foreseen[1] - foreseen[0] + sizes.norms(64))
    assert 0.8 * more < peaks[1] - peaks[0] < more


def test_no_weight_is_kept_for_backward() -> None:
    """The dequantized stacks are made again."""
    tuned = with_dora("qwen3-moe").train()
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tuned(input_ids=ids()[:1, :2], labels=ids()[:1, :2])
    assert saved
    assert 4 * 64 * 32 not in saved  # of gate_up_proj; nothing else has that size
