"""The tensors of a checkpoint as parameters of its model, and back, a few at a time.

transformers renames keys, and some models keep their weights otherwise than their checkpoints do:
experts that are stored one by one are one stack. It converts whole models; here its conversions
run both ways for single parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError, Problem
from ..model.half_precision import in_file
from .accounting import WrongTensors, lacks, listed
from .tensors import Checkpoint

_FIX = "download the checkpoint again, or check that config.json and the weights belong together"


@dataclass(eq=False)
class Group:
    """Tensors of a checkpoint, and the parameters that they are.

    Attributes:
        first: the parameter by which transformers calls the group.
        converter: transformers' conversion; None where a tensor is a parameter.
        names: the parameters.
        keys: the tensors, in the order in which they are converted.
        patterns: of each tensor, the part of the conversion that it matches.
        renamed: of each tensor, its key once transformers has renamed it and before it converts.
    """

    first: str
    converter: Any
    names: tuple[str, ...]
    keys: list[str]
    patterns: list[str]
    renamed: list[str]


class Parameters:
    """The parameters and buffers of a model, read from its checkpoint one at a time.

    Args:
        checkpoint: its files.
        model: without weights, on the meta device; it stays as it is.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
        )

        self.checkpoint, self.model = checkpoint, cast(Any, model)
        self.known: dict[str, Tensor] = self.model.state_dict()
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {p: one for one in converters for p in one.source_patterns}
        self._groups: dict[str, Group] = {}
        self._of_name: dict[str, Group] = {}
        self._of_key: dict[str, Group] = {}
        for key in sorted(checkpoint.files, key=dot_natural_key):
            name, pattern = self._renamed(key, converters)
            self._add(key, name, by_pattern[pattern] if pattern else None, pattern or key)

    def _renamed(self, key: str, converters: list[Any]) -> tuple[str, str | None]:
        """Return what transformers calls a key, and the pattern of the converter that takes it."""
        from transformers.core_model_loading import rename_source_key

        # As transformers' own loop does: a key that would become none of the model's stays.
        prefix, known = self.model.base_model_prefix, self.known
        name, pattern = rename_source_key(key, self._renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        return name, pattern

    def _add(self, key: str, name: str, converter: Any, pattern: str) -> None:
        group = self._groups.get(name)
        if group is None:
            targets = converter.target_patterns if converter else [""]
            names = tuple(name.replace(targets[0], target) for target in targets)
            group = self._groups[name] = Group(name, converter, names, [], [], [])
            self._of_name |= dict.fromkeys(names, group)
        self._of_key[key] = group
        group.keys.append(key)
        group.patterns.append(pattern)
        group.renamed.append(self._renamed(key, [])[0])

    def __contains__(self, name: str) -> bool:
        return name in self._of_name

    def __iter__(self) -> Any:
        return iter(self._of_name)

    def group(self, *, name: str = "", key: str = "") -> Group:
        """Return the group of a parameter, or of a tensor in the files."""
        return self._of_key[key] if key else self._of_name[name]

    def read(self, name: str) -> Tensor:
        """Return one parameter, on the CPU, in the dtype of the files.

        Raises:
            ModelError: the tensors that the files hold do not make it.
        """
        group = self._of_name[name]
        tensors = {key: self.checkpoint.read(key) for key in group.keys}
        try:
            made = self._made(group, list(tensors.values()))
        except (RuntimeError, ValueError, KeyError) as error:
            raise self._wrong(self.fault(name)) from error
        if name in self.known and made[name].shape != self.known[name].shape:
            raise self._wrong(self.fault(name))
        return made[name]

    def stored(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return key -> tensor of what the files hold for the parameters of `group`: by the keys
        and in the dtypes that the checkpoint has.

        Args:
            values: the parameters of the group, by name.

        Raises:
            ModelError: transformers cannot turn its conversion round.
        """
        if group.converter is None:
            return {key: self._cast(key, values[group.first]) for key in group.keys}
        try:
            found = self._turned_back(group, values)
            # What transformers reads again has to be what was written.
            again = self._made(group, [found[key] for key in group.keys])
            same = all(torch.equal(again[name], values[name]) for name in group.names)
        except (NotImplementedError, RuntimeError, ValueError, KeyError) as error:
            raise self._one_way(group) from error
        if not same:
            raise self._one_way(group)
        return {key: self._cast(key, tensor) for key, tensor in found.items()}

    def _made(self, group: Group, tensors: list[Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.first: tensors[0]}
        converter = copy.deepcopy(group.converter)
        for key, pattern, tensor in zip(group.keys, group.patterns, tensors, strict=True):
            converter.add_tensor(group.first, key, pattern, tensor)
        return self._converted(converter, group.first)

    def _turned_back(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return key -> tensor; by the names that they would have where the files lack some."""
        converter = group.converter.reverse_transform()
        first = ""
        for name in group.names:
            first, pattern = converter.rename_source_key(name)
            converter.add_tensor(first, name, pattern, values[name])
        keys: dict[str, str] = {}
        prefix = f"{self.model.base_model_prefix}."
        for key, renamed in zip(group.keys, group.renamed, strict=True):
            keys |= {renamed: key, f"{prefix}{renamed}": key, renamed.removeprefix(prefix): key}
        made = self._converted(converter, first)
        return {keys.get(name, name): tensor for name, tensor in made.items()}

    def _converted(self, converter: Any, name: str) -> dict[str, Tensor]:
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {key: v[0] if isinstance(v, list) else v for key, v in made.items()}

    def _cast(self, key: str, tensor: Tensor) -> Tensor:
        return in_file(key, self.dtype(key), tensor).contiguous()

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that the files hold `key` in."""
        from safetensors import safe_open

        file = self.checkpoint.folder / self.checkpoint.files[key]
        with safe_open(file, framework="pt") as opened:
            some = opened.get_slice(key)
            tensor: Tensor = some[:0] if some.get_shape() else opened.get_tensor(key)
        return tensor.dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter that the files make, by name; what has no place in the
        model, too. Nothing is read.

        Raises:
            WrongTensors: tensors that are converted are not all there, or of other shapes.
        """
        found, wrong = dict[str, tuple[int, ...]](), []
        for group in self._groups.values():
            shape = self.checkpoint.shapes[group.keys[0]]
            found |= {n: tuple(self.known[n].shape) if n in self.known else () for n in group.names}
            if group.converter is None:
                found[group.first] = shape
            elif said := self._fault(group):
                wrong.append(Problem(said, _FIX, where=str(self.checkpoint.folder)))
        if wrong:
            raise WrongTensors(wrong)
        return found

    @property
    def unused(self) -> set[str]:
        """The tensors in the files that the model has no place for."""
        of_key = self._of_key.items()
        return {key for key, group in of_key if not any(n in self.known for n in group.names)}

    def fault(self, name: str) -> str:
        """Say which tensors of a parameter are missing, or have another shape than they need."""
        group = self._of_name[name]
        return self._fault(group) or f"{name} cannot be made of {listed(group.keys)}"

    def lost(self, name: str) -> list[str]:
        """Return the tensors of a parameter that the files lack."""
        group = self._of_name[name]
        return self._lost(group, self._expected(group))

    def _lost(self, group: Group, expected: Mapping[str, Any]) -> list[str]:
        return [_as_named(key, group) for key in expected if key not in self.checkpoint.shapes]

    def _fault(self, group: Group) -> str:
        shapes, expected = self.checkpoint.shapes, self._expected(group)
        if lost := self._lost(group, expected):
            return "; ".join(lacks(lost, shapes))
        if other := [key for key, shape in expected.items() if shapes[key] != shape]:
            sizes = f"{list(shapes[other[0]])}, its config wants {list(expected[other[0]])}"
            return f"its {other[0]} has the shape {sizes}"
        if more := [key for key in group.keys if expected and key not in expected]:
            return f"it holds more than its config has: {listed(more)}"
        return ""

    def _expected(self, group: Group) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of what the files have to hold; nothing where that is not known."""
        try:
            meant = {n: torch.empty(self.known[n].shape, device="meta") for n in group.names}
            if group.converter is None:
                return {key: tuple(meant[group.first].shape) for key in group.keys}
            return {key: tuple(t.shape) for key, t in self._turned_back(group, meant).items()}
        except (NotImplementedError, RuntimeError, ValueError, KeyError):
            return {}

    def _wrong(self, what: str) -> ModelError:
        return ModelError(what, fix=_FIX, where=str(self.checkpoint.folder))

    def _one_way(self, group: Group) -> ModelError:
        what = f"what is stored as {listed(group.keys)} is converted when it is read"
        what = f"{what}, and transformers cannot turn that round"
        fix = "merge it in memory: quantadapt merge, without --onto"
        return ModelError(what, fix=fix, where=str(self.checkpoint.folder))


def _as_named(name: str, group: Group) -> str:
    """Return a name that transformers has for a tensor of `group` as the files have others."""
    key, renamed = group.keys[0], group.renamed[0]
    pairs = zip(reversed(key), reversed(renamed), strict=False)
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return name.replace(renamed[: len(renamed) - end], key[: len(key) - end], 1)
