"""What the parts of a plan come to together: by rules, sizes, processes and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..capabilities import Merge
from ..errors import Problem
from ..inputs.model_config import text_config, towers_in
from ..memory.cards import GIB
from ..memory.other_layers import other_layers
from ..memory.shape import Shape
from ..records import Evaluation
from . import processes, streaming
from .beside import beside_of
from .context_parallel import context_problems
from .exports import PlannedExport, makes_dense, refused_where
from .layers import Layers, layers_of
from .memory import MemoryPlan
from .names import is_all_linear
from .parts import Draft, evaluation_of
from .planned import Plan
from .processes import NO_MERGE
from .refusals import (
    attach_refusals,
    data_start_problems,
    export_refusals,
    float8_problems,
    head_problems,
    invocation_problems,
    loftq_problems,
    merge_aware_problems,
    misfit_problems,
    packing_problems,
    refusals_beside,
    task_problems,
)
from .reusing import look_at_reused
from .share import DENSE_EXPERTS, Share, packed_share, share_on_disk, tower_sizes, towers_words
from .targets import named_problems
from .workload import memory_plan

MERGE_AWARE = (
    "merge_aware: each pass also rounds every adapted weight onto the grid of its layer, which "
    "takes as long as dequantizing it several times, and is not recorded as a CUDA graph"
)
FLOAT8 = (
    "compute: fp8: while it trains, products with the base round its weights and what comes in to "
    "8-bit floats; adapters, the head, stacks of experts, every evaluation and what a reference "
    "says before stay in the compute dtype"
)
ONLY_TOPK = (
    "save_only_topk_weights: the adapter of the finished run can be merged and answered with, and"
    " not trained further, as PEFT says; checkpoints hold all of it, so the run can be resumed"
)
UNKNOWN_LAYERS = (
    "how the layers of this model are called is not known here: whether those that are named are"
    " there shows when a run begins, before any work"
)


def cell_problems(made: Plan) -> list[Problem]:
    """Return why this adapter cannot be put onto this base; empty if it can."""
    found = attach_refusals(made.cell, made.backend, made.adapter)
    return found + loftq_problems(made.adapter_options, made.backend, has_original=not made.adopt)


def combined(draft: Draft, made: Plan) -> Plan:
    """Return `made` with rules, exports, processes and memory looked at."""
    _look_at_options(draft, made)
    problems, notes = look_at_reused(made)
    draft.problems += problems
    draft.notes += notes
    layers = _look_at_layers(draft, made)
    for name, evaluator in made.evaluators.items():
        record = draft.registry.record(Evaluation, evaluation_of(name))
        draft.problems += refusals_beside(made.cell, record, evaluator.model_dump())
    draft.notes += made.quantizer.notes(made.device)
    _look_at_towers(draft, made)
    made = replace(made, share=_share(draft, made, layers))
    if made.share is not None and made.share.is_low:
        draft.notes.append(made.share.words)
        if made.adopt and made.share.has_dense_experts:
            draft.notes.append(DENSE_EXPERTS)
    made = replace(made, exports=_allowed_exports(made))
    made = _streamed(draft, _shared(draft, made))
    made = replace(made, exports=_fitting_exports(made))
    if not made.trains:
        return replace(made, memory=None)
    if made.memory is not None:
        _look_at_memory(draft, made.memory, adopt=made.adopt)
    return made


def _look_at_options(draft: Draft, made: Plan) -> None:
    """Refuse what the options of a plan's parts rule out; note what some of them cost."""
    spec, cell, options, config = made.spec, made.cell, made.adapter_options, made.config or {}
    draft.problems += cell_problems(made)
    draft.problems += data_start_problems(options)
    if spec.train.merge_aware:
        draft.problems += merge_aware_problems(cell, made.backend, made.quantizer, made.adapter)
        draft.notes.append(MERGE_AWARE)
    on_cards = bool(draft.cards)
    device = "cuda" if on_cards else made.device
    capability = None if on_cards else _capability(draft, device)
    draft.problems += float8_problems(spec.train, device, made.dtype, capability)
    if spec.train.compute == "fp8":
        draft.notes.append(FLOAT8)
    if options.get("save_only_topk_weights"):
        draft.notes.append(ONLY_TOPK)
    draft.problems += refusals_beside(cell, made.objective, made.task.model_dump())
    adds_to_loss = made.adapter.peft_type == "ADALORA"
    draft.problems += task_problems(made.task, spec.train, adds_to_loss=adds_to_loss)
    draft.problems += context_problems(
        *(spec.train, made.task, config, options),
        processes=made.processes,
        longest=spec.train.row_length or spec.data.max_length,
    )
    if made.trains:
        draft.problems += invocation_problems(made.task, spec.train, config, options)
        draft.problems += head_problems(made.task, config)
        draft.problems += packing_problems(spec.train, config)


