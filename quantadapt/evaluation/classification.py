"""The evaluation `classification`: how often a classifier is right, and what it takes for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..data.batches import padded
from ..data.labelled import LABEL, LABELS
from ..errors import DataError
from ..hookspecs import hookimpl
from ..protocols import Evaluator, Figure, Given
from ..records import Evaluation
from .predictions import device_of, evaluating, refuse_no_numbers

if TYPE_CHECKING:
    from torch import Tensor, nn

WHERE = "evaluation 'classification'"


class Classification(Evaluator):
    """Accuracy and F1 of texts, or of words; and how often which label was taken for which."""

    confusions: int = Field(
        12, ge=0, description="how many pairs of a label and another are counted, the worst first"
    )

    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Measure it on held-out examples. Raises DataError where they have no labels, or one that
        the model has no output for; NumbersError where it answers NaN or infinity."""
        from ..loading.heads import labels_of

        config: Any = getattr(model, "config", None)
        names, table = labels_of(config), confusion(model, given)
        seen = [place for place in range(len(names)) if table[place].sum() or table[:, place].sum()]
        f1 = {names[place]: _f1(table, place) for place in seen}
        found = {
            "accuracy": Figure(int(table.trace()) / int(table.sum()), "share", "higher"),
            "macro-f1": Figure(sum(f1.values()) / len(f1), "share", "higher"),
        }
        found |= {f"f1 {name}": Figure(value, "share", "higher") for name, value in f1.items()}
        wrong = sorted(
            ((int(table[one, other]), names[one], names[other]) for one in seen for other in seen
             if one != other),
            key=lambda entry: -entry[0],
        )  # fmt: skip
        found |= {
            f"{one} taken for {other}": Figure(times, "", "lower")
            for times, one, other in wrong[: self.confusions]
        }
        return found | {"labels counted": Figure(int(table.sum()))}


def confusion(model: nn.Module, given: Given) -> Tensor:
    """Return how often each label was taken for each, int64 [labels, labels]: rows are right."""
    import torch

    from ..loading.heads import label_ids

    known = label_ids(getattr(model, "config", None))
    size = max(known.values(), default=-1) + 1
    table = torch.zeros(size, size, dtype=torch.int64)
    for logits, labels in _answers(model, given, known):
        right = labels >= 0
        refuse_no_numbers(logits[right])
        pairs = labels[right] * size + logits.argmax(-1)[right]
        table += pairs.bincount(minlength=size * size).view(size, size)
    return table


def _answers(
    model: nn.Module, given: Given, known: Mapping[str, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and the numbers of the right labels, on the CPU, batch by batch."""
    import torch

    columns = given.examples.column_names
    if LABEL not in columns and LABELS not in columns:
        fix = "pass data with the columns text and label, or leave the evaluation out"
        raise DataError("the held-out data hold no labels", fix=fix, where=WHERE)
    config: Any = getattr(model, "config", None)
    pad, device = getattr(config, "pad_token_id", None) or 0, device_of(model)
    with evaluating(model), torch.no_grad():
        for rows in given.examples.iter(given.batch_size):
            ids = rows["input_ids"]
            logits = model(
                input_ids=padded(ids, pad).to(device),
                attention_mask=padded([[1] * len(row) for row in ids], 0).to(device),
            ).logits
            if LABEL in columns:
                labels = torch.tensor([_number(label, known) for label in rows[LABEL]])
            else:
                numbers = [[_number(one, known) for one in row] for row in rows[LABELS]]
                labels = padded(numbers, -100)
            yield logits.float().cpu().flatten(0, -2), labels.flatten()


def _number(label: str, known: Mapping[str, int]) -> int:
    if label and label not in known:
        what = f"the model has no output for the label {label!r}"
        raise DataError(what, fix="measure on examples with the labels of training", where=WHERE)
    return known.get(label, -100)


def _f1(table: Tensor, place: int) -> float:
    right = float(table[place, place])
    return 2 * right / float(table[place].sum() + table[:, place].sum())


@hookimpl
def quantadapt_evaluations() -> list[Evaluation]:
    """Return the evaluation of this file."""
    summary = "accuracy and F1 of labels, and what is taken for what"
    return [Evaluation("classification", summary, Classification)]
