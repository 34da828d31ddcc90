"""What of a quantized base lies in CPU memory or on a disk while it trains, decided before it is
loaded.

Part of the plan and as pure: imports neither torch nor a vendor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import Problem
from ..memory import rules
from ..memory.cards import size_words
from ..memory.experts import STACKS
from ..memory.workload import Workload
from ..protocols import LayerwiseQuantizer, Quantizer
from ..spec import Spec
from .memory import MemoryPlan, streamed_words
from .processes import Parallel, rewrites_the_base

Stream = Literal["none", "experts", "all"]

NO_GPU = "train.stream has no effect here: without a GPU the base is in CPU memory anyway"
NOT_STREAMED = "train.stream_folder has no effect here: nothing of the base is streamed"


def unstreamed(options: Mapping[str, Any]) -> list[Problem]:
    """Return why a base under an adapter with these options cannot be streamed; empty if it can."""
    if not (start := rewrites_the_base(options)):
        return []
    what = f"init_lora_weights: {start} rewrites the base, which would be whole on the GPU then"
    fix = "leave train.stream out, or start LoRA otherwise"
    return [Problem(what, fix, "adapter.init_lora_weights", "stream-keeps-the-base")]


def ways(
    work: Workload, quantizer: Quantizer, host: float | None, *, adopt: bool
) -> tuple[str, ...]:
    """Return what may be streamed where training does not fit otherwise, least first.

    Args:
        host: bytes of CPU memory that are free; None where they are not known.
        adopt: whether the base is quantized already.
    """
    if not work.streamable or host is None or is_loaded_whole(quantizer, adopt=adopt):
        return ()
    streams = ("experts", "all") if _has_stacks(work) else ("all",)
    return tuple(w for w in streams if replace(work, streamed=w).host_bytes + rules.BESIDE <= host)


def choose(
    spec: Spec, memory: MemoryPlan | None, parallel: Parallel, *, on_gpu: bool, asked: bool
) -> Stream:
    """Return what a run streams.

    Args:
        memory: on the cards of the run, with what `ways` allows.
        on_gpu: whether it runs on one.
        asked: whether the cards are only asked about.
    """
    wanted = spec.train.stream
    if wanted != "auto":
        return wanted if on_gpu else "none"
    if memory is None or parallel == "fsdp" or asked or not memory.cards:
        return "none"
    found: Any = memory.cards[0].streamed if memory.cards[0].fits else "none"
    return found  # type: ignore[no-any-return]


def problems(
    spec: Spec,
    stream: Stream,
    memory: MemoryPlan | None,
    quantizer: Quantizer,
    host: int | None,
    *,
    parallel: Parallel,
    processes: int,
    adopt: bool,
) -> Iterator[Problem]:
    """Yield what speaks against streaming `stream` of the base.

    Args:
        memory: with that much in CPU memory.
        host: bytes of CPU memory that are free; None where they are not known.
        processes: how many of this machine hold a base each.
    """
    where = "train.stream"
    if spec.train.stream in ("experts", "all") and parallel == "fsdp":
        what = "a base is shared by several GPUs, or streamed from CPU memory"
        yield Problem(what, "leave out train.stream, or use train.parallel: ddp", where)
    if stream == "none" or memory is None:
        return
    work = memory.work
    if stream == "experts" and not _has_stacks(work):
        what = "the model has no experts that are quantized"
        yield Problem(what, "use train.stream: all", where)
        return
    needed = processes * work.host_bytes + rules.BESIDE
    if host is not None and needed > host:
        bases = f"{processes} streamed bases" if processes > 1 else "a streamed base"
        there = f"{size_words(host)} are free"
        what = f"{bases} and the process take {size_words(needed)} of CPU memory, {there}"
        fix = (
            "keep it on a fast disk (train.stream_folder), use a backend with fewer bits, fewer"
            " processes, or a machine with more memory"
        )
        yield Problem(what, fix, where, "stream-needs-memory")
    if host is not None:
        yield from _disk_problems(spec, processes * work.streamed_bytes)
    whole = replace(work, streamed="none")
    least = whole.quantized_bytes + whole.dense_bytes
    if is_loaded_whole(quantizer, adopt=adopt):
        for card in memory.cards:
            if least > card.most:
                does = "loads" if adopt else "quantizes"
                what = f"this backend {does} the base whole on the GPU ({size_words(least)})"
                fix = "use a backend that quantizes layer by layer, as hqq and bnb-nf4 do"
                if adopt:
                    fix = "start from the unquantized model"
                yield Problem(what, fix, where, "stream-by-layers")


def _disk_problems(spec: Spec, needed: int) -> Iterator[Problem]:
    """Yield why the folder that the spec names cannot hold `needed` bytes."""
    where = "train.stream_folder"
    if spec.train.stream_folder is None:
        return
    folder = Path(spec.train.stream_folder).expanduser()
    if not folder.is_dir():
        yield Problem(f"there is no folder {folder}", "make it, or name another", where)
    elif not os.access(folder, os.W_OK):
        yield Problem(f"no file can be made in {folder}", "name another folder", where)
    elif needed > (free := shutil.disk_usage(folder).free):
        there = f"{size_words(free)} are free in {folder}"
        what = f"a streamed base takes {size_words(needed)}, {there}"
        fix = "make room there, name a folder on another disk, or use a backend with fewer bits"
        yield Problem(what, fix, where, "stream-needs-disk")


def notes(stream: Stream, spec: Spec, memory: MemoryPlan | None) -> Iterator[str]:
    """Yield what a run that streams should tell, or one that was to and does not."""
    if stream == "none":
        if spec.train.stream_folder is not None:
            yield NOT_STREAMED
        return
    what = "the experts" if stream == "experts" else "the base"
    told = streamed_words(memory.work) if memory else f"{what} streamed from CPU memory"
    why = ", as training does not fit otherwise" if spec.train.stream == "auto" else ""
    yield f"stream: {told}{why}; passes are not recorded as CUDA graphs"
    if spec.evaluate.samples:
        yield (
            f"stream: for each token of an answer {what} is copied once; evaluate.samples: 0"
            " leaves answers out"
        )


def is_loaded_whole(quantizer: Quantizer, *, adopt: bool) -> bool:
    """Say whether the base is whole on the device before any of it can go to CPU memory."""
    if adopt:
        return type(quantizer).load is not LayerwiseQuantizer.load
    return type(quantizer).quantize is not LayerwiseQuantizer.quantize


def _has_stacks(work: Workload) -> bool:
    return any(name in work.shape.linears and name not in work.dense for name in STACKS)
