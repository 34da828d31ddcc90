"""Products with the frozen base in 8-bit floats, against the same rounding done in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import slow_but
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import quantadapt as qa
from quantadapt.adapting.fused import use_fused_layers
from quantadapt.errors import PlanRefused
from quantadapt.facade import QuantLinear, float8, linear_facades, recomputing, wrap
from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.planning.words import plan_rows
from quantadapt.protocols import AdapterTarget
from quantadapt.spec import Spec, TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training import checking, train
from quantadapt.training import lent as loans

INPUTS, OUTPUTS = 48, 32


def e4m3(values: Tensor) -> Tensor:
    """The numbers of float8_e4m3fn nearest to float64 `values`, by the format's definition: four
    bits of exponent from -6 on, three of mantissa, half to even, 448 at most."""
    exponent = torch.floor(torch.log2(values.abs().clamp_min(1e-300))).clamp_min(-6)
    step = torch.exp2(exponent - 3)
    return (torch.round(values / step) * step).clamp(-448, 448)


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and factors of each row, float64."""
    factors = matrix.abs().amax(1, keepdim=True) / 448
    return e4m3(matrix / factors), factors


class Reference(torch.autograd.Function):
    """x Wᵀ and its gradient, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (codes, factors), (x_codes, x_factors) = rounded(weight), rounded(x)
        ctx.save_for_backward(codes, factors)
        return (x_codes @ codes.T) * x_factors * factors.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        codes, factors = ctx.saved_tensors
        dy_codes, dy_factors = rounded(grads[0] * factors.T)
        return (dy_codes @ codes) * dy_factors, None


class Dense(AdapterTarget):
    """An unquantized layer."""

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def dequantize(self, module: nn.Module) -> Tensor:
        return module.weight.detach()


def product_of_codes(
    x: Tensor, right: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, **_: Any
) -> Tensor:
    """What `torch._scaled_mm` is documented to return, in float64."""
    return (x.double() @ right.double() * scale_a * scale_b).to(out_dtype)


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own product, or, where that knows no factors by row on a CPU (up to 2.12), its stand
    in; training itself refuses there."""
    if "cuda" not in request.keywords and float8.refused(torch.device("cpu")):
        monkeypatch.setattr(torch, "_scaled_mm", product_of_codes)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Float32 numbers that a test in float64 sees as they are, of rows of several sizes."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers * torch.logspace(-3, 2, shape[0])[:, None]


def facade(bias: bool = False, inputs: int = INPUTS, outputs: int = OUTPUTS) -> QuantLinear:
    torch.manual_seed(0)
    made = wrap(nn.Sequential(nn.Linear(inputs, outputs, bias)), Dense(), torch.float32)[0]
    made.wants_float8 = True
    return made.train()


def close(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Rounding to codes is the same; sums are float32's."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < share, float(error)


def test_numbers_are_rounded_as_the_format_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    known = every[every.isfinite()]
    assert torch.equal(e4m3(known), known)
    between = torch.linspace(-448, 448, 20_001, dtype=torch.float64).float()
    nearest = known[(between[:, None].double() - known).abs().argmin(1)]
    far = (between.double() - e4m3(between.double())).abs()
    torch.testing.assert_close(far, (between.double() - nearest).abs())
    codes, factors = float8.in_float8(between[None])
    assert factors.item() == pytest.approx(1)
    assert torch.equal(codes.double()[0], e4m3(between.double()))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_the_rounded_sides_do(bias) -> None:
    layer, x, dy = facade(bias), random(10, INPUTS), random(10, OUTPUTS, seed=1)
    given = x.clone().requires_grad_()
    layer(given.view(2, 5, INPUTS)).view(10, OUTPUTS).backward(dy)
    with torch.no_grad():
        y = layer(x)
    exact = x.double().requires_grad_()
    expected = Reference.apply(exact, layer.vendor.weight.double())
    expected.backward(dy.double())
    close(y, expected.detach() + (layer.bias.double() if bias else 0))
    close(given.grad, exact.grad)
    plain = x.double() @ layer.vendor.weight.double().T + (layer.bias.double() if bias else 0)
    off = (y.double() - plain).norm() / plain.norm()
    assert 0.005 < off < 0.05  # two roundings of 2.6% each, in sums of 48


class Rounding(Dense):
    """Its own forward rounds what comes in."""

    quantizes_activations = True

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.linear(x.round(), module.weight, module.bias)


def test_products_are_in_the_compute_dtype_also_of_float32(monkeypatch) -> None:
    layer = facade().to(torch.bfloat16)
    made, scaled = [], float8._scaled
    monkeypatch.setattr(float8, "_scaled", lambda *a: made.append(a[-1]) or scaled(*a))
    model = nn.ModuleDict({"linear": layer})
    config = LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
    use_fused_layers(config)
    adapted_layer = inject_adapter_in_model(config, model)["linear"]
    for one in (layer, adapted_layer):
        x = random(6, INPUTS).requires_grad_()
        one(x).sum().backward()
        assert x.grad.dtype == torch.float32
    assert made == [torch.bfloat16] * 4


def test_a_vendor_that_rounds_inputs_does_so_still() -> None:
    """What it serves is what is trained; the gradient goes through 8-bit floats."""
    layer, x, dy = facade(), random(10, INPUTS), random(10, OUTPUTS, seed=1)
    layer.target = Rounding()
    given = x.clone().requires_grad_()
    y = layer(given)
    y.backward(dy)
    assert torch.equal(y, nn.functional.linear(x.round(), layer.vendor.weight))
    exact = x.double().requires_grad_()
    Reference.apply(exact, layer.vendor.weight.double()).backward(dy.double())
    close(given.grad, exact.grad)


def test_rows_of_zeros_and_of_what_is_no_number() -> None:
    layer = facade()
    x = random(4, INPUTS)
    x[0] = 0
    x[1, 3], x[2, 5] = math.nan, math.inf
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0], torch.zeros(OUTPUTS))
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


