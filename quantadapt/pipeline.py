"""The pipeline: spec -> plan -> quantize -> attach -> train -> evaluate -> export.

`run` does all of it and leaves a run folder. Each stage takes what the one before returned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import planning
from .data.vocabulary import check_tokens
from .dependencies import import_requirements, in_turn
from .distributed.talking import PeerLost, peers_in_words, reduced, start, tell_end, told_end
from .distributed.world import as_launched, world
from .errors import (
    Interrupted,
    NumbersError,
    PlanRefused,
    QuantadaptError,
    RewardError,
    TrainingError,
)
from .evaluation.sizes import size_mib
from .evaluation.verdict import warnings_of
from .exporting.loading import load_base
from .exporting.manifest import BASE
from .exporting.saving import save, save_base
from .exporting.stage import export, merge_entry
from .exporting.tuned import Tuned
from .folders.metrics import add_figures, label, with_unit
from .folders.run_folder import RunFolder, UnwrittenFolder
from .planning.planned import Plan
from .planning.share import BEGINNING
from .planning.stage import without_merges
from .quantizing.dense import skip_for
from .quantizing.examples import calibration_examples
from .quantizing.stage import AT_RANDOM, quantize_plan, with_config
from .quantizing.state import state_of
from .quantizing.tokenizer import load_tokenizer
from .registry.blame import blamed, blaming_plugins
from .registry.discovery import registry
from .remote_code import as_the_spec_says
from .showing.python import display
from .showing.quietly import quietly
from .spec import Spec
from .stages import attach_planned, given_of

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from .data.reading import Data
    from .evaluation.gain import TokenLosses
    from .protocols import Figure, Task
    from .quantizing.examples import Examples
    from .training.stage import TrainResult

logger = logging.getLogger(__name__)

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its data, to show progress: "stage", "figures", "log", "validation",
"export", "note" or "warning"."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run leaves: the tuned model, its folder and the figures in `metrics.json`."""

    model: PeftModel
    folder: Path
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        words = []
        for evaluation, figures in self.metrics.get("evaluations", {}).items():
            name, figure = next(iter(figures.items()))
            found = {
                model: with_unit(value, figure["unit"], "{:.4g}".format)
                for model, value in figure["values"].items()
                if value is not None
            }
            if {"quantized", "tuned"} <= found.keys():
                what = label(evaluation, name)
                words.append(f"{what} {found['quantized']} to {found['tuned']}")
        words += [f"warning: {text}" for text in self.metrics.get("warnings", [])]
        return f"<RunResult {str(self.folder)!r}{''.join(f'; {word}' for word in words)}>"


@in_turn
@blaming_plugins
@as_the_spec_says
def run(
    spec: Spec | Plan,
    *,
    listener: Listener | None = None,
    command: str = "",
    verbose: bool | None = None,
) -> RunResult:
    """Plan, quantize, attach, train, evaluate, export; leave a run folder.

    Args:
        spec: what to do; a plan that was made of one is carried out as it is.
        listener: told about stages, training steps and notes as they happen.
        command: the command line that led here, for the report.
        verbose: whether to show progress; by default on a terminal and in a notebook, where there
            is no `listener`.

    Raises:
        PlanRefused: before anything is touched. OutputError: the run folder cannot be used.
    """
    with display(False if listener and verbose is None else verbose) as shown, quietly():

        def told(event: str, data: Mapping[str, Any]) -> None:
            shown(event, data)
            if listener is not None:
                listener(event, data)

        return _Run(spec, told, command).go()


def meet(plan: Plan) -> None:
    """Join the other processes. Raises TrainingError, in all, if they planned something else."""
    mine = start(plan.device)
    if mine.size == 1:
        return
    import torch

    sharding = reduced(float(plan.parallel == "fsdp"), torch.device(plan.device), "sum")
    if sharding not in (0, mine.size):
        what = "some processes would shard the base and some not, because their GPUs differ"
        raise TrainingError(what, fix="set train.parallel to fsdp or ddp", where="train.parallel")


