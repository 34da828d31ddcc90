"""What a checkpoint of packed layers holds for each of them, and the vendor modules made of it.

Experts may be packed as stacks, or one by one, as checkpoints that others quantized have them:
those become stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import ModelError, Problem
from ..model.experts import Stack, expert_stacks, layers_of
from ..model.modules import linear_layers
from ..model.numbers import refuse_not_numbers
from .accounting import WrongTensors, lacks, listed
from .mxfp4 import names_of
from .reading import renaming
from .tensors import local_folder

_FLOATS = ("F64", "F32", "F16", "BF16")
"""What the weights of dense layers are in, by the names of safetensors."""
BELONG = "check that config.json and the weights belong together, or download them again"


class LayerLoader(Protocol):
    """What is wanted of a quantizer here, as `protocols.LayerwiseQuantizer` says it."""

    @property
    def target(self) -> Any:
        """The view of the layers that this quantizer makes."""
        ...

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the vendor module for the tensors that were saved for it."""
        ...

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Return one vendor module with the rows of all `layers`."""
        ...


class PackedLayer(NamedTuple):
    """A layer, or a stack of experts, whose packed tensors are in a checkpoint.

    Attributes:
        linear: the layer, or the tall one of the stack, on the meta device.
        tensors: what the files hold, by the name of the layer and that of the tensor in it; of
            several layers where experts are packed one by one.
        stack: that of the experts, if it is one.
    """

    linear: nn.Linear
    tensors: dict[str, dict[str, Tensor]]
    stack: Stack | None

    def names(self) -> Iterator[str]:
        """Yield the full names of the tensors."""
        for layer, tensors in self.tensors.items():
            yield from (f"{layer}.{part}" for part in tensors)
            if self.stack is not None:  # what transformers makes of the names of experts' weights
                yield from (f"{self.stack.name}{part.removeprefix('weight')}" for part in tensors)
        if self.stack is not None:
            yield from names_of(self.stack)

    def made(self, quantizer: LayerLoader, path: str, device: str) -> nn.Module:
        """Return the vendor module; the tensors are given away. Raises WrongTensors where they are
        not what the backend saves."""
        rows = self.linear.out_features // len(self.tensors)
        part = self.linear
        if len(self.tensors) > 1:
            dtype, size = part.weight.dtype, self.linear.in_features
            part = nn.Linear(size, rows, bias=False, device="meta", dtype=dtype)
        vendors = []
        for name, tensors in self.tensors.items():
            state = {key: tensors.pop(key).to(device) for key in [*tensors]}
            named = ((f"{name}.{key}", value) for key, value in state.items())
            refuse_not_numbers(named, where=path)
            vendors.append(_loaded(quantizer, name, part, state, path))
        if len(vendors) == 1:
            return vendors[0]
        try:
            return quantizer.join_rows(vendors)
        except ModelError as error:
            assert self.stack is not None
            first = error.problems[0]
            what = f"{self.stack.name}: {first.what}"
            raise ModelError(what, fix=first.fix, where=path) from error


def packed_layers(path: str, model: nn.Module) -> dict[str, PackedLayer]:
    """Return what the files in `path` hold of packed layers, by the name of the module that each
    becomes in `model`, which is dense and on the meta device. Raises WrongTensors where some
    experts of a stack are packed and others are not there."""
    linears = dict(linear_layers(model, ()))
    stacks = {stack.module: stack for stack in expert_stacks(model, ())}
    one_by_one = {name: layers_by_expert(model, stack) for name, stack in stacks.items()}
    of_experts = {layer for layers in one_by_one.values() for layer in layers}
    released = {of: to for stack in stacks.values() for of, to in names_of(stack).items()}
    rename = renaming(model)

    def renamed(key: str) -> str:
        return released.get(name := rename(key), name)

    state = _packed_state(path, linears.keys() | stacks.keys() | of_experts, renamed)
    found = {n: PackedLayer(one, {n: state[n]}, None) for n, one in linears.items() if n in state}
    lost: list[str] = []
    for name, stack in stacks.items():
        layers = (name,) if name in state else one_by_one[name]
        there = [layer for layer in layers if layer in state]
        missing = [layer for layer in layers if there and layer not in state]
        lost += missing
        if there and not missing:
            tensors = {layer: state[layer] for layer in layers}
            found[name] = PackedLayer(_on_meta(stack, model), tensors, stack)
    if lost:
        words = lacks(lost, state, "packed tensors for ")
        raise WrongTensors([Problem(what, BELONG, where=path) for what in words])
    return found


def _on_meta(stack: Stack, model: nn.Module) -> nn.Linear:
    """Return the tall layer of a stack without values."""
    dtype = model.get_parameter(stack.name).dtype
    return nn.Linear(stack.in_features, stack.rows, bias=False, device="meta", dtype=dtype)


def layers_by_expert(model: nn.Module, stack: Stack) -> tuple[str, ...]:
    """Return what the layers are called whose weights transformers stacks to this parameter, in
    the order of its rows; () where it knows none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for one in get_model_conversion_mapping(model):  # type: ignore[arg-type]
        target = one.target_patterns[0].replace("\\", "").lstrip(".")
        if isinstance(one, WeightConverter) and f".{stack.name}".endswith(f".{target}"):
            sources = [pattern.replace("\\", "") for pattern in one.source_patterns]
            if all("experts.*." in s and s.endswith(".weight") for s in sources):
                parts = (s.rpartition("experts.*.")[2].removesuffix(".weight") for s in sources)
                return layers_of(stack, tuple(parts))
    return ()


