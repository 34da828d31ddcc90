"""The pipeline: spec -> plan -> quantize -> attach -> train -> evaluate -> export.

Each stage is a function that takes the previous stage's value; `run` reads like the line above.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import planning
from .dependencies import import_requirements
from .errors import (
    MergeRefused,
    ModelError,
    OutputError,
    PlanRefused,
    Problem,
    QuantadaptError,
)
from .planning import Plan
from .registry import registry
from .run_folder import RunFolder, atomic_folder, environment
from .spec import DataSpec, Spec, TrainSpec
from .state import ModelState, state_of

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor, nn

    from .data import Data
    from .training import TrainResult

RECORD = "quantadapt.json"
ADAPTER = "adapter"
MERGED = "merged"

MergeKind = Literal["dense", "requantize"]

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event name ("stage", "log", "note") and its data, for progress displays."""


class BaseMismatchWarning(UserWarning):
    """An adapter is loaded onto a base that it was not trained on."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the tuned model, its folder and the figures in `metrics.json`."""

    model: PeftModel
    folder: Path
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)


# The stages, one by one ------------------------------------------------------------------------


def quantize(
    source: str | nn.Module | None = None,
    backend: str = "hqq",
    *,
    device: str = "auto",
    dtype: str = "auto",
    calibration: list[dict[str, Tensor]] | None = None,
    skip_modules: tuple[str, ...] | list[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Load and quantize a model; its linear layers become `QuantLinear` facades.

    Args:
        source: checkpoint folder, hub id, a live module (changed in place, and recognized if it is
            quantized already), or None for the bundled demo.
        backend: see `quantadapt backends`.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32, bfloat16 or float16; the compute dtype.
        calibration: tokenized examples for backends that need them.
        skip_modules: module names left dense; by default the output head.
        options: the backend's options, e.g. `bits=4`.

    Returns:
        The model, with its `ModelState` as `model.quantadapt`.

    Raises:
        PlanRefused: with every problem at once. ModelError: the checkpoint cannot be loaded.
    """
    spec = Spec(
        model=source if isinstance(source, str) else None,
        backend={"name": backend, **options},
        device=device,
        dtype=dtype,
        skip_modules=None if skip_modules is None else list(skip_modules),
    )
    made = planning.plan(spec, check_output=False)
    if source is None or isinstance(source, str):
        return quantize_plan(made, calibration=calibration)
    return quantize_plan(made, module=source, calibration=calibration)


def quantize_plan(
    plan: Plan,
    *,
    module: nn.Module | None = None,
    calibration: list[dict[str, Tensor]] | None = None,
) -> nn.Module:
    """Do what `plan` says about the base. `module` is a live module to use instead of a path."""
    import torch

    from .facade import wrap
    from .loading import skipped_modules

    import_requirements(plan.backend)
    quantizer = plan.quantizer
    dtype = getattr(torch, plan.dtype)
    wanted = plan.spec.skip_modules
    skip = None if wanted is None else tuple(wanted)
    adopted = quantizer.from_model(module) if module is not None else None
    if adopted is not None:
        quantizer, model = adopted, module
    elif plan.adopt and module is None:
        model = quantizer.load(plan.model, device=plan.device, dtype=dtype)
    else:
        model = quantizer.quantize(
            plan.model if module is None else module,
            device=plan.device,
            dtype=dtype,
            calibration=calibration,
            skip_modules=skip,
        )
    assert model is not None
    skip = skipped_modules(model, skip)
    model.requires_grad_(False)
    model = wrap(model, quantizer.target, dtype, skip)
    model.quantadapt = ModelState(  # type: ignore[assignment]
        source="" if module is not None else plan.model,
        backend=plan.backend,
        quantizer=quantizer,
        device=plan.device,
        dtype=dtype,
        skip_modules=skip,
        tokenizer=None if module is not None else load_tokenizer(plan.model),
    )
    return model


def load_tokenizer(source: str) -> Any:
    """Return the checkpoint's tokenizer, with a pad token. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        what = f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        raise ModelError(
            what, fix="put the tokenizer's files beside config.json", where=source
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    )
    made = planning.plan(spec, check_output=False)
    return _attach(model, record.name, made.adapter_options, seed)


def _attach(model: nn.Module, name: str, options: Mapping[str, Any], seed: int) -> PeftModel:
    from transformers import set_seed

    from .attaching import attach_adapter

    set_seed(seed)
    state = state_of(model)
    record = registry().adapter(name)
    peft_model = attach_adapter(model, record, options)
    state.adapter, state.adapter_options = record, dict(options)
    return peft_model


def train(
    model: PeftModel,
    data: str | Dataset | None = None,
    *,
    output: str | Path | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
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
        max_length: longest example in tokens, where `data` is read from a file.
        options: fields of TrainSpec, e.g. `max_steps=200`, `learning_rate=1e-4`.
    """
    import tempfile

    from .data import load_data
    from .training import train as train_

    spec = TrainSpec(**options)
    tokenizer = tokenizer or state_of(model).tokenizer
    if data is None or isinstance(data, str):
        wanted = DataSpec(path=data, max_length=max_length)
        data = load_data(wanted, _needed(tokenizer), seed=seed).train
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output) if output else Path(scratch)
        return train_(model, tokenizer, data, spec, output=folder, seed=seed, on_log=on_log)


def evaluate(
    model: nn.Module,
    data: str | Dataset | None = None,
    *,
    batch_size: int = 8,
    max_examples: int = 200,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Return perplexity, mean loss (nats per token) and token count on held-out data.

    Args:
        model: with or without an adapter.
        data: a file, all of it; a folder or hub id, its held-out part if it has one; a tokenized
            Dataset; or None for the demo's.
        batch_size: examples per forward pass.
        max_examples: use at most so many.
        tokenizer: needed for a live module only.
    """
    from .evaluation import perplexity

    tokenizer = tokenizer or state_of(model).tokenizer
    held_out = _held_out(data, tokenizer)
    part = held_out.select(range(min(len(held_out), max_examples)))
    found = perplexity(
        model, part, batch_size=batch_size, pad_token_id=getattr(tokenizer, "pad_token_id", None)
    )
    return {"perplexity": found.value, "loss": found.loss, "tokens": found.tokens}


def _held_out(data: str | Dataset | None, tokenizer: Any) -> Any:
    from .data import load_held_out

    if data is None or isinstance(data, str):
        return load_held_out(data, _needed(tokenizer))
    return data


def _needed(tokenizer: Any) -> Any:
    """Return the tokenizer. Raises QuantadaptError where a live module has none."""
    if tokenizer is None:
        fix = "pass tokenizer=..., or a tokenized Dataset as data"
        raise QuantadaptError("the model was made from a live module, without a tokenizer", fix=fix)
    return tokenizer


def save(model: nn.Module, path: str | Path, *, overwrite: bool = True) -> Path:
    """Save the adapter to `path/adapter`, or, without one, the quantized base to `path`.

    The adapter is a plain PEFT folder; `quantadapt.json` beside it records the base.

    Args:
        model: what `quantize`, `attach` or `load` returned.
        path: a folder; what an earlier `save` wrote there is replaced if `overwrite`.
        overwrite: only ever replaces a folder that `save` wrote.

    Raises:
        OutputError: the folder holds something else; it is untouched.
    """
    state = state_of(model)
    final = Path(path) / ADAPTER if state.adapter else Path(path)
    if final.is_dir() and any(final.iterdir()) and not (final / RECORD).exists():
        fix = "choose another folder, or empty it yourself"
        raise OutputError("it holds something that save did not write", fix=fix, where=str(final))
    with atomic_folder(final, overwrite=overwrite) as folder:
        if state.adapter:
            model.save_pretrained(str(folder))  # type: ignore[operator]
        else:
            state.quantizer.save(model, folder)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(folder))
        _write_record(folder, state)
    return final


def _write_record(folder: Path, state: ModelState) -> None:
    versions = environment(state.backend.requires)["versions"]
    record = state.record() | {"format": 1, "versions": versions}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(
    path: str | Path, *, base: str | nn.Module | None = None, device: str = "auto"
) -> nn.Module:
    """Load what `save`, `merge` or a run wrote.

    Args:
        path: a run folder, an adapter folder, or a saved quantized or merged model.
        base: put the adapter onto this base instead of the recorded one: a path, which is quantized
            as recorded, or a model from `quantize`. A base other than recorded warns.
        device: auto, cpu, cuda, ...

    Raises:
        ModelError: there is nothing to load.
    """
    folder = Path(path)
    adapter = next(
        (f for f in (folder / ADAPTER, folder) if (f / "adapter_config.json").exists()), None
    )
    if adapter is not None:
        return _load_adapter(adapter, base, device)
    if not (folder / "config.json").exists() and (folder / MERGED).is_dir():
        folder = folder / MERGED
    quantized = "quantization_config" in _config(folder)
    record = _read_record(folder)
    backend = record["backend"] if quantized else "none"
    return quantize(str(folder), backend, device=device, dtype=record["dtype"])


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = "there is neither an adapter nor a model here"
        raise ModelError(
            what, fix="pass a folder that a run or save wrote", where=str(folder)
        ) from None
    return config


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        what = f"{RECORD} is missing or unreadable, so nothing says which base this belongs to"
        fix = "load it with peft: PeftModel.from_pretrained(base, folder)"
        raise ModelError(what, fix=fix, where=str(folder)) from None
    return record


def _load_adapter(folder: Path, base: str | nn.Module | None, device: str) -> PeftModel:
    from peft import PeftModel

    record = _read_record(folder)
    if base is None or isinstance(base, str):
        model = quantize(
            base or record["base"],
            record["backend"],
            device=device,
            dtype=record["dtype"],
            skip_modules=record["skip_modules"],
            **record["options"],
        )
    else:
        model = base
    state = state_of(model)
    _warn_other_base(state, record)
    peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)  # type: ignore[arg-type]
    state.adapter = registry().adapter(record["adapter"])
    state.adapter_options = dict(record["adapter_options"])
    return peft_model