def test_only_what_trains_and_what_the_kernels_take() -> None:
    x = random(4, INPUTS)
    layer = facade()
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.vendor.weight))
        assert not torch.equal(layer.train()(x), nn.functional.linear(x, layer.vendor.weight))
    for inputs, outputs in ((INPUTS, 24), (40, OUTPUTS)):
        odd, x = facade(inputs=inputs, outputs=outputs), random(4, inputs)
        with torch.no_grad():
            assert torch.equal(odd(x), nn.functional.linear(x, odd.vendor.weight))


@pytest.mark.parametrize("outputs", [OUTPUTS, 24])
def test_layers_that_the_kernels_do_not_take_are_told(outputs) -> None:
    layers = {"q_proj": nn.Linear(INPUTS, OUTPUTS), "v_proj": nn.Linear(INPUTS, outputs)}
    model = wrap(nn.ModuleList(nn.ModuleDict(layers) for _ in range(1)), Dense(), torch.float32)
    notes: list[str] = []
    with loans.float8_products(model, TrainSpec(compute="fp8"), notes.append):
        pass
    with loans.float8_products(model, TrainSpec(), notes.append):
        pass
    assert len(notes) == (outputs == 24)
    assert all("1 of 2 layers" in note and note.endswith("16: 1 x v_proj") for note in notes)


