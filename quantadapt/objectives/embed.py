"""`embed`: texts that belong together get vectors that are near each other.

Losses are sentence-transformers' own. An encoder or a decoder learns them; of a language model the
head is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..errors import DataError, Problem
from ..hookspecs import hookimpl
from ..memory.shape import Shape
from ..protocols import Task
from ..records import Objective
from .classify import pad_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup

REQUIRES = ("sentence-transformers>=6.2",)
EXTRA = "embeddings"
_SCORED = ("cosent", "cosine")


class Embed(Task):
    """The options of `embed`. Losses are those of sentence-transformers."""

    sequences: ClassVar[int] = 2
    adds_up: ClassVar[bool] = False  # the others of a batch are what an anchor is told apart from
    repeats: ClassVar[bool] = False
    meets: ClassVar[bool] = True
    wants_lm: ClassVar[bool] = False
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "chunks"  # none are made

    pooling: Literal["mean", "cls", "lasttoken"] = Field(
        "mean",
        description="what a text's vector is: the mean over its tokens, the first (of encoders "
        "that learnt it so), or the last (of decoders)",
    )
    loss_type: Literal["auto", "ranking", "triplet", "cosent", "cosine"] = Field(
        "auto",
        description="ranking: MultipleNegativesRankingLoss, the other texts of a batch are "
        "negatives, too; triplet: TripletLoss; cosent, cosine: of pairs with a score; auto: "
        "ranking, or cosent where there are scores",
    )
    scale: float = Field(
        20.0, gt=0, description="of ranking and cosent: what similarities are multiplied by"
    )
    margin: float = Field(
        5.0, gt=0, description="of triplet: by how much farther a negative is to be"
    )

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse encoder-decoder models, and the first token of decoders."""
        if config.get("is_encoder_decoder"):
            what = "Embed makes vectors with a decoder or an encoder, and the model has both"
            fix = "use a model with one of them"
            return [Problem(what, fix, "objective", "embed-encoder-decoder")]
        if self.pooling != "cls" or not _is_decoder(config):
            return []
        what = "the first token of a decoder sees no other, so all texts would have one vector"
        return [Problem(what, "use mean or lasttoken", "objective.pooling", "embed-cls-decoder")]

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return groups of texts, as `load_embedding` makes them. Raises DataError where they do
        not go with the loss."""
        from ..data.retrieval import SCORE, load_embedding

        found = load_embedding(spec, tokenizer, seed=seed, pooling=self.pooling)
        self._check(SCORE in found.train.column_names, _texts_of(found.train))
        return found

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.reading import survey
        from ..data.retrieval import groups

        return survey(spec, groups)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the texts of the first groups."""
        from ..data.retrieval import look_at_groups

        return look_at_groups(spec, tokenizer, limit)

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads the texts of groups."""
        return GroupCollator(pad_of(setup), _texts_of(setup.dataset))

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens the longest text of each group has."""
        import pyarrow.compute as pc

        from ..data.retrieval import column_of

        found: list[int] = []
        names = [column_of(place) for place in range(_texts_of(dataset))]
        for table in dataset.with_format("arrow").iter(10_000):
            lengths = [pc.list_value_length(table[name]) for name in names]
            found += pc.max_element_wise(*lengths).to_pylist()
        return found

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the mean over all groups of a step of the loss of their batches. A batch that is
        learnt from is that of all processes: its others are what an anchor is told apart from."""
        from ..model.gathered import of_all_processes
        from ..model.pooling import vectors

        made = vectors(model, batch["input_ids"], batch["attention_mask"], self.pooling)
        groups = made.view(-1, batch["texts"], made.shape[-1])
        scores, share = batch.get("scores"), len(groups) / count
        if model.training:  # what is held out is shared out as it comes
            groups = of_all_processes(groups)
            scores = None if scores is None else of_all_processes(scores)
        found: Tensor = self.losses(list(groups.unbind(1)), scores) * share
        return found

    def losses(self, made: list[Tensor], scores: Tensor | None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            made: the vectors of anchors, of what belongs to them, and of what does not, each
                [groups, hidden_size].
            scores: how alike both are, [groups].
        """
        from sentence_transformers.sentence_transformer import losses

        kind = self.loss_type
        if kind == "auto":
            kind = "ranking" if scores is None else "cosent"
        of: Any = None  # they get vectors, not texts
        measure: Any = {
            "ranking": lambda: losses.MultipleNegativesRankingLoss(of, scale=self.scale),
            "triplet": lambda: losses.TripletLoss(of, triplet_margin=self.margin),
            "cosent": lambda: losses.CoSENTLoss(of, scale=self.scale),
            "cosine": lambda: losses.CosineSimilarityLoss(of),
        }[kind]()
        found: Tensor = measure.compute_loss_from_embeddings(made, scores)
        return found

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of groups."""
        return len(batch["input_ids"]) // int(batch["texts"])

    def _check(self, scored: bool, texts: int) -> None:
        """Raise DataError where the data are not what the loss learns from."""
        kind, what = self.loss_type, ""
        if kind in _SCORED and not scored:
            what = f"{kind} learns from pairs with a score, and the data hold none"
        elif kind in ("ranking", "triplet") and scored:
            what = f"{kind} learns from texts that belong together, and the data hold scores"
        elif kind == "triplet" and texts != 3:
            what = f"triplet learns from one negative each, and the data hold {texts - 2}"
        if what:
            fix = "use objective.loss_type: auto, or other data"
            raise DataError(what, fix=fix, where="objective.loss_type")


def _is_decoder(config: Mapping[str, Any]) -> bool:
    """Say whether a token of a model with this config.json sees those before it alone."""
    if config.get("use_bidirectional_attention"):
        return False
    names = config.get("architectures") or [""]
    causal = str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return causal or Shape.of(config) is not None


def _texts_of(dataset: Dataset) -> int:
    """Return how many texts a group has."""
    return sum(name.endswith("_ids") for name in dataset.column_names)


@dataclass
class GroupCollator:
    """Pads the texts of groups on the right; those of a group are neighbours."""

    pad_token_id: int
    texts: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` [groups * texts, length], `texts`, how many a
        group has, and `scores` [groups] where the data have them."""
        import torch

        from ..data.batches import padded
        from ..data.retrieval import SCORE, column_of

        names = [column_of(place) for place in range(self.texts)]
        rows = [example[name] for example in examples for name in names]
        batch: dict[str, Any] = {
            "input_ids": padded(rows, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
            "texts": self.texts,
        }
        if SCORE in examples[0]:
            batch["scores"] = torch.tensor([float(e[SCORE]) for e in examples])
        return batch


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the objective of this file."""
    summary = "vectors of texts that belong together are near each other"
    return [
        Objective(
            "embed", summary, Embed, requires=REQUIRES, extra=EXTRA, evaluations=("retrieval",)
        )
    ]
