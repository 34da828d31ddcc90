"""The pipeline: spec -> plan -> quantize -> attach -> train -> evaluate -> export.

`run` does all of it and leaves a run folder. Each stage takes what the one before returned.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import planning
from ..data.positions import check_lengths
from ..data.vocabulary import check_tokens
from ..dependencies import import_requirements, in_turn
from ..distributed.talking import PeerLost, peers_in_words, tell_end, told_end
from ..distributed.world import as_launched, world
from ..errors import Interrupted, PlanRefused
from ..exporting.manifest import BASE
from ..exporting.saving import save
from ..exporting.stage import export, merge_entry
from ..exporting.tuned import Tuned
from ..folders.run_folder import RunFolder, UnwrittenFolder
from ..planning.planned import Plan
from ..planning.reusing import base_in, making_of
from ..planning.share import BEGINNING
from ..planning.stage import without_merges
from ..quantizing.dense import skip_for
from ..quantizing.examples import calibration_examples
from ..quantizing.stage import AT_RANDOM, with_config
from ..quantizing.state import state_of
from ..quantizing.tokenizer import load_tokenizer
from ..registry.blame import blaming_plugins
from ..registry.discovery import registry
from ..remote_code import as_the_spec_says
from ..showing.python import display
from ..showing.quietly import quietly
from ..spec import Spec
from ..stages import attach_planned
from .base import quantized_base
from .measuring import Listener, Measuring
from .recording import of_training
from .result import RunResult

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from ..data.reading import Data
    from ..protocols import Task
    from ..quantizing.examples import Examples
    from ..training.stage import TrainResult


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


class _Run:
    """One run: the plan, the folder, and the figures as they come in."""

    def __init__(self, spec: Spec | Plan, listener: Listener, command: str) -> None:
        self.listener = listener
        self.metrics: dict[str, Any] = {"command": command, "stages": {}, "evaluations": {}}
        self.metrics["failed_evaluations"] = {}
        self.world = world()
        self.started = time.monotonic()
        with self.stage("plan") as done:
            if isinstance(spec, Spec):
                spec = self.planned(as_launched(spec))
            self.plan: Plan = done(with_config(spec))
        self.spec = self.plan.spec

    def planned(self, spec: Spec) -> Plan:
        """Plan; what is refused is told with what transformers alone can judge."""
        from ..training.checking import problems

        try:
            return planning.plan(spec, check_output=self.world.is_main)
        except PlanRefused as error:
            if found := problems(spec.train):
                raise PlanRefused([*error.problems, *found]) from None
            raise

    def go(self) -> RunResult:
        from ..training.stopping import Stop

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
        from ..adapting.stage import check_adapter
        from ..loading.heads import with_head
        from ..loading.reading import read_config
        from ..training.checking import problems

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
        self.measuring = Measuring(self.plan, data, self.tokenizer, self.metrics, self.listener)
        if self.measuring.wants_unquantized:
            with self.stage("evaluate"):
                self.measuring.measure_unquantized()
        with self.stage("quantize") as done:
            saved = self.folder.path / BASE
            tell = self.note
            model = done(quantized_base(self.plan, saved, self.examples, data.labels, tell))
            self.record_making(saved)
            for note in state_of(model).notes:
                if note.startswith(BEGINNING):
                    self.listener("detail", {"text": note.removeprefix(BEGINNING).lstrip()})
                elif note.startswith(AT_RANDOM):
                    self.listener("note", {"text": note})
        with self.stage("evaluate"):
            self.measuring.measure_base(model)
        with self.stage("attach") as done:
            tuned: PeftModel = done(self.attach(model))
        with self.stage("train") as done:
            self.record_training(done(self.train(tuned, data)))
            self.save(tuned)
            self.stop.obey(self.plan.device)  # a signal that came in training
        with self.stage("evaluate") as done:
            self.measuring.measure_tuned(tuned, self.losses)
            done(self.metrics["evaluations"])
        with self.stage("export") as done:
            done(self.export(tuned, data))
        return tuned

    def note(self, text: str) -> None:
        self.listener("note", {"text": text})

    def record_making(self, saved: Path) -> None:
        """Note what calibrating the base took, here or in the run that it was taken from."""
        making = making_of(saved) if self.world.is_main and base_in(saved) else None
        if making is not None:
            self.metrics["quantize"] = making.model_dump(exclude={"of"})

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
        anew = {"overwrite": False, "force_base": False, "reuse_base": None}
        anew |= {"trust_remote_code": False, "train": train}
        again = self.plan.resolved.model_copy(update=anew)
        self.folder.write_text("spec.yaml", again.to_yaml())
        self.folder.write_json("plan.json", self.plan.to_dict())
        self.folder.write_environment(self.plan.backend.requires)
        for note in self.plan.notes:
            self.listener("warning" if note.startswith(BEGINNING) else "note", {"text": note})

    def read_data(self) -> Data:
        self.tokenizer = load_tokenizer(self.plan.model)
        task: Task = self.plan.task
        data = task.read_for(self.spec, self.tokenizer, processes=self.world.size)
        for part in (data.train, data.eval):
            check_tokens(part, (self.plan.config or {}).get("vocab_size"), self.tokenizer)
            check_lengths(part, self.plan.config or {})
        if data.report.files:  # a task that reads for itself may count nothing
            self.metrics["data"] = data.report.to_dict()
        for text in data.report.words():
            self.listener("note", {"text": f"data: {text}"})
        return data

    def calibration(self, data: Data) -> Examples | None:
        """Choose what a backend that calibrates is shown."""
        return self.calibration_examples(data) if self.plan.calibrates else None

    def calibration_examples(self, data: Data) -> Examples:
        return calibration_examples(self.spec, self.tokenizer, lambda: data.train)

    def attach(self, model: nn.Module) -> PeftModel:
        from ..adapting.expert_names import StacksWarning

        plan = self.plan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StacksWarning)  # `check` has told of names
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
        from ..training.stage import train as train_

        def on_log(entry: dict[str, Any]) -> None:
            self.folder.append_metric(entry)
            self.listener("validation" if "eval_loss" in entry else "log", entry)

        def on_note(text: str) -> None:
            if text not in self.plan.notes:  # it has been told
                self.note(text)

        return train_(
            model,
            self.tokenizer,
            data.train,
            self.spec.train,
            task=self.plan.task,
            output=self.folder.path,
            seed=self.spec.seed,
            held_out=self.measuring.held_out,
            on_log=on_log,
            on_note=on_note,
            stop=self.stop,
        )

    def record_training(self, result: TrainResult) -> None:
        # That of answers of its own, which change as it learns, does not say how well it does.
        self.losses = [] if self.plan.task.generates else result.losses
        self.metrics["train"] = of_training(result, self.plan, self.world.size)
        if result.streamed is not None:
            self.note(result.streamed.words)

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
            data=lambda _: self.measuring.held_out,
            examples=lambda _: self.examples or self.calibration_examples(data),
            before=self.measuring.base_losses,
            measure=lambda merged: self.measuring.measure("merged", merged),
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
        from ..reporting.page import write_report

        if not self.world.is_main:
            return
        self.folder.write_json("metrics.json", self.metrics)
        self.folder.set_state(state)
        write_report(self.folder)
