"""`QuantWeight`: a vendor's layer whose weight is read and written as if it were dense. What
`QuantLinear` and `QuantStack` share."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..compiling import results_in
from ..errors import ModelError
from ..protocols import AdapterTarget
from .lazy_weight import DENSE, TAKEN_OUT, LazyWeight
from .libraries import meet_libraries
from .passes import ReadForPasses
from .peft_calls import makes_room, merging_layer
from .reloading import reload


class _Merged(NamedTuple):
    """What a layer computes with while PEFT has an adapter merged into it.

    Attributes:
        layer: PEFT's layer around the facade, while it lives.
        weight: [out_features, in_features], in the compute dtype.
        returns: whether the vendor's module is what unmerging leads back to.
    """

    layer: weakref.ref[Any]
    weight: Tensor
    returns: bool


class QuantWeight(ReadForPasses):
    """What stands in front of a vendor's layer: its weight, read and written as if it were dense.

    Args:
        vendor: the vendor's module.
        target: the backend's view of it.
        dtype: dtype in which the layer computes, and of the weight when read.
    """

    keeps_scales: bool = False
    """Whether a weight that is written is dithered onto the grid that the layer has, rather than
    quantized anew. Writing what was read changes nothing then, and small changes are kept."""

    held_weight: Tensor | None = None
    """The dense weight, while `DenseWeights` has it stay for training; where the layer's codes
    become others, the same memory holds theirs."""

    _vendor: nn.Module
    _merged: _Merged | None = None

    def __init__(self, vendor: nn.Module, target: AdapterTarget, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = target.shape(vendor)
        self.target = target
        self.compute_dtype = dtype
        self._adopt(vendor)
        meet_libraries()
        self.train(vendor.training)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def _adopt(self, vendor: nn.Module) -> None:
        self.forget()
        held, self.__dict__["held_weight"] = self.held_weight, None
        # Not a submodule: PEFT must not find a second linear layer behind this one.
        object.__setattr__(self, "_vendor", vendor)
        bias, own = vendor.bias, "bias" in vendor.__dict__  # or a property, say of a wrapper
        if (own or "bias" in vendor._buffers) and isinstance(bias, Tensor):
            vendor.bias = nn.Parameter(bias, requires_grad=False)  # so that it can be trained
        object.__setattr__(self, "_parameters", vendor._parameters)
        object.__setattr__(self, "_buffers", vendor._buffers)
        if held is not None and (held.device, held.dtype) == (self.device, self.compute_dtype):
            held.copy_(self._of_codes(held.dtype))  # in place: recorded passes read it there
            self.__dict__["held_weight"] = held

    @property
    def vendor(self) -> nn.Module:
        """The wrapped vendor module; one of its own, quantized anew, while something is merged."""
        merged = self._merged_weight()
        return self._vendor if merged is None else self._quantized(merged)

    @property
    def own_vendor(self) -> nn.Module:
        """The vendor module that is there, whatever is merged."""
        return self._vendor

    @property
    def device(self) -> torch.device:
        """Where the layer computes: where its packed tensors are, unless they are streamed."""
        if (streamed := vars(self._vendor).get("_streamed")) is not None:
            device: torch.device = streamed.streamer.device
            return device
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, [out_features, in_features]: read lazily, and what is written into it is
        quantized into the layer. See `LazyWeight`."""
        meet_libraries()  # PEFT reads the weight of each layer that it takes
        shape = (self.out_features, self.in_features)
        layout = torch.empty(shape, dtype=self._read_dtype, device="meta")
        return LazyWeight(self, layout, self.device)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if isinstance(value, LazyWeight) and value.is_all_of(self):
            self.keep_merged()  # so PEFT takes the adapter's layer away
        elif makes_room(self):
            return
        elif value.requires_grad and value.is_leaf:
            what = "a quantized layer cannot take a weight that is trained"
            fix = "pass nn.Parameter(..., requires_grad=False), or put an nn.Linear in its place"
            raise ModelError(what, fix=fix)
        else:
            self.write(value)

    @property
    def bias(self) -> Any:
        """The bias, a parameter of [out_features] or None."""
        return self._vendor.bias

    @bias.setter
    def bias(self, value: Any) -> None:
        self._vendor.bias = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # nn.Module takes parameters before it looks at properties
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":  # parametrize and its like, which put another in its place
            raise ModelError(TAKEN_OUT, fix=DENSE)
        super().__delattr__(name)

    def write(self, weight: Tensor) -> None:
        """Replace the weight by `weight` [out_features, in_features], quantized as before.

        While PEFT merges and unmerges, the layer is dense instead and its quantized weight waits:
        unmerging ends with the very tensors that it began with.

        Raises:
            ModelError: the shape is another, or the backend cannot quantize weights again.
        """
        if isinstance(weight, LazyWeight) and weight.is_all_of(self):
            return
        if tuple(weight.shape) != (self.out_features, self.in_features):
            what = f"its weight has the shape {(self.out_features, self.in_features)}"
            raise ModelError(f"{what}, what is written {tuple(weight.shape)}")
        dense, merged = weight.detach(), self._merged
        # Dithering sees changes that 16 bits round away.
        dtype = torch.float32 if self.keeps_scales else self.compute_dtype
        dense = dense.to(device=self.device, dtype=dtype, copy=True).contiguous()
        if (layer := merging_layer(self)) is not None:
            self.__dict__["_merged"] = _Merged(
                weakref.ref(layer), dense, merged is None or merged.returns
            )
        elif self._merged_weight() is not None and merged is not None:
            self.__dict__["_merged"] = merged._replace(weight=dense, returns=False)
        else:
            self.requantize(dense)

    def _merged_weight(self) -> Tensor | None:
        """Return the weight with what PEFT has merged into it; None where nothing is merged."""
        if (merged := self._merged) is None:
            return None
        layer = merged.layer()
        if layer is not None and (layer.merged_adapters or merging_layer(self) is not None):
            return merged.weight
        if layer is None or not merged.returns:  # merge_and_unload took PEFT's layer away
            self.requantize(merged.weight)
        self.__dict__["_merged"] = None
        return None

    def keep_merged(self) -> None:
        """Quantize what is merged, for good."""
        if (merged := self._merged_weight()) is not None:
            self.requantize(merged)

    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features], in the compute dtype."""
        if self._merged is not None and (merged := self._merged_weight()) is not None:
            return merged
        return self._of_codes(self._read_dtype)

    def _of_codes(self, dtype: torch.dtype) -> Tensor:
        """Return the weight without what is merged, in `dtype`."""
        with torch.no_grad(), results_in(dtype):
            return self.target.dequantize(self._vendor).to(dtype).contiguous()

    def dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return the rows from `first` to before `last`, as `dequantize` does."""
        if self._merged is not None and (merged := self._merged_weight()) is not None:
            return merged[first:last]
        dtype = self._read_dtype
        with torch.no_grad(), results_in(dtype):
            rows = self.target.dequantize_rows(self._vendor, first, last)
            return rows.to(dtype).contiguous()

    @property
    def _read_dtype(self) -> torch.dtype:
        """The compute dtype; float32 where PEFT merges into a layer that keeps its scales, as 16
        bits round away what dithering keeps."""
        exact = self.keeps_scales and merging_layer(self) is not None
        return torch.float32 if exact else self.compute_dtype

    def requantize(self, weight: Tensor) -> None:
        """Replace the weight by `weight` [out_features, in_features], quantized as before.

        Raises:
            ModelError: the backend cannot quantize weights again.
        """
        self._replace(self._quantized(weight))

    @property
    def has_grid(self) -> bool:
        """Whether it is known what values its weights can take while its scales stay, so that
        `repack` works."""
        return self.target.grid(self._vendor) is not None

    def repack(self, weight: Tensor) -> None:
        """Replace the weight by the values nearest to `weight` [out_features, in_features] that it
        can take with the scales that it has."""
        with torch.no_grad():
            vendor = self.target.repack(self._vendor, weight.to(self.device))
        self._replace(_frozen(vendor))

    def _replace(self, vendor: nn.Module) -> None:
        """Put another module of the vendor in the place of the one that is there."""
        before, after = (v._parameters.get("bias") for v in (self._vendor, vendor))
        if before is not None and after is not None:
            vendor.bias = before  # it may be trained, and an optimizer may hold it
        self.__dict__["_merged"] = None
        self._adopt(vendor)

    def _quantized(self, weight: Tensor) -> nn.Module:
        """Return a vendor's module that holds `weight`."""
        if type(self.target).requantize is AdapterTarget.requantize:
            what = f"{type(self._vendor).__name__} cannot be quantized again with other weights"
            fix = "merge into dense weights (quantadapt.merge), or make the model dense first"
            raise ModelError(what, fix=fix)
        with torch.no_grad():
            if self.keeps_scales:
                return _frozen(self.target.repack(self._vendor, self.dithered(weight)))
            dense = weight.to(device=self.device, dtype=self.compute_dtype)
            return _frozen(self.target.requantize(self._vendor, dense))

    def dithered(self, weight: Tensor) -> Tensor:
        """Return `weight` [out_features, in_features], better in float32, on the grid that the
        layer has: what is far below a step is kept on the whole. See `moved`."""
        start = self.target.dequantize(self._vendor).float()
        return self.moved(weight.to(start.device).float() - start)

    def moved(self, change: Tensor) -> Tensor:
        """Return the layer's weight plus `change`, in float32, on the grid that it has; see
        `Grid.dithered`.

        Raises:
            ModelError: the backend knows no grid of the layer.
        """
        grid, start = self.target.grid(self._vendor), self.target.dequantize(self._vendor)
        if grid is None:
            what = f"{type(self._vendor).__name__} has scales that cannot be kept"
            raise ModelError(what, fix="quantize it anew, or merge into dense weights")
        return grid.dithered(start, change)

    def _dense(self, change: Tensor | None) -> Tensor:
        """Return the weight in the compute dtype, or what `change` makes of it."""
        if change is None:
            # What answers may be recorded, and must not read what can be dropped.
            held = self.held_weight if self.training and self._merged is None else None
            return self.dequantize() if held is None else held
        with torch.no_grad():
            return self.moved(change).to(self.compute_dtype)

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, the weight is read in `dtype`."""
        before, self.compute_dtype = self.compute_dtype, dtype
        try:
            yield
        finally:
            self.compute_dtype = before

    def compute_dtype_for(self, device_type: str) -> torch.dtype:
        """Return the dtype that the layer computes in: that of autocast where it is on."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.compute_dtype

    # Saving and moving are the vendor's business: it knows what its tensors mean.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if hasattr(self._vendor, "_shard"):  # its tensors have no memory of their own, see sharding
            return self
        if "_streamed" in vars(self._vendor):
            self._refuse_move(fn)
            return self
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device)).dtype
        if dtype.is_floating_point:  # model.to(torch.bfloat16), model.half()
            self.compute_dtype = dtype
        self._vendor._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._merged is not None:
            self.__dict__["_merged"] = self._merged._replace(weight=fn(self._merged.weight))
        self._adopt(self._vendor)
        return self

    def _refuse_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise ModelError where `fn` would move or cast a layer that is streamed."""
        there = torch.empty(0, dtype=self.compute_dtype, device=self.device)
        if (moved := fn(there)).device != there.device or moved.dtype != there.dtype:
            what = "a base that is streamed from CPU memory can be neither moved nor cast"
            raise ModelError(what, fix="first call quantadapt.streaming.bring_back(model)")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.vendor.state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.vendor._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *told: Any) -> None:
        self.__dict__["_merged"] = None
        self._adopt(reload(self._vendor, self.target, state_dict, prefix, *told))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        memo[id(self)] = facade = type(self).__new__(type(self))
        streamed = vars(self._vendor).get("_streamed")
        with streamed.apart(self._vendor) if streamed is not None else nullcontext():
            facade.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return facade

    def __getstate__(self) -> dict[str, Any]:
        self._merged_weight()  # settles what PEFT's layer has left behind
        state, merged = self.__dict__.copy(), self._merged
        # Of this layer's training; nobody would take it from a copy.
        state |= dict.fromkeys(("held_weight", *ReadForPasses.KEPT))
        if merged is not None:  # weak references are neither copied nor pickled
            layer: Any = merged.layer()
            state["_merged"] = merged._replace(layer=layer)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if (merged := self._merged) is not None:
            self.__dict__["_merged"] = merged._replace(layer=weakref.ref(merged.layer))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vendor={type(self._vendor).__name__}"


def _frozen(vendor: nn.Module) -> nn.Module:
    """Return a vendor's module, just made, in which nothing but the bias can be trained."""
    for name, parameter in vendor.named_parameters():
        if name != "bias":
            parameter.requires_grad_(False)
    return vendor
