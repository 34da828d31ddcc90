"""The stages one by one, as research code calls them: quantize, attach, train, evaluate.

`pipeline.run` strings them together; `exporting` holds what comes after them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import planning
from .errors import QuantadaptError
from .quantizing.stage import quantize_plan
from .quantizing.state import state_of
from .registry.discovery import registry
from .spec import Spec, TrainSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from .quantizing.examples import Calibration
    from .training.stage import TrainResult

_WHOLE = TrainSpec(parallel="ddp")
"""Whoever works stage by stage shards the base where they want to."""


def quantize(
    source: str | Path | nn.Module | None = None,
    backend: str = "hqq",
    *,
    device: str = "auto",
    dtype: str = "auto",
    calibration: Calibration = None,
    skip_modules: tuple[str, ...] | list[str] | None = None,
    skip_misfits: bool = False,
    **options: Any,
) -> nn.Module:
    """Load and quantize a model; its linear layers become `QuantLinear` facades.

    Args:
        source: checkpoint folder, hub id, a live module (changed in place, and recognized if it is
            quantized already), or None for the bundled demo.
        backend: see `quantadapt backends`.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32, bfloat16 or float16; the compute dtype.
        calibration: what backends that calibrate are shown: a data file, a tokenized Dataset, or a
            list of examples, each the keyword arguments of one call of the model, such as
            `{"input_ids": int64 tensor [1, length]}`. The demo model has its own.
        skip_modules: module names left dense; by default the output head.
        skip_misfits: leave layers dense, too, whose size the backend cannot quantize.
        options: the backend's options, e.g. `bits=4`.

    Returns:
        The model, with its `ModelState` as `model.quantadapt`.

    Raises:
        PlanRefused: with every problem at once. ModelError: the checkpoint cannot be loaded.
        DataError: the calibration data cannot be used. PluginError: the backend failed.
    """
    if isinstance(source, Path):
        source = str(source)
    spec = Spec(
        model=source if isinstance(source, str) else None,
        backend={"name": backend, **options},
        device=device,
        dtype=dtype,
        skip_modules=None if skip_modules is None else list(skip_modules),
        skip_misfits=skip_misfits,
        train=_WHOLE,
    )
    made = planning.plan(spec, check_output=False)
    if source is None or isinstance(source, str):
        return quantize_plan(made, calibration=calibration)
    return quantize_plan(made, module=source, calibration=calibration)


def attach(model: nn.Module, adapter: str = "lora", *, seed: int = 0, **options: Any) -> PeftModel:
    """Attach an untrained adapter to a model that `quantize` returned.

    Args:
        model: holds facades; PEFT changes it in place.
        adapter: see `quantadapt adapters`.
        seed: for the adapter's random start.
        options: fields of PEFT's config, e.g. `r=16`, `target_modules=["q_proj"]`.

    Raises:
        PlanRefused: a rule forbids the combination, or an option is wrong.
    """
    state = state_of(model)
    record = registry().adapter(adapter)
    spec = Spec(
        backend={"name": state.backend.name, **state.quantizer.model_dump()},
        adapter={"name": adapter, **options},
        device=state.device,
        dtype=state.dtype_name,
        train=_WHOLE,
    )
    made = planning.plan(spec, check_output=False)
    return attach_planned(model, record.name, made.adapter_options, seed)


def attach_planned(model: nn.Module, name: str, options: Mapping[str, Any], seed: int) -> PeftModel:
    """Attach the adapter `name` with options that a plan has checked; remember it on the model."""
    from transformers import set_seed

    from .adapting.stage import attach_adapter

    set_seed(seed)
    state = state_of(model)
    record = registry().adapter(name)
    peft_model = attach_adapter(model, record, options)
    state.adapter, state.adapter_options = record, dict(options)
    return peft_model


def train(
    model: PeftModel,
    data: str | Path | Dataset | None = None,
    *,
    output: str | Path | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    max_length: int = 512,
    **options: Any,
) -> TrainResult:
    """Train the adapter.

    Args:
        model: what `attach` returned.
        data: a file, folder or hub id (see DataSpec), a tokenized Dataset, or None for the demo's.
        output: where checkpoints go; a temporary folder if missing.
        seed: for shuffling and dropout.
        tokenizer: needed for a live module only.
        on_log: called at each logging step with step, loss, learning_rate, ...
        on_note: told in a sentence what became of each data file, and how memory is used, where
            that was chosen or had to change.
        max_length: longest example in tokens, where `data` is read from a file.
        options: fields of TrainSpec, e.g. `max_steps=200`, `learning_rate=1e-4`.

    Raises:
        SpecError: an option is unknown or wrong. DataError: the data cannot be used.
        TrainingError: training cannot go on.
    """
    from .data.reading import load_data
    from .training.stage import train as train_

    spec = Spec(train=options).train
    tokenizer = tokenizer or state_of(model).tokenizer
    if data is None or isinstance(data, str | Path):
        path = None if data is None else str(data)
        wanted = Spec(data={"path": path, "max_length": max_length}).data
        read = load_data(wanted, _needed(tokenizer), seed=seed)
        data = read.train
        if hasattr(model, "quantadapt"):
            state_of(model).max_length = max_length
        if on_note is not None:
            for text in read.report.words():
                on_note(f"data: {text}")
    with tempfile.TemporaryDirectory() as scratch:
        return train_(
            *(model, tokenizer, data, spec),
            output=Path(output or scratch).expanduser(),
            seed=seed,
            on_log=on_log,
            on_note=on_note,
        )


def evaluate(
    model: nn.Module,
    data: str | Path | Dataset | None = None,
    *,
    batch_size: int = 8,
    max_examples: int = 200,
    max_length: int | None = None,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Return perplexity, mean loss (nats per token) and token count on held-out data.

    Args:
        model: with or without an adapter.
        data: a file, all of it; a folder or hub id, its held-out part if it has one; a tokenized
            Dataset; or None for the demo's.
        batch_size: examples per forward pass.
        max_examples: use at most so many.
        max_length: longest example in tokens, where `data` is read from a file; by default what
            the model was trained with, or 512.
        tokenizer: needed for a live module only.
    """
    from .evaluation.stage import perplexity

    tokenizer = tokenizer or state_of(model).tokenizer
    trained = getattr(getattr(model, "quantadapt", None), "max_length", None)
    held_out = held_out_data(data, tokenizer, max_length or trained)
    part = held_out.select(range(min(len(held_out), max_examples)))
    found = perplexity(
        model, part, batch_size=batch_size, pad_token_id=getattr(tokenizer, "pad_token_id", None)
    )
    return {"perplexity": found.value, "loss": found.loss, "tokens": found.tokens}


def held_out_data(
    data: str | Path | Dataset | None, tokenizer: Any, max_length: int | None = None
) -> Any:
    """Return tokenized data to measure on: read if it is named, as it is if it is a Dataset.

    Args:
        max_length: longest example in tokens; 512 if that is not known.
    """
    from .data.reading import MAX_LENGTH, load_held_out

    if data is None or isinstance(data, str | Path):
        source, length = None if data is None else str(data), max_length or MAX_LENGTH
        return load_held_out(source, _needed(tokenizer), max_length=length)
    return data


def _needed(tokenizer: Any) -> Any:
    """Return the tokenizer. Raises QuantadaptError where a live module has none."""
    if tokenizer is None:
        fix = "pass tokenizer=..., or a tokenized Dataset as data"
        raise QuantadaptError("the model was made from a live module, without a tokenizer", fix=fix)
    return tokenizer
