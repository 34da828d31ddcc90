"""Make an AQLM model: each linear layer is fitted to what calibration shows it, block by block.

Every finished layer is kept in a work folder, so that a run that was killed goes on where it was.
Progress goes to the logger `quantadapt.aqlm`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantadapt.calibration import LayerInputs, walk_blocks
from quantadapt.calibration.experts import Opened, close_experts, open_experts, round_experts
from quantadapt.errors import ModelError, OutputError
from quantadapt.folders.modes import give_usual_modes
from quantadapt.loading import (
    cast_parameters,
    from_pretrained,
    linear_layers,
    linear_of,
    set_submodule,
    skipped_modules,
)
from quantadapt.paths import cache_folder
from quantadapt_aqlm import additive

if TYPE_CHECKING:
    from quantadapt_aqlm import AQLM

log = logging.getLogger("quantadapt.aqlm")

Examples = list[dict[str, Tensor]]
STORED = ("codes", "codebooks", "scales")


def make(
    quantizer: AQLM,
    source: str | nn.Module,
    examples: Examples,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None,
) -> nn.Module:
    """Return `source` with AQLM layers; see `Quantizer.quantize`."""
    model = from_pretrained(source, dtype=dtype) if isinstance(source, str) else source
    training = model.training
    cast_parameters(model.eval(), dtype)
    skip = skipped_modules(model, skip)
    opened = open_experts(model, skip, lambda *sizes: None)
    names = [name for name, _ in linear_layers(model, skip)]
    work = WorkFolder(_root(quantizer), _key(quantizer, model, names, examples, device, dtype))
    maker = _Maker(quantizer, model, work, names, dtype, opened)
    walk_blocks(
        model,
        examples,
        names=names,
        on_layer=maker.on_layer,
        on_block=maker.on_block,
        device=device,
    )
    close_experts(model, opened, lambda one, _: maker.made.pop(one.stack.name))
    round_experts(model, skip, quantizer, device)
    return model.to(device).train(training)


class _Maker:
    """Fits the layers that the walk hands over, and puts them into the model block by block."""

    def __init__(
        self,
        quantizer: AQLM,
        model: nn.Module,
        work: WorkFolder,
        names: list[str],
        dtype: torch.dtype,
        opened: list[Opened],
    ) -> None:
        self.quantizer, self.model, self.work, self.dtype = quantizer, model, work, dtype
        shared = [(one, _Experts(one)) for one in opened]
        self.stacks = {name: experts for one, experts in shared for name in one.layers}
        self.count = len(names) - sum(len(one.layers) - 1 for one in opened)
        self.number = 0
        self.made: dict[str, nn.Module] = {}

    def on_layer(self, name: str, linear: nn.Linear, inputs: LayerInputs) -> None:
        if (experts := self.stacks.get(name)) is None:
            self.make(name, linear, inputs)
        elif experts.add(name, linear, inputs):
            experts.spread(self.make(experts.opened.stack.name, *experts.together()))

    def make(self, name: str, linear: nn.Linear, inputs: LayerInputs) -> Tensor:
        """Fit a layer, and return its weight as it is then."""
        self.number += 1
        linear.weight.requires_grad_(False)
        state = self.work.read(name, linear.weight.device)
        progress = f"layer {self.number} of {self.count}, {name}"
        if state is None:
            started = time.perf_counter()
            state = self._fit(name, linear, inputs)
            self.work.keep(name, state)
            progress += f", took {time.perf_counter() - started:.1f} s"
        else:
            progress += ", was finished before"
            if linear.bias is not None:
                state["bias"] = linear.bias.data
        vendor = self.quantizer.load_linear(linear, state).train(linear.training)
        dense = self.quantizer.target.dequantize(vendor).to(self.dtype)
        error = _output_error(linear.weight, dense, inputs.second_moment)
        log.info("%s: relative error of the outputs %.4f", progress, error)
        # Until its block is done, the layer computes as what it will be, without unpacking it.
        linear.weight.data = dense
        self.made[name] = vendor
        return dense

    def _fit(self, name: str, linear: nn.Linear, inputs: LayerInputs) -> dict[str, Tensor]:
        if not inputs.rows:
            log.warning("no example reaches %s: it is fitted to its weight alone", name)
        if not bool(inputs.second_moment.isfinite().all()):
            what = f"calibration gives {name} inputs that are no numbers (nan or inf)"
            raise ModelError(what, fix="use dtype: bfloat16 or float32, and check the weights")
        return fitted(self.quantizer, linear, inputs, name)

    def on_block(self, name: str) -> None:
        stacks = {experts.opened.stack.name for experts in self.stacks.values()}
        for layer in [n for n in self.made if not name or n.startswith(f"{name}.")]:
            if layer not in stacks:
                set_submodule(self.model, layer, self.made.pop(layer))


class _Experts:
    """Collects what the layers of all experts of a stack are fed: they share their codebooks, so
    they are fitted together, to the inputs of all."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.linears: dict[str, nn.Linear] = {}
        self.moment: Tensor | None = None
        self.rows = 0

    def add(self, name: str, linear: nn.Linear, inputs: LayerInputs) -> bool:
        """Note a layer; say whether it is the last one."""
        self.linears[name] = linear
        moment = inputs.second_moment
        self.moment = moment.clone() if self.moment is None else self.moment.add_(moment)
        self.rows += inputs.rows
        return len(self.linears) == len(self.opened.layers)

    def together(self) -> tuple[nn.Linear, LayerInputs]:
        """Return the tall layer and its inputs."""
        assert self.moment is not None
        weight = torch.cat([self.linears[name].weight for name in self.opened.layers])
        return linear_of(weight), LayerInputs(self.moment, self.rows)

    def spread(self, dense: Tensor) -> None:
        """Let each expert's layer compute with its part of `dense`."""
        rows = len(dense) // len(self.opened.layers)
        for name, weight in zip(self.opened.layers, torch.split(dense, rows), strict=True):
            self.linears[name].weight.data = weight
        self.linears, self.moment = {}, None


