"""A frozen quantized base, sharded over the ranks with FSDP2, whatever its vendor.

The tensors of a decoder block's vendor modules become views of one flat parameter, `packed`, and
that is what `torch.distributed.fsdp.fully_shard` shards and gathers. FSDP2 keeps the storage of
a gathered parameter and only frees and fills its memory, so the views are made once and hold
from step to step; between the steps they have no memory. Adapters, norms and tiny tensors stay
whole on every rank. ZeRO-3: https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .errors import ModelError
from .facade import BroughtTarget, facades
from .model.flat import Leaf, laid_out, write_into
from .model.modules import decoder_blocks

PACKED = "packed"
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where a module keeps what is called with its passes, and as its weights are told or loaded."""


def shard(model: nn.Module) -> nn.Module:
    """Shard the base of `model` over all ranks, in place; every rank has to hold the same.

    Works block by block, so the peak is the model as it stands and one block more.

    Raises:
        ModelError: the linear layers do not stand in one list of blocks.
    """
    for block in blocks(model).values():
        if PACKED not in block._parameters:
            shard_block(block, [facade.vendor for _, facade in facades(block)])
    for _, facade in facades(model):
        if not isinstance(facade.target, GatheringTarget):
            facade.target = GatheringTarget(facade.target)
    _shard_rest(model)
    gather_ahead(model)
    return model


def gather_ahead(model: nn.Module, ahead: bool = True) -> None:
    """Have each block of a sharded base gathered while the one before it computes, in forward and
    in backward; or, not `ahead`, when it is needed: slower, with a block less in memory."""
    sharded: list[Any] = [m for m in model.modules() if PACKED in m._parameters]
    for block, following in zip_longest(sharded, sharded[1:]):
        asked = [following] if ahead and following is not None else []
        block.set_modules_to_forward_prefetch(asked)
        # FSDP2 goes the way back by itself; a block that asks for itself asks for nothing.
        block.set_modules_to_backward_prefetch([] if ahead else [block])


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> decoder block. Raises ModelError where they cannot be told."""
    found = decoder_blocks(model)
    if found is None:
        what = "it cannot be sharded: its linear layers do not stand in one list of blocks"
        raise ModelError(what, fix="use train.parallel: ddp")
    return found


def is_sharded(model: nn.Module) -> bool:
    """Say whether `shard` or a sharded load made this model."""
    return any(PACKED in module._parameters for module in model.modules())


def shard_block(block: nn.Module, vendors: Iterable[nn.Module]) -> None:
    """Keep this rank's share of the `vendors`, the quantized layers of `block`."""
    from torch.distributed.fsdp import fully_shard

    vendors = list(vendors)
    others = set(block.parameters())
    shards = _Shard.of(block, vendors)
    if shards is None:
        return
    whole = shards.packed.untyped_storage()
    fully_shard(block, mesh=_mesh(), reshard_after_forward=True, ignored_params=others)
    whole.resize_(0)  # the vendors' tensors still are views of it
    block.register_forward_pre_hook(lambda *_: shards.bind())
    for vendor in vendors:
        object.__setattr__(vendor, "_shard", shards)


def _shard_rest(model: nn.Module) -> None:
    """Shard embedding and head where they are not tied, and make the decoder FSDP's root."""
    from torch.distributed.fsdp import fully_shard

    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if not tied and type(embedding) is nn.Embedding and embedding.max_norm is None:
        _shard_embedding(embedding)
    if not tied and type(head) is nn.Linear:
        head.requires_grad_(False)
        fully_shard(head, mesh=_mesh(), reshard_after_forward=True)
    # FSDP's hooks are on __call__: PEFT calls the forward of the model with the head directly
    root = whole.base_model
    fully_shard(root, mesh=_mesh(), ignored_params=set(root.parameters()))


def _shard_embedding(embedding: Any) -> None:
    """Keep this rank's rows. All of them are gathered to look some up, without FSDP2, which would
    hold them twice: as they come, and in place."""
    rows = distribute_tensor(embedding.weight.detach(), _mesh(), [Shard(0)])
    embedding.weight = nn.Parameter(rows, requires_grad=False)

    def forward(ids: Tensor) -> Tensor:
        weight: Tensor = embedding.weight.full_tensor()
        return nn.functional.embedding(ids, weight, embedding.padding_idx)

    forward.gathers = True  # type: ignore[attr-defined]
    embedding.forward = forward


def _mesh() -> Any:
    """Return all ranks in a row. Raises ValueError without a process group."""
    return _mesh_of(torch.distributed.group.WORLD)


