"""The quantize stage: what a plan says about the base, done.

Decides what stays dense and what calibrating backends are shown, lets the backend work, and puts
the facades in front of what it made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import planning
from ..dependencies import import_requirements
from ..errors import ModelError, PluginError
from ..inputs.documents import reason
from ..inputs.fingerprints import Fingerprint, digests_of, fingerprint_of, fingerprint_of_module
from ..planning.on_disk import config_of
from ..planning.planned import Plan
from ..protocols import LayerwiseQuantizer
from ..records import Record
from ..registry.blame import blaming
from ..remote_code import as_the_spec_says
from .dense import nothing_quantized, skip_for, tell_kept, tell_share, wanted_skip
from .examples import examples_for
from .state import ModelState, state_of
from .tokenizer import find_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .examples import Calibration, Examples


AT_RANDOM = "new in this model, begins at random and is trained with the adapter:"
"""How a note begins on modules that the checkpoint does not hold."""


@as_the_spec_says
def quantize_plan(
    plan: Plan,
    *,
    module: nn.Module | None = None,
    calibration: Calibration = None,
    head: str = "",
    labels: Sequence[str] = (),
) -> nn.Module:
    """Do what `plan` says about the base.

    Args:
        module: the live module that it was made for.
        head, labels: see `loading.heads`; by default the head that the plan's task learns with.
    """
    import torch

    from ..facade import mark_conv1d
    from ..model.linears import conv1d_layers
    from ..model.modules import linear_layers

    import_requirements(plan.backend)
    plan = with_config(plan)
    examples = examples_for(plan, calibration)
    digests = None if module is None else digests_of(_tensors(module))
    conv1d = () if module is None else conv1d_layers(module)
    head = "" if module is not None else head or plan.task.head
    model, skip, notes = _vendors(plan, module, examples, head, labels)
    model.requires_grad_(False)
    random: tuple[str, ...] = getattr(model, "begun_at_random", ())
    if random:
        notes.append(f"{AT_RANDOM} {', '.join(random)}")
    model = _with_facades(plan, module, model, skip)
    if plan.adopt and module is not None:
        _take_marks_off(model)
    conv1d = conv1d or conv1d_layers(model)
    mark_conv1d(model, conv1d)
    if plan.adopt and not skip:  # what a merge must not quantize
        skip = tuple(name for name, _ in linear_layers(model, ()))
    if plan.backend.name != "none":
        notes.append(tell_share(model, skip, plan))
    model.quantadapt = ModelState(  # type: ignore[assignment]
        source=plan.model,
        backend=plan.backend,
        quantizer=plan.quantizer,
        device=plan.device,
        dtype=getattr(torch, plan.dtype),
        skip_modules=skip,
        tokenizer=find_tokenizer(plan.model) if plan.model else None,
        calibration=examples,
        conv1d=conv1d,
        new_modules=tuple(plan.spec.new_modules),
        unused_modules=tuple(plan.spec.unused_modules),
        notes=tuple(notes),
        fingerprint=_fingerprint(plan, model, digests),
        head=head,
        labels=tuple(labels),
        begun_at_random=random,
        stream=plan.stream,
    )
    if head:
        _set_padding(model, state_of(model).tokenizer)
    return model


def _vendors(
    plan: Plan,
    module: nn.Module | None,
    examples: Examples | None,
    head: str,
    labels: Sequence[str],
) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """Return the model as the backend makes it, or as it is where it is quantized already; what of
    it is left dense; and what reading it has noted."""
    import torch

    from ..loading.accounting import expecting
    from ..loading.heads import with_head
    from ..model.dense import skipped_modules

    quantizer, dtype = plan.quantizer, getattr(torch, plan.dtype)
    expected = expecting(plan.spec.new_modules, plan.spec.unused_modules)
    with with_head(head, labels), expected as notes, _taking_blocks(plan):
        if not plan.adopt:
            skip = skip_for(plan, module)
            with blaming(plan.backend, "quantizing"):
                model = quantizer.quantize(
                    _source(plan, module, skip, dtype),
                    device=plan.device,
                    dtype=dtype,
                    calibration=examples,
                    skip_modules=skip,
                )
            _refuse_other_than_module(model, plan.backend)
            skip = skipped_modules(model, skip)
            notes += tell_kept(plan, model)
            return model, skip, notes
        # What is quantized already gets a facade, a head too, unless somebody said otherwise.
        skip = wanted_skip(plan) or ()
        if module is not None:
            return module, skip, notes
        model = quantizer.load(plan.model, device=plan.device, dtype=dtype)
        _refuse_other_than_module(model, plan.backend)
    return model, skip, notes


def _take_marks_off(model: nn.Module) -> None:
    """Take transformers' marks of a quantized model off a live module, as of one that is read here:
    by them TRL trains adapters in bfloat16, and a dense merge would say that it is quantized."""
    from transformers import PreTrainedModel

    from ..loading.reading import unmarked

    if isinstance(model, PreTrainedModel):
        unmarked(model)


def _with_facades(
    plan: Plan, module: nn.Module | None, model: nn.Module, skip: tuple[str, ...]
) -> nn.Module:
    """Put facades in front of the quantized layers; shard or stream the base where the plan says
    so.

    Raises:
        ModelError: what was quantized already is not what it is said to be.
        PlanRefused: no layer is quantized.
    """
    import torch

    from ..facade import facades, wrap
    from ..model.numbers import refuse_not_numbers_in, refuse_not_numbers_packed
    from ..streaming import StreamedTarget, stream, streamer_of

    target, dtype = plan.quantizer.target, getattr(torch, plan.dtype)
    if plan.adopt:
        refuse_not_numbers_packed(model, target.matches, where=plan.model)
        if module is not None:
            refuse_not_numbers_in(model)
    try:
        if plan.parallel == "fsdp":
            from ..sharding import GatheringTarget, shard

            model = shard(wrap(model, GatheringTarget(target), dtype, skip))
        else:
            target = StreamedTarget(target) if streamer_of(model) else target
            model = wrap(model, target, dtype, skip)
        if plan.stream != "none":
            folder = plan.spec.train.stream_folder
            model = stream(model, plan.stream, folder=folder)  # what came whole, and its facades
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not (plan.adopt and plan.model):
            raise
        what = f"its quantized layers are not what config.json says: {reason(error)}"
        fix = "check that config.json and the weights belong together"
        raise ModelError(what, fix=fix, where=plan.model) from error
    if next(facades(model), None) is None:
        raise nothing_quantized(model)
    return model


def _fingerprint(
    plan: Plan, model: nn.Module, digests: Mapping[str, str] | None
) -> Fingerprint | None:
    """Return what the base is known by: its files; or what a live module held, whose `digests` were
    taken before it was quantized."""
    from ..facade import facades

    if digests is None:
        return plan.fingerprint or fingerprint_of(plan.model)
    layers = [name.removesuffix("_stack") for name, _ in facades(model)]
    return fingerprint_of_module(plan.config or {}, digests, layers, quantized=bool(plan.adopt))


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Let a classifier know the token by which it finds the end of a sequence."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = getattr(tokenizer, "pad_token_id", None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _refuse_other_than_module(made: Any, backend: Record) -> None:
    """Raise PluginError where a backend returned something else than a model."""
    import torch

    if not isinstance(made, torch.nn.Module):
        what, fix = f"it returned {made!r}, which is no module", "tell its authors"
        raise PluginError(what, fix=fix, where=f"backend {backend.name}")


def _source(
    plan: Plan, module: nn.Module | None, skip: tuple[str, ...] | None, dtype: torch.dtype
) -> str | nn.Module:
    """Return what the backend gets. One that does not work layer by layer on load looks for
    `nn.Linear` itself: where a model has other linear layers, it gets one that has not."""
    from ..loading.reading import architecture, from_pretrained
    from ..model.dense import skipped_modules
    from ..model.linears import other_linears
    from ..model.modules import make_linear

    if type(plan.quantizer).quantize is LayerwiseQuantizer.quantize:
        return plan.model if module is None else module
    if next(other_linears(architecture(plan.model) if module is None else module), None) is None:
        return plan.model if module is None else module
    dense = from_pretrained(plan.model, dtype=dtype) if module is None else module
    return make_linear(dense, skipped_modules(dense, skip))


@contextmanager
def _taking_blocks(plan: Plan) -> Iterator[None]:
    """Inside, shard each decoder block as soon as it is quantized, or move it to CPU memory, where
    the plan says so."""
    from ..loading.blocks import BlockDone, watching_blocks

    take: BlockDone
    if plan.parallel == "fsdp":
        from ..distributed.talking import start
        from ..sharding import shard_block as take

        start(plan.device)
    elif plan.stream != "none":
        import torch

        from ..streaming import Streamer, stream_block

        streamer = Streamer(torch.device(plan.device), folder=plan.spec.train.stream_folder)
        take = partial(stream_block, streamer, plan.stream)
    else:
        yield
        return
    with watching_blocks(take):
        yield


@as_the_spec_says
def with_config(plan: Plan) -> Plan:
    """Return the plan completed: a hub id's config is downloaded where it is not here yet."""
    from ..loading.reading import read_config

    if plan.config is not None:
        return plan
    read = read_config(plan.model)
    return planning.completed(plan, config_of(plan.model) or read.to_dict())
