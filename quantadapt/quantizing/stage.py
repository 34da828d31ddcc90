"""The quantize stage: what a plan says about the base, done.

Decides what stays dense and what calibrating backends are shown, lets the backend work, and puts
the facades in front of what it made.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import planning
from ..dependencies import import_requirements
from ..errors import ModelError, PlanRefused, PluginError, Problem, QuantadaptError, warn
from ..inputs.documents import reason, shown
from ..inputs.fingerprints import (
    Fingerprint,
    digests_of,
    fingerprint_of,
    fingerprint_of_module,
)
from ..inputs.model_config import towers_in
from ..planning.on_disk import config_of
from ..planning.refusals import misfit_problems
from ..planning.share import BEGINNING, Share, is_expert_bias, part_of
from ..planning.stage import Plan
from ..protocols import LayerwiseQuantizer, Quantizer
from ..records import Record, kind_of
from ..registry.discovery import registry
from ..remote_code import as_the_spec_says, trusted
from .state import ModelState, state_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .examples import Calibration, Examples


_OF_TOKENIZER = re.compile(r"tokenizer|^(vocab|merges)\.|^spiece\.|\.(spm|bpe|tiktoken)$", re.I)
"""What the files of a tokenizer are called, among those of a checkpoint."""


AT_RANDOM = "new in this model, begins at random and is trained with the adapter:"
"""How a note begins on modules that the checkpoint does not hold."""

_DECIDING = ("stays_dense", "misfit")
"""What a backend decides by which layers stay dense."""


class UnusedOptionWarning(UserWarning):
    """Something was given that has no effect."""


class MostlyDenseWarning(UserWarning):
    """Few of a model's weights are quantized."""


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

    from ..facade import facades, mark_conv1d, wrap
    from ..loading.accounting import expecting
    from ..loading.heads import with_head
    from ..model.dense import skipped_modules
    from ..model.linears import conv1d_layers
    from ..model.modules import linear_layers
    from ..model.numbers import refuse_not_numbers_in, refuse_not_numbers_packed
    from ..streaming import StreamedTarget, stream, streamer_of

    import_requirements(plan.backend)
    plan = with_config(plan)
    quantizer = plan.quantizer
    dtype = getattr(torch, plan.dtype)
    skip = _wanted_skip(plan)
    examples = _examples(plan, calibration)
    digests = {} if module is None else digests_of(_tensors(module))
    conv1d = () if module is None else conv1d_layers(module)
    expected = expecting(plan.spec.new_modules, plan.spec.unused_modules)
    head = "" if module is not None else head or plan.task.head
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
            notes += _tell_kept(plan, model)
        elif module is not None:
            model = module
        else:
            model = quantizer.load(plan.model, device=plan.device, dtype=dtype)
            _refuse_other_than_module(model, plan.backend)
    model.requires_grad_(False)
    random: tuple[str, ...] = getattr(model, "begun_at_random", ())
    if random:
        notes.append(f"{AT_RANDOM} {', '.join(random)}")
    # What is quantized already gets a facade, a head too, unless somebody said otherwise.
    target, skip = quantizer.target, skip or ()
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
    conv1d = conv1d or conv1d_layers(model)
    mark_conv1d(model, conv1d)
    if plan.adopt and not skip:  # what a merge must not quantize
        skip = tuple(name for name, _ in linear_layers(model, ()))
    if plan.backend.name != "none":
        notes.append(_tell_share(model, skip, plan.notes))
    known: Fingerprint | None
    if module is None:
        known = plan.fingerprint or fingerprint_of(plan.model)
    else:
        layers = [name.removesuffix("_stack") for name, _ in facades(model)]
        config, quantized = plan.config or {}, bool(plan.adopt)
        known = fingerprint_of_module(config, digests, layers, quantized=quantized)
    model.quantadapt = ModelState(  # type: ignore[assignment]
        source=plan.model,
        backend=plan.backend,
        quantizer=quantizer,
        device=plan.device,
        dtype=dtype,
        skip_modules=skip,
        tokenizer=find_tokenizer(plan.model) if plan.model else None,
        calibration=examples,
        conv1d=conv1d,
        new_modules=tuple(plan.spec.new_modules),
        unused_modules=tuple(plan.spec.unused_modules),
        notes=tuple(notes),
        fingerprint=known,
        head=head,
        labels=tuple(labels),
        begun_at_random=random,
        stream=plan.stream,
    )
    if head:
        _set_padding(model, state_of(model).tokenizer)
    return model


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