def _allowed_exports(made: Plan) -> tuple[PlannedExport, ...]:
    """Return the exports, those refused that a rule refuses."""
    cell, backend, adapter = made.cell, made.backend, made.adapter
    return refused_where(
        made.exports, lambda e: export_refusals(e.record, e.exporter, cell, backend, adapter)
    )


def _shared(draft: Draft, made: Plan) -> Plan:
    """Return `made` with how processes share the base, and what memory is predicted then."""
    spec, config, cell = made.spec, made.config or {}, made.cell
    merges = any(export.required and export.exporter.merges for export in made.exports)
    through = processes.merge_aware_problems(spec.train)
    through += processes.task_share_problems(made.task)
    refused = processes.share_problems(cell, made.backend, made.adapter, config, merges)
    memory = _memory(draft, made, [*refused, *through])
    kind, why = processes.choose(spec, made.processes, memory)
    draft.notes += why
    made = replace(made, parallel=kind, memory=memory)
    if kind != "fsdp":
        return made
    draft.problems += processes.shard_problems(cell, made.backend, made.adapter, config) + through
    draft.notes += processes.shard_notes(spec)
    exports = refused_where(made.exports, lambda e: [NO_MERGE] if e.exporter.merges else [])
    return replace(made, exports=exports, memory=memory and memory.shared_by(made.processes))


def _streamed(draft: Draft, made: Plan) -> Plan:
    """Return `made` with what of the base is streamed, and what memory is predicted then."""
    spec, memory = made.spec, made.memory
    on_gpu, asked = made.cell.device == "cuda", bool(draft.cards)
    wanted = spec.train.stream in ("experts", "all")
    stream = streaming.choose(spec, memory, made.parallel, on_gpu=on_gpu, asked=asked)
    if wanted and not on_gpu:
        draft.notes.append(streaming.NO_GPU)
    if wanted:
        draft.problems += streaming.unstreamed(made.adapter_options)
    if stream != "none" and memory is not None:
        memory = memory.streamed_as(stream)
    draft.problems += streaming.problems(
        *(spec, stream, memory, made.quantizer, None if asked else draft.machine.host),
        parallel=made.parallel,
        processes=processes.on_this_machine(made.processes),
        adopt=made.adopt,
    )
    draft.notes += streaming.notes(stream, spec, memory)
    return replace(made, stream=stream, memory=memory)


def _fitting_exports(made: Plan) -> tuple[PlannedExport, ...]:
    """Return the exports, those refused for which there is no memory beside the model."""
    exports, memory = made.exports, made.memory
    if memory and (problem := memory.merge_problem()):
        aware = made.spec.train.merge_aware
        dense = [e.name for e in exports if makes_dense(e, made.backend, aware)]
        exports = refused_where(exports, lambda e: [problem] if e.name in dense else [])
    if memory and made.stream != "none" and (again := memory.requantize_problem()):
        exports = refused_where(
            exports, lambda e: [again] if e.exporter.merges == Merge.REQUANTIZE else []
        )
    return exports


def _capability(draft: Draft, device: str) -> tuple[int, int] | None:
    """Return the compute capability of the GPU `device`, or None."""
    index, there = device.partition(":")[2] or "0", draft.machine.cuda
    return there[int(index)] if index.isdigit() and int(index) < len(there) else None


def _share(draft: Draft, made: Plan, layers: Layers | None) -> Share | None:
    """Return how much of a local checkpoint will be, or is quantized; `layers` are those that it
    has."""
    if made.backend.name == "none" or draft.problems or not made.model:
        return None
    skip, folder = tuple(made.spec.skip_modules or ()), Path(made.model).expanduser()
    if made.adopt:
        shape = Shape.of(made.config or {})
        return packed_share(folder, shape.numbers) if shape else None
    vocabulary = text_config(made.config or {}).get("vocab_size")
    experts, towers = made.quantizer.quantizes_experts, made.spec.towers
    share = share_on_disk(folder, vocabulary, skip, experts=experts, towers=towers)
    if share is None or layers is None or not made.spec.skip_misfits:
        return share
    sizes = layers.without(skip)
    return share.without({n: sizes[n] for n in misfit_problems(made.quantizer, sizes)[1]})


