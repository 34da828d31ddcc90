"""LoftQ through the protocol: closer to the unquantized model at the start, on any backend."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.loftq import LoftQStartWarning, _low_rank
from quantadapt.errors import PlanRefused
from quantadapt.loading import from_pretrained
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model
from quantadapt.testing.tensors import relative

IDS = torch.arange(48).reshape(2, 24) + 100
SMALL = str(small_model())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def start(backend: str, adapter: str = "loftq", attach=(), **options):
    model = qa.quantize(SMALL, backend, **options)
    return qa.attach(model, adapter, **dict(attach))


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("hqq", {"bits": 2}),
        ("bnb-nf4", {}),
        pytest.param("hqq", {"bits": 3}, marks=pytest.mark.slow),
        pytest.param("torchao-intx", {"bits": 3}, marks=pytest.mark.slow),
        pytest.param("quanto", {"weights": "int2"}, marks=pytest.mark.slow),
    ],
)
def test_it_starts_closer_to_the_unquantized_model(backend, options) -> None:
    exact = logits(from_pretrained(SMALL))
    plain = relative(logits(start(backend, "lora", **options)), exact)
    loftq = relative(logits(start(backend, attach={"r": 32}, **options)), exact)
    assert loftq < 0.9 * plain


@pytest.mark.slow
def test_the_starting_perplexity_falls() -> None:
    model = qa.quantize(None, "hqq", bits=2)
    quantized = qa.evaluate(model, max_examples=40)["perplexity"]
    started = qa.evaluate(qa.attach(model, "loftq"), max_examples=40)["perplexity"]
    assert started < 0.98 * quantized


@pytest.mark.slow
def test_more_iterations_get_closer_and_come_back(tmp_path) -> None:
    exact = logits(from_pretrained(SMALL))
    errors = []
    for count in (1, 4):
        attach = {"r": 32, "loftq_config": {"loftq_iter": count}}
        model = start("hqq", attach=attach, bits=2)
        errors.append(relative(logits(model), exact))
    assert errors[1] < errors[0]
    expected = logits(model)
    qa.save(model, tmp_path)
    assert torch.equal(logits(qa.load(tmp_path)), expected)


def test_one_iteration_leaves_the_base_alone(tmp_path) -> None:
    model = start("hqq", bits=2)
    expected = logits(model)
    qa.save(model, tmp_path)
    assert not (tmp_path / "base").exists()
    assert torch.equal(logits(qa.load(tmp_path)), expected)


def test_it_is_the_best_low_rank_approximation() -> None:
    matrix = torch.randn(80, 60, generator=torch.Generator().manual_seed(0))
    b, a = _low_rank(matrix, 8)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ v[:8]
    assert float((matrix - b @ a).norm()) < 1.001 * float((matrix - best).norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "options", "targets", "whole"),
    [
        ("none", {}, ["q_proj"], ["q_proj"]),
        ("hqq", {}, ["q_proj", "lm_head"], ["lm_head"]),
        ("hqq", {"skip_modules": ["lm_head", "v_proj"]}, ["q_proj", "v_proj"], ["v_proj"]),
    ],
    ids=["none", "head", "skipped"],
)
def test_layers_that_lost_nothing_begin_as_those_of_lora(backend, options, targets, whole) -> None:
    """A and B began as zeros there, and stayed so whatever was learnt; or it was no facade."""
    model = qa.quantize(SMALL, backend, **options)
    with pytest.warns(LoftQStartWarning, match=f"took nothing away .*{whole[0]} among them"):
        tuned = qa.attach(model, "loftq", r=4, target_modules=targets)
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        lost = name.rpartition(".")[2] not in whole
        assert a.any()
        assert bool(b.any()) == lost
        assert b.grad.any(), name  # what is all zeros has none


def test_with_dora_and_rslora_it_starts_in_the_same_place() -> None:
    expected = logits(start("hqq", bits=2))
    for adapter in ("dora", "rslora"):
        attach = {"init_lora_weights": "loftq", "r": 16}
        found = logits(start("hqq", adapter, attach=attach, bits=2))
        assert relative(found, expected) < 1e-4


def test_what_it_cannot_do_is_refused_before_any_work(tmp_path) -> None:
    quantized = qa.save(qa.quantize(SMALL, "hqq"), tmp_path / "q")
    with pytest.raises(PlanRefused, match="quantized already"):
        plan(Spec(model=str(quantized), adapter="loftq"))
    with pytest.raises(PlanRefused, match="quantized already"):
        qa.attach(qa.quantize(from_pretrained(SMALL), "hqq"), "loftq")
    adapter = {"name": "loftq", "loftq_config": {"loftq_iter": 3}}
    with pytest.raises(
        PlanRefused, match=r"(?s)cannot quantize single layers again.*loftq_iter: 1"
    ):
        plan(Spec(model=str(demo.MODEL_DIR), backend="gptq", adapter=adapter))
