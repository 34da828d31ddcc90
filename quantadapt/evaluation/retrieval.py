"""The evaluation `retrieval`: are the texts that belong to a query found first?

Of a model that makes vectors, each anchor is a query to all texts that are held out; of one that
scores passages, each query has its own. Pairs with a score are compared by rank correlation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..data.batches import padded
from ..data.retrieval import FIRST, GROUP, POOLING, SCORE, column_of
from ..errors import DataError
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .predictions import device_of, evaluating, refuse_no_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn

WHERE = "evaluation 'retrieval'"
_TYPES = "token_type_ids"


class Retrieval(Evaluator):
    """nDCG, mean reciprocal rank and recall; or the rank correlation with scores."""

    at: int = Field(10, ge=1, description="how many texts are looked at for nDCG, MRR and recall")
    pooling: Literal["", "mean", "cls", "lasttoken"] = Field(
        "", description="how vectors are made; empty: as the run was trained, or else the mean"
    )

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out texts. Raises DataError where the data hold none that belong
        together, NumbersError where the model answers NaN or infinity."""
        columns = given.examples.column_names
        if GROUP in columns:
            return ranking(list(_of_passages(model, given)), self.at)
        if column_of(1) not in columns:
            what = "the held-out data hold no texts that belong together"
            fix = "pass data with the columns anchor and positive, or leave the evaluation out"
            raise DataError(what, fix=fix, where=WHERE)
        state: Any = getattr(model, "quantadapt", None)
        if getattr(state, "head", ""):
            what = "the model has a head, and so makes no vectors of the texts in the held-out data"
            fix = "of a reranker, pass data with query, passage and label; else leave it out"
            raise DataError(what, fix=fix, where=WHERE)
        own = given.examples[0].get(POOLING) or getattr(state, "pooling", "")
        pooling = self.pooling or own or "mean"
        if SCORE in columns:
            return _correlation(model, given, pooling)
        return ranking(list(_of_anchors(model, given, pooling)), self.at)


Ranked = tuple["Tensor", "Tensor"]
"""Scores of texts, and which of them belong to the query (bool), both [texts]."""


def ranking(queries: Sequence[Ranked], at: int) -> dict[str, Figure]:
    """Return the figures of queries, as information retrieval has them: means over those that have
    an answer. Of texts with equal scores, which 16 bits make often, each order is as likely."""
    rows = [_ranked(scores, belongs, at) for scores, belongs in queries if bool(belongs.any())]
    if not rows:
        what = "no held-out query has a text that belongs to it"
        raise DataError(what, fix="hold out some that have", where=WHERE)
    names = f"ndcg@{at}", f"mrr@{at}", "accuracy@1", f"recall@{at}"
    means = {name: _mean(found) for name, found in zip(names, zip(*rows, strict=True), strict=True)}
    return means | {"queries": Figure(len(rows))}


def _ranked(scores: Tensor, belongs: Tensor, at: int) -> tuple[float, float, float, float]:
    """Return nDCG, reciprocal rank, hit at 1 and recall of one query, expected over all orders of
    texts with equal scores."""
    import torch

    ordered, order = scores.sort(descending=True)
    changes = (ordered[1:] != ordered[:-1]).long()
    group = torch.cat([changes.new_zeros(1), changes]).cumsum(0)
    sizes = group.bincount()
    hits = sizes.double().new_zeros(len(sizes)).index_add_(0, group, belongs[order].double())
    likely = (hits / sizes)[group].tolist()  # that a place holds one that belongs to the query
    answers = int(belongs.sum())
    discount = [1 / math.log2(place + 2) for place in range(at)]
    gained = math.fsum(hit * share for hit, share in zip(likely, discount, strict=False))
    best = sum(discount[: min(answers, at)])
    return gained / best, _reciprocal(hits, sizes, at), likely[0], math.fsum(likely[:at]) / answers


def _reciprocal(hits: Tensor, sizes: Tensor, at: int) -> float:
    """Return the expected reciprocal rank of the first hit, 0 beyond `at`; both [groups]."""
    first = int(hits.nonzero()[0])
    before, there, size = int(sizes[:first].sum()), float(hits[first]), int(sizes[first])
    found, none_yet = 0.0, 1.0
    for place in range(min(size, max(at - before, 0))):
        now = min(1.0, there / (size - place))
        found += none_yet * now / (before + place + 1)
        none_yet *= 1 - now
    return found


def _mean(scores: Sequence[float]) -> Figure:
    return Figure(math.fsum(scores) / len(scores), "share", "higher", scores=tuple(scores))


