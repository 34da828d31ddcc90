"""The stages one by one, as research code calls them: quantize, attach, train, evaluate, and
generate.

`pipeline.run` strings them together; `exporting` holds what comes after them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import planning
from .dependencies import in_turn
from .errors import (
    ModelError,
    OptionsError,
    Problem,
    refuse_below_one,
    refuse_unknown,
)
from .evaluation.given_data import (
    examples_of,
    is_named,
    named_in_spec,
    named_to_measure_on,
    refuse_length,
    refuse_unmeasured,
)
from .evaluation.held_out import given_of, held_out, held_out_data
from .planning.planned import Plan
from .planning.streaming import NO_GPU, NOT_STREAMED
from .quantizing.stage import quantize_plan
from .quantizing.state import ModelState, state_of
from .records import as_call
from .registry.blame import blaming_plugins
from .remote_code import trusting
from .showing.python import Listener, stage
from .showing.quietly import quietly
from .spec import Spec

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from .data.reading import HeldOut
    from .data.tokens import Prompt
    from .generation import Answer
    from .generation.prompts import Layout, Turns
    from .quantizing.examples import Calibration
    from .training.stage import TrainResult


@in_turn
@blaming_plugins
def quantize(
    source: str | Path | nn.Module | None = None,
    backend: str = "hqq",
    *,
    device: str = "auto",
    dtype: str = "auto",
    calibration: Calibration = None,
    skip_modules: tuple[str, ...] | list[str] | None = None,
    skip_misfits: bool = False,
    towers: Sequence[str] = ("language",),
    new_modules: tuple[str, ...] | list[str] = (),
    unused_modules: tuple[str, ...] | list[str] = (),
    head: Literal["", "sequence", "token"] = "",
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
    stream: Literal["none", "experts", "all"] = "none",
    stream_folder: str | None = None,
    verbose: bool | None = None,
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
        towers: the parts of an image-text model that are quantized, and adapted later: language,
            vision, projector. The others stay as they are.
        new_modules: module names that the checkpoint does not hold and that start at random, such
            as the head of a classifier; whatever else is missing is refused.
        unused_modules: module names that the checkpoint holds and the model has not.
        head: read a checkpoint as one that classifies each "sequence" or each "token". One that has
            no such head gets a new one, which is trained with the adapter.
        labels: what that head tells apart, in the order of its outputs.
        trust_remote_code: run Python code that comes with the checkpoint; without it, one that
            needs that is refused.
        stream: keep all quantized layers in CPU memory, or "experts", and copy them to the GPU
            block by block whenever the model computes. `quantadapt.streaming.bring_back` undoes it.
        stream_folder: on a fast disk, to keep them in instead of CPU memory.
        verbose: whether to show progress; by default on a terminal and in a notebook.
        options: the backend's options, e.g. `bits=4`.

    Returns:
        The model, with its `ModelState` as `model.quantadapt`.

    Raises:
        PlanRefused: with every problem at once. OptionsError: there is no such head. ModelError:
        the checkpoint cannot be loaded. DataError: the calibration data cannot be used.
        PluginError: the backend failed.
    """
    from .loading.heads import ENDINGS

    refuse_unknown(head=(head, ("", *ENDINGS)))
    if isinstance(source, Path):
        source = str(source)
    spec = Spec(
        model=source if isinstance(source, str) else None,
        backend={"name": backend, **options},
        device=device,
        dtype=dtype,
        skip_modules=None if skip_modules is None else list(skip_modules),
        skip_misfits=skip_misfits,
        towers=list(towers),
        new_modules=list(new_modules),
        unused_modules=list(unused_modules),
        trust_remote_code=trust_remote_code,
        # Who shards a base does so where they want.
        train={"parallel": "ddp", "stream": stream, "stream_folder": stream_folder},
    )
    module = None if source is None or isinstance(source, str) else source
    made = planning.plan(spec, module=module, check_output=False)
    with stage("quantize", verbose) as tell:
        for text in (NO_GPU, NOT_STREAMED):
            if text in made.notes:
                tell("note", {"text": text})
        model = quantize_plan(
            made, module=module, calibration=calibration, head=head, labels=labels
        )
        tell("detail", {"text": as_call(made.backend.name, made.quantizer.model_dump())})
    return model


