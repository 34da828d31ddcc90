"""`QuantLinear`, the facade of one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compiling import has_triton
from ..model.linears import as_conv1d, linear_of
from ..protocols import ByteCodes, WordCodes
from . import float8
from .float8 import Rows, in_float8
from .frozen import Frozen
from .peft_calls import copies_to_train, looks_for_parameters
from .quant_weight import QuantWeight

FEW_TOKENS = 4
"""Tokens that are multiplied with codes in words as they are held, at most; in bytes, one is."""


class QuantLinear(QuantWeight, nn.Linear):
    """One quantized linear layer, seen as `nn.Linear`. See `QuantWeight` for the arguments.

    Attributes:
        conv1d: whether the model's own class has a `Conv1D` here. What PEFT trains in its place
            is one then, so that PEFT reads it again without this facade.
    """

    conv1d: bool = False
    wants_float8: bool = False
    """Whether, while it trains, products with its weight are in 8-bit floats."""

    @property
    def rounds_activations(self) -> bool:
        """Whether the vendor's forward runs because it quantizes activations."""
        target = self.target
        rounds = target.quantizes_activations and (target.straight_through or not self.training)
        return rounds and self._merged is None

    @property
    def in_float8(self) -> bool:
        """Whether products with the weight are in 8-bit floats now."""
        return self.wants_float8 and self.training and self._merged is None and self.takes_float8

    @property
    def takes_float8(self) -> bool:
        """Whether the kernels take its sizes."""
        return self.in_features % float8.MULTIPLE == 0 == self.out_features % float8.MULTIPLE

    def rows_of(self, x: Tensor) -> Rows | None:
        """Return x [..., in_features] as the layer's product gets it, for layers that share it;
        None where that is not in 8-bit floats."""
        if not self.in_float8 or self.rounds_activations:
            return None
        return in_float8(x.reshape(-1, x.shape[-1]))

    def vendor_forward(
        self, x: Tensor, change: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """Run the layer in the compute dtype; the output has the dtype of x, or that of autocast.

        To be called where gradients are off: this is what autograd's functions run.

        Args:
            x: [..., in_features].
            change: added to the weight and rounded onto its grid, see `moved`.
            rows: what `rows_of` x is, where that is there.
        """
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return self._run(x.to(self.compute_dtype), change, rows).to(x.dtype)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return self._run(x.to(dtype), change, rows)

    def _run(self, x: Tensor, change: Tensor | None, rows: Rows | None) -> Tensor:
        target, dtype = self.target, x.dtype
        if self._merged is not None:
            self._merged_weight()  # which looks whether it still is
        usual = not self.training and self._merged is None and change is None
        if usual and (made := self._of_few_tokens(x)) is not None:
            return made.to(dtype)
        if self.rounds_activations:
            vendor = self._vendor
            if change is not None:
                vendor = target.repack(vendor, self.moved(change))
            return target.forward(vendor, x).to(dtype)
        if usual and target.decodes(self._vendor, x):
            return target.forward(self._vendor, x).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.in_float8 and change is None:
            given = self.rows_of(x) if rows is None else rows
            assert given is not None
            y = float8.product(given, self.rows_for_forward(x), dtype)
            y = y if bias is None else y.add_(bias)
            return y.view(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, self.weight_for_forward(x, change).to(dtype), bias)

    def multiplies_dense(self, x: Tensor) -> bool:
        """Whether its output for `x` is a product with the dense weight, in one dtype: then
        `add_product` is another way to compute it. In evaluation as while it trains, but where
        kernels read what is packed, so that what was answered is what is learnt from."""
        device_type = x.device.type
        one_dtype = torch.is_autocast_enabled(device_type) or x.dtype == self.compute_dtype
        if self._merged is not None or self.rounds_activations or self.in_float8 or not one_dtype:
            return False
        if self.training or (x.is_cuda and x.numel() == x.shape[-1]):
            return self.training
        return not self.target.decodes(self._vendor, x) and self._codes_for(x) is None

    def add_product(self, rows: Tensor, begin: Callable[[], Tensor]) -> Tensor:
        """Return what `begin` makes, [tokens, out_features], with rows Wᵀ added in place, without
        the bias. As in `vendor_forward`, gradients are to be off, and autocast, too. The weight
        comes first: what making it takes beside is gone by then.

        Args:
            rows: [tokens, in_features], in the dtype of what `begin` makes.
        """
        weight = self.weight_for_forward(rows).to(rows.dtype)
        return begin().addmm_(rows, weight.T)

    def _of_few_tokens(self, x: Tensor) -> Tensor | None:
        """Return the output for `x` by a kernel of ours; None where there is none."""
        if (codes := self._codes_for(x)) is None:
            return None
        given = self.target.inputs_of_codes(self._vendor, x)
        if isinstance(codes, WordCodes):
            from .triton_words import product as of_words

            return of_words(given, codes, self.bias)
        from .triton_one_token import product as of_bytes

        return of_bytes(given, codes, self.bias)

    def _codes_for(self, x: Tensor) -> ByteCodes | WordCodes | None:
        """Return the codes with which a kernel of ours multiplies `x`; None where it is more than
        a few tokens, or the codes are held otherwise."""
        tokens = x.numel() // x.shape[-1]
        if not x.is_cuda or not 0 < tokens <= FEW_TOKENS or not has_triton():
            return None
        if tokens == 1 and (held := self.target.byte_codes(self._vendor)) is not None:
            from .triton_one_token import takes as takes_bytes

            return held if takes_bytes(held, x) else None
        if (words := self.target.word_codes(self._vendor)) is not None:
            from .triton_words import takes as takes_words

            return words if takes_words(words, x) else None
        return None

    def gradient(
        self,
        dy: Tensor,
        added_to: Tensor | None = None,
        change: Tensor | None = None,
        begin: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Return dy W [tokens, in_features], for the weight that forward had.

        Args:
            dy: [tokens, out_features].
            added_to: what it is added to, in place.
            change: as in `vendor_forward`.
            begin: makes `added_to` where the weight is there, as in `add_product`; not for products
                in 8-bit floats.
        """
        if self.in_float8 and change is None:
            # As in forward: on CUDA products give no float32, which norms may hand on.
            dx = float8.gradient(dy.to(self.compute_dtype), self.rows_for_backward()).to(dy.dtype)
            return dx if added_to is None else added_to.add_(dx)
        weight = self.weight_for_backward(change).to(dy.dtype)
        added_to = added_to if begin is None else begin()
        return dy @ weight if added_to is None else added_to.addmm_(dy, weight)

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x Wᵀ [tokens, out_features], for a weight that is there already."""
        if self.in_float8:
            return float8.product(in_float8(x), in_float8(weight), x.dtype)
        return x @ weight.T

    def times_back(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dy W [tokens, in_features], likewise."""
        return float8.gradient(dy, in_float8(weight)) if self.in_float8 else dy @ weight

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # decoding waits for Python, so no function of autograd
            return self.vendor_forward(input)
        bias = self._vendor.bias
        trained = bias if bias is not None and bias.requires_grad else None
        output: Tensor = Frozen.apply(input, self, trained)  # type: ignore[no-untyped-call]
        return output

    def dense(self) -> nn.Linear:
        """Return an ordinary linear layer with the dequantized weight and a copy of the bias."""
        bias = self.bias
        copied = None if bias is None else bias.detach().to(self.compute_dtype).clone()
        return linear_of(self.dequantize().clone(), copied).train(self.training)

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
