"""The evaluation `tasks`: benchmarks of lm-evaluation-harness, on the model as it is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ..dependencies import errors_only, unchanged_process
from ..errors import ModelError, Problem
from ..evaluation.predictions import evaluating
from ..generation.rows import base_of
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from ..remote_code import refusal, trusted

if TYPE_CHECKING:
    from torch import nn

_SHARES = ("acc", "exact_match", "em", "pass", "f1", "strict", "accuracy")
"""How metrics begin that are shares of one."""


class Tasks(Evaluator):
    """Tasks of lm-evaluation-harness, with its prompts, metrics and standard errors.

    All models of a run answer the same questions, so that the standard error of a change is that of
    the differences, question by question.
    """

    tasks: tuple[str, ...] = Field(
        min_length=1, description="names of tasks, groups and tags, e.g. [mmlu, gsm8k]"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; by default each task's own number"
    )
    limit: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="only the first so many questions of each task; below 1: this share of them",
    )
    include_path: tuple[str, ...] = Field(
        (),
        description="folders with files of other tasks, which are code: it needs trust_remote_code",
    )
    apply_chat_template: bool = Field(
        False, description="write questions by the tokenizer's chat template"
    )
    fewshot_as_multiturn: bool = Field(
        True, description="with it, write examples as turns of the chat, not as one text"
    )
    system_instruction: str | None = Field(None, description="what stands before all of it")
    gen_kwargs: dict[str, Any] = Field(
        {}, description="how answers are made, in place of what the tasks say"
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="longest question with answer, in tokens; by default the model's",
    )
    bootstrap_iters: int = Field(
        100_000, ge=0, description="resamplings for the standard errors of what is no mean"
    )
    confirm_run_unsafe_code: bool = Field(
        False, description="let tasks such as humaneval run the code that the model writes"
    )

    @field_validator("tasks", "include_path", mode="before")
    @classmethod
    def _from_words(cls, value: Any) -> Any:
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, list | tuple):
            return value
        return [word.strip() if isinstance(word, str) else word for word in words]

    def refusals(self) -> Iterable[Problem]:
        """Return which tasks there are none of, or lack their data, and folders that are not
        trusted: lm-eval runs the functions and the templates in them."""
        from .task_files import task_problems

        untrusted = () if trusted() else self.include_path
        return [
            *(refusal(folder, "files of tasks are code") for folder in untrusted),
            *task_problems(self.tasks, self.include_path, confirmed=self.confirm_run_unsafe_code),
        ]

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure each task; what is asked for comes first, parts of groups after it."""
        results = self.results(model, given)
        return dict(_figures(results, self.tasks))

    def results(self, model: nn.Module, given: Given) -> dict[str, Any]:
        """Return what lm-eval's `evaluate` does, with the answers to each question.

        Raises:
            ModelError: the model has no tokenizer, no chat template where that is asked for, or
                predicts no text.
        """
        self._check(model, given)
        with unchanged_process():
            from lm_eval.evaluator import evaluate

            from .live_model import LiveModel, seeded
        with errors_only("lm_eval"), seeded(), evaluating(model):
            live = LiveModel(
                model, given.tokenizer, batch_size=given.batch_size, max_length=self.max_length
            )
            found: dict[str, Any] = evaluate(
                live,
                self._loaded(),
                limit=self.limit,
                bootstrap_iters=self.bootstrap_iters,
                system_instruction=self.system_instruction,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                confirm_run_unsafe_code=self.confirm_run_unsafe_code,
            )
        return found

    def _check(self, model: nn.Module, given: Given) -> None:
        tokenizer = given.tokenizer
        if tokenizer is None:
            fix = "pass the model's tokenizer"
            raise ModelError("tasks need a tokenizer, and the model has none", fix=fix)
        if self.apply_chat_template and not tokenizer.chat_template:
            fix = "leave apply_chat_template out"
            raise ModelError("the tokenizer has no chat template", fix=fix)
        if not getattr(base_of(model), "can_generate", lambda: False)():
            what = f"{type(base_of(model)).__name__} does not generate text"
            raise ModelError(what, fix="use a causal language model")

    def _loaded(self) -> Any:
        """Return the tasks as lm-eval's `simple_evaluate` prepares them."""
        from .task_files import manager_of

        loaded = manager_of(self.tasks, self.include_path).load(list(self.tasks))
        for task in loaded["tasks"].values():
            if self.gen_kwargs and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", dict(self.gen_kwargs), update=True)
            own = task.get_config("num_fewshot")
            if own is None or (self.num_fewshot is not None and own != 0):
                task.set_config("num_fewshot", self.num_fewshot or 0)
            task.set_fewshot_seed(seed=1234)
        return loaded


def _figures(results: Mapping[str, Any], asked: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """Yield the metrics of all tasks and groups with their names."""
    found = {**results["results"], **results.get("groups", {})}
    first = [name for name in asked if name in found]
    for name in dict.fromkeys([*first, *found]):
        better = results["higher_is_better"].get(name, {})
        for key, value in found[name].items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = found[name].get(f"{metric}_stderr,{how}")
            label = f"{name} {metric}" + (f" ({how})" if how != "none" else "")
            yield (
                label,
                Figure(
                    float(value),
                    "share" if metric.startswith(_SHARES) else "",
                    _direction(better.get(metric)),
                    float(error) if isinstance(error, Real) and math.isfinite(error) else None,
                    _scores(results, name, metric, how, float(value)),
                ),
            )


def _direction(higher: bool | None) -> Literal["higher", "lower", ""]:
    return "" if higher is None else "higher" if higher else "lower"


def _scores(
    results: Mapping[str, Any], name: str, metric: str, how: str, mean: float
) -> tuple[float, ...]:
    """Return what each question scored, where `mean` is the mean of that; else nothing."""
    found: list[float] = []
    for leaf in _leaves(results, name):
        rows = [row for row in results["samples"].get(leaf, ()) if row["filter"] == how]
        rows = [row for row in rows if metric in row]  # parts of a group need not have it
        values = [row[metric] for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        if not all(isinstance(value, Real) for value in values):
            return ()
        found += [float(value) for value in values]
    if not found or abs(math.fsum(found) / len(found) - mean) > 1e-9 * max(1, abs(mean)):
        return ()
    return tuple(found)


def _leaves(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the tasks that a group consists of, or the task itself."""
    parts = results.get("group_subtasks", {}).get(name)
    if not parts:
        yield name
        return
    for part in parts:
        yield from _leaves(results, part)


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "benchmarks of lm-evaluation-harness, such as mmlu and gsm8k, with standard errors"
    requires, extra = ("lm-eval>=0.4.12",), "quantadapt[tasks]"
    return [Evaluation("tasks", summary, Tasks, requires=requires, extra=extra)]
