"""What Liger's patches leave to be computed otherwise, against stock PEFT and transformers.

The patches are the real ones; on a CPU their kernels' places are taken by plain torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantadapt import fused_kernels as fused_kernels_file
from quantadapt.fused_kernels import fused_kernels

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
IDS = torch.arange(24).view(2, 12) * 5 % 61


class RmsNorm:
    """As Liger's kernel computes it: of the weight that it is given."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


class SiluMul:
    """As Liger's kernel computes it, whatever activation the model has."""

    @staticmethod
    def apply(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
        return nn.functional.silu(gate) * up


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch) -> None:
    pytest.importorskip("liger_kernel", reason="there is liger-kernel for Linux alone")
    for place, value in {
        "rms_norm.LigerRMSNormFunction": RmsNorm,
        "swiglu.LigerSiLUMulFunction": SiluMul,
        "monkey_patch.liger_rotary_pos_emb": apply_rotary_pos_emb,
    }.items():
        monkeypatch.setattr(f"liger_kernel.transformers.{place}", value)
    monkeypatch.setattr(fused_kernels_file, "_runs_liger", lambda _: True)


def llama(activation: str = "silu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, hidden_act=activation))


def adapted(config: Any, activation: str = "silu", name: str = "default") -> Any:
    model = get_peft_model(llama(activation), config, adapter_name=name).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def loss_and_gradients(model: Any) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(input_ids=IDS, labels=IDS).loss
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def assert_same_with_liger(model: Any) -> list[str]:
    """Return what was told."""
    notes: list[str] = []
    expected = loss_and_gradients(model)
    with fused_kernels(model, notes.append) as done:
        assert done is True
        found = loss_and_gradients(model)
    for made, wanted in zip(found, expected, strict=True):
        assert float((made - wanted).norm()) <= 1e-5 * float(wanted.norm())
    return notes


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", **options)


def test_lora_is_the_same_and_liger_computes_it() -> None:
    model = adapted(lora())
    assert assert_same_with_liger(model) == []
    with fused_kernels(model, pytest.fail):
        layer = model.get_base_model().model.layers[0]
        forwards = [vars(m)["forward"].__func__ for m in (layer.mlp, layer.input_layernorm)]
    assert {f.__module__ for f in forwards} == {
        "liger_kernel.transformers.swiglu",
        "liger_kernel.transformers.rms_norm",
    }


@pytest.mark.parametrize("targets", [NORMS, ["norm"]], ids=["all", "last"])
def test_norms_that_are_tuned_count(targets) -> None:
    """Liger's norm takes the weight of the base from PEFT's layer."""
    assert assert_same_with_liger(adapted(LNTuningConfig(target_modules=targets))) == []


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("modules", [NORMS, ["mlp"]], ids=["norms", "mlp"])
def test_what_is_trained_whole_counts(modules, name) -> None:
    """Whatever the adapter is called."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules)
    model = adapted(config, name=name)
    before = [name for name, _ in model.named_modules()]
    assert assert_same_with_liger(model) == []
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh"])
def test_another_activation_stays(activation) -> None:
    """Liger's MLP of Llama computes SiLU, whatever the config says."""
    (note,) = assert_same_with_liger(adapted(lora(), activation))
    assert note == "Liger's kernels are not used in LlamaMLP: the activation is another there"


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_a_liger_that_does_not_fit_is_told_and_not_used(error, monkeypatch) -> None:
    """As of Qwen3.5-MoE, whose patches ask for a class that there is not."""

    def patches_in_part(model: Any, **_: Any) -> None:
        model.model.norm.forward = model.lm_head.forward
        raise error("there is no Such")

    place = "liger_kernel.transformers.monkey_patch._apply_liger_kernel_to_instance"
    monkeypatch.setattr(place, patches_in_part)
    model, notes = adapted(lora()), []
    expected = loss_and_gradients(model)
    with fused_kernels(model, notes.append) as done:
        assert done is False
        found = loss_and_gradients(model)
    assert all(map(torch.equal, found, expected))
    (note,) = notes
    assert note.startswith("Liger's kernels are not used: liger-kernel ")
    assert note.endswith(" fails: there is no Such")