def _of_anchors(model: nn.Module, given: Given, pooling: str) -> Iterator[Ranked]:
    """Yield each different anchor's cosines with all different texts."""
    import torch

    anchors: dict[tuple[int, ...], set[int]] = {}
    texts: dict[tuple[int, ...], int] = {}
    several = [name for name in given.examples.column_names if name.endswith("_ids")]
    for row in given.examples:
        places = [texts.setdefault(tuple(row[name]), len(texts)) for name in several
                  if name != FIRST]  # fmt: skip
        anchors.setdefault(tuple(row[FIRST]), set()).add(places[0])
    queries = _vectors(model, list(anchors), given, pooling)
    scores = queries @ _vectors(model, list(texts), given, pooling).T
    for row_, belong in zip(scores, anchors.values(), strict=True):
        belongs = torch.zeros(len(texts), dtype=torch.bool)
        belongs[list(belong)] = True
        yield row_, belongs


def _correlation(model: nn.Module, given: Given, pooling: str) -> dict[str, Figure]:
    if len(set(given.examples[SCORE])) < 2:
        what = "all held-out pairs have one score, so no order of theirs can be compared"
        raise DataError(what, fix="hold out more, e.g. by data.eval_fraction", where=WHERE)
    both = [
        _vectors(model, [tuple(ids) for ids in given.examples[column_of(place)]], given, pooling)
        for place in (0, 1)
    ]
    cosines = (both[0] * both[1]).sum(1)
    return {
        "spearman": Figure(_spearman(cosines.tolist(), given.examples[SCORE]), "", "higher"),
        "pairs": Figure(len(cosines)),
    }


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of ranks; equal values share the mean of theirs."""
    import torch

    ranks = []
    for values in (one, other):
        found = torch.tensor(values, dtype=torch.float64)
        below = (found[:, None] > found).sum(1)
        ranks.append(below + ((found[:, None] == found).sum(1) - 1) / 2)
    a, b = (rank.double() - rank.double().mean() for rank in ranks)
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def _vectors(
    model: nn.Module, texts: Sequence[tuple[int, ...]], given: Given, pooling: str
) -> Tensor:
    """Return the unit vectors of texts, float64 on the CPU, [texts, hidden_size]."""
    import torch

    from ..model.pooling import vectors

    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    pad, device = _pad_of(model), device_of(model)
    made: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), given.batch_size):
            rows = [texts[place] for place in order[start : start + given.batch_size]]
            ids = padded(rows, pad).to(device)
            seen = padded([[1] * len(row) for row in rows], 0).to(device)
            made.append(vectors(model, ids, seen, pooling).double().cpu())
            refuse_no_numbers(made[-1])
    found = torch.nn.functional.normalize(torch.cat(made), dim=1)
    return found[torch.tensor(order).argsort()]


def _of_passages(model: nn.Module, given: Given) -> Iterator[Ranked]:
    """Yield the scores of each query's passages."""
    import torch

    scores, device = list[float](), device_of(model)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(given.examples), given.batch_size):
            rows = [given.examples[place] for place in
                    range(start, min(start + given.batch_size, len(given.examples)))]  # fmt: skip
            batch = pairs_batch(rows, _pad_of(model))
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
            if logits.shape != (len(rows), 1):
                what = "the model gives no single score for a passage"
                fix = "train one with objective: rerank, or leave the evaluation out"
                raise DataError(what, fix=fix, where=WHERE)
            refuse_no_numbers(logits)
            scores += logits.double().flatten().tolist()
    queries: dict[int, list[int]] = {}
    for place, query in enumerate(given.examples[GROUP]):
        queries.setdefault(query, []).append(place)
    labels = given.examples[SCORE]
    for places in queries.values():
        found = torch.tensor([scores[place] for place in places], dtype=torch.float64)
        yield found, torch.tensor([labels[place] > 0.5 for place in places])


def pairs_batch(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Return what a model takes of queries with their passages, [passages, length]."""
    batch = {
        "input_ids": padded([row[FIRST] for row in rows], pad),
        "attention_mask": padded([[1] * len(row[FIRST]) for row in rows], 0),
    }
    if _TYPES in rows[0]:
        batch[_TYPES] = padded([row[_TYPES] for row in rows], 0)
    return batch


def _pad_of(model: Any) -> int:
    config: Any = getattr(model, "config", None)
    return getattr(config, "pad_token_id", None) or 0


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "how early the texts that belong to a query are found"
    return [Evaluation("retrieval", summary, Retrieval)]
