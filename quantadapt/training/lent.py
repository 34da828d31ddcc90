"""All that is lent to a model, and to libraries, while it trains, and taken back afterwards.

`lent` is the list, in order; the loans follow in that order, those of where the base is in
`base_placement`. What they compute stands elsewhere: in `adapting.fused`, `compiling`,
`recomputing`, `cuda_graphs` and `model.head`. What evaluating lends stands in
`evaluation.predictions`, what loading lends in `loading.read_ahead`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from ..dependencies import in_words
from ..fused_kernels import fused_kernels
from ..memory import rules
from ..model.patches import changed, patched, put_back, restored
from .base_placement import gathered_once, one_block_at_a_time, streamed
from .context_parallel import rows_in_parts
from .figures import adapter_device, compute_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..adapting.fused import FusedLayers
    from ..facade.dense_weights import DenseWeights
    from ..memory.setting import Setting
    from ..protocols import Task
    from ..spec import TrainSpec
    from .cuda_graphs import Graphs
    from .recomputing import Recomputer

OnNote = Callable[[str], None]

PLANNED_FROM = 16_384
"""Tokens of a row from which on cuDNN's attention takes less time than flash attention with the
planning, too: on an H200 that took 90 ms for a new shape, forward and backward, and saved 12 ms in
each layer of 8B."""


class Loans(NamedTuple):
    """The loans that somebody has to steer while the model trains."""

    fused: FusedLayers
    recomputer: Recomputer
    graphs: Graphs | None
    dense: DenseWeights


@contextmanager
def lent(model: Any, spec: TrainSpec, task: Task, on_note: OnNote) -> Iterator[Loans]:
    """Lend `model` all that it trains with, and take it back in reverse, also after an error.

    A trainer that is made inside gets more, see `lent_to_trainers`.

    Args:
        model: a PeftModel, or a model whose trained weights are marked.
        task: what it learns; says whether passes are alike enough to be recorded.
        on_note: told in a sentence what cannot be lent, which then costs time or memory.
    """
    from ..adapting.fused_ia3 import ia3_layers
    from ..adapting.low_rank import low_rank_layers
    from ..adapting.rank_budget import joint_ranks
    from ..compiling import compiled_functions
    from ..facade.dense_weights import DenseWeights
    from ..model.sinks import fused_sinks
    from .cuda_graphs import can_record
    from .packing import kept_apart

    with ExitStack() as stack:
        lend = stack.enter_context
        lend(given_back(model))  # the first, so that nothing of a trainer stays
        lend(streamed(model, spec, on_note))  # the base, from CPU memory
        lend(gathered_once(model, spec, on_note))  # a base that several GPUs share
        lend(quick_walks(model))  # `train` and `zero_grad` that do not ask each module
        lend(fast_adapters(model))  # TF32 for float32 adapters
        fused = lend(fused_layers(model, keep_casts=spec.memory != "min", on_note=on_note))
        lend(low_rank_layers(model))  # VeRA and AdaLoRA, computed as LoRA
        lend(ia3_layers(model))  # in one pass over the activations
        lend(joint_ranks(model))  # what AdaLoRA does once a step, for all layers together
        lend(float8_products(model, spec, on_note))  # with the frozen base
        lend(compiled_functions())  # dequantizing in one kernel
        lend(fast_attention(model, adapter_device(model)))  # cuDNN's
        lend(fused_sinks(model))  # attention with sinks in one call
        lend(rows_in_parts(model, spec))  # attention of rows that several processes share
        if rules.fused_kernels(spec):
            lend(fused_kernels(model, on_note))  # Liger's norms, MLPs and rotary embeddings
        if spec.memory == "min":
            lend(one_block_at_a_time(model))  # of a sharded base
        if spec.packing and spec.context_parallel_size == 1:
            lend(kept_apart(model, on_note))  # attention without a mask of all pairs of tokens
        if not spec.packing:
            lend(one_row_each(on_note))  # no search for packed rows
        records = rules.records(task, spec) and can_record(model)
        recomputer = lend(recomputed(model, None, spec.use_reentrant, draws=not records))
        dense = DenseWeights(model)
        stack.callback(dense.drop)
        graphs = lend(graphed(model, on_note)) if records else None
        yield Loans(fused, recomputer, graphs, dense)


@contextmanager
def given_back(model: Any) -> Iterator[None]:
    """Undo what trainers and unfinished passes leave on a model: forwards, tags, settings, hooks,
    gradients, modes, kept weights."""
    from transformers import PreTrainedModel

    from ..adapting.fused import forget_unfinished

    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners = [owner.__dict__ for owner in (model, *parts, *_configs(_base(model)))]
    before = [dict(own) for own in owners]
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for own, was in zip(owners, before, strict=True):
            put_back(own, was, changed(own, was))
        # TRL and Trainer each leave one on the embedding. Transformers' own, for routers, go with
        # the mark above that says that they are there.
        for module, known in hooks.items():
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        for module, mode in modes.items():
            module.training = mode
        forget_unfinished(model)


def _configs(base: Any) -> list[Any]:
    found = [base.config, base.config.get_text_config(), getattr(base, "generation_config", None)]
    return list({id(config): config for config in found if config is not None}.values())


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def quick_walks(model: Any) -> Iterator[None]:
    """Trainer calls `train` and `zero_grad` at every step, and each walks through all modules: that
    takes as long as several layers."""
    whole, trained = type(model), [p for p in model.parameters() if p.requires_grad]

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else whole.train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    whole.train(model)
    with patched(model, train=train, zero_grad=zero_grad):
        yield


@contextmanager
def fast_adapters(model: Any) -> Iterator[None]:
    """Let float32 adapters on a half-precision base use the tensor cores (TF32).

    TF32 has more mantissa bits than bfloat16 and as many as float16. A float32 base keeps full
    precision.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if adapter_device(model).type == "cuda" and compute_dtype(model) != torch.float32:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def fused_layers(
    model: nn.Module, keep_casts: bool = True, on_note: OnNote | None = None
) -> Iterator[FusedLayers]:
    """Make the fused layers of `model` ready for training; see `FusedLayers`."""
    from ..adapting.fused import FusedLayers, not_fused

    if (count := not_fused(model)) and on_note is not None:
        on_note(
            f"{count} LoRA layers are PEFT's own, which takes more time and memory than ours:"
            f" quantadapt.attach makes those, unless {in_words('peft')} does no longer"
        )
    with FusedLayers(model, keep_casts).lent() as training:
        yield training