def adapted(**options: Any) -> nn.Module:
    """Two layers of one module that get the same x, with LoRA."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(INPUTS, OUTPUTS), "b": nn.Linear(INPUTS, 64, bias=False)})
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["a", "b"], **options)
    use_fused_layers(config)
    made = inject_adapter_in_model(config, wrap(plain, Dense(), torch.float32))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    for _, layer in linear_facades(made):
        layer.wants_float8 = True
    return made.train()


def lora_reference(layer: Any, x: Tensor, dora: bool) -> Tensor:
    """PEFT's formula around the reference's product, in float64."""
    weight, bias = layer.base_layer.vendor.weight.double(), layer.base_layer.bias
    a, b = (getattr(layer, f"lora_{n}")["default"].weight for n in "AB")
    a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    layer.reference = [a, b]
    y = Reference.apply(x, weight) + 3 * (x @ a.T) @ b.T
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().requires_grad_()
        layer.reference.append(magnitude)
        y = y * (magnitude / (weight + 3 * b @ a).detach().norm(dim=1))
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("joined", [False, True])
def test_adapters_around_it(dora, joined) -> None:
    model = adapted(use_dora=dora)
    x = random(10, INPUTS)
    sides = [random(10, n, seed=n) for n in (OUTPUTS, 64)]

    def passed() -> tuple[list[Tensor], Tensor]:
        given = x.clone().requires_grad_()
        outputs = [model["a"](given), model["b"](given)]
        model.zero_grad()
        torch.autograd.backward(outputs, sides)
        return outputs, given.grad

    with loans.fused_layers(model):
        outputs, dx = passed()
        if joined:
            outputs, dx = passed()
    exact = x.double().requires_grad_()
    expected = [lora_reference(model[n], exact, dora) for n in "ab"]
    torch.autograd.backward(expected, [side.double() for side in sides])
    for y, wanted in zip(outputs, expected, strict=True):
        close(y.detach(), wanted.detach())
    # DoRA multiplies its factors into the gradient first: other codes, where they are near a tie.
    close(dx, exact.grad, 2e-2 if dora else 1e-5)
    for name in "ab":
        layer = model[name]
        trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        trained += [layer.lora_magnitude_vector["default"].weight] if dora else []
        for parameter, wanted in zip(trained, layer.reference, strict=True):
            close(parameter.grad, wanted.grad, 1e-4)


def test_a_recomputation_keeps_codes_for_its_backward() -> None:
    layer, x = facade(), random(INPUTS * 2, INPUTS)
    dy = random(len(x), OUTPUTS, seed=1)
    with torch.no_grad():
        layer(x)
        assert layer._kept is None
        fresh = layer.gradient(dy)
        with recomputing():
            layer(x)
        assert isinstance(layer._kept, float8.Rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuantLinear, "dequantize", lambda self: 1 / 0)
            assert torch.equal(layer.gradient(dy), fresh)
        assert layer._kept is None
        with recomputing():
            layer(x[:8])  # 8 x 48 x 4 bytes, and codes are 32 x 48
        assert layer._kept is None


@contextmanager
def allowed() -> Iterator[None]:
    """Let training compute so without a GPU: torch's product knows CPUs, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "float8_problems", lambda *_: [])
        yield


@pytest.mark.parametrize("backend", slow_but(["none", "hqq", "bnb-nf4", "torchao-int8"], "hqq"))
def test_every_backend_trains_so(backend, tokenizer, random_data, tmp_path) -> None:
    """The first loss is off by what rounding does, the curve is the one without."""
    curves = {}
    for compute in ("dtype", "fp8"):
        torch.manual_seed(0)
        model = qa.quantize(str(small_model()), backend, device="cpu", dtype="float32")
        model = qa.attach(model, "lora", seed=0)
        spec = TrainSpec(
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            compute=compute,
            learning_rate=1e-3,
            gradient_checkpointing=True,
        )
        with allowed():
            result = train(model, tokenizer, random_data, spec, output=tmp_path / compute, seed=0)
        curves[compute] = [loss for _, loss in result.losses]
        assert not any("wants_float8" in vars(layer) for _, layer in linear_facades(model))
    difference = [abs(a - b) / b for a, b in zip(curves["fp8"], curves["dtype"], strict=True)]
    assert 0 < max(difference) < 0.02, curves


@pytest.mark.slow
def test_the_curve_on_the_demo_is_that_without() -> None:
    """30 steps of the demo's base, and the perplexity that they lead to."""
    curves, perplexities = {}, {}
    for compute in ("dtype", "fp8"):
        model = qa.attach(qa.quantize(backend="bnb-nf4", device="cpu", dtype="float32"), "lora")
        options = {"max_steps": 30, "per_device_train_batch_size": 4, "logging_steps": 5}
        with allowed():
            result = qa.train(model, compute=compute, max_length=128, **options)
        curves[compute] = [loss for _, loss in result.losses]
        perplexities[compute] = qa.evaluate(model, max_examples=50)["perplexity"]
    print(curves, perplexities)
    assert curves["fp8"] == pytest.approx(curves["dtype"], rel=0.01)
    assert perplexities["fp8"] == pytest.approx(perplexities["dtype"], rel=0.005)


# --- what the plan says -----------------------------------------------------------------------


def planned(tmp_path: Path, *cuda: tuple[int, int], cards: tuple[float, ...] = (), **spec: Any):
    machine = Machine(cuda, (24 * 2**30,) * len(cuda))
    train = {"compute": "fp8", **spec.pop("train", {})}
    made = Spec(output=str(tmp_path / "run"), train=train, backend="bnb-nf4", **spec)
    return plan(made, machine=machine, cards=cards)


