"""The evaluation `rewarded`: what reward functions give a model's answers to held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ..data.prompts import REFERENCE, ROW, Asked
from ..data.tokens import encode_prompt
from ..distributed.talking import summed
from ..distributed.world import World, world
from ..errors import DataError, Problem
from ..evaluation.predictions import device_of
from ..generation import Sampling
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .answering import rollouts, scored
from .functions import functions_of, problems
from .scoring import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

WHERE = "evaluation 'rewarded'"


class Rewarded(Evaluator):
    """Answers each held-out prompt once, and scores that."""

    rewards: tuple[str, ...] = Field(
        (), description="reward functions: file.py:function, module:function, or an entry point"
    )
    reward_weights: tuple[float, ...] = Field((), description="one for each; empty: 1")
    reward_timeout: float = Field(
        60.0, gt=0, description="seconds that a call, or the import, may take"
    )
    max_completion_length: int = Field(256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest tokens")
    seed: int = Field(0, ge=0, description="of the draws")

    def refusals(self) -> Iterable[Problem]:
        """Return what is wrong with the functions' names, and whether there are any."""
        if not self.rewards:
            what = "it needs reward functions"
            fix = "name them, e.g. --set rewarded.rewards=[rewards.py:function]"
            return [Problem(what, fix, WHERE)]
        return [
            *problems(self.rewards, WHERE),
            *weight_problems(self.rewards, self.reward_weights, WHERE),
        ]

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out prompts. Raises RewardError, DataError where there is none."""
        import torch

        scorer = scorer_of(self.rewards, self.reward_weights, self.reward_timeout)
        mine, asked = world() if given.split else World(), _asked(given)
        if not asked:
            what = "there are no held-out prompts"
            raise DataError(what, fix="pass data with a column prompt", where=WHERE)
        sampling = Sampling(
            max_new_tokens=self.max_completion_length, temperature=self.temperature, seed=self.seed
        )
        places, width = [*range(mine.rank, len(asked), mine.size)], len(self.rewards)
        made = rollouts(
            *(model, given.tokenizer, [asked[place] for place in places], sampling),
            batch_size=given.batch_size,
            first=mine.rank * len(asked),
        )
        table = torch.zeros(len(asked), 2 * width + 2, dtype=torch.float64)
        if made:
            scores = scored(scorer, made)
            lengths = torch.tensor([[len(one.ids), one.ended] for one in made]).double()
            parts = [scores.nan_to_num(), (~scores.isnan()).double(), lengths]
            table[places] = torch.cat(parts, dim=1)
        if given.split:
            table = summed(table, device_of(model)).cpu()
        scores = table[:, :width].masked_fill(table[:, width : 2 * width] == 0, math.nan)
        return _figures(scorer, scores, table[:, 2 * width :])


def _figures(scorer: Scorer, scores: Tensor, lengths: Tensor) -> dict[str, Figure]:
    """Return the figures of scores [answers, functions], and lengths and ends [answers, 2]."""
    totals = scorer.totals(scores)
    known = totals[~totals.isnan()]
    if not len(known):
        what = "no reward function applies to any of the answers"
        raise DataError(what, fix="let one return a number, not None", where=WHERE)
    error = float(known.std(correction=0)) / math.sqrt(len(known))
    each = tuple(known.tolist()) if len(known) == len(totals) else ()
    found = {"reward": Figure(float(known.mean()), "", "higher", error, each)}
    if len(scorer.functions) > 1:
        means = zip(scorer.functions, scores.nanmean(0).tolist(), strict=True)
        found |= {name: Figure(mean, "", "higher") for name, mean in means if mean == mean}
    length, ended = lengths.mean(0).tolist()
    return found | {
        "length": Figure(length, "tokens"),
        "ended": Figure(ended, "share"),
        "answers": Figure(len(scores)),
    }


def _asked(given: Given) -> list[Asked]:
    """Return the prompts, as the objective read them, or as texts with what the data say."""
    if ROW in given.examples.column_names:
        return [Asked.of(row) for row in given.examples]
    return [
        Asked(encode_prompt(given.tokenizer, one), one.text, {REFERENCE: one.reference})
        for one in given.prompts
    ]


def weight_problems(names: Iterable[str], weights: Iterable[float], where: str) -> list[Problem]:
    """Return whether there is not one weight for each function."""
    count, given = len([*names]), len([*weights])
    if given in (0, count):
        return []
    what = f"there are {given} reward_weights for {count} reward functions"
    return [Problem(what, "give one for each, or none", where)]


def scorer_of(names: tuple[str, ...], weights: tuple[float, ...], seconds: float) -> Scorer:
    """Return what scores. Raises RewardError where a function cannot be imported in time."""
    return Scorer(functions_of(names, seconds), weights or (1.0,) * len(names), seconds)


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "what reward functions give a model's own answers to held-out prompts"
    return [Evaluation("rewarded", summary, Rewarded)]