@contextmanager
def float8_products(
    model: nn.Module, spec: TrainSpec, on_note: OnNote = lambda _: None
) -> Iterator[None]:
    """Where `spec` says so, let products with the frozen linear layers be in 8-bit floats, in
    passes that train."""
    from ..facade import float8, linear_facades

    named = dict(linear_facades(model)) if spec.compute == "fp8" else {}
    layers = named.values()
    if odd := [name for name, layer in named.items() if not layer.takes_float8]:
        kinds = Counter(name.rpartition(".")[2] for name in odd)
        which = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        on_note(
            f"compute: fp8: {len(odd)} of {len(named)} layers compute in the compute dtype, as"
            f" their sizes are no multiples of {float8.MULTIPLE}: {which}"
        )
    with restored(layers, "wants_float8"):
        for layer in layers:
            layer.__dict__["wants_float8"] = True
        yield


@contextmanager
def fast_attention(model: Any, device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention from Hopper on, where it takes two thirds of flash attention's time
    (H200, forward and backward); elsewhere, and where it cannot be used, nothing changes.

    cuDNN plans for each shape anew, which takes long, so a shape goes to it that comes again, or
    whose rows are long.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        yield
        return
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    seen: set[Any] = set()

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = getattr(ids, "shape", None)
        pays = shape is None or shape in seen or shape[-1] >= PLANNED_FROM
        torch.backends.cuda.enable_cudnn_sdp(pays)
        seen.add(shape)

    handle = _base(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with sdpa_kernel(order, set_priority=True):
            yield
    finally:
        handle.remove()


@contextmanager
def one_row_each(on_note: OnNote) -> Iterator[None]:
    """Tell transformers that no row of a batch holds several examples: it would look for them at
    every step, and wait for the GPU to tell. Nor does a CUDA graph that is recorded need a mask for
    the case that there are some."""
    from transformers import masking_utils

    answers = {"find_packed_sequence_indices": None, "is_tracing": False}
    own, mine = vars(masking_utils), get_ident()
    known = {name: _answering(own[name], answers[name], mine) for name in answers if name in own}
    if missing := answers.keys() - known.keys():
        on_note(
            f"each step waits for the GPU once more: {in_words('transformers')} has no"
            f" masking_utils.{' and no '.join(sorted(missing))}"
        )
    with patched(masking_utils, **known):
        yield


def _answering(function: Callable[..., Any], answer: Any, thread: int) -> Callable[..., Any]:
    """Return what answers so in `thread`, and is `function` for models that run in others."""
    return lambda *args, **kw: answer if get_ident() == thread else function(*args, **kw)


@contextmanager
def recomputed(
    model: nn.Module, setting: Setting | None = None, reentrant: bool = False, draws: bool = True
) -> Iterator[Recomputer]:
    """Let layers of `model` be recomputed, by `setting` or as the `Recomputer` is told."""
    from ..facade.invocations import kept_invocations
    from ..model.head_groups import in_head_groups
    from .recomputing import FLAG, FUNCTION, Recomputer, require_grad

    with ExitStack() as stack:
        invocations = stack.enter_context(kept_invocations(model))
        recomputer = Recomputer(model, reentrant, draws, invocations)
        stack.callback(recomputer.inputs.close)
        stack.enter_context(restored(recomputer.base.modules(), FLAG, FUNCTION, "in_parts"))
        stack.enter_context(restored(recomputer.tiles.mlps, "forward"))
        recomputer.tiles.lend()
        groups = in_head_groups(
            recomputer.base, recomputer.tiles.is_long, recomputer.attention.around_kernel
        )
        recomputer.turn_attention = stack.enter_context(groups)
        if reentrant:  # it only records a graph where an input wants one
            embedding = recomputer.base.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(require_grad).remove)
        if setting is not None:
            recomputer.apply(setting)
        yield recomputer


@contextmanager
def graphed(model: Any, on_note: OnNote) -> Iterator[Graphs]:
    """Let the decoder of `model`, which `can_record`, be recorded, once the `Graphs` that are
    yielded are started."""
    from .cuda_graphs import Graphs

    graphs = Graphs(model, on_note)
    with patched(graphs.decoder, forward=graphs.forward):
        try:
            yield graphs
        finally:
            graphs.stop()