class _Run:
    """One run: the plan, the folder, and the figures as they come in."""

    def __init__(self, spec: Spec | Plan, listener: Listener, command: str) -> None:
        self.listener = listener
        self.metrics: dict[str, Any] = {"command": command, "stages": {}, "evaluations": {}}
        self.metrics["failed_evaluations"] = {}
        self.found: dict[str, dict[str, Mapping[str, Figure]]] = {}
        self.world = world()
        self.started = time.monotonic()
        with self.stage("plan") as done:
            if isinstance(spec, Spec):
                spec = planning.plan(as_launched(spec), check_output=self.world.is_main)
            self.plan: Plan = done(with_config(spec))
        self.spec = self.plan.spec

    def go(self) -> RunResult:
        from .training.stopping import Stop

        import_requirements(self.plan.backend)
        with Stop(self.spec.train.max_time, since=self.started).listening() as self.stop:
            return self.listened()

    def listened(self) -> RunResult:
        """Do the run, while signals are obeyed."""
        self.check()
        data = self.read_data()
        self.examples = self.calibration(data)
        self.stop.hold()  # from here on the folder says how the run has ended
        self.folder = self.create_folder()
        with self.folder:
            try:
                self.stop.obey()
                with peers_in_words():
                    tuned = self.work(data)
                self.stop.hold()
            except BaseException as error:
                self.stop.hold()
                with suppress(Exception):  # the first error is the one to tell
                    if isinstance(error, Interrupted):
                        tell_end(error.exit_code)
                    elif isinstance(error, PeerLost):  # for it was told to end, perhaps
                        self.stop.follow(told_end())
                told = isinstance(error, PeerLost) and self.stop.signalled
                interrupted = told or isinstance(error, KeyboardInterrupt)
                with suppress(Exception):
                    self.finish("interrupted" if interrupted else "failed")
                if told:
                    self.stop.obey()
                raise
            self.finish("finished")
        return RunResult(tuned, self.folder.path, self.plan, self.metrics)

    def check(self) -> None:
        """Refuse what the plan cannot know and shows before any weight is loaded: models, schedules
        and optimizers that transformers lacks, layers that are missing or cannot be quantized."""
        from .adapting.stage import check_adapter
        from .loading.heads import with_head
        from .loading.reading import read_config
        from .training.stage import problems

        found = problems(self.spec.train)
        skip = None
        with with_head(self.plan.task.head):
            read_config(self.plan.model)
            try:
                if not self.plan.adopt:
                    skip = skip_for(self.plan)
            except PlanRefused as error:
                found += error.problems
            try:
                self.plan = without_merges(self.plan, check_adapter(self.plan, skip))
            except PlanRefused as error:
                found += error.problems
        if found:
            raise PlanRefused(found)

    def work(self, data: Data) -> PeftModel:
        self.write_start()
        self.measure_unquantized(data)
        with self.stage("quantize") as done:
            model = done(self.quantize(data.labels))
            for note in state_of(model).notes:
                if note.startswith(BEGINNING):
                    self.listener("detail", {"text": note.removeprefix(BEGINNING).lstrip()})
                elif note.startswith(AT_RANDOM):
                    self.listener("note", {"text": note})
        self.measure_base(model, data)
        with self.stage("attach") as done:
            tuned: PeftModel = done(self.attach(model))
        with self.stage("train") as done:
            self.record_training(done(self.train(tuned, data)))
            self.save(tuned)
            self.stop.obey(self.plan.device)  # a signal that came in training
        with self.stage("evaluate") as done:
            self.measure_tuned(tuned, data)
            done(self.metrics["evaluations"])
        with self.stage("export") as done:
            done(self.export(tuned, data))
        return tuned

    def create_folder(self) -> RunFolder:
        spec = self.spec
        assert spec.output
        if not self.world.is_main:
            return UnwrittenFolder(Path(spec.output).expanduser())
        return RunFolder.create(
            Path(spec.output),
            overwrite=spec.overwrite,
            resume=spec.train.resume,
            inputs=spec.inputs,
        )

    @property
    def answers_prompts(self) -> bool:
        """Whether this process does: the first, or all, whose shares only work together."""
        return self.world.is_main or self.plan.parallel == "fsdp"

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
            self.tell_plugins(name, value)

    def tell_plugins(self, stage: str, value: Any) -> None:
        """Call `quantadapt_stage_done`. A plugin that fails here must not cost the run."""
        for implementation in registry().manager.hook.quantadapt_stage_done.get_hookimpls():
            given = {"stage": stage, "value": value}
            try:
                implementation.function(*(given[name] for name in implementation.argnames))
            except Exception as error:
                who = implementation.plugin_name
                text = f"plugin {who!r} failed in quantadapt_stage_done({stage!r}): {error!r}"
                self.listener("note", {"text": text})

    def write_start(self) -> None:
        self.folder.note_exports(planned.folder for planned in self.plan.exports)
        # Without what only concerned this folder, so that the file runs again as it stands; trust
        # in code is asked for again: the folder may come from elsewhere then.
        train = self.spec.train.model_copy(update={"resume": False})
        anew = {"overwrite": False, "force_base": False, "trust_remote_code": False, "train": train}
        again = self.plan.resolved.model_copy(update=anew)
        self.folder.write_text("spec.yaml", again.to_yaml())
        self.folder.write_json("plan.json", self.plan.to_dict())
        self.folder.write_environment(self.plan.backend.requires)
        for note in self.plan.notes:
            self.listener("note", {"text": note})

    def read_data(self) -> Data:
        self.tokenizer = load_tokenizer(self.plan.model)
        task: Task = self.plan.task
        data = task.read_for(self.spec, self.tokenizer, processes=self.world.size)
        for part in (data.train, data.eval):
            check_tokens(part, (self.plan.config or {}).get("vocab_size"), self.tokenizer)
        if data.report.files:  # a task that reads for itself may count nothing
            self.metrics["data"] = data.report.to_dict()
        for text in data.report.words():
            self.listener("note", {"text": f"data: {text}"})
        return data

    def held_out(self, data: Data) -> Dataset:
        return data.eval.select(range(min(len(data.eval), self.spec.evaluate.max_examples)))

    def prompts(self, data: Data) -> list[Any]:
        return data.prompts[: self.spec.evaluate.samples]

    def measure(self, name: str, model: nn.Module, data: Data, *, split: bool = False) -> None:
        """Measure `model`; with `split`, all processes have to, each with its part of the data."""
        from .evaluation.stage import measure

        spec = self.spec.evaluate
        given = replace(
            given_of(data.held_out, self.tokenizer, spec.max_examples),
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            split=split,
        )
        failed = self.metrics["failed_evaluations"]
        for evaluation, evaluator in self.plan.evaluators.items():
            if evaluation in failed or not evaluator.wants(name):
                continue
            try:
                found = measure(evaluation, evaluator, model, given)
            except NumbersError:
                raise  # nothing good can follow
            except QuantadaptError as error:
                if split and self.world.size > 1:  # the others may be waiting for this process
                    raise
                learns_from_it = isinstance(error, RewardError) and self.plan.task.generates
                if learns_from_it and name in ("unquantized", "quantized"):
                    raise  # training would end of it, too, and later
                told = blamed(error.__cause__) or error
                failed[evaluation] = f"{told.problems[0].what}, on the {name} model"
                text = f"evaluation {evaluation!r} is left out from here on: {failed[evaluation]}"
                logger.warning(text, exc_info=True)
                self.listener("note", {"text": text})
                continue
            earlier = self.found.setdefault(evaluation, {})
            add_figures(self.metrics, evaluation, name, found, earlier)
            earlier[name] = found
            self.listener("figures", {"evaluation": evaluation, "model": name, "figures": found})

    def measure_unquantized(self, data: Data) -> None:
        """Measure the dense base, which is loaded for this alone and dropped again."""
        asked = any(evaluator.wants("unquantized") for evaluator in self.plan.evaluators.values())
        wanted = asked and self.spec.evaluate.unquantized and not self.plan.adopt
        if not wanted or not self.world.is_main or self.plan.parallel == "fsdp":
            return
        from .loading.accounting import expecting
        from .loading.heads import with_head
        from .loading.reading import from_pretrained

        with self.stage("evaluate"):
            import torch

            expected = expecting(self.spec.new_modules, self.spec.unused_modules)
            with with_head(self.plan.task.head, data.labels), expected:
                model = from_pretrained(
                    self.plan.model,
                    dtype=getattr(torch, self.plan.dtype),
                    device_map={"": self.plan.device},
                )
            self.metrics["size"] = {"dense_mib": size_mib(model)}
            self.measure("unquantized", model, data)

    def calibration(self, data: Data) -> Examples | None:
        """Choose what a backend that calibrates is shown."""
        return self.calibration_examples(data) if self.plan.calibrates else None

    def calibration_examples(self, data: Data) -> Examples:
        return calibration_examples(self.spec, self.tokenizer, lambda: data.train)

    def quantize(self, labels: Sequence[str]) -> nn.Module:
        """Quantize the base. One that is calibrated here is kept in the run folder, because the
        spec alone could not make it again; a resumed run and the other processes load it."""
        if not self.plan.calibrates:
            meet(self.plan)
            return quantize_plan(self.plan, labels=labels)
        saved = self.folder.path / BASE
        resumed = self.spec.train.resume and saved.exists()
        if self.world.is_main and not resumed:
            plan = replace(self.plan, parallel="none")
            model = quantize_plan(plan, calibration=self.examples, labels=labels)
            save_base(model, state_of(model), saved)
            if self.world.size == 1:
                return model
        # Only now: vendors take a process group for an invitation to calibrate together.
        meet(self.plan)
        return self.placed(load_base(saved, self.plan.device))

    def placed(self, model: nn.Module) -> nn.Module:
        """Shard or stream a base that came whole, where the plan says so."""
        if self.plan.stream != "none":
            from .streaming import stream

            state_of(model).stream = self.plan.stream
            folder = self.plan.spec.train.stream_folder
            return stream(model, self.plan.stream, folder=folder)
        if self.plan.parallel != "fsdp":
            return model
        from .sharding import shard

        return shard(model)

    def measure_base(self, model: nn.Module, data: Data) -> None:
        with self.stage("evaluate"):
            self.metrics.setdefault("size", {})["quantized_mib"] = size_mib(model)
            self.measure("quantized", model, data, split=True)
            self.before = self.answers(model, data)
            self.base_losses = self.losses_for_merges(model, data)

    def losses_for_merges(self, model: nn.Module, data: Data) -> TokenLosses | None:
        """Return the losses of the base, which training may change, where a merge is planned."""
        from .evaluation.gain import token_losses
        from .evaluation.predictions import predicts_tokens

        merges = any(e.exporter.merges and not e.refusals for e in self.plan.exports)
        if not (merges and self.world.is_main and predicts_tokens(model)):
            return None
        return token_losses(model, self.held_out(data))

    def answers(self, model: nn.Module, data: Data) -> list[str]:
        from .generation import greedy

        prompts = self.prompts(data) if self.answers_prompts else []
        length = self.spec.evaluate.max_new_tokens
        return greedy(model, self.tokenizer, prompts, max_new_tokens=length) if prompts else []

    def attach(self, model: nn.Module) -> PeftModel:
        plan = self.plan
        tuned = attach_planned(model, state_of(model), plan)
        state_of(tuned).max_length = self.spec.data.max_length
        targets = tuned.peft_config["default"].target_modules  # type: ignore[union-attr]
        found = sorted(targets) if isinstance(targets, (list, set)) else [targets]
        # What was quantized says more exactly how much than the plan could.
        planned = [note for note in plan.notes if not note.startswith(BEGINNING)]
        base = state_of(tuned).fingerprint  # of a hub id it is known only now
        more: dict[str, Any] = {
            "target_modules": found,
            "notes": [*planned, *state_of(tuned).notes],
        }
        more["fingerprint"] = base and base.model_dump()
        self.folder.write_json("plan.json", plan.to_dict() | more)
        return tuned

    def train(self, model: PeftModel, data: Data) -> TrainResult:
        from .training.stage import train as train_

        def on_log(entry: dict[str, Any]) -> None:
            self.folder.append_metric(entry)
            self.listener("validation" if "eval_loss" in entry else "log", entry)

        return train_(
            model,
            self.tokenizer,
            data.train,
            self.spec.train,
            task=self.plan.task,
            output=self.folder.path,
            seed=self.spec.seed,
            held_out=self.held_out(data),
            on_log=on_log,
            on_note=lambda text: self.listener("note", {"text": text}),
            stop=self.stop,
        )

    def record_training(self, result: TrainResult) -> None:
        # That of answers of its own, which change as it learns, does not say how well it does.
        self.losses = [] if self.plan.task.generates else result.losses
        names = ("steps", "validation", "best_step", "kept_step", "stopped_early",
                 "seconds", "tokens", "peak_memory_gib", "resumed_from",
                 "trainable_parameters", "base_parameters", "dequantize_share",
                 "rounding_share")  # fmt: skip
        self.metrics["train"] = {name: getattr(result, name) for name in names}
        self.metrics["train"] |= {"processes": self.world.size, "parallel": self.plan.parallel}
        self.metrics["train"]["unit"] = self.plan.task.unit
        self.metrics["train"]["memory"] = self.memory_figures(result)
        if result.packed is not None:
            self.metrics["train"]["packed"] = result.packed._asdict()
        if result.streamed is not None:
            self.metrics["train"]["streamed"] = result.streamed._asdict()
            self.listener("note", {"text": result.streamed.words})

    def memory_figures(self, result: TrainResult) -> dict[str, Any]:
        """Return how memory was used, and on a GPU what is predicted for just that."""
        batch = self.spec.train.per_device_train_batch_size
        figures = asdict(result.setting) | {"layers": result.layers, "batch": batch}
        if self.plan.memory is not None and self.plan.device.startswith("cuda"):
            predicted = self.plan.memory.peak_gib(result.setting, result.longest)
            figures |= {"predicted_gib": predicted, "longest": result.longest}
        return figures

    def measure_tuned(self, model: PeftModel, data: Data) -> None:
        self.measure("tuned", model, data, split=True)
        self.metrics["warnings"] = warnings_of(self.metrics, self.losses)
        for text in self.metrics["warnings"]:
            self.listener("warning", {"text": text})
        if not self.answers_prompts:
            return
        after = self.answers(model, data)
        self.metrics["samples"] = [
            {"prompt": p.text, "reference": p.reference, "before": b, "after": a}
            for p, b, a in zip(self.prompts(data), self.before, after, strict=True)
        ]

    def save(self, model: PeftModel) -> None:
        """Save the adapter as soon as it is trained: nothing that fails later may lose it."""
        if not self.world.is_main:
            return
        # A base that was calibrated is there since it was quantized.
        root, base = self.folder.path, not self.plan.calibrates
        self.saved = save(model, root, base=base, overwrite=self.spec.train.resume)
        files = (file for file in self.saved.rglob("*.safetensors"))
        self.metrics["size"]["adapter_mib"] = sum(f.stat().st_size for f in files) / 2**20

    def export(self, model: PeftModel, data: Data) -> dict[str, Any]:
        """Write what is planned. An export that fails keeps no other from being written; its error
        is raised at the end."""
        found: dict[str, Any] = {}
        if not self.world.is_main:
            return found
        tuned = Tuned(
            model,
            saved=self.saved,
            data=lambda _: self.held_out(data),
            examples=lambda _: self.examples or self.calibration_examples(data),
            before=self.base_losses,
            measure=lambda merged: self.measure("merged", merged, data),
            metrics=self.metrics,
        )
        errors = []
        for planned in self.plan.exports:
            found[planned.name], error = export(planned, tuned, self.folder.path)
            errors += [error] if error else []
            self.listener("export", {"name": planned.name, **found[planned.name]})
        self.metrics |= {"exports": found, "merge": merge_entry(self.plan, found)}
        if errors:
            raise errors[0]
        return found

    def finish(self, state: Literal["finished", "failed", "interrupted"]) -> None:
        """Write the figures and the report, also of a run that did not get to its end."""
        from .reporting.page import write_report

        if not self.world.is_main:
            return
        self.folder.write_json("metrics.json", self.metrics)
        self.folder.set_state(state)
        write_report(self.folder)
