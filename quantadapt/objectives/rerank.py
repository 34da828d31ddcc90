"""`rerank`: a head of its own scores how well a passage answers a query, both read together.

The loss is that of sentence-transformers' cross-encoders, binary cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..hookspecs import hookimpl
from ..records import Objective
from .classify import HeadTask, pad_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup


class Rerank(HeadTask):
    """The options of `rerank`: none."""

    head: ClassVar[Literal["", "sequence", "token"]] = "sequence"
    unit: ClassVar[str] = "nats per passage"

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return queries with passages, as `load_reranking` makes them; the head has one output."""
        from ..data.retrieval import load_reranking

        return load_reranking(spec, tokenizer, seed=seed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.reading import survey
        from ..data.retrieval import passages

        return survey(spec, passages)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the first queries with their passages."""
        from ..data.retrieval import look_at_passages

        return look_at_passages(spec, tokenizer, limit)

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads queries with their passages."""
        return PassageCollator(pad_of(setup))

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the mean over all passages of a step, in nats."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        scores = batch.pop("scores")
        logits = model(**batch).logits.float().view(-1)
        total = binary_cross_entropy_with_logits(logits, scores, reduction="sum")
        mean: Tensor = total / count
        return mean

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of passages."""
        return len(batch["input_ids"])


@dataclass
class PassageCollator:
    """Pads queries with their passages on the right."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the model takes, [passages, length], and `scores` [passages]."""
        import torch

        from ..data.retrieval import SCORE
        from ..evaluation.retrieval import pairs_batch

        batch = pairs_batch(examples, self.pad_token_id)
        return {**batch, "scores": torch.tensor([float(e[SCORE]) for e in examples])}


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "score how well a passage answers a query"
    return [Objective("rerank", summary, Rerank, evaluations=("retrieval",))]
