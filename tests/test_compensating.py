"""Rounding that makes up for its errors: against counting out everything in float64, and on the
demo's own layers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_rows import few_rows
from merging import moved
from test_experts import made
from torch import Tensor

import quantadapt as qa
from quantadapt.exporting.compensating import compensated, compensating
from quantadapt.exporting.merging import bare_base, merged_model
from quantadapt.facade import facades, linear_facades, stack_facades
from quantadapt.testing.small_demo import calibration_examples, small_model

STEP = 0.5


def to_steps(columns: Tensor, which: slice) -> Tensor:
    """Multiples of a step, from -2 to 2 of them."""
    return (columns / STEP).round().clamp(-2, 2) * STEP


def moment_of(inputs: int, rows: int, seed: int, *, alike: float = 0.7) -> Tensor:
    """Return X^T X, float64, of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = (1 - alike) * x + alike * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return x.T @ x


def errors(weight: Tensor, moment: Tensor, rounded: Tensor) -> Tensor:
    off = rounded.double() - weight.double()
    return ((off @ moment.double()) * off).sum(1)


def by_the_book(weight: Tensor, moment: Tensor) -> Tensor:
    """GPTQ as its paper has it, in float64: after each column the inverse of what is left, anew."""
    weight, moment = weight.double().clone(), moment.double().clone()
    moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    left = moment.diagonal().argsort(descending=True).tolist()
    while left:
        column, *others = left
        inverse = torch.linalg.inv(moment[left][:, left])
        value = to_steps(weight[:, column], slice(None))
        error = (weight[:, column] - value) / inverse[0, 0]
        weight[:, others] -= error[:, None] * inverse[0, 1:]
        weight[:, column] = value
        left = others
    return weight


@pytest.mark.parametrize("inputs", [5, 40, 150])
def test_without_sweeps_it_is_gptq(inputs: int) -> None:
    """150: more columns than are rounded before all others learn of it."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, inputs, generator=generator) * 0.4
    moment = moment_of(inputs, 3 * inputs, 2)
    found = compensated(weight, moment, to_steps, sweeps=0)
    wanted = by_the_book(weight, moment)
    plain = to_steps(weight, slice(None))
    better = errors(weight, moment, wanted) < 0.99 * errors(weight, moment, plain)
    assert better.sum() >= 12  # others may stay rounded to nearest
    # What lies halfway between two steps may fall to either side in float32, rarely.
    assert (found.double() == wanted)[better].float().mean() > 0.98


def test_few_columns_are_rounded_as_well_as_can_be() -> None:
    """Of all 5^5 ways to round a row, what is found has nearly the least error."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 5, generator=generator) * 0.3
    moment = moment_of(5, 200, 3)
    ways = torch.tensor(list(itertools.product(range(-2, 3), repeat=5))) * STEP
    off = ways[None].double() - weight[:, None].double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(5)
    least = torch.einsum("rwi,ij,rwj->rw", off, damped, off).amin(1)
    found = errors(weight, damped, compensated(weight, moment, to_steps))
    plain = errors(weight, damped, to_steps(weight, slice(None)))
    assert (found >= least * (1 - 1e-4)).all()
    assert found.sum() < 1.1 * least.sum()
    assert plain.sum() > 2.5 * least.sum()


def test_no_row_is_worse_than_rounded_to_nearest() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(64, 30, generator=generator) * 0.5
        moment = moment_of(30, 20, seed, alike=0.2)  # fewer rows than inputs
        damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(30)
        found, plain = compensated(weight, moment, to_steps), to_steps(weight, slice(None))
        assert torch.equal(found, to_steps(found, slice(None)))
        assert (errors(weight, damped, found) <= errors(weight, damped, plain) * (1 + 1e-4)).all()


