"""`QuantLinear`: an `nn.Linear` in front of one vendor module, so that PEFT never meets a vendor.

The facade shares the vendor module's parameter and buffer dictionaries: `named_parameters`, `to`,
FSDP and `state_dict` see the vendor's own tensors under the vendor's own names, while the module
tree holds one `nn.Linear` per layer and nothing behind it. `weight` is a `LazyWeight`: shape,
dtype and device are free, the dequantized numbers are made when somebody computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import results_in
from .errors import PluginError
from .model.modules import is_skipped
from .protocols import AdapterTarget


class LazyWeight(torch.Tensor):
    """The dequantized weight of a facade, made only when an operation needs its numbers.

    Not differentiable and not stored: a facade's weight is frozen. Assigning to `.data`, as some
    initializations do (PiSSA), quantizes the new values into the layer.
    """

    _facade: QuantLinear

    @staticmethod
    def __new__(cls, facade: QuantLinear) -> LazyWeight:
        shape = (facade.out_features, facade.in_features)
        weight: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=facade.compute_dtype, device=facade.device
        )
        weight._facade = facade
        return weight

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self._facade.dequantize()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._facade.requantize(value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._facade)
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda weight: weight._facade.dequantize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._facade.dequantize().clone()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class _Frozen(torch.autograd.Function):
    """Vendor forward; backward through the dequantized weight (exact for weight-only methods,
    straight-through where activations are quantized as well). Saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, facade: QuantLinear) -> Tensor:
        ctx.facade, ctx.dtype = facade, x.dtype
        y = facade.vendor_forward(x)
        # Autograd forbids in-place changes of a view that was made in here, and adapters add to
        # the base's output in place; this forgets that y is one, without a copy.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        weight = ctx.facade.weight_for_backward()
        return (dy.to(weight.dtype) @ weight).to(ctx.dtype), None


