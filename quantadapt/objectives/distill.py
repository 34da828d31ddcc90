"""`distill`: a quantized base and its adapter learn what a dense model predicts, token by token.

The teacher is the base before it was quantized, so that the adapter makes up for what quantizing
cost; or a larger model with the same vocabulary. It stands beside the model while that is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator

from ..errors import ModelError, Problem, TrainingError
from ..hookspecs import hookimpl
from ..memory.cards import size_words
from ..records import Objective
from .answers import causal_problems
from .sft import SFT

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ..data.reading import Data
    from ..spec import DataSpec
    from ..training.trainer import Setup

BASE = "base"
_WHERE = "objective.teacher"
_NOT_SEEN = ("attention_mask", "labels", "counted", "tokens")


class Distill(SFT):
    """The options of `distill`. Divergences and names are those of TRL's `GKDTrainer`."""

    packs: ClassVar[bool] = True
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "chunks"

    teacher: str = Field(
        BASE,
        description="base: the model before it was quantized; or a checkpoint folder or hub id "
        "with the same vocabulary",
    )
    beta: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0: KL(teacher || student), 1: KL(student || teacher), between them the "
        "generalized Jensen-Shannon divergence",
    )
    temperature: float = Field(
        1.0, gt=0, description="what logits of both are divided by; the loss is not scaled back"
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="the share of the loss on the tokens of the data themselves"
    )
    _held: Any = PrivateAttr(None)

    @field_validator("teacher")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(f"the teacher is {BASE}, a folder or a hub id")
        return value

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse models that are not causal, and teachers that are not there or not dense."""
        from ..planning.on_disk import check_model

        found = causal_problems(type(self).__name__, "distill", config, "objective: sft")
        if self.teacher == BASE:
            return found + _dense_problems(config, "the base")
        if missing := check_model(self.teacher):
            return found + [replace(problem, where=_WHERE) for problem in missing]
        return found + _teacher_problems(self.teacher_config(config))

    def teacher_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the base's, or that of the teacher's folder."""
        from ..planning.on_disk import config_of

        return config if self.teacher == BASE else config_of(self._path) or {}

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return what sft reads. Raises ModelError where the teacher knows other tokens."""
        self._check_tokens(tokenizer)
        return super().read(spec, tokenizer, seed=seed)

    @contextmanager
    def holding(self, setup: Setup, tell: Callable[[str], None]) -> Iterator[None]:
        """Hold the teacher, on the model's device and in its dtype. Raises TrainingError where it
        is not known, or mixes examples of a packed row up; ModelError where it cannot be read."""
        from ..data.batches import PackedCollator
        from ..evaluation.sizes import size_mib
        from ..training.packing import kept_apart, refuse_leaks

        source = self._source(setup.model)
        self._check_tokens(setup.tokenizer)
        self._held = _loaded(source, setup.model)
        size = size_words(size_mib(self._held) * 2**20)
        tell(f"the teacher, {source}, stands beside the model: {size}")
        try:
            if setup.spec.packing:
                refuse_leaks(self._held, PackedCollator(0))
            with kept_apart(self._held, lambda _: None) if setup.spec.packing else nullcontext():
                yield
        finally:
            self._held = None

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the mean divergence over all tokens of a step, in nats."""
        import torch

        from ..model.divergence import Mix, divergences
        from ..model.head import counting

        labels = batch["labels"][:, 1:].flatten()
        where = counting(labels, batch.get("counted"))
        seen = {name: value for name, value in batch.items() if name not in _NOT_SEEN}
        with torch.no_grad():  # first: what it works with is gone before the student keeps anything
            teacher = _predicted(self._held, seen, where)
        student = _predicted(model, seen, where)
        mix = Mix(self.beta, self.temperature, self.alpha)
        mean: Tensor = divergences(student, teacher, labels[where], mix).sum() / count
        return mean

    @property
    def _reads_text(self) -> bool:
        return True

    @property
    def _path(self) -> str:
        return os.path.expanduser(self.teacher)

    def _source(self, model: Any) -> str:
        from ..planning.on_disk import quantization_of

        if self.teacher != BASE:
            return self._path
        source = str(getattr(getattr(model, "quantadapt", None), "source", ""))
        if source and not _dense_problems({"quantization_config": quantization_of(source)}, ""):
            return source
        what = "the model does not come from a checkpoint that is not quantized"
        raise TrainingError(what, fix=f"name one in {_WHERE}", where=_WHERE)

    def _check_tokens(self, tokenizer: Any) -> None:
        """Raise ModelError where the teacher's tokenizer has other tokens; a live model's may be
        missing."""
        from ..quantizing.tokenizer import load_tokenizer

        if self.teacher == BASE or not hasattr(tokenizer, "get_vocab"):
            return
        try:
            theirs = load_tokenizer(self._path).get_vocab()
        except ModelError as error:
            what = f"the teacher, {self.teacher}: {error.problems[0].what}"
            raise ModelError(what, fix=error.problems[0].fix, where=_WHERE) from None
        ours = tokenizer.get_vocab()
        if ours != theirs:
            apart = len(ours.items() ^ theirs.items())
            what = f"the teacher's tokenizer differs from the model's in {apart:,} entries"
            fix = "use a teacher of the same family, or objective: sft with text that it wrote"
            raise ModelError(what, fix=fix, where=_WHERE)


def _dense_problems(config: Mapping[str, Any], who: str) -> list[Problem]:
    """Return why a model with this config is no dense teacher; empty if it is."""
    from ..inputs.model_config import DEQUANTIZED
    from ..planning.on_disk import quantization_in

    found = quantization_in(config)
    if found is None or found.get("quant_method") in DEQUANTIZED:
        return []
    what = f"{who} is quantized already, and the teacher has to be dense"
    return [Problem(what, f"name the unquantized model in {_WHERE}", _WHERE, "distill-dense")]


def _teacher_problems(config: Mapping[str, Any]) -> list[Problem]:
    from ..planning.refusals import other_head

    found = _dense_problems(config, "it")
    if other := other_head(config) or (
        "encoder-decoder model" * bool(config.get("is_encoder_decoder"))
    ):
        what = f"the teacher has to predict the next token, and it is a {other}"
        found.append(Problem(what, "use a causal model", _WHERE, "distill-causal"))
    return found


def _loaded(source: str, student: Any) -> nn.Module:
    """Return a dense model where the student is, frozen."""
    from ..loading.accounting import expecting
    from ..loading.reading import from_pretrained
    from ..training.figures import adapter_device, compute_dtype

    state = getattr(student, "quantadapt", None)
    lacks = (getattr(state, name, ()) for name in ("new_modules", "unused_modules"))
    device, dtype = adapter_device(student), compute_dtype(student)
    with expecting(*lacks):
        teacher = from_pretrained(source, dtype=dtype, device_map={"": device})
    return teacher.requires_grad_(False).eval()


def _predicted(model: Any, seen: Mapping[str, Any], where: Tensor) -> Any:
    """Return what a model says of the tokens at places `where`. Padding is at the end, where no
    token that counts sees it, so no attention mask is needed."""
    from ..evaluation.predictions import without_head
    from ..model.divergence import Predicted

    with without_head(model) as head:
        rows = model(**seen, use_cache=False).logits[:, :-1].flatten(0, 1)
    return Predicted(rows[where], head)


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "predict what the unquantized base does, or a larger teacher"
    return [Objective("distill", summary, Distill, evaluations=("agreement", "perplexity"))]