def test_it_makes_up_for_inputs_that_are_off() -> None:
    """The layer is fed something else than the tuned one: what it is to give is in its outputs.
    Without rounding, the damped least squares have a closed form, in float64."""
    generator = torch.Generator().manual_seed(7)
    y = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    x = y + 0.3 * y[:, :1] + 0.1 * torch.randn(400, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 20, generator=generator) * 0.4
    damping = 0.01 * (x.T @ x).diagonal().mean() * torch.eye(20, dtype=torch.float64)
    wanted = torch.linalg.solve(x.T @ x + damping, (x.T @ y + damping) @ weight.double().T).T
    free = compensated(weight, x.T @ x, lambda part, _: part, cross_moment=x.T @ y)
    assert (free.double() - wanted).abs().max() < 1e-4
    found = compensated(weight, x.T @ x, to_steps, cross_moment=x.T @ y)
    without = compensated(weight, x.T @ x, to_steps)
    target = y @ weight.double().T
    off, before = (float((x @ w.double().T - target).norm()) for w in (found, without))
    assert off < 0.8 * before


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_the_inputs_does_not_matter(scale: float) -> None:
    weight, moment = torch.randn(16, 20) * 0.4, moment_of(20, 60, 4)
    wanted = compensated(weight, moment, to_steps)
    assert torch.equal(compensated(weight, (moment * scale).float(), to_steps), wanted)


def test_inputs_that_are_always_0_or_always_the_same() -> None:
    """Dead ones are rounded to nearest; what cannot be inverted is damped; no data: to nearest."""
    weight = torch.randn(16, 20) * 0.4
    plain = to_steps(weight, slice(None))
    moment = moment_of(20, 60, 5)
    moment[3], moment[:, 3] = 0, 0
    assert torch.equal(compensated(weight, moment, to_steps)[:, 3], plain[:, 3])
    one = torch.ones(20, 20)
    found = compensated(weight, one, to_steps)
    assert (errors(weight, one, found) <= errors(weight, one, plain) + 1e-3).all()
    assert torch.equal(compensated(weight, torch.zeros(20, 20), to_steps), plain)


BACKENDS: list[Any] = [
    ("hqq", {"bits": 4}),
    ("gptq", {"bits": 3, "group_size": 64, "desc_act": True}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("bnb-nf4", {}),
            ("hqq", {"bits": 2, "axis": 0}),
            ("bnb-int8", {}),
            ("gptq", {"bits": 4, "group_size": 64}),
            ("awq", {"group_size": 64}),
        )
    ),
]


@pytest.mark.parametrize(("backend", "options"), BACKENDS, ids=str)
def test_on_layers_of_the_demo_it_keeps_a_small_change(
    backend: str, options: dict[str, Any], inputs: Callable[[str], Tensor]
) -> None:
    """What an adapter adds, sums of inputs as its gradients are, is lost by rounding to nearest
    and kept by this: outputs for inputs that were not shown are nearer to the tuned ones."""
    examples = calibration_examples() if backend in ("gptq", "awq") else None
    given = {"dtype": "float32", "calibration": examples, **options}
    model = qa.quantize(str(small_model(1)), backend, **given)
    target = model.quantadapt.quantizer.target
    torch.manual_seed(0)
    for name, facade in linear_facades(model):
        if not name.endswith(("q_proj", "o_proj", "down_proj")):
            continue
        x = inputs(name)
        shown, unseen = x[: len(x) * 3 // 4], x[len(x) * 3 // 4 :]
        before, grid = facade.dequantize(), target.grid(facade.vendor)
        change = torch.randn(len(before), 4) @ torch.randn(4, len(shown)) @ shown
        tuned = before + change * (0.02 * before.norm() / change.norm())
        found = compensated(tuned, shown.T @ shown, grid.nearest)
        wanted = unseen @ tuned.T
        off, plain = (
            float((unseen @ w.float().T - wanted).norm()) for w in (found, grid.nearest(tuned))
        )
        assert torch.equal(target.dequantize(target.repack(facade.vendor, found)).float(), found)
        # The steps of 2 bits are large, and 864 rows say little of the 768 inputs of a layer.
        least = 1 if options.get("bits") == 2 else 0.8
        assert off < least * plain, (name, off, plain)


@pytest.fixture(scope="module")
def inputs() -> Callable[[str], Tensor]:
    """Returns what a layer of the demo is given, [tokens, in_features]."""
    from quantadapt.loading import from_pretrained

    model = from_pretrained(str(small_model(1)), dtype=torch.float32).eval()

    def of(name: str) -> Tensor:
        seen: list[Tensor] = []
        layer = model.get_submodule(name)
        hook = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for example in calibration_examples():
                model(**example)
        hook.remove()
        return torch.cat(seen)

    return of


# Models ------------------------------------------------------------------------------------------


def tuned_model(source: Any, backend: str, target: str | list[str], **options: Any) -> Any:
    """A small adapter whose B is sums of a few rows, so small that rounding to nearest loses it."""
    model = qa.quantize(source, backend, dtype="float32", **options)
    tuned = qa.attach(model, "lora", r=4, target_modules=target)
    qa.train(
        tuned,
        few_rows(),
        max_steps=6,
        learning_rate=5e-4,
        per_device_train_batch_size=8,
        verbose=False,
    )
    return tuned.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.cat([e["input_ids"] for e in held_out()])).logits
    return found


