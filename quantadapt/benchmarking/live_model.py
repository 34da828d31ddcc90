"""A live model as lm-evaluation-harness meets it: its own `HFLM`, which changes nothing of it.

Imports lm_eval, and so is imported only where something is measured.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ..evaluation.predictions import device_of, refuse_no_numbers
from ..generation import Sampling, answers
from ..generation.rows import base_of, takes_rows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": 0.0}
_OF_DRAWS = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}
_OF_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
_OF_SIZES = {"max_length", "max_new_tokens", "transformers_version", "use_cache"}
_NO_MATTER = _OF_DRAWS | _OF_TOKENS | _OF_SIZES
"""What a model's generation config may say without any other greedy answer coming of it."""
_EVERY = 10.0
"""Seconds between two lines about how far it is."""


class LiveModel(HFLM):  # type: ignore[misc]
    """A model that is loaded, quantized or not, with or without an adapter.

    Answers are made by our own way of generating where that gives the same as HFLM's.

    Args:
        model: of transformers or PEFT, in evaluation mode; keeps its weights, and what is tied.
        batch_size: requests per forward pass.
        max_length: longest prompt with its answer, in tokens; by default what the model is made
            for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None = None,
    ) -> None:
        with _keeping(model):
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
                batch_size=batch_size,
                max_length=max_length,
            )
        self._device = device_of(model)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Return (log-probability, whether it is the greedy answer) of each continuation."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Return the log-probability of each text."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        """Return logits, [batch, tokens, vocabulary]. Raises NumbersError where they are none."""
        self._tell()
        logits = super()._model_call(*args, **kwargs)
        refuse_no_numbers(logits[..., 0])  # what is NaN in a row is so in all of its logits
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super()._model_generate(*args, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each request, cut at the first of its stop texts."""
        ours = [request for request in requests if self._is_ours(request.args[1])]
        others = [request for request in requests if not self._is_ours(request.args[1])]
        made = {id(r): text for r, text in zip(ours, self._answers(ours), strict=True)}
        if others:
            texts = super().generate_until(others, disable_tqdm=True)
            made |= {id(r): text for r, text in zip(others, texts, strict=True)}
        return [made[id(request)] for request in requests]

    def _is_ours(self, options: Mapping[str, Any]) -> bool:
        """Say whether our way of generating gives what HFLM's does: it is greedy, and nothing else
        changes what is likeliest."""
        wanted = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        known = wanted.keys() <= {*_GREEDY, "until", "max_gen_toks"}
        plain = all(wanted.get(name, value) == value for name, value in _GREEDY.items())
        rest = self._own.keys() - _NO_MATTER
        return known and plain and takes_rows(self.model) and not rest

    @property
    def _own(self) -> dict[str, Any]:
        """What the model's generation config says."""
        config = getattr(base_of(self.model), "generation_config", None)
        return {} if config is None else config.to_diff_dict()

    def _longest(self, wanted: Mapping[str, Any]) -> int:
        """Return the longest answer, in tokens. HFLM says by `max_length` what the task says, which
        counts for less to transformers than `max_new_tokens` of the model's own config."""
        return int(self._own.get("max_new_tokens") or wanted["max_gen_toks"])

    def _answers(self, requests: Sequence[Instance]) -> list[str]:
        """Return greedy answers to requests, those with the same options together."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            wanted = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), self.max_gen_toks)
            eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            stop = [text for text in handle_stop_sequences(wanted.get("until"), eos=eos) if text]
            room = self.max_length - wanted["max_gen_toks"]
            if room < 1:
                what = f"answers of {wanted['max_gen_toks']} tokens leave no room for a question"
                raise ValueError(f"{what} in the {self.max_length} that the model is made for")
            ids = [
                self.tok_encode(requests[index].args[0], left_truncate_len=room)
                for index in indices
            ]
            longest = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
            given = answers(
                self.model,
                self.tokenizer,
                [ids[index] for index in longest],
                Sampling(max_new_tokens=self._longest(wanted), stop=tuple(stop)),
                batch_size=self.batch_size,
            )
            for index, answer in zip(longest, given, strict=True):
                found[indices[index]] = answer.text
                self._tell()
        return [found[index] for index in range(len(requests))]

    _begun = _told = 0.0

    def _tell(self) -> None:
        """Log now and then that it goes on."""
        now = time.monotonic()
        self._begun = self._begun or now
        if now - max(self._told, self._begun) >= _EVERY:
            self._told = now
            logger.info("tasks: measuring for %.0f s", now - self._begun)


@contextmanager
def _keeping(model: Any) -> Iterator[None]:
    """Leave the tensors of a model tied or untied as they are, while HFLM takes it for one that it
    has loaded itself."""
    model.__dict__["tie_weights"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


@contextmanager
def seeded() -> Iterator[None]:
    """Draw as lm-eval's `simple_evaluate` does, and leave the process's random numbers as they
    were, so that a run trains the same adapter whether tasks are measured or not."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        numpy.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])
