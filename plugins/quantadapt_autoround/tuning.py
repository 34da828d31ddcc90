"""Run auto-round's tuner on the blocks of a model, and undo what it does beside."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from quantadapt.calibration.experts import Tokens
from quantadapt.calibration.recording import run
from quantadapt.errors import DataError, ModelError

if TYPE_CHECKING:
    from quantadapt_autoround import AutoRound

TRACE = 5
"""The level of `logging.Logger.trace`, as auto-round and neural-compressor have it."""
LONGEST = 2048
"""Tokens in a calibration row, at most."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Read by cuBLAS; auto-round sets it for good."""

Tuned = dict[str, tuple[Tensor, Tensor | int]]
"""Scales and zero points of layers, by name."""


def tune(
    quantizer: AutoRound, model: nn.Module, names: set[str], rows: list[Tensor], device: str
) -> Tuned:
    """Let auto-round tune the layers `names`, whose weights it replaces by rounded ones.

    Args:
        quantizer: the options.
        model: its parameters have the compute dtype.
        names: the layers to quantize.
        rows: tokens, int64 [1, length], all of one length.
        device: where to compute.

    Returns:
        Those of the layers that are in auto-round's blocks.

    Raises:
        ModelError: auto-round cannot do it, or finds no such layer.
    """
    from auto_round import AutoRound as Tuner

    tokens = Tokens(show_all=False)
    with torch.no_grad():
        tokens.count(model, lambda: [run(model, {"input_ids": row}) for row in rows])
    tokens.tell()
    with restored(model):
        try:
            tuner = Tuner(model, **_settings(quantizer, model, names, rows, device))
            with torch.enable_grad():
                tuner.quantize()
        except SystemExit as error:
            what = "auto-round gave up on this model; what it said before tells why"
            raise ModelError(what, fix="choose another backend") from error
        left = {name: vars(model.get_submodule(name)) for name in sorted(names)}
        tuned = {name: (own["scale"], own["zp"]) for name, own in left.items() if "scale" in own}
    if not tuned:
        what = "auto-round found no transformer block with a layer to quantize"
        raise ModelError(what, fix="choose another backend")
    return tuned


def _settings(
    quantizer: AutoRound, model: nn.Module, names: set[str], rows: list[Tensor], device: str
) -> dict[str, Any]:
    """Return the keyword arguments of auto-round's `AutoRound`."""
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    options = quantizer.model_dump() | {"group_size": quantizer.group_size or -1}
    return {
        "tokenizer": SimpleNamespace(),  # asked for, but not needed for tokenized data
        "alg_configs": SignRoundConfig(**options),
        "dataset": rows,
        "seqlen": rows[0].shape[-1],
        "nsamples": len(rows),
        "batch_size": min(8, len(rows)),
        "device_map": device,
        "amp": device != "cpu" and dtype != torch.float32,
        "enable_torch_compile": False,
        "low_cpu_mem_usage": False,
        "layer_config": quantizer.left_dense(_kept_dense(model, names), None)["extra_config"],
    }


def _kept_dense(model: nn.Module, names: set[str]) -> list[str]:
    """Return the layers that auto-round would quantize although they are not among `names`."""
    from auto_round.utils import SUPPORTED_LAYER_TYPES

    from quantadapt.model.dense import heads
    from quantadapt.model.modules import is_skipped

    kinds, left = tuple(SUPPORTED_LAYER_TYPES), heads(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name not in names and not is_skipped(name, left)
    ]


def rows_of(calibration: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the examples' tokens as rows [1, length] of one length, which auto-round can batch.

    Raises:
        DataError: an example holds no `input_ids`.
    """
    if any("input_ids" not in example for example in calibration):
        fix = "pass examples that hold input_ids"
        raise DataError("auto-round is shown tokens only", fix=fix, where="calibration")
    ids = [example["input_ids"].flatten() for example in calibration]
    length = min(max(len(row) for row in ids), LONGEST)
    tokens = torch.cat(ids).long()
    count = len(tokens) // length
    return list(tokens[: count * length].view(count, 1, length))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo what auto-round does beside quantizing: it seeds every generator, sets a variable of
    cuBLAS, changes how tensors are printed, keeps the model, and leaves attributes on it, among
    them `forward` functions that a copy would share with the original. And spare it its bars and
    most of its time: it collects garbage after each step, here only its own."""
    from auto_round.compressors import orchestrator
    from auto_round.context.compress import CompressContext
    from auto_round.context.model import ModelContext
    from auto_round.modeling.fused_moe import replace_modules

    # It would put classes of its own in the place of some mixtures of experts: ours are taken
    # apart already, or stay whole.
    is_replaced = replace_modules.is_custom_model
    replace_modules.is_custom_model = lambda model: False
    before = {id(module): set(vars(module)) for module in model.modules()}
    training, variable = model.training, os.environ.get(CUBLAS)
    states = random.getstate(), numpy.random.get_state()
    gc.freeze()
    bars, orchestrator.tqdm = orchestrator.tqdm, partial(orchestrator.tqdm, disable=True)
    try:
        with torch.random.fork_rng(), torch._tensor_str.printoptions():
            yield
    finally:
        orchestrator.tqdm = bars
        give_logging_back()
        gc.unfreeze()
        replace_modules.is_custom_model = is_replaced
        if variable is None:
            os.environ.pop(CUBLAS, None)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        ModelContext.reset_context()
        CompressContext.reset_context()
        for module in model.modules():
            for name in set(vars(module)) - before.get(id(module), set(vars(module))):
                delattr(module, name)
        model.train(training)


def give_logging_back() -> None:
    """Importing auto-round makes warnings of all of transformers its own, and shows them; and it
    takes `trace` from every logger of others, such as neural-compressor's, which gives more."""
    from transformers.utils import logging as of_transformers

    for name in ("warning_once", "info_once"):
        if hasattr(of_transformers, name):
            setattr(logging.Logger, name, getattr(of_transformers, name))

    def trace(self: logging.Logger, message: str, *args: Any, **kwargs: Any) -> None:
        if self.isEnabledFor(TRACE):
            self._log(TRACE, message, args, **{"stacklevel": 2, **kwargs})

    logging.Logger.trace = trace  # type: ignore[attr-defined]
