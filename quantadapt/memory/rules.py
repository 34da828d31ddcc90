"""What decides how a run uses memory: the plan asks before, the run itself when it is there.

`train` is the spec's part on training, `task` the objective's options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..machine import installed_version
from .cards import GIB, size_words
from .setting import Setting

if TYPE_CHECKING:
    from ..protocols import Task
    from ..spec import TrainSpec


def given(train: TrainSpec, layers: int, most: int, *, offloads: bool) -> Setting | None:
    """Return the setting that the spec asks for; None where it leaves it to the card.

    Args:
        layers: how many layers can be recomputed.
        most: how many of them with a gain.
        offloads: whether inputs can leave for CPU memory, as they can on a GPU.
    """
    batch = train.per_device_train_batch_size
    if train.gradient_checkpointing is not None:
        return Setting(layers if train.gradient_checkpointing else 0, False, batch)
    if train.memory == "min":
        return Setting(layers if most else 0, offloads and most > 0, batch)
    return None


def splits(task: Task, train: TrainSpec, *, adds_to_loss: bool, divides: bool = True) -> bool:
    """Say whether a batch may go through the model in parts.

    Args:
        adds_to_loss: whether the adapter adds something to the loss of each pass, as AdaLoRA does,
            or the model: see `adds_to_loss`.
        divides: whether the loss is divided by a count of the whole batch, not a mean.
    """
    alike = not (adds_to_loss or train.packing)
    return task.adds_up and divides and alike


def adds_to_loss(config: Mapping[str, Any]) -> bool:
    """Say if a language model with this config.json adds a part of its own to the loss of each
    pass: one that balances its routers, or Bamba's on the size of logits."""
    return bool(config.get("output_router_logits") or config.get("z_loss_coefficient"))


def records(task: Task, train: TrainSpec) -> bool:
    """Say whether passes are to be recorded as CUDA graphs, where they can be."""
    talks = train.context_parallel_size > 1  # to other processes, in each layer
    other = train.use_reentrant or train.merge_aware or talks
    return task.repeats and train.cuda_graphs and not other


def fused_kernels(train: TrainSpec) -> bool:
    """Say whether Liger's kernels are wanted and here; it may still not know the model."""
    return train.use_liger_kernel and installed_version("liger-kernel") is not None


KEEPS = 0.1
"""A base that GPUs share stays gathered while it trains where the whole of it takes no more than
this share of what each of them has free beside its own; with `memory: min` never."""


def stays_gathered(needed: int, room: float) -> bool:
    """Say whether GPUs with ample room each hold the whole of a base that they share.

    Args:
        needed: bytes that the whole takes.
        room: bytes that training may still allocate, on the GPU that has the least.
    """
    return needed <= KEEPS * room


def stays_gathered_words(needed: int) -> str:
    """Say so of a base that takes that many bytes more than the share of it."""
    return (
        f"fsdp: each GPU has room for the whole base, so it stays gathered while it trains"
        f" ({size_words(needed)} more; train.memory: min shares it at all times)"
    )


def may_keep_dense(train: TrainSpec) -> bool:
    """Say whether dequantized weights may stay while it trains, where a card has room: where how it
    uses memory is left to the card, and products are with the very weights."""
    given = train.memory == "min" or train.gradient_checkpointing is not None
    return not (given or train.merge_aware or train.compute == "fp8")


def stays_dense(needed: int, room: float) -> bool:
    """Say whether dequantized weights stay: there is as much room again, say for evaluation.

    Args:
        needed: bytes that they take.
        room: bytes that can be allocated beside all that a step needs.
    """
    return 0 < 2 * needed <= room


def stays_dense_words(needed: int) -> str:
    """Say so of weights that take that many bytes."""
    return (
        "memory: there is room for dequantized weights, so they stay while it trains"
        f" ({size_words(needed)} more; train.memory: min makes them anew for each product)"
    )


ATTENTION_FROM = 4096
"""Of rows with so many tokens attention is a twelfth of the time of a layer of 8B; what it returns
takes a fifteenth of what such a layer keeps."""


def keeps_attention(row: int) -> bool:
    """Say whether of a row of so many tokens what attention returned in recomputed layers is kept
    before whole layers are, as it saves more time for its bytes, see `training.kept_attention`."""
    return row >= ATTENTION_FROM


def has_host_room(needed: int, free: int) -> bool:
    """Say whether CPU memory has room for what attention returned, too, beside inputs of layers:
    training can go without.

    Args:
        needed: bytes of all that.
        free: bytes that are free.
    """
    return 2 * needed <= free


BESIDE = 2 * GIB
"""CPU memory that has to be free beside what training keeps there: for the process itself."""

HOST_SHARE = 0.9
"""So much of free CPU memory inputs of layers may take."""


def input_every(needed: int, free: int) -> int:
    """Return of how many layers in a row one keeps its input in CPU memory: each where there is
    room, else every second, which costs half a forward more.

    Args:
        needed: bytes of all inputs.
        free: bytes that are free; 0 where that is not known.
    """
    return 2 if 0 < HOST_SHARE * free < needed else 1


def input_every_words(needed: str, free: str) -> str:
    """Say that it is every second, of inputs and free CPU memory of such sizes."""
    return (
        f"memory: inputs of all layers would take {needed} of CPU memory, {free} are free: every"
        " second one is kept, the others are made again, which takes half a forward more"
    )


def limit(train: TrainSpec) -> int | None:
    """Return the bytes that the spec allows, if it gives a number."""
    return int(train.memory * GIB) if isinstance(train.memory, float) else None
