"""The exports `gguf` and `gguf-adapter`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...capabilities import Cell, Merge
from ...errors import ModelError, Problem
from ...inputs.documents import read_object
from ...paths import is_local_path, local_file
from ...planning.on_disk import config_of
from ...protocols import Exporter, Figure
from ...records import Adapter, Backend
from ..adapter_files import refuse_several
from .converter import ADAPTER, CONVERT, MODEL, convert, converter_problem, find_converter
from .families import adapter_problems, unknown_in
from .vocabulary import kind_of

if TYPE_CHECKING:
    from ..tuned import Tuned

_CONVERTER = (
    "folder of llama.cpp's sources, whose converter is used then; else it is used for what "
)
_CONVERTER += "is not known here, where $LLAMA_CPP or PATH has it"


class Gguf(Exporter):
    """The merged model and its tokenizer in one file, `model.gguf`."""

    dtype: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f16", description="of the weights; norms and biases stay f32"
    )
    converter: str | None = Field(None, description=_CONVERTER)
    check: bool = Field(
        True, description="load the file with transformers and compare it with the adapter"
    )

    @property
    def merges(self) -> Merge:
        return Merge.DENSE

    @property
    def planned(self) -> str:
        return f"GGUF file in {self.dtype}"

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        found = _problems(cell.model, MODEL, self.converter)
        file = local_file(cell.model, "tokenizer.json") if cell.model else None
        if file is not None and not found and not find_converter(MODEL, self.converter):
            try:
                known = kind_of(read_object(file)) is not None
            except ModelError:
                known = True  # the run tells it
            if not known:
                found.append(_unknown("llama.cpp is not known to take text apart as its tokenizer"))
        return found

    def done(self, figures: Mapping[str, Figure]) -> str:
        from ..kept import merge_words

        size = figures["size"]
        found = merge_words(figures) or "not compared with the adapter"
        return f"{self.dtype}, {size}, {found}"

    def needed(self, tuned: Tuned) -> int | None:
        from ...quantizing.state import state_of
        from ..merging import merged_bytes

        bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}[self.dtype]  # q8_0: 32 have a scale
        dense = merged_bytes(tuned.model, "dense")
        return int(dense * bits / (8 * state_of(tuned.model).dtype.itemsize))

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        from ..asking import asking_tokenizer, learnt_layout
        from .model import config_of as config_of_model

        path = folder / "model.gguf"
        if self.check:
            _ = tuned.held_out  # what is wrong with the data is told before the work
        merged: Any = tuned.merged("dense")
        script = find_converter(MODEL, self.converter)
        tokenizer, chats = asking_tokenizer(tuned), learnt_layout(tuned) == "chat"
        if script and (self.converter or unknown_in(config_of_model(merged))):
            count = self._converted(merged, tokenizer, folder, script)
        else:
            from .model import write_model

            name = base_name(tuned)
            count = write_model(merged, tokenizer, path, self.dtype, name, chats=chats)
        figures = {"tensors": Figure(count), "size": Figure(path.stat().st_size / 2**20, "MiB")}
        if self.check:
            config = merged.config
            del merged  # what is read from the file takes its place
            figures |= self._compared(config, tuned, path)
        return figures

    def _converted(self, merged: Any, tokenizer: Any, folder: Path, script: Path) -> int:
        from .files import tensors_of

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            merged.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            convert(script, Path(scratch), folder / "model.gguf", self.dtype)
        return sum(1 for _ in tensors_of(folder / "model.gguf"))

    def _compared(self, config: Any, tuned: Tuned, path: Path) -> dict[str, Figure]:
        """Return how far the file, as transformers reads it, is from the adapter. Raises ModelError
        where that is more than its numbers explain."""
        import torch

        from ...quantizing.state import state_of
        from ..checking import refuse_far, refuse_no_number
        from .model import read_model

        state = state_of(tuned.model)
        if (loaded := read_model(path, config, state.device)) is None:
            return {}
        figures = tuned.compared(loaded)
        if self.dtype == "q8_0":
            refuse_no_number(figures)  # each tensor was compared when it was written
            return figures
        dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        coarser = max((dtypes[self.dtype], state.dtype), key=lambda d: torch.finfo(d).eps)
        refuse_far(figures, coarser, activations=state.quantizer.target.quantizes_activations)
        return figures


class GgufAdapter(Exporter):
    """The LoRA adapter in one file, `adapter.gguf`, for a GGUF file of its base."""

    dtype: Literal["f32", "f16", "bf16"] = Field("f32", description="of the factors")
    converter: str | None = Field(None, description=_CONVERTER)

    @property
    def planned(self) -> str:
        return f"GGUF file of the adapter in {self.dtype}"

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        found = _problems(cell.model, ADAPTER, self.converter)
        fix = "merge it: the export gguf"
        if adapter.peft_type != "LORA":
            found.append(Problem("llama.cpp knows LoRA alone", fix, cell.where, "gguf-lora"))
        found += [
            Problem(what, fix, cell.where, "gguf-lora")
            for what in adapter_problems(cell.adapter_options)
        ]
        return found

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        from .adapter import write_adapter

        refuse_several(tuned.manifest["active"], "one file holds")
        path, script = folder / "adapter.gguf", find_converter(ADAPTER, self.converter)
        config = config_of(tuned.manifest["base"])
        if config is None:
            from .model import config_of as config_of_model

            config = config_of_model(tuned.model.get_base_model())
        if script and (self.converter or unknown_in(config)):
            base = local_file(tuned.manifest["base"], "config.json")
            more = ("--base", str(base.parent)) if base else ()
            convert(script, tuned.adapter, path, self.dtype, *more)
            return {"size": Figure(path.stat().st_size / 2**20, "MiB")}
        layers = write_adapter(tuned.adapter, config, path, self.dtype, base_name(tuned))
        return {"layers": Figure(layers), "size": Figure(path.stat().st_size / 2**20, "MiB")}


def base_name(tuned: Tuned) -> str:
    """Return what the base is called, without where it lies."""
    base: str = tuned.manifest["base"]
    name = Path(base).expanduser().resolve().name if is_local_path(base) else base
    return name or "model"


def _problems(model: str, script: str, converter: str | None) -> list[Problem]:
    """Return what a plan can tell against writing `model`."""
    if problem := converter_problem(script, converter):
        return [problem]
    config = config_of(model) if model else None
    if config is None or find_converter(script, converter):
        return []
    return [_unknown(text) for text in unknown_in(config)]


def _unknown(what: str) -> Problem:
    return Problem(f"it cannot be written as GGUF: {what}", CONVERT, "export", "gguf-family")