@cache
def _mesh_of(group: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if "nccl" in torch.distributed.get_backend_config(group) else "cpu"
    return init_device_mesh(kind, (torch.distributed.get_world_size(group),))


def reshard(model: nn.Module) -> None:
    """Let go of blocks that a pass left gathered because it failed."""
    if not is_sharded(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --- a base that stays gathered ------------------------------------------------------------------


def gathered_bytes(model: nn.Module) -> int:
    """Return how many bytes `kept_gathered` takes: all that is shared, beside this rank's share."""
    shared = {id(p): p for p in model.parameters() if isinstance(p, DTensor)}
    return sum(p.numel() * p.element_size() for p in shared.values())


@contextmanager
def kept_gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each rank holds the whole base of `model`, gathered once, and computes as if it had
    never been sharded: the base is frozen, so nothing has to be sent in a pass."""
    with ExitStack() as stack:
        for module in model.modules():
            _without_fsdp(module, stack)
        for shards in _shards(model):
            shards.keep()
            stack.callback(shards.share)
        whole: dict[int, nn.Parameter] = {}  # what is tied is gathered once
        for module in model.modules():
            for name, parameter in [*module._parameters.items()]:
                if isinstance(parameter, DTensor):  # of embedding and head
                    if id(parameter) not in whole:
                        numbers = parameter.full_tensor()
                        whole[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
                    module._parameters[name] = whole[id(parameter)]
                    stack.callback(module._parameters.__setitem__, name, parameter)
        yield


def _shards(model: nn.Module) -> list[_Shard]:
    found = (getattr(facade.own_vendor, "_shard", None) for _, facade in facades(model))
    return [*{id(shards): shards for shards in found if shards is not None}.values()]


def _without_fsdp(module: nn.Module, stack: ExitStack) -> None:
    """Take what gathers `module` for its passes off, and what looks for its share where weights are
    loaded or told, until `stack` ends."""
    from torch.distributed.fsdp import FSDPModule

    for name in HOOKS:
        hooks = getattr(module, name)
        for key, hook in [*hooks.items()]:
            if _is_of_fsdp(hook):
                before = [*hooks.items()]
                del hooks[key]
                stack.callback(_put_back, hooks, before)
    if isinstance(module, FSDPModule):  # which looks for its parameters when `to` is called
        stack.callback(setattr, module, "__class__", type(module))
        module.__class__ = type(module).__bases__[-1]
    gathers = vars(module).get("forward")
    if getattr(gathers, "gathers", False):
        del module.forward
        stack.callback(setattr, module, "forward", gathers)


def _is_of_fsdp(hook: Any) -> bool:
    """Say whether FSDP2 left it on a module: a method of its own, or a function that it made on the
    spot, which only says where it was written."""
    owner = type(getattr(hook, "__self__", None))
    written = (owner.__module__, getattr(hook, "__module__", None) or "")
    return any(name.startswith("torch.distributed.") and "fsdp" in name for name in written)


def _put_back(hooks: dict[int, Any], before: list[tuple[int, Any]]) -> None:
    """Let `hooks` have those of `before` again, in their order, and then what came since."""
    since = [item for item in hooks.items() if item not in before]
    hooks.clear()
    hooks.update([*before, *since])


class _Shard:
    """The packed tensors of one block."""

    def __init__(self, block: nn.Module, leaves: list[Leaf]) -> None:
        self.block, self.leaves = block, leaves
        self.storage = 0
        self._kept: tuple[Any, Tensor] | None = None

    @classmethod
    def of(cls, block: nn.Module, vendors: Iterable[nn.Module]) -> _Shard | None:
        """Move the tensors of `vendors` into `block.packed`; None where there are none."""
        leaves, size = laid_out(vendors)
        if not leaves:
            return None
        shards = cls(block, leaves)
        packed = torch.zeros(size, dtype=torch.uint8, device=leaves[0].tensor.device)
        write_into(packed, leaves)
        # Bytes under the name of floats: before torch 2.12, FSDP2 takes nothing else.
        packed = packed.view(torch.float32)
        for leaf in leaves:
            leaf.point_to(packed)
        block.register_parameter(PACKED, nn.Parameter(packed, requires_grad=False))
        return shards

    @property
    def packed(self) -> Tensor:
        """A DTensor that holds this rank's share, or all of it while FSDP2 has it gathered."""
        packed: Any = self.block._parameters[PACKED]
        return packed  # type: ignore[no-any-return]

    @property
    def is_gathered(self) -> bool:
        """Whether the vendor's tensors can be read."""
        return self._kept is not None or not isinstance(self.packed, DTensor)

    def keep(self) -> None:
        """Gather it, and let it stay so. All ranks have to."""
        packed: Any = self.block._parameters.pop(PACKED)
        self._kept = packed, packed.full_tensor()
        self.bind()

    def share(self) -> None:
        """Undo `keep`."""
        assert self._kept is not None
        packed, whole = self._kept
        self._kept, self.storage = None, 0
        self.block._parameters[PACKED] = packed
        whole.untyped_storage().resize_(0)  # the vendors' tensors still are views of it

    def bind(self, packed: Tensor | None = None) -> None:
        """Point the vendor's tensors to what is gathered, unless they do so already."""
        if packed is None:
            packed = self.packed.data if self._kept is None else self._kept[1]
        storage = packed.untyped_storage()._cdata
        if storage != self.storage:
            for leaf in self.leaves:
                leaf.point_to(packed)
            self.storage = storage


@contextmanager
def gathered(vendor: nn.Module) -> Iterator[Tensor | None]:
    """Let the tensors of `vendor` be read outside its block's forward and backward.

    All ranks have to enter. Yields what was gathered for it, or None if nothing had to be.
    """
    shards: _Shard | None = getattr(vendor, "_shard", None)
    if shards is None:
        yield None
    elif shards.is_gathered:
        shards.bind()
        yield None
    else:
        packed: Any = shards.packed
        whole = packed.full_tensor()
        shards.bind(whole)
        try:
            yield whole
        finally:
            whole.untyped_storage().resize_(0)


class GatheringTarget(BroughtTarget):
    """A backend's target whose layers are gathered where somebody reads them between passes."""

    @staticmethod
    def readable(module: nn.Module) -> AbstractContextManager[Tensor | None]:
        """Gather the layer if need be."""
        return gathered(module)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Refuse: each process holds a share only. Raises ModelError."""
        what = "a sharded base cannot be rewritten"
        raise ModelError(what, fix="use train.parallel: ddp, or one process")
