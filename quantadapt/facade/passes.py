"""A weight as passes read it: a forward, and its backward, which needs it again."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from .float8 import Rows, in_float8
from .frozen import is_recomputing


class ReadForPasses(nn.Module):
    """A layer whose weight is made for each pass. A recomputation, which its backward follows at
    once, keeps what it has made; one at a time, and whoever takes it has it alone."""

    KEPT: ClassVar[tuple[str, ...]] = ("_kept", "_kept_product")

    _kept: Tensor | Rows | None = None
    _kept_product: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features], in the compute dtype."""

    @abstractmethod
    def _dense(self, change: Tensor | None) -> Tensor:
        """Return the weight in the compute dtype, or what `change` makes of it."""

    def weight_for_forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        """Return the weight as `dequantize` does, or as `moved` does by `change`; a recomputation
        keeps it for its backward, unless that takes as much memory as `x`, its input."""
        weight = self._dense(change)
        self._keep(weight, x)
        return weight

    def weight_for_backward(self, change: Tensor | None = None) -> Tensor:
        """Return the weight that forward had; the one kept by a recomputation is given away."""
        kept, self.__dict__["_kept"] = self._kept, None
        return kept if isinstance(kept, Tensor) else self._dense(change)

    def rows_for_forward(self, x: Tensor) -> Rows:
        """As `weight_for_forward`, in 8-bit floats."""
        rows = in_float8(self.dequantize())
        self._keep(rows, x)
        return rows

    def rows_for_backward(self) -> Rows:
        """As `weight_for_backward`, in 8-bit floats."""
        kept, self.__dict__["_kept"] = self._kept, None
        return kept if isinstance(kept, Rows) else in_float8(self.dequantize())

    def _keep(self, weight: Tensor | Rows, x: Tensor) -> None:
        keep = is_recomputing() and weight.nbytes < x.nbytes
        # Not by setattr, which takes nn.Module long.
        self.__dict__["_kept"] = weight if keep else None

    def keep_product(self, x: Tensor, product: Tensor) -> None:
        """Have a recomputation keep x Wᵀ, too, for a backward that wants it."""
        self.__dict__["_kept_product"] = (x.detach(), product) if is_recomputing() else None

    def product_for_backward(self, x: Tensor) -> Tensor | None:
        """Return what was kept with `x`, if it is that which was kept last, and give it away."""
        kept, self.__dict__["_kept_product"] = self._kept_product, None
        return kept[1] if kept is not None and kept[0].data_ptr() == x.data_ptr() else None

    def forget(self) -> None:
        """Drop what was kept for a backward that will not come."""
        self.__dict__["_kept"] = self.__dict__["_kept_product"] = None