def _look_at_layers(draft: Draft, made: Plan) -> Layers | None:
    """Refuse names that no layer has and sizes that cannot be quantized, as far as the checkpoint
    tells of its layers, which are returned."""
    spec, config, options = made.spec, made.config, made.adapter_options
    if config is None or any(problem.where == "model" for problem in draft.problems):
        return None
    skip, towers = tuple(spec.skip_modules or ()), towers_in(config)
    layers = layers_of(config, Path(made.model).expanduser() if made.model else None)
    if made.trains and layers is not None:
        draft.problems += named_problems(made.adapter, options, layers, skip)
    fresh = bool(made.model) and not (made.adopt or towers or spec.skip_misfits)
    if fresh and layers is not None:
        draft.problems += misfit_problems(made.quantizer, layers.without(skip))[0]
    names = not is_all_linear(options.get("target_modules"))
    if made.model and made.trains and names and not (layers and layers.names):
        draft.notes.append(UNKNOWN_LAYERS)
    return layers


def _look_at_towers(draft: Draft, made: Plan) -> None:
    """Tell what of an image-text model stays as it is; refuse towers that a model has not."""
    config, chosen = made.config, made.spec.towers
    if config is None:
        return
    there = towers_in(config)
    if there and not made.adopt:
        sizes = tower_sizes(Path(made.model).expanduser()) if made.model else {}
        draft.notes.append(towers_words(there, chosen, sizes))
    if chosen != ["language"] and "vision" not in there:
        what = "the model has no towers to choose from: config.json has no vision_config"
        draft.problems.append(Problem(what, "leave towers out", where="towers"))
    elif made.adopt and chosen != ["language"]:
        what = "the model is quantized already: what of it is, is known from its files"
        draft.problems.append(Problem(what, "leave towers out", where="towers"))


def _memory(draft: Draft, made: Plan, unshared: Sequence[Problem]) -> MemoryPlan | None:
    """Predict what a GPU with the whole base needs, for the cards that were asked about or the
    smallest that the run would use."""
    on_gpu = made.cell.device == "cuda"
    memory = memory_plan(
        made.spec,
        made.config or {},
        made.quantizer,
        made.adapter,
        made.adapter_options,
        made.task,
        dtype=made.dtype if on_gpu or made.spec.dtype != "auto" else "bfloat16",
        adopt=made.adopt,
        unshared=unshared,
        beside=None if draft.problems else beside_of(made),  # else files may be damaged
        dense_experts=made.adopt and made.share is not None and made.share.has_dense_experts,
        streamable=not streaming.unstreamed(made.adapter_options),
    )
    if memory is None:
        if draft.cards:
            what = "memory cannot be predicted for this model with this backend"
            fix = "decoders with Llama's sizes can, if the backend tells its bits per weight"
            draft.problems.append(Problem(what, fix, where="--card"))
        return None
    if others := other_layers(made.config or {}):
        draft.notes.append(others)
    if memory.work.tower is not None:
        count = memory.work.tower.patches
        draft.notes.append(f"memory counts one picture of {count:,} patches for each example")
    if made.spec.train.stream == "auto" and made.processes == 1:
        host = math.inf if draft.cards else draft.machine.host
        streams = streaming.ways(memory.work, made.quantizer, host, adopt=made.adopt)
        memory = replace(memory, streams=streams)
    if draft.cards:  # CPU memory beside them is not known
        return memory.with_cards([card * GIB for card in draft.cards])
    each = (draft.machine.host or 0) // processes.on_this_machine(max(draft.processes, 1))
    memory = replace(memory, work=replace(memory.work, host_free=each))
    used = _used_cards(draft, made.device) if on_gpu else ()
    return memory.with_cards([min(used)]) if used else memory


def _used_cards(draft: Draft, device: str) -> tuple[int, ...]:
    """Return the bytes of the GPUs that the run would use; none where they are not known."""
    there = draft.machine.memory
    if draft.processes > 1:
        return there[: processes.on_this_machine(draft.processes)]
    index = device.partition(":")[2] or "0"
    return there[int(index) : int(index) + 1] if index.isdigit() else ()


def _look_at_memory(draft: Draft, memory: MemoryPlan, *, adopt: bool) -> None:
    """Refuse a run that cannot fit, and note what else a user may want to know.

    Args:
        adopt: whether the base is quantized already.
    """
    spec, asked = draft.spec, bool(draft.cards)
    on_gpu = bool(memory.cards) and not asked
    if spec.train.use_liger_kernel and not memory.work.fused_kernels and on_gpu:
        draft.notes.append("more memory and time are needed without liger-kernel: install it")
    if asked and not any(card.fits for card in memory.cards):
        draft.problems += [memory.problem(card) for card in memory.cards]
    elif on_gpu:
        measures_dense = spec.evaluate.unquantized and not adopt and memory.work.shards == 1
        draft.problems += memory.problems(measures_dense)
        here = processes.on_this_machine(draft.processes)
        draft.notes += memory.host_notes(draft.machine.host, here)
        draft.notes += memory.notes(spec.evaluate.batch_size)
