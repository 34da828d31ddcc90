"""`QuantLinear`, the facade of one linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compiling import multiplied_by
from ..model.linears import as_conv1d
from .frozen import Frozen
from .peft_calls import copies_to_train, looks_for_parameters
from .quant_weight import QuantWeight


class QuantLinear(QuantWeight, nn.Linear):
    """One quantized linear layer, seen as `nn.Linear`. See `QuantWeight` for the arguments.

    Attributes:
        conv1d: whether the model's own class has a `Conv1D` here. What PEFT trains in its place
            is one then, so that PEFT reads it again without this facade.
    """

    conv1d: bool = False

    @property
    def rounds_activations(self) -> bool:
        """Whether the vendor's forward runs because it quantizes activations."""
        target = self.target
        rounds = target.quantizes_activations and (target.straight_through or not self.training)
        return rounds and self._merged is None

    def vendor_forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        """Run the layer in the compute dtype; the output has the dtype of x, or that of autocast.

        To be called where gradients are off: this is what autograd's functions run.

        Args:
            x: [..., in_features].
            change: added to the weight and rounded onto its grid, see `moved`.
        """
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return self._run(x.to(self.compute_dtype), change).to(x.dtype)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return self._run(x.to(dtype), change)

    def _run(self, x: Tensor, change: Tensor | None) -> Tensor:
        target, dtype = self.target, x.dtype
        if self._merged is not None:
            self._merged_weight()  # which looks whether it still is
        if self.rounds_activations:
            vendor = self._vendor
            if change is not None:
                vendor = target.repack(vendor, self.moved(change))
            return target.forward(vendor, x).to(dtype)
        usual = not self.training and self._merged is None and change is None
        if usual and target.decodes(self._vendor, x):
            return target.forward(self._vendor, x).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if usual and x.is_cuda and x.numel() == self.in_features:
            return self._run_one_token(x, bias)
        weight = self.weight_for_forward(x, change)
        return nn.functional.linear(x, weight.to(dtype), bias)

    def _run_one_token(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply with the weight as it is read, where one kernel does that."""
        with multiplied_by(x.reshape(-1)) as made:
            try:
                found = self.dequantize()
            except RuntimeError:  # of a backend that goes on with what it takes for the weight
                if not made:
                    raise
                found = x.new_empty(0)
        if made and found is made[0]:
            product = found.view(*x.shape[:-1], -1)
            return product if bias is None else product + bias
        weight = self.dequantize() if made else found
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # decoding waits for Python, so no function of autograd
            return self.vendor_forward(input)
        bias = self._vendor.bias
        trained = bias if bias is not None and bias.requires_grad else None
        output: Tensor = Frozen.apply(input, self, trained)  # type: ignore[no-untyped-call]
        return output

    def dense(self) -> nn.Linear:
        """Return an ordinary linear layer with the dequantized weight and a copy of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize().clone(), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(self.compute_dtype).clone()
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train(self.training)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the vendor's parameters; to PEFT's `target_parameters` those of a dense layer."""
        if looks_for_parameters():
            yield f"{prefix}.weight".lstrip("."), self.weight  # type: ignore[misc]
            if self.bias is not None:
                yield f"{prefix}.bias".lstrip("."), self.bias
        else:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy; an ordinary linear layer where PEFT copies it to train it in full."""
        if copies_to_train():
            dense = self.dense()
            memo[id(self)] = copied = as_conv1d(dense) if self.conv1d else dense
            return copied
        return super().__deepcopy__(memo)