def _warn_other_base(state: ModelState, record: Mapping[str, Any]) -> None:
    now = state.record()
    differing = [
        f"{key} {record.get(key)!r}, now {now[key]!r}"
        for key in ("base", "backend", "options", "dtype")
        if record.get(key) != now[key]
    ]
    if differing:
        text = f"the adapter was trained on another base: {'; '.join(differing)}"
        warnings.warn(text, BaseMismatchWarning, stacklevel=4)


def merge(
    model: PeftModel,
    path: str | Path,
    *,
    kind: MergeKind = "dense",
    data: str | Dataset | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge the adapter into its base, check it on held-out tokens, and write `path/merged`.

    `model` itself stays as it is.

    Args:
        model: a base with an adapter.
        path: gets a folder `merged` that transformers loads.
        kind: "dense", or "requantize" to quantize the merged weights as the base was.
        data: held-out data for the check, as for `evaluate`; the demo's if missing.
        tokenizer: needed for a live module only.
        overwrite: replace an earlier `merged`.

    Returns:
        kind, kl (nats per token), top1 (share), perplexity_adapter, perplexity_merged.

    Raises:
        MergeRefused: a rule forbids it; names the rule, the reason and the way out.
    """
    from .merging import merged_model

    state = state_of(model)
    check_merge(state, kind)
    held_out = _held_out(data, tokenizer or state.tokenizer)
    merged = merged_model(model, kind)
    check = _check_merged(model, merged, held_out)
    _write_merged(merged, kind, Path(path) / MERGED, overwrite)
    return {"kind": kind, **check}


def check_merge(state: ModelState, kind: MergeKind) -> None:
    """Raise MergeRefused where a rule forbids this merge."""
    if state.adapter is None:
        raise MergeRefused([Problem("there is no adapter to merge", "attach and train one first")])
    cell = planning.make_cell(
        state.backend,
        state.quantizer,
        state.adapter,
        state.adapter_options,
        state.device,
        state.dtype_name,
    )
    if found := planning.merge_refusals(cell, state.backend, state.adapter, kind):
        raise MergeRefused(found)


def _check_merged(model: PeftModel, merged: nn.Module, data: Dataset) -> dict[str, float]:
    """Compare merged and unmerged model, token by token, on held-out data."""
    from .evaluation import compare, snapshot

    check = compare(snapshot(model, data), snapshot(merged, data))
    return {
        "kl": check.kl,
        "top1": check.top1,
        "perplexity_adapter": check.perplexity_reference,
        "perplexity_merged": check.perplexity_candidate,
    }


def _write_merged(merged: nn.Module, kind: MergeKind, final: Path, overwrite: bool) -> None:
    state = state_of(merged)
    needed = int(_mib(merged) * 2**20)
    with atomic_folder(final, overwrite=overwrite, needed=needed) as folder:
        if kind == "requantize":
            state.quantizer.save(merged, folder)
        else:
            merged.save_pretrained(str(folder))  # type: ignore[operator]
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(str(folder))
        _write_record(folder, state)


# The whole run ---------------------------------------------------------------------------------


def run(spec: Spec, *, listener: Listener | None = None, command: str = "") -> RunResult:
    """Plan, quantize, attach, train, evaluate, export; leave a run folder.

    Args:
        spec: what to do.
        listener: told about stages, training steps and notes as they happen.
        command: the command line that led here, for the report.

    Raises:
        PlanRefused: before anything is touched. OutputError: the run folder cannot be used.
    """
    return _Run(spec, listener or (lambda event, data: None), command).go()


class _Run:
    """One run: the plan, the folder, and the figures as they come in."""

    def __init__(self, spec: Spec, listener: Listener, command: str) -> None:
        self.listener = listener
        self.metrics: dict[str, Any] = {"command": command, "stages": {}, "perplexity": {}}
        with self.stage("plan") as done:
            self.plan = done(planning.plan(spec))
        self.spec = self.plan.spec

    def go(self) -> RunResult:
        import_requirements(self.plan.backend)
        self.check_training()
        data = self.read_data()
        self.folder = self.create_folder()
        try:
            tuned = self.work(data)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            with suppress(Exception):  # the first error is the one to tell
                self.finish("interrupted" if interrupted else "failed")
            raise
        self.finish("finished")
        return RunResult(tuned, self.folder.path, self.plan, self.metrics)

    def check_training(self) -> None:
        """Ask transformers whether it knows the optimizer and the schedule."""
        from .training import problems

        if found := problems(self.spec.train):
            raise PlanRefused(found)

    def work(self, data: Data) -> PeftModel:
        self.write_start()
        self.measure_unquantized(data)
        with self.stage("quantize") as done:
            model = done(quantize_plan(self.plan))
        self.measure_base(model, data)
        with self.stage("attach") as done:
            tuned: PeftModel = done(self.attach(model))
        with self.stage("train") as done:
            self.record_training(done(self.train(tuned, data)))
        with self.stage("evaluate") as done:
            self.measure_tuned(tuned, data)
            done(self.metrics["perplexity"])
        with self.stage("export") as done:
            done(self.export(tuned, data))
        return tuned

    def create_folder(self) -> RunFolder:
        spec = self.spec
        assert spec.output
        inputs = [p for p in (spec.model, spec.data.path, spec.data.eval_path) if p]
        return RunFolder.create(
            Path(spec.output), overwrite=spec.overwrite, resume=spec.train.resume, inputs=inputs
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[Any], Any]]:
        """Time a stage, announce it, and hand its value to the plugins."""
        self.listener("stage", {"name": name, "state": "start"})
        started = time.perf_counter()
        values: list[Any] = []

        def done(value: Any) -> Any:
            values.append(value)
            return value

        yield done
        seconds = time.perf_counter() - started
        self.metrics["stages"][name] = self.metrics["stages"].get(name, 0.0) + seconds
        self.listener("stage", {"name": name, "state": "done", "seconds": seconds})
        for value in values:
            registry().manager.hook.quantadapt_stage_done(stage=name, value=value)

    def write_start(self) -> None:
        self.folder.write_text("spec.yaml", self.spec.to_yaml())
        self.folder.write_json("plan.json", self.plan.to_dict())
        self.folder.write_json("environment.json", environment(self.plan.backend.requires))
        for note in self.plan.notes:
            self.listener("note", {"text": note})

    def read_data(self) -> Data:
        from .data import load_data

        self.tokenizer = load_tokenizer(self.plan.model)
        return load_data(self.spec.data, self.tokenizer, seed=self.spec.seed)

    def held_out(self, data: Data) -> Dataset:
        return data.eval.select(range(min(len(data.eval), self.spec.evaluate.max_examples)))

    def prompts(self, data: Data) -> list[Any]:
        return data.prompts[: self.spec.evaluate.samples]

    def perplexity(self, name: str, model: nn.Module, data: Data) -> float:
        from .evaluation import perplexity

        found = perplexity(
            model,
            self.held_out(data),
            batch_size=self.spec.evaluate.batch_size,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.metrics["perplexity"][name] = found.value
        self.listener("perplexity", {"name": name, "value": found.value})
        return found.value

    def measure_unquantized(self, data: Data) -> None:
        """Perplexity of the dense base, which is loaded for this alone and dropped again."""
        if not self.spec.evaluate.unquantized or self.plan.adopt:
            return
        from .loading import from_pretrained

        with self.stage("evaluate"):
            import torch

            model = from_pretrained(
                self.plan.model,
                dtype=getattr(torch, self.plan.dtype),
                device_map={"": self.plan.device},
            )
            self.metrics["size"] = {"dense_mib": _mib(model)}
            self.perplexity("unquantized", model, data)

    def measure_base(self, model: nn.Module, data: Data) -> None:
        with self.stage("evaluate"):
            self.metrics.setdefault("size", {})["quantized_mib"] = _mib(model)
            self.perplexity("quantized", model, data)
            self.before = self.answers(model, data)

    def answers(self, model: nn.Module, data: Data) -> list[str]:
        from .evaluation import greedy

        prompts = [prompt.text for prompt in self.prompts(data)]
        length = self.spec.evaluate.max_new_tokens
        return greedy(model, self.tokenizer, prompts, max_new_tokens=length) if prompts else []

    def attach(self, model: nn.Module) -> PeftModel:
        plan = self.plan
        tuned = _attach(model, plan.adapter.name, plan.adapter_options, self.spec.seed)
        targets = tuned.peft_config["default"].target_modules  # type: ignore[union-attr]
        found = sorted(targets) if isinstance(targets, (list, set)) else [targets]
        self.folder.write_json("plan.json", plan.to_dict() | {"target_modules": found})
        return tuned

    def train(self, model: PeftModel, data: Data) -> TrainResult:
        from .training import train as train_

        def on_log(entry: dict[str, Any]) -> None:
            self.folder.append_metric(entry)
            self.listener("log", entry)

        return train_(
            model,
            self.tokenizer,
            data.train,
            self.spec.train,
            output=self.folder.path,
            seed=self.spec.seed,
            on_log=on_log,
        )

    def record_training(self, result: TrainResult) -> None:
        names = ("steps", "seconds", "tokens", "peak_memory_gib", "resumed_from",
                 "trainable_parameters", "base_parameters")  # fmt: skip
        self.metrics["train"] = {name: getattr(result, name) for name in names}

    def measure_tuned(self, model: PeftModel, data: Data) -> None:
        self.perplexity("tuned", model, data)
        after = self.answers(model, data)
        self.metrics["samples"] = [
            {"prompt": p.text, "reference": p.reference, "before": b, "after": a}
            for p, b, a in zip(self.prompts(data), self.before, after, strict=True)
        ]

    def export(self, model: PeftModel, data: Data) -> dict[str, Any]:
        adapter = save(model, self.folder.path)
        files = (file for file in adapter.rglob("*.safetensors"))
        self.metrics["size"]["adapter_mib"] = sum(f.stat().st_size for f in files) / 2**20
        plan = self.plan
        if plan.merge == "never":
            kind = "refused" if plan.merge_refusals else "never"
            refused = [vars(problem) for problem in plan.merge_refusals]
            self.metrics["merge"] = {"kind": kind, "refusals": refused}
        else:
            self.metrics["merge"] = self.merge(model, data, plan.merge)
        return dict(self.metrics["merge"])

    def merge(self, model: PeftModel, data: Data, kind: MergeKind) -> dict[str, Any]:
        from .evaluation import gain_kept
        from .merging import merged_model

        merged = merged_model(model, kind)
        self.perplexity("merged", merged, data)
        check = _check_merged(model, merged, self.held_out(data))
        _write_merged(merged, kind, self.folder.path / MERGED, overwrite=True)
        found = self.metrics["perplexity"]
        kept = gain_kept(found["quantized"], found["tuned"], found["merged"])
        return {"kind": kind, **check, "gain_kept": kept}

    def finish(self, state: Literal["finished", "failed", "interrupted"]) -> None:
        """Write the figures and the report, also of a run that did not get to its end."""
        from .report import write_report

        self.folder.write_json("metrics.json", self.metrics)
        self.folder.set_state(state)
        write_report(self.folder)


def _mib(model: nn.Module) -> float:
    """Return the size of everything that a checkpoint of `model` holds, in MiB."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
