"""The files of a checkpoint written again, one after the other, with an adapter merged in.

Whatever the adapter holds ends up in a tensor that is written, or it is an error: each of PEFT's
modules is asked what it makes of the tensors of the module that it stands around.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import ModelError
from ..loading.conversion import Group, Parameters
from ..model.half_precision import in_file
from ..model.linears import conv1d_layers
from ..model.modules import in_own_layout
from ..paths import INDEX
from .checking import Sketch, sketch
from .merging import adapted_parts, merged_part
from .ties import all_equal

if TYPE_CHECKING:
    from peft import PeftModel

IN_MEMORY = "merge it in memory: quantadapt merge, without --onto"


class MergedShards:
    """What has to be written in place of the files of a base.

    Args:
        tuned: the base, its linear layers on disk, under the adapter.
        stored: the parameters of that base, in its files.
        ties: the base's parameters that are tied, see `tied_groups`.
        trained: names of parameters of the base itself that the adapter holds, such as biases.

    Raises:
        ModelError: something of the adapter has no place in the checkpoint.
    """

    def __init__(
        self,
        tuned: PeftModel,
        stored: Parameters,
        ties: Iterable[tuple[str, ...]],
        trained: Iterable[str],
    ) -> None:
        base: nn.Module = tuned.get_base_model()
        self.stored, self.checkpoint = stored, stored.checkpoint
        self.parts = dict(adapted_parts(base))
        self.conv1d = conv1d_layers(base)
        self.values: dict[str, Tensor] = {name: base.get_parameter(name) for name in trained}
        groups = [g for g in ties if any(self._changes(n) for n in g)]
        self.places = {*stored, *(name for group in groups for name in group)}
        self._refuse_homeless()
        self.tied = {name: values for g in groups for values in [self._of(g)] for name in g}
        self.unties = any(not all_equal(list(values.values())) for values in self.tied.values())

    @property
    def layers(self) -> int:
        """How many modules of the base are adapted or trained whole."""
        return len(self.parts)

    def write(self, folder: Path, *, sketched: bool) -> dict[str, Sketch]:
        """Write all files, each with what that of the base holds, and return a sketch of each
        tensor in them, if `sketched`. Memory holds one file, what is merged with a tensor of it and
        lies in a later one, and embeddings that are tied."""
        from safetensors.torch import save_file

        weight_map: dict[str, str] = {}
        meant: dict[str, Sketch] = {}
        made: dict[str, Tensor] = {}
        for file, keys in self.checkpoint.shards():
            for key in keys:
                if key not in made:
                    made |= self._written(key)  # and what is of one module with it
            here = [key for key in made if self.checkpoint.files.get(key, file) == file]
            tensors = {key: made.pop(key) for key in here}
            meant |= {key: sketch(tensor) for key, tensor in tensors.items() if sketched}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        self._write_index(folder, weight_map)
        return meant

    def _written(self, key: str) -> dict[str, Tensor]:
        """Return what is written where the files hold `key`, by the names in the files."""
        group = self.stored.group(key=key)
        if not any(self._changes(name) or name in self.tied for name in group.names):
            return {key: self.checkpoint.read(key)}
        values, groups, names = dict[str, Tensor](), list[Group](), [*group.names]
        for name in names:  # which grows by what is merged, or converted, with it
            if name not in values:
                values |= self._values(name)
            if name in self.stored and (group := self.stored.group(name=name)) not in groups:
                groups.append(group)
            names += [n for n in (*values, *group.names) if n not in names]
        return self._in_files(values, groups)

    def _in_files(self, values: Mapping[str, Tensor], groups: Iterable[Group]) -> dict[str, Tensor]:
        """Return key -> tensor; what the files hold none of, as a head that was tied, gets the name
        and dtype of its own."""
        found = {key: t for group in groups for key, t in self.stored.stored(group, values).items()}
        new = {name: value for name, value in values.items() if name not in self.stored}
        return found | {name: value.detach().cpu().contiguous() for name, value in new.items()}

    def _values(self, name: str) -> Mapping[str, Tensor]:
        """Return the merged value of a parameter, and of those that are written with it."""
        if name in self.tied:
            if not self.unties:
                return {name: self.tied[name][name]}
            # Each has memory of its own then, also where some are still equal.
            return {name: value.clone() for name, value in self.tied[name].items()}
        if (part := self._part_of(name)) is not None:
            return self._merged(part)
        return {name: self.values[name] if name in self.values else self.stored.read(name)}

    def _merged(self, part: str) -> dict[str, Tensor]:
        """Return name -> value of what one of PEFT's parts makes of its module's tensors."""
        made = nn.ModuleDict({"made": merged_part(part, self.parts[part], "dense")})
        inside = [n.removeprefix(part) for n in self.conv1d if f"{n}.".startswith(f"{part}.")]
        merged = in_own_layout(made, [f"made{name}" for name in inside]).state_dict()
        values = {f"{part}{key.removeprefix('made')}": value for key, value in merged.items()}
        if lost := sorted(values.keys() - self.places):
            raise self._homeless(lost)
        return values

    def _part_of(self, name: str) -> str | None:
        return next((part for part in self.parts if name.startswith(f"{part}.")), None)

    def _changes(self, name: str) -> bool:
        return name in self.values or self._part_of(name) is not None

    def _of(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        """Return name -> value of parameters that are tied, of which the files may hold one."""
        stored = self.stored.read(next(name for name in group if name in self.stored))
        found = {}
        for name in group:
            part = self._part_of(name)
            value = self.values.get(name, stored) if part is None else self._merged(part)[name]
            found[name] = in_file(name, stored.dtype, value)
        return found

    def _refuse_homeless(self) -> None:
        """Raise ModelError where the adapter changes a module of which the files hold nothing."""
        held = {part for name in self.places if (part := self._part_of(name)) is not None}
        if lost := sorted({*self.parts} - held | self.values.keys() - self.places):
            raise self._homeless(lost)

    def _homeless(self, names: list[str]) -> ModelError:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        what = f"the checkpoint has no place for what the adapter trained: {shown}"
        return ModelError(what, fix=IN_MEMORY, where=str(self.checkpoint.folder))

    def _write_index(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        if (self.checkpoint.folder / INDEX).exists():
            index = json.loads((self.checkpoint.folder / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] = weight_map
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
