"""`LazyWeight`: the weight of a quantized layer as a tensor whose numbers are made when needed.

Shape, dtype and device are free. Reading makes the dequantized numbers; views (`reshape`, `T`,
`w[0]`, views of views) stay lazy, and writing into the weight or any view of it makes the numbers,
changes them and hands all of them back to the layer. So nothing that is written is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import ModelError

TAKEN_OUT = "the weight of a quantized layer cannot be taken out or parametrized"
DENSE = "name the layer in target_modules, or make it dense: quantadapt.facade.densify"
_EXCHANGES = ("aten::set_", "aten::resize_", "aten::resize_as_")  # memory of its own


class Layer(Protocol):
    """What a lazy weight asks of its layer."""

    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        ...

    def write(self, weight: Tensor) -> None:
        """Replace the weight by `weight`, [out_features, in_features]."""
        ...


class _View(NamedTuple):
    """One step from a weight to a view of it: `func(tensor, *args, **kwargs)`, or one part of it"""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        result = self.func(tensor, *self.args, **self.kwargs)
        view: Tensor = result if self.part is None else result[self.part]
        return view


class LazyWeight(torch.Tensor):
    """The weight of `layer`, or a view of it.

    Frozen: it cannot require a gradient. Assigning to `.data` writes into the layer.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _layer: Layer
    _views: tuple[_View, ...]
    _meta: Tensor

    @staticmethod
    def __new__(cls, layer: Layer, meta: Tensor, device: torch.device, *views: _View) -> LazyWeight:
        """Make the weight, or a view of it.

        Args:
            layer: where the numbers come from and go to.
            meta: a tensor on the meta device with the layout of the weight, or of the view.
            device: where the numbers will be.
            views: the steps that lead from the weight to the view.
        """
        weight: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        weight._layer, weight._meta, weight._views = layer, meta, views
        return weight

    def is_all_of(self, layer: Layer) -> bool:
        """Say whether this is the whole weight of `layer`, and not a part or a rearranged view."""
        aliases = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
        return self._layer is layer and all(view.func in aliases for view in self._views)

    def is_part_of(self, layer: Layer) -> bool:
        """Say whether this is the weight of `layer`, or a view of it."""
        return self._layer is layer

    def of(self, dense: Tensor) -> Tensor:
        """Return this view of `dense`, the numbers of the whole weight."""
        for view in self._views:
            dense = view.of(dense)
        return dense

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same weight or view; assigning writes into the layer."""
        return LazyWeight(self._layer, self._meta, self.device, *self._views)

    @data.setter
    def data(self, value: Tensor) -> None:
        same = isinstance(value, LazyWeight) and value.is_part_of(self._layer)
        if same and value._views == self._views:  # type: ignore[attr-defined]
            return  # it was changed in place, and is written already
        if self.is_all_of(self._layer):
            self._layer.write(value)
        elif self.shape == value.shape:
            self.copy_(value)
        else:
            what = f"this weight has the shape {tuple(self.shape)}, what is written"
            raise ModelError(f"{what} {tuple(value.shape)}")

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """False, or True for what autograd has written into."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        """Accept False; a quantized weight is frozen. Raises ModelError."""
        if requires_grad:
            what = "the weight of a quantized layer is frozen, so it can have no gradient"
            fix = (
                "train an adapter on it, or the whole layer with modules_to_save; gradients for"
                " LoRA-GA come from the unquantized model, through its cache_file"
            )
            raise ModelError(what, fix=fix)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_view(func) and isinstance(args[0], LazyWeight):
            return args[0]._viewed(func, args[1:], kwargs)
        if func._schema.name in _EXCHANGES:
            raise ModelError(TAKEN_OUT, fix=DENSE)
        written = [w for w in _written(func, args, kwargs) if isinstance(w, LazyWeight)]
        wholes: dict[int, Tensor] = {}

        def numbers(weight: LazyWeight) -> Tensor:
            layer = weight._layer
            if id(layer) not in wholes:
                whole = layer.dequantize()
                # A backend may hand out the very weight of its layer.
                wholes[id(layer)] = whole.clone() if written else whole
            return weight.of(wholes[id(layer)])

        dense_args, dense_kwargs = tree_map_only(LazyWeight, numbers, (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        for layer in {id(weight._layer): weight._layer for weight in written}.values():
            layer.write(wholes[id(layer)])
        return _returned(func, written, result)

    def _viewed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        on_meta = func(self._meta, *args, **kwargs)
        if isinstance(on_meta, Tensor):
            view = _View(func, args, kwargs)
            return LazyWeight(self._layer, on_meta, self.device, *self._views, view)
        return [
            LazyWeight(self._layer, meta, self.device, *self._views, _View(func, args, kwargs, i))
            for i, meta in enumerate(on_meta)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        """Return a copy of the numbers."""
        return self.clone().numpy(force=force)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) for every layer and stack of experts of `model` with such a weight."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)  # PEFT's layers show that of the one behind
        if isinstance(weight, LazyWeight) and weight._layer is module:
            yield name, module


@cache
def _is_view(func: Any) -> bool:
    """Say whether `func` returns a view, or views, of its first argument and changes nothing."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
        return False
    return bool(returns) and all(value.alias_info is not None for value in returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield what `func` writes into of its arguments."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from tree_flatten(value)[0]


def _returned(func: Any, written: list[LazyWeight], result: Any) -> Any:
    """Return `result`, or the weight that was written where `func` returns what it changed."""
    returns = func._schema.returns
    if written and len(returns) == 1 and returns[0].alias_info is not None:
        return written[0] if isinstance(result, Tensor) else written
    return result