@in_turn
@blaming_plugins
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
    state, spec = state_of(model), Spec(adapter={"name": adapter, **options}, seed=seed)
    made = planning.plan_adapter(state, spec)
    with quietly():
        return attach_planned(model, state, made)


def attach_planned(model: nn.Module, state: ModelState, plan: Plan) -> PeftModel:
    """Attach the adapter of `plan`; `state` is the model's."""
    from transformers import set_seed

    from .adapting.stage import attach_adapter

    set_seed(plan.spec.seed)
    return attach_adapter(model, state, plan.adapter, plan.adapter_options)


@in_turn
@blaming_plugins
def train(
    model: PeftModel,
    data: str | Path | list[Any] | Dataset | None = None,
    *,
    objective: str | Mapping[str, Any] = "sft",
    output: str | Path | None = None,
    eval_data: str | Path | Dataset | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    max_length: int | None = None,
    verbose: bool | None = None,
    **options: Any,
) -> TrainResult:
    """Train the adapter.

    Args:
        model: what `attach` returned.
        data: a file, folder or hub id (see DataSpec), a tokenized Dataset, or None for the demo's;
            for objectives that stream also a list of sources, `{"path": ..., "weight": ...}`.
        objective: see `quantadapt objectives`; a name, or `{"name": ..., option: value}`.
        output: where checkpoints go; a temporary folder if missing.
        eval_data: what `eval_steps` or `eval_strategy` measure on while training: a file, which is
            read as `data` is and leaves all of that to be learnt, or a tokenized Dataset; by
            default what is held out of `data`.
        seed: for shuffling and dropout.
        tokenizer: needed where the model came without one: a live module, for instance.
        on_log: called at each logging step with step, loss, learning_rate, ..., and after each
            validation with step, eval_loss, ...
        on_note: told in a sentence what became of each data file, and how memory is used, where
            that was chosen or had to change.
        max_length: longest example in tokens, where data is read from a file; by default 512.
        verbose: whether to show progress and notes; by default on a terminal and in a notebook.
        options: fields of TrainSpec, e.g. `max_steps=200`, `learning_rate=1e-4`.

    Raises:
        SpecError: an option is unknown or wrong. PlanRefused: the objective is, or does not go with
        the others or with the model. QuantadaptError: an argument has no effect. DataError: the
        data cannot be used. TrainingError: training cannot go on.
    """
    from .evaluation.verdict import training_warnings
    from .training.checking import check
    from .training.stage import train as train_

    named = {**named_in_spec(data, max_length), **named_to_measure_on(eval_data)}
    spec = Spec(train=options, objective=objective, data=named, seed=seed)
    task = planning.task_for(spec)
    check(model, spec.train, task)
    refuse_length(max_length, data, data if eval_data is None else eval_data)
    refuse_unmeasured(spec, eval_data)
    tokenizer = tokenizer or state_of(model).tokenizer
    given: Dataset | None = None
    if not (eval_data is None or isinstance(eval_data, str | Path)):
        given = held_out_data(eval_data, tokenizer)
    with stage("train", verbose) as tell, tempfile.TemporaryDirectory() as scratch:
        log, note = _told(tell, on_log, on_note)
        dataset, measured = examples_of(data, given, task, spec, tokenizer, note)
        state = state_of(model) if hasattr(model, "quantadapt") else None
        if state is not None and is_named(data):
            state.max_length = spec.data.max_length
        if spec.train.stream_folder is not None and spec.train.stream not in ("experts", "all"):
            note(NOT_STREAMED)
        result = train_(
            *(model, tokenizer, dataset, spec.train),
            task=task,
            output=Path(output or scratch).expanduser(),
            seed=seed,
            held_out=measured,
            on_log=log,
            on_note=note,
            keeps=output is not None,
        )
        for text in [] if task.generates else training_warnings(result.losses):
            tell("warning", {"text": text})
        return result


def _told(
    tell: Listener,
    on_log: Callable[[dict[str, Any]], None] | None,
    on_note: Callable[[str], None] | None,
) -> tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]:
    """Return what to call with an entry of the log, and with a note: each is shown, and handed to
    the caller's own function, if there is one."""

    def log(entry: dict[str, Any]) -> None:
        tell("validation" if "eval_loss" in entry else "log", entry)
        if on_log is not None:
            on_log(entry)

    def note(text: str) -> None:
        tell("note", {"text": text})
        if on_note is not None:
            on_note(text)

    return log, note


