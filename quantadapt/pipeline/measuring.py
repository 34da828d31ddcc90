"""What a run measures of its models: before quantization, quantized, tuned, merged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..distributed.talking import told_main
from ..distributed.world import world
from ..errors import NumbersError, QuantadaptError, RewardError
from ..evaluation.held_out import given_of
from ..evaluation.sizes import size_mib
from ..evaluation.verdict import warnings_of
from ..folders.metrics import add_figures
from ..planning.planned import Plan
from ..registry.blame import blamed

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ..data.reading import Data
    from ..evaluation.gain import TokenLosses
    from ..protocols import Figure

logger = logging.getLogger(__name__)

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its data, to show progress: "stage", "figures", "log", "validation",
"export", "note" or "warning"."""


class Measuring:
    """Measures the models of one run, all on the same held-out data.

    Args:
        plan, data, tokenizer: the run's.
        metrics: what becomes `metrics.json`; the figures come into it.
        listener: told of the figures, and of evaluations that are left out.
    """

    def __init__(
        self, plan: Plan, data: Data, tokenizer: Any, metrics: dict[str, Any], listener: Listener
    ) -> None:
        self.plan, self.data, self.tokenizer = plan, data, tokenizer
        self.metrics, self.listener = metrics, listener
        self.world = world()
        self.found: dict[str, dict[str, Mapping[str, Figure]]] = {}
        self.before: list[str] = []
        self.base_losses: TokenLosses | None = None

    @property
    def held_out(self) -> Dataset:
        """The examples that are measured on."""
        held_out = self.data.eval
        return held_out.select(range(min(len(held_out), self.plan.spec.evaluate.max_examples)))

    @property
    def prompts(self) -> list[Any]:
        """Those that are answered before and after."""
        return self.data.prompts[: self.plan.spec.evaluate.samples]

    @property
    def answers_prompts(self) -> bool:
        """Whether this process does: the first, or all, whose shares only work together."""
        return self.world.is_main or self.plan.parallel == "fsdp"

    @property
    def wants_unquantized(self) -> bool:
        """Whether this process is to measure the base before it is quantized."""
        asked = any(evaluator.wants("unquantized") for evaluator in self.plan.evaluators.values())
        wanted = asked and self.plan.spec.evaluate.unquantized and not self.plan.adopt
        return wanted and self.world.is_main and self.plan.parallel != "fsdp"

    def measure(self, name: str, model: nn.Module, *, split: bool = False) -> None:
        """Measure `model`, which the figures call `name`.

        An evaluation that fails is told, and left out from there on.

        Args:
            split: all processes have to, each with its part of the data.
        """
        from ..evaluation.stage import measure

        spec = self.plan.spec.evaluate
        given = replace(
            given_of(self.data.held_out, self.tokenizer, spec.max_examples),
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            split=split,
        )
        for evaluation, evaluator in self.plan.evaluators.items():
            if evaluation in self.metrics["failed_evaluations"] or not evaluator.wants(name):
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
                self._leave_out(evaluation, name, error)
                continue
            earlier = self.found.setdefault(evaluation, {})
            add_figures(self.metrics, evaluation, name, found, earlier)
            earlier[name] = found
            for text in told_main():
                self.listener("note", {"text": text})
            self.listener("figures", {"evaluation": evaluation, "model": name, "figures": found})

    def _leave_out(self, evaluation: str, name: str, error: QuantadaptError) -> None:
        told = blamed(error.__cause__) or error
        why = f"{told.problems[0].what}, on the {name} model"
        self.metrics["failed_evaluations"][evaluation] = why
        text = f"evaluation {evaluation!r} is left out from here on: {why}"
        logger.warning(text, exc_info=True)
        self.listener("note", {"text": text})

    def measure_unquantized(self) -> None:
        """Measure the dense base, which is loaded for this alone and dropped again."""
        import torch

        from ..loading.accounting import expecting
        from ..loading.heads import with_head
        from ..loading.reading import from_pretrained

        plan = self.plan
        expected = expecting(plan.spec.new_modules, plan.spec.unused_modules)
        with with_head(plan.task.head, self.data.labels), expected:
            model = from_pretrained(
                plan.model,
                dtype=getattr(torch, plan.dtype),
                device_map={"": plan.device},
            )
        self.metrics["size"] = {"dense_mib": size_mib(model)}
        self.measure("unquantized", model)

    def measure_base(self, model: nn.Module) -> None:
        """Measure the quantized base, and keep of it what later models are compared with."""
        self.metrics.setdefault("size", {})["quantized_mib"] = size_mib(model)
        self.measure("quantized", model, split=True)
        self.before = self._answers(model)
        self.base_losses = self._losses_for_merges(model)

    def measure_tuned(self, model: nn.Module, losses: Sequence[tuple[int, float]]) -> None:
        """Measure the tuned model, and say what is wrong with it.

        Args:
            losses: of its training, each with its step; empty where they do not say how well it
                does.
        """
        self.measure("tuned", model, split=True)
        self.metrics["warnings"] = warnings_of(self.metrics, losses)
        for text in self.metrics["warnings"]:
            self.listener("warning", {"text": text})
        if not self.answers_prompts:
            return
        after = self._answers(model)
        self.metrics["samples"] = [
            {"prompt": p.text, "reference": p.reference, "before": b, "after": a}
            for p, b, a in zip(self.prompts, self.before, after, strict=True)
        ]

    def _losses_for_merges(self, model: nn.Module) -> TokenLosses | None:
        """Return the losses of the base, which training may change, where a merge is planned."""
        from ..evaluation.gain import token_losses
        from ..evaluation.predictions import predicts_tokens

        merges = any(e.exporter.merges and not e.refusals for e in self.plan.exports)
        if not (merges and self.world.is_main and predicts_tokens(model)):
            return None
        return token_losses(model, self.held_out)

    def _answers(self, model: nn.Module) -> list[str]:
        from ..generation import greedy

        prompts = self.prompts if self.answers_prompts else []
        length = self.plan.spec.evaluate.max_new_tokens
        return greedy(model, self.tokenizer, prompts, max_new_tokens=length) if prompts else []
