"""Recompute only as many layers as memory demands, and keep their inputs in CPU memory if need be.

The first n decoder layers are recomputed (their activations are made again in backward), the rest
keep theirs: those of the last layers are the first to be freed. Checkpointing is
`torch.utils.checkpoint`, non-reentrant unless asked otherwise (https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..facade import read_in_parts, recomputed_later, recomputing
from ..facade.invocations import Invocations
from ..memory.setting import Setting
from ..model.modules import is_skipped
from ..model.towers import other_towers
from ..streaming import streamer_of
from .tiling import Tiles

# what transformers' GradientCheckpointingLayer reads
FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class Recomputer:
    """Sets how many layers of a model recompute, again and again if need be.

    Args:
        model: a PeftModel or transformers model.
        reentrant: which kind of `torch.utils.checkpoint`.
        draws: whether a pass draws random numbers, which a recomputation has to draw again.
        invocations: where adapters begin in each row, which a recomputation has to know again.
    """

    def __init__(
        self,
        model: nn.Module,
        reentrant: bool = False,
        draws: bool = True,
        invocations: Invocations | None = None,
    ) -> None:
        self.base: Any = getattr(model, "get_base_model", lambda: model)()  # type: ignore[operator]
        self.layers = decoder_layers(self.base)
        self.reentrant, self.draws = reentrant, draws
        self.invocations = invocations or Invocations()
        self.inputs, self.tiles = CpuInputs(), Tiles(self.layers, _hidden_size(self.base))
        self.calls = 0
        """How often a layer has asked to be recomputed."""

    @property
    def count(self) -> int:
        """How many layers can be recomputed, one by one; 1 where it is all of them or none."""
        return max(len(self.layers), 1)

    @property
    def most(self) -> int:
        """How many layers can be recomputed with a gain: the activations of the last one are
        there in any case when its backward begins."""
        if self.layers:
            return len(self.layers) - 1
        return 1 if getattr(self.base, "supports_gradient_checkpointing", False) else 0

    def apply(self, setting: Setting) -> None:
        """Checkpoint the first `setting.recomputed_layers` layers. Raises ValueError where the
        model cannot checkpoint and has to."""
        function = self._function(setting.offload)
        read_in_parts(self.base, setting.offload or streamer_of(self.base) is not None)
        self.tiles.turn(setting.offload)
        if not self.layers:
            self._apply_to_all(setting.recomputed_layers > 0, function)
        for index, layer in enumerate(self.layers):
            setattr(layer, FLAG, index < setting.recomputed_layers)
            setattr(layer, FUNCTION, function)

    def _apply_to_all(self, on: bool, function: Callable[..., Any]) -> None:
        """A model that checkpoints in loops of its own knows all layers or none."""
        if not on and not any(getattr(module, FLAG, False) for module in self.base.modules()):
            return
        if not getattr(self.base, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(self.base).__name__} cannot recompute its layers")
        self.base._set_gradient_checkpointing(enable=on, gradient_checkpointing_func=function)

    def _function(self, offload: bool) -> Callable[..., Any]:
        # Keeping weights from the recomputation to the backward is faster, but takes memory.
        contexts = {} if self.reentrant or offload else {"context_fn": _contexts}
        options = {"use_reentrant": self.reentrant, "preserve_rng_state": self.draws, **contexts}
        return partial(self._recompute, partial(checkpoint, **options), offload)  # type: ignore[arg-type]

    def _recompute(
        self, function: Callable[..., Any], offload: bool, layer: Callable[..., Any], *args: Any
    ) -> Any:
        self.calls += 1
        layer = self.invocations.again(layer)
        inputs = self.inputs.saving(args[0]) if offload else nullcontext()
        with inputs, recomputed_later():
            return function(layer, *args)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers can checkpoint one by one, in the order of computation;
    empty for a model that knows all or none. Towers in which nothing is trained keep nothing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    towers = [name for name in other_towers(model) if not _trains(model.get_submodule(name))]
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if is_skipped(name, tuple(towers)):
            continue
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(inside):
            found.append(module)
            inside = (*inside, f"{name}.")
    return found


def _hidden_size(base: nn.Module) -> int:
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or 0)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class CpuInputs:
    """Keeps the inputs of recomputed layers in CPU memory from forward to backward.

    On CUDA the copies run on a stream of their own, to and from pinned buffers that are used again
    (pinning takes long). When the input of a layer is fetched, that of the layer before it sets
    out, too. On a CPU the tensors are copied all the same, which serves tests alone.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._last: weakref.ref[_Stored] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def saving(self, hidden: Tensor) -> Iterator[None]:
        """Inside, autograd saves `hidden` here and everything else as ever."""

        # The hook gets a detached alias, so it is known by its memory. Autograd keeps the hook, and
        # with it whatever the hook refers to: not `hidden`, which is to be freed.
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(tensor: Tensor) -> Tensor | _Stored:
            same = tensor.data_ptr() == address and tensor.shape == shape
            return self._store(tensor) if same else tensor

        def unpack(saved: Tensor | _Stored) -> Tensor:
            return saved.fetched() if isinstance(saved, _Stored) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _store(self, tensor: Tensor) -> _Stored:
        if self._last is not None and (before := self._last()) is not None:
            before.let_go()
        stored = _Stored(self, tensor, self._last)
        self._last = weakref.ref(stored)
        return stored

    def take(self, tensor: Tensor) -> Tensor:
        """Return a buffer with room for `tensor`: flat, of bytes."""
        for index, buffer in enumerate(self._free):
            if buffer.numel() >= tensor.nbytes:
                return self._free.pop(index)
        if self._free:  # all too small, and never to be used again
            self._free.pop()
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; copies that still read it come first on the stream."""
        self._free.append(buffer)

    def copy(self, target: Tensor, source: Tensor, device: torch.device) -> Any:
        """Copy behind the computation's back, once what it has done so far is done; return what
        tells that the copy is there: an event, or None where nothing has to be awaited."""
        if device.type != "cuda":
            target.copy_(source)
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


class _Stored:
    """One input in CPU memory, and the one that was stored before it.

    Memory of the device is given back once the computation has waited for the copy, which was done
    long before. (With `record_stream` it would come free only when the copy has really run, and the
    program runs far ahead of the device.)
    """

    def __init__(
        self, owner: CpuInputs, tensor: Tensor, previous: weakref.ref[_Stored] | None
    ) -> None:
        self.owner, self.previous = owner, previous
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.buffer = owner.take(tensor)
        weakref.finalize(self, owner.give, self.buffer)
        self.on_device: Tensor | None = tensor
        self.copied = owner.copy(self._view(), tensor, tensor.device)

    def _view(self) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return self.buffer[:size].view(self.dtype).view(self.shape)

    def _wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def let_go(self) -> None:
        """Free the tensor on the device."""
        self._wait()
        self.on_device = None

    def fetch(self) -> None:
        """Start copying it back."""
        if self.on_device is None:
            self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.copied = self.owner.copy(self.on_device, self._view(), self.device)

    def fetched(self) -> Tensor:
        """Return it on its device, and start fetching the one that is wanted next."""
        self.fetch()
        self._wait()
        tensor, self.on_device = self.on_device, None
        assert tensor is not None
        if self.previous is not None and (before := self.previous()) is not None:
            before.fetch()
        return tensor


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a layer's forward and of its recomputation."""
    return nullcontext(), recomputing()


def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Make a graph start at `output`; a hook of the embedding."""
    output.requires_grad_(True)
