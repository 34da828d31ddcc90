"""The evaluation `agreement`: how far a model is from the dense one in what it predicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from ..errors import DataError, ModelError, Problem
from ..folders.metrics import NATS
from ..hookspecs import hookimpl
from ..paths import is_local_path
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .predictions import NoTokens, device_of, predicts_tokens

if TYPE_CHECKING:
    from torch import nn

    from .stage import Snapshot

BASE = "base"
_WHERE = "evaluation 'agreement'"


class AgreementEvaluator(Evaluator):
    """KL divergence from a dense model, and how often both rank the same token first."""

    reference: str = Field(
        BASE,
        description="base: the model before it was quantized; or a checkpoint folder or hub id "
        "with the same vocabulary",
    )
    max_tokens: int = Field(
        1024, ge=1, description="tokens that are compared; each takes the vocabulary in CPU memory"
    )
    _kept: dict[str, Any] = PrivateAttr(default_factory=dict)

    def wants(self, model: str) -> bool:
        """Say no for the base itself."""
        return self.reference != BASE or model != "unquantized"

    def refusals(self) -> Iterable[Problem]:
        """Look whether the reference is there."""
        path = os.path.expanduser(self.reference)
        if self.reference == BASE or not is_local_path(path) or os.path.isdir(path):
            return []
        fix = "check the path; a hub id has the form owner/name"
        return [Problem(f"{path} is no folder", fix, where="evaluation.reference")]

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on the first held-out tokens. Raises ModelError where the dense model is not
        known or has another vocabulary, DataError where no token is to be predicted."""
        from .stage import compare, snapshot

        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "batch_size": given.batch_size,
            "pad_token_id": getattr(given.tokenizer, "pad_token_id", None),
        }
        if not predicts_tokens(model):
            what = "the model predicts no tokens"
            raise ModelError(what, fix="leave the evaluation out", where=_WHERE)
        try:
            found = snapshot(model, given.examples, **options)
        except NoTokens as error:
            raise DataError(str(error), fix=error.FIX, where=_WHERE) from None
        reference = self._reference(model, given, options)
        size = min(found.log_probs.shape[1], reference.log_probs.shape[1])
        if not found.targets.equal(reference.targets) or size < int(found.targets.max()) + 1:
            what = "the dense model has another vocabulary"
            raise ModelError(what, fix="name one of the same family", where=_WHERE)
        both = compare(_first(reference, size), _first(found, size))
        return {
            "kl": Figure(both.kl, NATS, "lower"),
            "same first token": Figure(both.top1, "share", "higher"),
            "tokens compared": Figure(both.tokens),
        }

    def _reference(self, model: Any, given: Given, options: dict[str, Any]) -> Snapshot:
        """Return what the dense model predicts; it is loaded once for the same data."""
        from ..loading.accounting import expecting
        from ..loading.reading import from_pretrained
        from .stage import snapshot

        state = getattr(model, "quantadapt", None)
        source = os.path.expanduser(self.reference)
        if self.reference == BASE:
            source = getattr(state, "source", "") or self._kept.get("source", "")
        if not source:
            what = "it is not known which dense model this one was made from"
            raise ModelError(what, fix="name it: reference: PATH", where=_WHERE)
        key = (source, getattr(given.examples, "_fingerprint", id(given.examples)))
        if self._kept.get("key") != key:
            lacks = (getattr(state, name, ()) for name in ("new_modules", "unused_modules"))
            dtype = getattr(state, "dtype", None) or next(model.parameters()).dtype
            with expecting(*lacks):
                dense = from_pretrained(source, dtype=dtype, device_map={"": device_of(model)})
            seen = snapshot(dense, given.examples, **options)
            self._kept.update(key=key, source=source, seen=seen)
        kept: Snapshot = self._kept["seen"]
        return kept


def _first(found: Snapshot, size: int) -> Snapshot:
    """Return predictions among the first tokens of a vocabulary, which families pad differently."""
    if found.log_probs.shape[1] == size:
        return found
    return replace(found, log_probs=found.log_probs[:, :size].log_softmax(-1))


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "how far predictions are from the dense model's, as a KL divergence"
    return [Evaluation("agreement", summary, AgreementEvaluator)]
