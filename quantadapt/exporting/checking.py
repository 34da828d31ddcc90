"""A merged model is judged by the files that were written: loaded as any user would, compared with
what was meant, layer by layer, and with the model that was merged, token by token.

The copy in memory is gone by then, so the check needs no more memory than the merge did. Where the
base may be larger than memory, the decoder's blocks stay on disk (`blocks_on_disk`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dependencies import errors_only
from ..errors import ModelError
from ..facade import facades
from ..loading.reading import architecture
from ..loading.tensors import Checkpoint
from ..model.modules import stacks
from ..protocols import Figure

DIRECTIONS = 8
"""Random directions that a tensor is projected on; the error that they show is right to a third.
Their signs are the bits of one byte."""
CHUNK = 2**20

ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Nats per token (or the relative error of other answers), by compute dtype, that rounding alone
may put between an adapter and the same merged into dense weights. On small models it is below
1e-9, 3e-3 and 1e-4; an adapter that is lost, or a tensor that starts at random, is 0.1 and more."""
ACTIVATIONS = 5
"""The same where the base quantizes activations, which dense weights do not, for each unit of the
error of a layer by that: int8 (0.01) 2e-5, on a random model of one block e2m1 (0.1) 0.07."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor: enough to tell how far another one is from it.

    Attributes:
        shape: of the tensor.
        norm: its Frobenius norm.
        projections: on `DIRECTIONS` fixed vectors of signs, float64.
    """

    shape: tuple[int, ...]
    norm: float
    projections: Tensor

    def distance(self, other: Sketch) -> float:
        """Return the estimated relative error of `other`; infinite where the shape is another or
        a number is none."""
        if self.shape != other.shape:
            return float("inf")
        apart = float((self.projections - other.projections).square().mean().sqrt())
        found = apart / self.norm if self.norm else apart
        return found if found == found else float("inf")


def sketch(tensor: Tensor) -> Sketch:
    """Return what is kept of `tensor`, of any dtype, in the memory of a small piece of it."""
    flat = tensor.detach().reshape(-1)
    projections = torch.zeros(DIRECTIONS, dtype=torch.float64, device=flat.device)
    squares = torch.zeros((), dtype=torch.float64, device=flat.device)
    shifts = torch.arange(DIRECTIONS, device=flat.device, dtype=torch.uint8)[:, None]
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].double()
        places = torch.arange(start, start + piece.numel(), device=flat.device)
        mixed = (places * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
        bits = ((mixed ^ (mixed >> 12)) >> 7 & 0xFF).byte()  # one for each direction
        projections += 2 * ((bits >> shifts & 1).double() @ piece) - piece.sum()  # of signs
        squares += piece.square().sum()
    return Sketch(tuple(tensor.shape), float(squares.sqrt()), projections.cpu())


def sketches(model: nn.Module) -> dict[str, Sketch]:
    """Return a sketch of everything that `model` computes with, by name: of a quantized layer the
    dequantized weight, so formats do not matter."""
    return {name: sketch(tensor) for name, tensor in _contents(model)}


def _contents(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    packed: tuple[str, ...] = ()
    for name, facade in facades(model):
        packed = (*packed, f"{name}.")
        yield f"{name}.weight", facade.dequantize()
        if facade.bias is not None:
            yield f"{name}.bias", facade.bias
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not name.startswith(packed):
            yield name, tensor


def refuse_other_model(meant: Mapping[str, Sketch], loaded: nn.Module) -> None:
    """Raise ModelError where a model read from files is not the one that was written."""
    refuse_other(meant, sketches(loaded), packed={f"{name}.weight" for name, _ in facades(loaded)})


def refuse_other_files(meant: Mapping[str, Sketch], folder: Path) -> None:
    """Raise ModelError where the files in `folder` do not hold what was meant. What is said of them
    token by token says nothing of what no token uses, such as rows of an embedding."""
    checkpoint = Checkpoint(str(folder))
    refuse_other(meant, {key: sketch(checkpoint.read(key)) for key in checkpoint.files})


def refuse_other(
    meant: Mapping[str, Sketch], found: Mapping[str, Sketch], packed: Collection[str] = ()
) -> None:
    """Raise ModelError where tensors are not those that were meant, up to rounding. `packed` are
    names of those that a quantizer computes."""
    wrong = {}
    for name in sorted(meant.keys() | found.keys()):
        if name not in found or name not in meant:
            wrong[name] = "missing" if name not in found else "not of the merged model"
        elif (error := meant[name].distance(found[name])) > (1e-3 if name in packed else 1e-6):
            wrong[name] = f"off by {error:.1e}"
    if wrong:
        shown = ", ".join(f"{name} {what}" for name, what in list(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise _wrong(f"read from its files the merged model is another one: {shown}{more}")


def refuse_far(figures: Mapping[str, Figure], dtype: torch.dtype, *, activations: float) -> None:
    """Raise ModelError where a dense merged model does not answer as the adapter does.

    Args:
        figures: of `compared`.
        dtype: in which the adapter computes.
        activations: the error of its base's layers by quantizing these; 0 where it does not.
    """
    limit, (words, far) = max(ROUNDED.get(dtype, 1e-4), ACTIVATIONS * activations), _apart(figures)
    if not far <= limit:
        what = f"the merged model does not answer as the adapter: {words} of {far:.2g}"
        raise _wrong(f"{what}, where rounding explains {limit:g}")


def refuse_no_number(figures: Mapping[str, Figure]) -> None:
    """Raise ModelError where a merged model gives no numbers."""
    if not _apart(figures)[1] < float("inf"):
        raise _wrong("the merged model gives no finite numbers")


def _apart(figures: Mapping[str, Figure]) -> tuple[str, float]:
    """Return how far `compared` says that models are apart, and what that is."""
    if "kl" in figures:
        return "a KL in nats per token", figures["kl"].value
    return "a relative error", figures["error"].value


def _wrong(what: str) -> ModelError:
    fix = "nothing was written; keep the adapter beside the base, and report this with its config"
    return ModelError(what, fix=fix)


def written_model(
    kind: type[Any], folder: Path, *, unused: Collection[str] = (), **options: Any
) -> nn.Module:
    """Load a dense model as any user would, by its class in transformers. `unused` are names of
    tensors that the base had beside, too.

    Raises:
        ModelError: a tensor is missing from the files, or is in them and of no use.
    """
    model, report = kind.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **options
    )
    words = {
        "missing_keys": "lack {}",
        "unexpected_keys": "hold {}, which the model has no place for",
        "mismatched_keys": "hold {} in another shape",
    }
    for key, said in words.items():
        if names := sorted({str(name) for name in report[key]} - set(unused)):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise _wrong(f"the files written {said.format(shown)}")
    loaded: nn.Module = model.eval()
    return loaded


@contextmanager
def blocks_on_disk(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Yield options for `written_model` with which transformers leaves the blocks of the model in
    `folder` on disk, each read when it runs, and puts the rest on `device`."""
    model = architecture(str(folder))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = [name for stack in stacks(model, linears) for name in stack]
    places = dict.fromkeys(blocks, "disk")
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for name in names:
        if not any(_overlap(name, other) for other in places):
            places[name] = device
    if not blocks:
        places = {"": device}
    made = tempfile.TemporaryDirectory(prefix="quantadapt-")
    with errors_only("accelerate.big_modeling"), made as scratch:  # it warns of blocks on disk
        yield {"device_map": places, "offload_folder": scratch}


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