def _packed_state(
    path: str, layers: set[str], renamed: Callable[[str], str]
) -> dict[str, dict[str, Tensor]]:
    """Return layer name -> the tensors saved for it, for those of `layers` that are packed: they
    hold more than a weight and a bias, or a weight of codes."""
    from safetensors import safe_open

    places: dict[str, dict[str, tuple[Path, str]]] = {}
    coded: set[str] = set()
    for file in sorted(local_folder(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                name = renamed(key)
                parents = accumulate(name.split("."), lambda parent, part: f"{parent}.{part}")
                if layer := next((parent for parent in parents if parent in layers), None):
                    places.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = file, key
                    if opened.get_slice(key).get_dtype() not in _FLOATS:
                        coded.add(layer)
    state: dict[str, dict[str, Tensor]] = {
        layer: {}
        for layer, parts in places.items()
        if layer in coded or parts.keys() - {"weight", "bias"}
    }
    for file in sorted({file for layer in state for file, _ in places[layer].values()}):
        with safe_open(file, framework="pt") as opened:
            for layer, tensors in state.items():
                of_file = [(part, k) for part, (at, k) in places[layer].items() if at == file]
                tensors.update((part, opened.get_tensor(key)) for part, key in of_file)
    return state


def _loaded(
    quantizer: LayerLoader, name: str, linear: nn.Linear, state: dict[str, Tensor], path: str
) -> nn.Module:
    """Return the vendor module for the tensors of one layer. Raises WrongTensors where they are not
    what the backend saves."""
    has = sorted(state)
    biased = any(part.rpartition(".")[2] == "bias" for part in has)
    if biased != (linear.bias is not None):
        what = f"it has no {name}.bias, which its config says is there"
        if biased:
            what = f"it has {name}.bias, which its config says is not there"
        raise WrongTensors([Problem(what, BELONG, where=path)])
    try:
        vendor = quantizer.load_linear(linear, state)
    except ModelError as error:
        raise WrongTensors([Problem(f"{name}: {error.problems[0].what}", BELONG, path)]) from error
    except (KeyError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        missing = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).strip()
        what = f"{name} cannot be made of what it holds for it, {listed(has)}: {missing}"
        raise WrongTensors([Problem(what, BELONG, where=path)]) from error
    sizes, wanted = quantizer.target.shape(vendor), (linear.in_features, linear.out_features)
    if sizes != wanted:
        what = f"{name} has {sizes} inputs and outputs, its config wants {wanted}"
        raise WrongTensors([Problem(what, BELONG, where=path)])
    return vendor