@pytest.mark.parametrize(
    ("cuda", "spec", "rules"),
    [
        ([], {}, ["fp8-gpu"]),
        ([(8, 9)], {}, ["fp8-gpu"]),
        ([(9, 0), (8, 0)], {"device": "cuda:1"}, ["fp8-gpu"]),
        ([(9, 0)], {"device": "cpu"}, ["fp8-gpu"]),
        ([(9, 0)], {"dtype": "float16"}, ["fp8-dtype"]),
        ([(8, 0)], {"dtype": "float32", "train": {"merge_aware": True}},
         ["fp8-gpu", "fp8-dtype", "fp8-merge-aware"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(cuda, spec, rules, tmp_path) -> None:
    with pytest.raises(PlanRefused) as refused:
        planned(tmp_path, *cuda, **spec)
    found = [problem for problem in refused.value.problems if problem.where == "train.compute"]
    assert [problem.rule for problem in found] == rules
    assert all("leave train.compute out" in problem.fix for problem in found)


def test_the_plan_says_it_and_counts_it(tmp_path) -> None:
    made = planned(tmp_path, (9, 0))
    assert any("products with the base round" in note for note in made.notes)
    assert ("device", "cuda, computing in bfloat16, products with the base in fp8") in plan_rows(
        made, None
    )
    work = made.memory.work
    without = replace(work, float8=False)
    tokens = 1000
    more = tokens * (work.shape.mlp + 2 * work.shape.hidden)
    assert work.backward_bytes(tokens) - without.backward_bytes(tokens) == more
    assert 0 < work.recompute_bytes(10**6) == without.recompute_bytes(10**6) / 2
    asked = planned(tmp_path, cards=(24.0,), device="cuda")  # of a card that is not here
    assert asked.memory.work.float8


def test_training_refuses_where_products_fail(tokenizer, random_data, tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), "lora")
    spec = TrainSpec(max_steps=1, compute="fp8")
    with pytest.raises(PlanRefused, match="Hopper"):
        train(model, tokenizer, random_data, spec, output=tmp_path, seed=0)
    with allowed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", lambda *_, **__: 1 / 0)
        with pytest.raises(PlanRefused, match="fail here: division by zero"):
            train(model, tokenizer, random_data, spec, output=tmp_path, seed=0)
    with allowed(), pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch, "_scaled_mm")
        with pytest.raises(PlanRefused, match="has no product of 8-bit floats"):
            train(model, tokenizer, random_data, spec, output=tmp_path, seed=0)


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "columns"), [(33, 48), (70, 4096), (16, 5008), (0, 64)])
@pytest.mark.parametrize("by", [False, True])
def test_kernels_do_what_plain_torch_does(rows, columns, by) -> None:
    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    factors = torch.rand(columns) + 0.5 if by else None
    expected = float8.in_float8(x, factors)
    found = float8.in_float8(x.cuda(), None if factors is None else factors.cuda())
    torch.testing.assert_close(found.factors.cpu(), expected.factors, rtol=1e-6, atol=0)
    off = found.codes.cpu().float() - expected.codes.float()
    assert off.ne(0).float().mean().nan_to_num() < 1e-3  # ties, where a quotient rounds otherwise
    assert (off.abs() <= expected.codes.float().abs() / 7 + 2**-9).all()
    turned = float8._transposed(found.codes)
    assert torch.equal(turned.view(torch.uint8), found.codes.view(torch.uint8).T.contiguous())


@pytest.mark.cuda
def test_on_a_gpu_a_row_with_what_is_no_number_is_told() -> None:
    x = torch.randn(3, 5008, dtype=torch.bfloat16, device="cuda")
    x[0, 5000], x[1, 3] = math.nan, math.inf
    factors = float8.in_float8(x).factors[:, 0]
    assert factors.isfinite().tolist() == [False, False, True]


@pytest.mark.cuda
def test_a_layer_on_a_gpu_computes_what_it_does_on_a_cpu() -> None:
    layer = facade().to(torch.bfloat16)
    x, dy = random(40, INPUTS).bfloat16(), random(40, OUTPUTS, seed=1).bfloat16()
    exact = x.double().requires_grad_()
    y = Reference.apply(exact, layer.vendor.weight.double())
    y.backward(dy.double())
    expected = y.detach().float(), exact.grad.float()
    with torch.no_grad():
        layer = layer.cuda()
        found = layer(x.cuda()), layer.gradient(dy.cuda())
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().float() - other).norm() / other.norm() < 0.02