_recomputing = False


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, each facade keeps the weight that it dequantizes for its backward.

    For gradient checkpointing, where backward follows at once; elsewhere all weights would pile up.
    """
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


class QuantLinear(nn.Linear):
    """One quantized linear layer, seen as `nn.Linear`.

    Args:
        vendor: the vendor's module.
        target: the backend's view of it.
        dtype: dtype in which the layer computes, and of the weight when read.
    """

    _vendor: nn.Module
    _kept: Tensor | None = None
    _kept_product: tuple[Tensor, Tensor] | None = None

    def __init__(self, vendor: nn.Module, target: AdapterTarget, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = target.shape(vendor)
        self.target = target
        self.compute_dtype = dtype
        self._adopt(vendor)
        self.train(vendor.training)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def _adopt(self, vendor: nn.Module) -> None:
        self.forget()
        # Not a submodule: PEFT must not find a second linear layer behind this one.
        object.__setattr__(self, "_vendor", vendor)
        object.__setattr__(self, "_parameters", vendor._parameters)
        object.__setattr__(self, "_buffers", vendor._buffers)

    @property
    def vendor(self) -> nn.Module:
        """The wrapped vendor module."""
        return self._vendor

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return LazyWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.requantize(value)

    @property
    def bias(self) -> Any:
        """The bias, a tensor of [out_features] or None."""
        return self._vendor.bias

    @bias.setter
    def bias(self, value: Any) -> None:
        self._vendor.bias = value

    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features], in the compute dtype."""
        with torch.no_grad(), results_in(self.compute_dtype):
            return self.target.dequantize(self._vendor).to(self.compute_dtype).contiguous()

    def weight_for_forward(self, x: Tensor) -> Tensor:
        """Return the weight as `dequantize` does; a recomputation keeps it for its backward, unless
        that takes as much memory as `x`, its input."""
        weight = self.dequantize()
        keep = _recomputing and self.in_features * self.out_features < x.numel()
        # Not by setattr, which takes nn.Module long.
        self.__dict__["_kept"] = weight if keep else None
        return weight

    def weight_for_backward(self) -> Tensor:
        """Return the weight as `dequantize` does; the one kept by a recomputation is given away."""
        kept, self.__dict__["_kept"] = self._kept, None
        return self.dequantize() if kept is None else kept

    def keep_product(self, x: Tensor, product: Tensor) -> None:
        """Have a recomputation keep x Wᵀ, too, for a backward that wants it."""
        self.__dict__["_kept_product"] = (x.detach(), product) if _recomputing else None

    def product_for_backward(self, x: Tensor) -> Tensor | None:
        """Return what was kept with `x`, if it is that which was kept last, and give it away."""
        kept, self.__dict__["_kept_product"] = self._kept_product, None
        return kept[1] if kept is not None and kept[0].data_ptr() == x.data_ptr() else None

    def forget(self) -> None:
        """Drop what was kept for a backward that will not come."""
        self.__dict__["_kept"] = self.__dict__["_kept_product"] = None

    def requantize(self, weight: Tensor) -> None:
        """Replace the weight by `weight` [out_features, in_features], quantized as before."""
        with torch.no_grad():
            dense = weight.to(device=self.device, dtype=self.compute_dtype)
            vendor = self.target.requantize(self._vendor, dense)
        for parameter in vendor.parameters():
            parameter.requires_grad_(False)
        self._adopt(vendor)

    @property
    def rounds_activations(self) -> bool:
        """Whether the vendor's forward runs because it quantizes activations."""
        target = self.target
        return target.quantizes_activations and (target.straight_through or not self.training)

    def compute_dtype_for(self, device_type: str) -> torch.dtype:
        """Return the dtype that the layer computes in: that of autocast where it is on."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.compute_dtype

    def vendor_forward(self, x: Tensor) -> Tensor:
        """Run the layer in the compute dtype; the output has the dtype of x, or that of autocast.

        To be called where gradients are off: this is what autograd's functions run.
        """
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return self._run(x.to(self.compute_dtype)).to(x.dtype)
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return self._run(x.to(dtype))

    def _run(self, x: Tensor) -> Tensor:
        target, dtype = self.target, x.dtype
        decodes = not self.training and target.decodes(self._vendor, x)
        if decodes or self.rounds_activations:
            return target.forward(self._vendor, x).to(dtype)
        weight, bias = self.weight_for_forward(x), self.bias
        return nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # decoding waits for Python, so no function of autograd
            return self.vendor_forward(input)
        output: Tensor = _Frozen.apply(input, self)  # type: ignore[no-untyped-call]
        return output

    def dense(self) -> nn.Linear:
        """Return an ordinary linear layer with the dequantized weight and a copy of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize().clone(), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(self.compute_dtype).clone()
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train(self.training)

    # Saving and moving are the vendor's business: it knows what its tensors mean.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        if hasattr(self._vendor, "_shard"):  # its tensors have no memory of their own, see sharding
            return self
        self._vendor._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._adopt(self._vendor)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._vendor.state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._vendor._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._vendor._load_from_state_dict(*args, **kwargs)
        self._adopt(self._vendor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vendor={type(self._vendor).__name__}"


def facades(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield (name, facade) for every facade in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def wrap(
    model: nn.Module, target: AdapterTarget, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> nn.Module:
    """Put a facade in front of every vendor layer that `target` matches, in place.

    Args:
        model: holds vendor modules; a single vendor module is returned wrapped.
        target: the backend's view of its layers.
        dtype: compute dtype of the facades.
        skip: names of modules that stay as they are.

    Raises:
        PluginError: the target's `shape` is not that of its dequantized weight.
    """
    if not isinstance(model, QuantLinear) and target.matches(model):
        return _checked(model, target, dtype, set())
    seen: set[tuple[int, int]] = set()
    wrapped: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(wrapped):
            continue  # a vendor's layer, or a part of one
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, QuantLinear) or is_skipped(path, skip):
                continue
            if target.matches(child):
                try:
                    setattr(module, child_name, _checked(child, target, dtype, seen))
                    wrapped = (*wrapped, f"{path}.")
                except PluginError as error:
                    raise PluginError(f"{path}: {error}") from None
    return model


def _checked(
    vendor: nn.Module, target: AdapterTarget, dtype: torch.dtype, seen: set[tuple[int, int]]
) -> QuantLinear:
    """Return a facade whose weight has the shape that `target` claims; each shape is tried once."""
    name, shape = type(target).__name__, target.shape(vendor)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise PluginError(f"{name}.shape returned {shape}, expected two sizes")
    facade = QuantLinear(vendor, target, dtype)
    if shape not in seen:
        found, claimed = tuple(facade.dequantize().shape), (shape[1], shape[0])
        if found != claimed:
            what = f"{name}.dequantize returned {found}, its shape says {claimed} (out, in)"
            raise PluginError(what, fix="tell the authors of the backend")
        seen.add(shape)
    return facade


def replace(model: nn.Module, make: Callable[[str, QuantLinear], nn.Module]) -> nn.Module:
    """Replace every facade in `model` by `make(name, facade)`, one at a time, in place."""
    for name, facade in list(facades(model)):
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, make(name, facade))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take the facades away again, in place: the vendor's modules stand where they stood."""
    return replace(model, lambda _, facade: facade.vendor)


def densify(model: nn.Module) -> nn.Module:
    """Replace every facade by an ordinary `nn.Linear` with the dequantized weight, in place."""
    return replace(model, lambda _, facade: facade.dense())