def _tell_kept(plan: Plan, model: nn.Module) -> list[str]:
    """Warn of the layers of a quantized model that its backend had to leave dense, and return what
    was told."""
    from ..model.dense import dense_by_default, skipped_modules

    default = dense_by_default(model, _wanted_skip(plan), plan.spec.towers)
    with blaming(plan.backend, "deciding what stays dense"):
        kept = plan.quantizer.stays_dense(model, skipped_modules(model, default))
    if not kept:
        return []
    text = (
        f"{plan.backend.name} leaves {len(kept)} linear layers dense ({kept[0]} is the first):"
        " transformers could not load them from a checkpoint if they were quantized"
    )
    warn(text, MostlyDenseWarning, stacklevel=4)
    return [text]


def _tell_share(model: nn.Module, skip: tuple[str, ...], told: Sequence[str]) -> str:
    """Return how much of the weights is quantized, and what stays dense; warn where it is little,
    and the plan has not told it."""
    share = share_of(model, skip)
    if share.is_low and not any(note.startswith(BEGINNING) for note in told):
        warn(share.words, MostlyDenseWarning, stacklevel=4)
    return share.words


def share_of(model: nn.Module, skip: tuple[str, ...] = ()) -> Share:
    """Return how much of a quantized model's weights is quantized.

    Args:
        model: with facades.
        skip: the modules that were left dense on purpose.
    """
    from torch import nn

    from ..facade import facades
    from ..model.modules import is_skipped

    found = dict(facades(model))
    dense: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or is_skipped(name, (*skip, *found)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if parameter.ndim > 1 and not is_expert_bias(full):
                dense[part_of(full) or type(module).__name__] += parameter.numel()
    return Share(sum(f.in_features * f.out_features for f in found.values()), dense)


def nothing_quantized(model: nn.Module) -> PlanRefused:
    """Say which layers the model has in place of linear ones, which alone are quantized."""
    matrices = (m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2)
    others = {type(m).__name__ for m in matrices} - {"Linear", "Embedding"}
    what = "the model has no linear layer to quantize"
    if others:
        what += f": nn.Linear and Conv1D are quantized, its layers are {', '.join(sorted(others))}"
    fix = "use another model, or name fewer layers in skip_modules"
    return PlanRefused([Problem(what, fix, where="model")])


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


def _wanted_skip(plan: Plan) -> tuple[str, ...] | None:
    wanted = plan.spec.skip_modules
    return None if wanted is None else tuple(wanted)


def skip_for(plan: Plan, module: nn.Module | None = None) -> tuple[str, ...] | None:
    """Return what is left dense, layers that do not fit included; None means the default.

    Looks at the architecture only. Raises PlanRefused, with a line for each layer whose size the
    backend cannot quantize, unless the spec says `skip_misfits`.
    """
    from ..loading.heads import head_names, wants_head
    from ..loading.reading import architecture
    from ..model.dense import dense_by_default, skipped_modules
    from ..model.experts import expert_stacks
    from ..model.modules import linear_layers
    from ..model.towers import LANGUAGE

    skip, quantizer = _wanted_skip(plan), plan.quantizer
    towers = plan.spec.towers
    if towers_in(plan.config or {}) and (skip is not None or towers != [LANGUAGE]):
        skip = dense_by_default(
            architecture(plan.model) if module is None else module, skip, towers
        )
    if wants_head() and module is None and skip is None:
        # A pooler may be new, and what starts at random is trained, not quantized.
        model = architecture(plan.model)
        skip = (*skipped_modules(model, None), *head_names(model))
    if all(getattr(type(quantizer), name) is getattr(Quantizer, name) for name in _DECIDING):
        return skip  # everything fits
    model = architecture(plan.model) if module is None else module
    default = skipped_modules(model, skip)
    with blaming(plan.backend, "deciding what stays dense"):
        dense = quantizer.stays_dense(model, default)
        left = (*default, *dense)
        sizes = {
            name: (linear.in_features, linear.out_features)
            for name, linear in linear_layers(model, left)
        }
        stacks = expert_stacks(model, left)
        sizes |= {stack.name: (stack.in_features, stack.rows) for stack in stacks}
        problems, misfits = misfit_problems(quantizer, sizes)
    if problems and not plan.spec.skip_misfits:
        raise PlanRefused(problems)
    return (*default, *dense, *misfits) if dense or misfits else skip


def _examples(plan: Plan, given: Calibration) -> Examples | None:
    """Return the calibration examples, checked, where the backend wants any."""
    from .. import demo
    from .examples import check_vocabulary, examples_from

    if not plan.calibrates:
        if given is not None:
            needless = f"these options of {plan.backend.name} need no data"
            why = "the model is quantized already" if plan.adopt else needless
            warn(f"calibration is not used: {why}", UnusedOptionWarning, stacklevel=4)
        return None
    if given is None and plan.model == str(demo.MODEL_DIR):
        given = str(demo.TRAIN_FILE)
    if given is None:
        what = f"backend {plan.backend.name!r} calibrates, and there is no data to do it on"
        fix = "pass calibration=..., a data file or tokenized examples (--calibration FILE)"
        raise PlanRefused([Problem(what, fix, where="calibration")])
    tokenizer = load_tokenizer(plan.model) if isinstance(given, str) and plan.model else None
    examples = examples_from(given, tokenizer)
    vocabulary = (plan.config or {}).get("vocab_size")
    # A live module may be no language model, and one that is may be shown something else.
    if plan.model or (vocabulary and all("input_ids" in example for example in examples)):
        check_vocabulary(examples, vocabulary)
    return examples


@contextmanager
def blaming(record: Record, doing: str) -> Iterator[None]:
    """Turn what a plugin's code raises into a PluginError that says whose it is, and where."""
    import torch

    try:
        yield
    except (QuantadaptError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = str(error).strip().splitlines()
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"it failed while {doing}: {type(error).__name__}: {text[0] if text else ''}"
        origin = registry().provenance(record)
        fix = f"tell its authors ({origin}): {place.filename}:{place.lineno}"
        where = f"{kind_of(record)} {record.name}"
        raise PluginError(what, fix=fix, where=where) from error


@as_the_spec_says
def with_config(plan: Plan) -> Plan:
    """Return the plan completed: a hub id's config is downloaded where it is not here yet."""
    from ..loading.reading import read_config

    if plan.config is not None:
        return plan
    read = read_config(plan.model)
    return planning.completed(plan, config_of(plan.model) or read.to_dict())


def load_tokenizer(source: str) -> Any:
    """Return the checkpoint's tokenizer, with a pad token. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    from ..loading.reading import refuse_code

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted())
    except Exception as error:  # as many kinds as there are tokenizers
        refuse_code(source, error)
        text = str(error).strip().splitlines() or [type(error).__name__]
        what = f"its tokenizer cannot be loaded: {text[0].rstrip(' :')}"
        fix = "put the tokenizer's files beside config.json"
        raise ModelError(what, fix=fix, where=source) from None
    refuse_code(source)  # transformers may have taken another tokenizer instead
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        what = f"model_max_length of its tokenizer is {shown(longest)}, no number"
        raise ModelError(what, fix="restore tokenizer_config.json", where=source)
    pad, rows = tokenizer.pad_token_id, (config_of(source) or {}).get("vocab_size")
    if pad is None or (isinstance(rows, int) and pad >= rows):  # one without a row of the embedding
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_tokenizer(source: str) -> Any:
    """Return the checkpoint's tokenizer as `load_tokenizer` does, or None where it has no files of
    one. Raises ModelError where those that it has are damaged."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
        return load_tokenizer(source) if any(map(_OF_TOKENIZER.search, names)) else None
    try:
        return load_tokenizer(source)
    except ModelError:
        return None