def fitted(
    quantizer: AQLM, linear: nn.Linear, inputs: LayerInputs | None = None, name: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of `aqlm.QuantizedLinear` for a layer, without inputs for its weight."""
    weight = linear.weight.data
    size = linear.in_features
    moment = inputs.second_moment if inputs else torch.zeros(size, size, device=weight.device)
    found = additive.quantize_weight(
        weight,
        moment,
        inputs.rows if inputs else 0,
        quantizer,
        seed=quantizer.seed + zlib.crc32(name.encode()),
        storage=torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16,
    )
    state = found.packed(quantizer.nbits_per_codebook, weight.dtype)
    return state if linear.bias is None else {**state, "bias": linear.bias.data}


def _output_error(weight: Tensor, dense: Tensor, moment: Tensor) -> float:
    weight, difference = weight.float(), weight.float() - dense.float()
    wrong = ((difference @ moment) * difference).sum()
    whole = ((weight @ moment) * weight).sum()
    return float((wrong / whole.clamp_min(1e-30)).clamp_min(0).sqrt())


# The work folder -------------------------------------------------------------------------------


class WorkFolder:
    """Finished layers, one file each. A file appears when it is complete; one that was damaged
    since counts as missing."""

    def __init__(self, root: Path, key: str) -> None:
        self.path = root / key
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "set backend.work_folder, or the variable QUANTADAPT_CACHE, to a folder of yours"
            what = f"finished layers cannot be kept: {error.strerror}"
            raise OutputError(what, fix=fix, where=str(self.path)) from None
        log.info("finished layers are kept in %s", self.path)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def read(self, name: str, device: torch.device) -> dict[str, Tensor] | None:
        """Return the tensors of a finished layer, or None."""
        from safetensors import safe_open

        if not self._file(name).exists():
            return None
        try:
            with safe_open(self._file(name), framework="pt") as opened:
                state = {key: opened.get_tensor(key) for key in STORED}
                digest = (opened.metadata() or {}).get("sha256")
        except Exception:  # whatever a damaged file makes of safetensors
            state, digest = {}, None
        if digest != _digest(state.items()):
            log.warning("%s is damaged: that layer is made again", self._file(name))
            return None
        return {key: value.to(device) for key, value in state.items()}

    def keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write a finished layer; it is there completely or not at all."""
        from safetensors.torch import save_file

        tensors = {key: state[key].cpu().contiguous() for key in STORED}
        partial = self.path / f".{name}.{os.getpid()}"
        try:
            save_file(tensors, partial, metadata={"sha256": _digest(tensors.items())})
            give_usual_modes([partial], self.path)
            os.replace(partial, self._file(name))
        except OSError as error:
            what = f"a finished layer cannot be kept: {error.strerror}"
            fix = "make room, or set backend.work_folder; finished layers are not lost"
            raise OutputError(what, fix=fix, where=str(self.path)) from error
        finally:
            partial.unlink(missing_ok=True)


def _root(quantizer: AQLM) -> Path:
    if quantizer.work_folder:
        return Path(quantizer.work_folder).expanduser()
    return cache_folder() / "aqlm"


def _key(
    quantizer: AQLM,
    model: nn.Module,
    names: list[str],
    examples: Examples,
    device: str,
    dtype: torch.dtype,
) -> str:
    """Return a name for everything that the codes depend on, this code included."""
    options = quantizer.model_dump(exclude={"work_folder"})
    facts = [options, names, device.partition(":")[0], str(dtype)]
    folder = Path(additive.__file__).parent
    code = b"".join((folder / name).read_bytes() for name in ("additive.py", "beam_search.py"))
    tensors = _digest([*model.state_dict().items(), *_tensors(examples)])
    digest = hashlib.sha256(code + json.dumps(facts, sort_keys=True).encode() + tensors.encode())
    return digest.hexdigest()[:20]


def _tensors(examples: Examples) -> Iterator[tuple[str, Any]]:
    for number, example in enumerate(examples):
        for key, value in sorted(example.items()):
            yield f"{number}.{key}", value


def _digest(items: Any) -> str:
    """Return a digest of names and tensors."""
    hashed = hashlib.sha256()
    for name, value in items:
        if isinstance(value, Tensor):
            hashed.update(f"{name}{list(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(flat.numpy().data)
        else:
            hashed.update(f"{name}{value!r}".encode())
    return hashed.hexdigest()
