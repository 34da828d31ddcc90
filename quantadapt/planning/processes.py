"""What several processes can do together, decided before any of them starts.

Part of the plan and as pure: imports neither torch nor a vendor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..capabilities import Cell, refusals
from ..distributed.world import world
from ..errors import Problem
from ..inputs.model_config import towers_in
from ..machine import Machine
from ..protocols import Task
from ..records import Adapter, Backend
from ..spec import Spec, TrainSpec
from .memory import MemoryPlan
from .refusals import loftq_iterations, wants_loftq

Parallel = Literal["none", "ddp", "fsdp"]

DDP = "use train.parallel: ddp, where each GPU holds the whole model"

FASTER = (
    "fsdp: each GPU holds the whole base, too; ddp sends none of it, and replays passes as CUDA"
    " graphs, which is faster, most of all for a small model"
)
"""What is told of sharing a base that need not be shared."""

NO_MERGE = Problem(
    "a sharded run never holds the whole base, so it writes no merged model",
    "write it afterwards, on one machine: quantadapt export RUN NAME",
    "export",
    "fsdp-no-merge",
)
"""Why a sharded run does not write an export that merges."""

_REWRITING = ("pissa", "olora", "corda", "lora_ga")
"""`init_lora_weights` that put something else into the base."""

_TRAINS_THE_BASE = ("modules_to_save", "trainable_token_indices", "target_parameters")


def choose(spec: Spec, processes: int, memory: MemoryPlan | None) -> tuple[Parallel, list[str]]:
    """Return how that many processes work together, and notes on why.

    `auto` shares the base where a card does not hold the whole, but does hold its share.

    Args:
        memory: what a GPU with the whole base needs, on the cards of the run; None where that
            cannot be predicted. Says, too, why the base cannot be shared.
    """
    if processes < 2:
        return "none", []
    cards = memory.cards if memory is not None else ()
    held = bool(cards) and all(card.fits for card in cards)
    if spec.train.parallel != "auto":
        slower = held and spec.train.parallel == "fsdp"
        return spec.train.parallel, [FASTER] if slower else []
    if memory is None or not cards:
        return "ddp", []
    small = memory.shared_by(processes).fits_better_than(memory)
    if small is None:
        return "ddp", ["ddp: each GPU holds the whole base, which is the fastest"] if held else []
    card = f"a GPU of {small.gib:.4g} GiB is too small for the whole base"
    if memory.unshared:
        return "ddp", [f"ddp, though {card}: {memory.why_whole}"]
    return "fsdp", [f"fsdp: {card}, and large enough for a share of it"]


def on_this_machine(processes: int) -> int:
    """Return how many of the processes of a run are here: of one that is still to be launched,
    all."""
    launched = world()
    return processes if launched.size == 1 else min(processes, launched.local_size)


def device_problems(spec: Spec, machine: Machine, processes: int) -> list[Problem]:
    """Return why that many processes cannot have a device each; empty if they can."""
    if processes < 2:
        return []
    kind, _, index = spec.device.partition(":")
    kind = machine.default_device if kind == "auto" else kind
    if kind not in ("cpu", "cuda"):
        what = f"several processes run on cuda, or for trying it out on cpu, not on {kind}"
        return [Problem(what, "use device: cuda", where="device")]
    launched, count = world(), len(machine.cuda)
    here = processes if launched.size == 1 else launched.local_rank + 1
    if index and (launched.size == 1 or index != str(launched.local_rank)):
        what = f"{spec.device} is one device, and {processes} processes want one each"
        return [Problem(what, f"use device: {kind}", where="device")]
    if kind == "cuda" and count and here > count:
        what = f"{here} GPUs are wanted, there are {count}"
        return [Problem(what, f"use --gpus {count}", where="--gpus")]
    if not count and (kind == "cuda" or (spec.device == "auto" and launched.size == 1)):
        what = f"{processes} GPUs are wanted, there are none that torch can use"
        fix = "use one process; `quantadapt doctor` looks, --device cpu tries it without GPUs"
        return [Problem(what, fix, where="--gpus")]
    return []


def shard_problems(
    cell: Cell, backend: Backend, adapter: Adapter, config: Mapping[str, Any]
) -> list[Problem]:
    """Return why the base of `cell` cannot be sharded; empty if it can.

    Args:
        config: the model's config.json.
    """
    return [
        *refusals(cell, (*backend.rules, *adapter.rules), "shard"),
        *_option_problems(cell.adapter_options),
        *_model_problems(config),
    ]


def share_problems(
    cell: Cell, backend: Backend, adapter: Adapter, config: Mapping[str, Any], merges: bool
) -> list[Problem]:
    """Return why a run cannot share the base; empty if it can.

    Args:
        config: the model's config.json.
        merges: whether it has to write an export that merges.
    """
    found = shard_problems(cell, backend, adapter, config)
    return [*found, NO_MERGE] if merges else found


def task_share_problems(task: Task) -> list[Problem]:
    """Return why a run cannot share the base for what it learns; empty if it can."""
    if task.generates:
        what = f"{type(task).__name__} answers prompts while it trains, of lengths that differ from"
        what += " GPU to GPU, and a sharded base computes on all of them together"
        return [Problem(what, DDP, "train.parallel", "fsdp-generates")]
    if not task.head:
        return []
    what = f"{type(task).__name__} trains a head whole, which is not sharded"
    return [Problem(what, DDP, "train.parallel", "fsdp-head")]


def merge_aware_problems(train: TrainSpec) -> list[Problem]:
    """Return why a run cannot share the base for how it trains; empty if it can."""
    if not train.merge_aware:
        return []
    what = "to train through the quantizer each GPU needs the whole of a layer's weight"
    fix = f"{DDP}; or leave train.merge_aware out"
    return [Problem(what, fix, "train.merge_aware", "fsdp-merge-aware")]


def shard_notes(spec: Spec) -> list[str]:
    """Return what a sharded run leaves out."""
    if not spec.evaluate.unquantized:
        return []
    return ["fsdp: the unquantized base is not measured, because one GPU may not hold it"]


def rewrites_the_base(options: Mapping[str, Any]) -> str:
    """Return the start of LoRA that puts something else into the base; empty where none does."""
    start = options.get("init_lora_weights")
    loftq = wants_loftq(options) and loftq_iterations(options) > 1
    return str(start) if loftq or str(start).startswith(_REWRITING) else ""


def _option_problems(options: Mapping[str, Any]) -> Iterator[Problem]:
    if start := rewrites_the_base(options):
        what = f"init_lora_weights: {start} rewrites the base, of which each process has a share"
        where = "adapter.init_lora_weights"
        yield Problem(what, DDP, where, "fsdp-keeps-the-base")
    for name in _TRAINS_THE_BASE:
        if options.get(name):
            what = f"{name} trains a part of the base, which is sharded"
            yield Problem(what, DDP, f"adapter.{name}", "fsdp-keeps-the-base")


def _model_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    if towers_in(config):
        what = "models that see or hear are not sharded"
        yield Problem(what, DDP, "train.parallel", "fsdp-language-models-only")
    if config.get("is_encoder_decoder"):
        what = "encoder-decoder models are not sharded"
        yield Problem(what, DDP, "train.parallel", "fsdp-decoders-only")
