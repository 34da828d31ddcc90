"""How the next token is chosen: the likeliest, or one drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ..errors import NumbersError, OptionsError, Problem
from ..inputs.likely_names import did_you_mean
from ..protocols import Options
from ..spec import wrong_value

if TYPE_CHECKING:
    from torch import Tensor


class Sampling(Options):
    """How answers are made. Greedy by default, so that the same model gives the same text again.

    Raises:
        OptionsError: an option is wrong or unknown.
    """

    max_new_tokens: int = Field(256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(
        0.0, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token"
    )
    top_k: int | None = Field(None, ge=1, description="draw from so many of the likeliest tokens")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the likeliest that have this share together"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="leave out what is less than this share of the likeliest"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, allow_inf_nan=False, description="above 1: less of what was there before"
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the draws; null: a new one")
    stop: tuple[str, ...] = Field((), description="texts that end an answer")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionsError([_problem(dict(detail)) for detail in error.errors()]) from None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return not self.draws and self.repetition_penalty == 1

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random. Less than 1e-5 leaves nothing to draw from, and
        overflows."""
        return self.temperature >= 1e-5

    def chooser(self, number: int = 0) -> Chooser:
        """Return what chooses the tokens of one answer, the `number`th of a request."""
        return Chooser(self, number)


def _problem(detail: dict[str, Any]) -> Problem:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        hint = did_you_mean(where, Sampling.model_fields)
        return Problem(f"there is no option {where!r} for answers", hint, where)
    return wrong_value(detail, where)


def refuse_no_number(highest: float) -> None:
    """Raise NumbersError where the highest of the logits is NaN, as it is where one of them is, or
    infinity: any token would do then."""
    if not math.isfinite(highest):
        what = "the model predicts values that are no numbers (NaN or infinity)"
        fix = "use a model whose weights are whole, in the dtype that it is made for"
        raise NumbersError(what, fix=fix)


class Chooser:
    """Chooses the tokens of one answer. What it draws does not depend on what other answers are
    made beside this one."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self.sampling, self._number = sampling, number
        self._processors: Any = None
        self._generator: Any = None

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> int:
        """Return the next token after `ids`, prompt included; `logits` are float32 [vocabulary]."""
        import torch

        if self.sampling.is_greedy:
            return int(logits.argmax())
        before = torch.tensor([list(ids)], device=logits.device)
        scores = self.processors(before, logits[None])[0]
        if not self.sampling.draws:
            return int(scores.argmax())
        generator = self.generator(logits.device)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    def generator(self, device: Any) -> Any:
        """Return what this answer's tokens are drawn with."""
        import torch

        if self._generator is None:
            self._generator = torch.Generator(device=device)
            seed = self.sampling.seed
            if seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((seed + self._number) % 2**63)
        return self._generator

    @property
    def processors(self) -> Any:
        """What changes logits before a token is chosen."""
        if self._processors is None:
            self._processors = self._made()
        return self._processors

    def _made(self) -> Any:
        """Return transformers' processors for the options, in the order of its `generate`."""
        from transformers import generation as made

        own, found = self.sampling, made.LogitsProcessorList()
        if own.repetition_penalty != 1:
            found.append(made.RepetitionPenaltyLogitsProcessor(own.repetition_penalty))
        if own.draws and own.temperature != 1:
            found.append(made.TemperatureLogitsWarper(own.temperature))
        if own.top_k:
            found.append(made.TopKLogitsWarper(own.top_k))
        if own.top_p < 1:
            found.append(made.TopPLogitsWarper(own.top_p))
        if own.min_p:
            found.append(made.MinPLogitsWarper(own.min_p))
        return found


def drawn_together(choosers: Sequence[Chooser], logits: Tensor) -> list[int] | None:
    """Return the next tokens of answers that are drawn alike, from logits [answers, vocabulary], at
    once: the very ones that each would choose by itself. None where they are not drawn alike."""
    import torch

    own = choosers[0].sampling
    alike = all(chooser.sampling is own for chooser in choosers)
    if len(choosers) == 1 or not alike or not own.draws or own.repetition_penalty != 1:
        return None
    likely = choosers[0].processors(None, logits).softmax(-1)
    # What multinomial does for one draw; waiting for each of them would leave a GPU idle.
    draws = torch.empty_like(likely)
    for row, chooser in zip(draws, choosers, strict=True):
        row.exponential_(1, generator=chooser.generator(logits.device))
    found: list[int] = (likely / draws).argmax(-1).tolist()
    return found