@in_turn
@blaming_plugins
def evaluate(
    model: nn.Module,
    data: str | Path | Dataset | HeldOut | None = None,
    *,
    evaluation: str = "perplexity",
    batch_size: int = 8,
    max_examples: int = 200,
    max_length: int | None = None,
    max_new_tokens: int = 64,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    verbose: bool | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return the figures of an evaluation by name: for `perplexity` the mean `loss` in nats per
    token and the count of `tokens`, too.

    Args:
        model: with or without an adapter.
        data: a file, of which nothing is held out; a folder or hub id, its held-out part if it has
            one; a tokenized Dataset, or a HeldOut with prompts, too; or None for the demo's.
        evaluation: see `quantadapt evaluations`.
        batch_size: examples per forward pass.
        max_examples: use at most so many.
        max_length: longest example in tokens, where data is read from a file; by default what the
            model was trained with, or 512.
        max_new_tokens: longest answer, in tokens, where the model is asked to answer.
        tokenizer: needed where the model came without one: a live module, for instance.
        trust_remote_code: run code that comes with what is measured, as files of tasks are.
        verbose: whether to show progress; by default on a terminal and in a notebook.
        options: the evaluation's options.

    Raises:
        PlanRefused: there is no such evaluation or option. OptionsError: a count is below 1.
        QuantadaptError: `max_length` is given with a Dataset. PluginError: the evaluation failed.
    """
    from .evaluation.stage import measure

    refuse_below_one(
        batch_size=batch_size, max_examples=max_examples, max_new_tokens=max_new_tokens
    )
    with trusting(trust_remote_code):
        evaluators = planning.evaluators([{"name": evaluation, **options}])
    refuse_length(max_length, data)
    tokenizer = tokenizer or state_of(model).tokenizer
    trained = getattr(getattr(model, "quantadapt", None), "max_length", None)
    with stage("evaluate", verbose) as tell:
        found = held_out(data, tokenizer, trained if max_length is None else max_length)
        given = given_of(found, tokenizer, max_examples)
        given = replace(given, batch_size=batch_size, max_new_tokens=max_new_tokens)
        figures = measure(evaluation, evaluators[evaluation], model, given)
        tell("figures", {"evaluation": evaluation, "model": "", "figures": figures})
    return {name: figure.value for name, figure in figures.items()}


@in_turn
@blaming_plugins
def generate(
    model: nn.Module,
    prompts: Sequence[str | Turns | Prompt],
    *,
    layout: Layout | None = None,
    batch_size: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> list[Answer]:
    """Let a model answer prompts; greedily, unless `temperature` is given.

    Args:
        model: with or without an adapter.
        prompts: texts, or chats as lists of turns, each a dict with `role` and `content`: a text,
            or a list of parts, `{"type": "text", "text": ...}` and `{"type": "image", "image":
            ...}`, the name of a file, the bytes of one, or an image of Pillow's.
        layout: what becomes of a text: "chat" (the turn of a user, as the tokenizer's chat template
            writes it), "instruction" (alpaca's layout), or "text", the default (as it stands).
        batch_size: most answers that are made at the same time; whoever is done makes room.
        tokenizer: needed where the model came without one: a live module, for instance.
        options: `max_new_tokens` (256), `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `seed`, `stop`.

    Raises:
        OptionsError: an option is wrong. DataError: a prompt cannot be written. ModelError: the
        model does not generate text.
    """
    from .data.pictures import ANYWHERE
    from .generation import PromptWriter, Sampling, answers
    from .generation.prompts import LAYOUTS

    sampling = Sampling(**options)
    if isinstance(prompts, str):
        problem = Problem("prompts is one text, and no list of them", "write [text]", "prompts")
        raise OptionsError([problem])
    refuse_below_one(batch_size=batch_size)
    refuse_unknown(layout=(layout or "text", LAYOUTS))
    if (tokenizer := tokenizer or state_of(model).tokenizer) is None:
        raise ModelError("the model has no tokenizer", fix="pass tokenizer=...", where="tokenizer")
    writer = PromptWriter(tokenizer, layout, root=ANYWHERE)
    ids = [writer.ids(prompt) for prompt in prompts]
    with quietly():
        return list(answers(model, tokenizer, ids, sampling, batch_size=batch_size))