def held_out() -> list[dict[str, Tensor]]:
    return calibration_examples()[16:]


@pytest.mark.parametrize(
    ("backend", "options"),
    [("hqq", {"bits": 4}), pytest.param("bnb-nf4", {}, marks=pytest.mark.slow)],
)
def test_a_merged_model_answers_as_the_tuned_one(backend: str, options: dict[str, Any]) -> None:
    model = tuned_model(str(small_model(2)), backend, ["q_proj", "down_proj", "up_proj"], **options)
    wanted = logits(model)
    before = {name: facade.dequantize() for name, facade in facades(bare_base(model))}
    write = compensating(model, calibration_examples()[:16])
    merged = merged_model(model, "requantize", write)
    plain = merged_model(model, "requantize", lambda _, copied, weight: copied.repack(weight))
    assert off(logits(merged), wanted) < 0.6 * off(logits(plain), wanted)
    assert torch.equal(logits(model), wanted), "the model is changed"
    for name, facade in facades(merged):
        weight, grid = facade.dequantize(), facade.target.grid(facade.vendor)
        assert torch.equal(grid.nearest(weight), weight)
        adapted = name.endswith(("q_proj", "down_proj", "up_proj"))
        assert adapted != torch.equal(weight, before[name]), name


def off(found: Tensor, wanted: Tensor) -> float:
    """Return the mean KL in nats."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss", "llama4"])
def test_experts_are_rounded_by_what_is_routed_to_them(kind: str, tmp_path: Any) -> None:
    """One by one, in stacks as the model keeps them; where the model runs them in a way of its own
    (Llama 4), they are rounded to nearest."""
    made(kind).save_pretrained(tmp_path)
    base = qa.quantize(str(tmp_path), "hqq", bits=3, group_size=32)
    model = moved(qa.attach(base, "lora", r=2, target_modules=["down_proj"]))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 128, (24, 1, 32), generator=generator)
    with warnings.catch_warnings(record=True):  # few tokens for each expert
        write = compensating(model, [{"input_ids": row} for row in rows])
    merged = merged_model(model, "requantize", write)
    plain = merged_model(model, "requantize", lambda _, copied, weight: copied.repack(weight))
    with torch.no_grad():
        found, nearest, wanted = (m(input_ids=rows[:, 0]).logits for m in (merged, plain, model))
    for (name, stack), (_, other) in zip(stack_facades(merged), stack_facades(plain), strict=True):
        weight = stack.dequantize()
        assert torch.equal(stack.target.grid(stack.vendor).nearest(weight), weight)
        shown = "down_proj" in name and kind != "llama4"
        assert shown != torch.equal(weight, other.dequantize()), name
    if kind != "llama4":
        assert off(found, wanted) < off(nearest, wanted)
