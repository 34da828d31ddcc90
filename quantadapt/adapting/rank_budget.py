"""What AdaLoRA does once a step, for all layers together.

PEFT goes from layer to layer: for the loss that keeps the rows of A and the columns of B
orthogonal, for importances, and for which directions a budget leaves. That is some ten thousand
kernels a step in an 8B model, and hundreds of waits for the GPU. The numbers are the same here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.patches import patched
from .adalora import tuner_of
from .fused_lora import no_autocast

STACKED = 2**24
"""So many numbers are stacked at a time."""
_Groups = list[list[int]]


@contextmanager
def joint_ranks(model: nn.Module) -> Iterator[None]:
    """Inside, an AdaLoRA that `model` may have takes its steps so."""
    tuner = tuner_of(model)
    if tuner is None or not hasattr(tuner, "rankallocator"):  # one that is not trained has none
        yield
        return
    ranks = _Ranks(tuner)
    with ExitStack() as stack:
        stack.enter_context(patched(tuner, forward=ranks.forward))
        own = {
            "update_ipt": ranks.update_importances,
            "mask_to_budget": ranks.mask_to_budget,
            "mask_using_rank_pattern": ranks.mask_by_pattern,
        }
        stack.enter_context(patched(tuner.rankallocator, **own))
        yield


class _Ranks:
    """Stands in for methods of PEFT's `AdaLoraModel` and `RankAllocator`.

    Attributes:
        weights: name -> A, B or E, as PEFT names them.
        triplets: the names of A, B and E of each layer.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner, self.allocator = tuner, tuner.rankallocator
        self.eager: Callable[..., Any] = tuner.forward
        adapter = tuner.trainable_adapter_name
        self.weights = {
            name: parameter
            for name, parameter in tuner.model.named_parameters()
            if "lora_" in name and adapter in name
        }
        names = [name for name in self.weights if f"lora_E.{adapter}" in name]
        kinds = "lora_A", "lora_B", "lora_E"
        self.triplets = [[name.replace("lora_E", kind) for kind in kinds] for name in names]
        self._pattern: tuple[Any, list[Tensor]] | None = None

    # --- the model's -------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tuner's: the base model's, with the loss on what is not orthogonal."""
        weight = self.tuner.peft_config[self.tuner.trainable_adapter_name].orth_reg_weight
        if weight < 0:
            return self.eager(*args, **kwargs)  # which refuses it
        outputs = self.tuner.model.forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if weight > 0 and isinstance(loss, Tensor):
            factors = [self.weights[name] for pair in self.triplets for name in pair[:2]]
            outputs.loss = loss + (weight * not_orthogonal(factors)).to(loss.dtype)
        return outputs

    # --- the allocator's ---------------------------------------------------------------------

    def update_importances(self, model: nn.Module) -> None:
        """Update the importance of each weight and how uncertain it is, from the gradients."""
        allocator, names = self.allocator, list(self.weights)
        held = allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc
        for name in names:
            for state in held:
                if name not in state:
                    state[name] = torch.zeros_like(self.weights[name])
        beta1, beta2 = allocator.beta1, allocator.beta2
        with torch.no_grad():
            for some in _parts([self.weights[name].numel() for name in names]):
                group = [names[i] for i in some]
                now, mean, uncertain = ([state[name] for name in group] for state in held)
                weights = [self.weights[name] for name in group]
                torch._foreach_copy_(now, [weight.grad for weight in weights])  # type: ignore[arg-type]
                torch._foreach_mul_(now, weights)
                torch._foreach_abs_(now)
                torch._foreach_mul_(mean, beta1)
                torch._foreach_add_(mean, now, alpha=1 - beta1)
                change = torch._foreach_sub(now, mean)
                torch._foreach_abs_(change)
                torch._foreach_mul_(uncertain, beta2)
                torch._foreach_add_(uncertain, change, alpha=1 - beta2)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set E to zero where a direction is not among the `budget` most important ones; return
        which are, by the name of E."""
        scores = self._scores()
        flat = torch.cat(scores)
        left_out = self.allocator.init_bgt - budget
        gone = flat <= torch.kthvalue(flat, k=left_out)[0]
        kept = gone.logical_not().tolist()
        pattern: dict[str, list[bool]] = {}
        with torch.no_grad():
            parts = torch.split(gone, [len(score) for score in scores])  # type: ignore[no-untyped-call]
            for (*_, name), part in zip(self.triplets, parts, strict=True):
                self.weights[name].masked_fill_(part.view(-1, 1), 0.0)
                pattern[name], kept = kept[: len(part)], kept[len(part) :]
        return pattern

    def _scores(self) -> list[Tensor]:
        """Return the importance of each direction, [r] of each layer."""
        a, b, e = ([triplet[i] for triplet in self.triplets] for i in range(3))
        of_a, of_b = self._means(a, dim=1), self._means(b, dim=0)
        pairs = zip(self._means(e, dim=1), of_a, of_b, strict=True)
        return [of_e + (x + y) for of_e, x, y in pairs]

    def _means(self, names: Sequence[str], dim: int) -> list[Tensor]:
        """Return the mean of the scores of each weight over one of its two dimensions."""
        allocator, found = self.allocator, [torch.empty(0)] * len(names)
        states = allocator.exp_avg_ipt, allocator.exp_avg_unc
        for group in _equal([self.weights[name] for name in names]):
            mean, uncertain = (torch.stack([state[names[i]] for i in group]) for state in states)
            for i, value in zip(group, mean.mul_(uncertain).mean(dim + 1), strict=True):
                found[i] = value
        return found

    def mask_by_pattern(self, model: nn.Module, pattern: dict[str, list[bool]]) -> None:
        """Set E to zero where `pattern` says so; its names may lack that of the adapter."""
        if self._pattern is None or self._pattern[0] is not pattern:
            self._pattern = pattern, self._masks(pattern)
        with torch.no_grad():
            for (*_, name), mask in zip(self.triplets, self._pattern[1], strict=True):
                self.weights[name].masked_fill_(mask, 0.0)

    def _masks(self, pattern: dict[str, list[bool]]) -> list[Tensor]:
        shorter = self.allocator.adapter_name not in next(iter(pattern))
        suffix = f".{self.allocator.adapter_name}"
        masks = []
        for *_, name in self.triplets:
            keeps = torch.tensor(pattern[name.replace(suffix, "") if shorter else name])
            masks.append(keeps.logical_not().view(-1, 1).to(self.weights[name].device))
        return masks


# --- orthogonality -------------------------------------------------------------------------------


def not_orthogonal(factors: Sequence[Tensor]) -> Tensor:
    """Return how far the factors are from orthogonal: the mean of ‖G - I‖ (Frobenius), where G is
    A Aᵀ or Bᵀ B.

    Args:
        factors: A [r, in_features] and B [out_features, r] in turn, of each layer.
    """
    result: Tensor = _NotOrthogonal.apply(*factors)  # type: ignore[no-untyped-call]
    return result


class _NotOrthogonal(torch.autograd.Function):
    """Saves the factors, and [r, r] of each for its gradient."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        groups, total, slopes = _of_factors(factors), None, []
        with no_autocast(factors[0].device.type):
            for group in groups:
                stack = torch.stack([factors[i] for i in group])
                off = stack.mT @ stack if group[0] % 2 else stack @ stack.mT
                off.diagonal(dim1=1, dim2=2).sub_(1)
                norms = torch.linalg.vector_norm(off, dim=(1, 2))
                total = norms.sum() if total is None else total + norms.sum()
                slopes.append(off / norms.where(norms > 0, 1).view(-1, 1, 1))
        ctx.groups = groups
        ctx.save_for_backward(*factors, *slopes)
        assert total is not None
        mean: Tensor = total / len(factors)
        return mean

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad)
        factors, slopes = saved[:count], saved[count:]
        found: list[Any] = [None] * count
        with no_autocast(grad.device.type):
            for group, slope in zip(ctx.groups, slopes, strict=True):
                stack, slope = torch.stack([factors[i] for i in group]), slope * (2 * grad / count)
                made = stack @ slope if group[0] % 2 else slope @ stack
                for i, gradient in zip(group, made, strict=True):
                    found[i] = gradient
        return tuple(found)


def _of_factors(factors: Sequence[Tensor]) -> _Groups:
    """Return the places of equal A, and of equal B: those at odd places."""
    sides = (range(0, len(factors), 2), range(1, len(factors), 2))
    return [
        [side[i] for i in group] for side in sides for group in _equal([factors[i] for i in side])
    ]


def _equal(tensors: Sequence[Tensor]) -> _Groups:
    """Return the places of tensors of one shape, as many at a time as are stacked."""
    by_shape: dict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        by_shape[tensor.shape, tensor.device].append(i)
    return [
        [places[i] for i in part]
        for places in by_shape.values()
        for part in _parts([tensors[i].numel() for i in places])
    ]


def _parts(sizes: Sequence[int]) -> _Groups:
    """Return all places in order, in parts of at most `STACKED` numbers, or of one place."""
    parts: _Groups = []
    room = 0
    for i, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = STACKED
        parts[-1].append(i)
        room -= size
    return parts
