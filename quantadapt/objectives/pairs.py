"""What objectives share that learn from pairs of a chosen and a rejected answer.

Both go through the model in one batch, as neighbours. Logits are made in chunks, as for sft, and of
each answer its log-likelihood is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import Problem
from ..protocols import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup

REFERENCE = ("reference_chosen", "reference_rejected")
"""Columns with the log-likelihoods of both answers by the reference model, in nats."""


class PairTask(Task):
    """Reads pairs, and makes batches of them: `input_ids`, `attention_mask` and `labels` [2 pairs,
    length], the chosen answer of each pair before the rejected one."""

    sequences: ClassVar[int] = 2
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "chunks"

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse encoder-decoder models, and losses of routers."""
        name, instead = type(self).__name__, "objective: sft with the chosen answers"
        return causal_problems(name, "pairs", config, instead)

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return pairs, as `load_preferences` makes them."""
        from ..data.preferences import load_preferences

        return load_preferences(spec, tokenizer, seed=seed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.preferences import pairs, with_bundled
        from ..data.reading import survey

        return survey(with_bundled(spec), pairs)

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads the answers of pairs."""
        return PairCollator(setup.pad_token_id, setup.length_multiple)

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens the longer answer of each pair has, with its prompt."""
        import pyarrow.compute as pc

        from ..data.preferences import CHOSEN, REJECTED

        found: list[int] = []
        for table in dataset.with_format("arrow").iter(10_000):
            both = (pc.list_value_length(table[name]) for name in (CHOSEN[0], REJECTED[0]))
            found += pc.max_element_wise(*both).to_pylist()
        return found

    def parts(self, batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
        """Yield its parts; how many labels count is known of the whole alone."""
        for part in super().parts(batch, size):
            if size * self.sequences < len(batch["input_ids"]):
                part.pop("counted", None)
            yield part


def causal_problems(name: str, rule: str, config: Mapping[str, Any], instead: str) -> list[Problem]:
    """Return why a loss on the tokens of causal models does not fit a model with this config.

    Args:
        rule: what the rules' names begin with.
        instead: what does fit an encoder-decoder model.
    """
    found = []
    if config.get("is_encoder_decoder"):
        what = f"{name} learns from the tokens of causal models, this is an encoder-decoder model"
        fix = f"use a causal model, or {instead}"
        found.append(Problem(what, fix, "objective", f"{rule}-encoder-decoder"))
    if config.get("output_router_logits"):
        what = f"{name} does not balance routers, and the model's config asks for that"
        fix = "set output_router_logits to false in its config.json"
        found.append(Problem(what, fix, "objective", f"{rule}-routers"))
    return found


@dataclass
class PairCollator:
    """Pads the answers of pairs on the right.

    Attributes:
        multiple: batches are padded to a multiple of so many tokens.
    """

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, the number of labels that count, `counted`, and `reference` [2 pairs]
        where the data have it."""
        import torch

        from ..data.preferences import CHOSEN, REJECTED

        rows = [(e[ids], e[mask]) for e in examples for ids, mask in (CHOSEN, REJECTED)]
        labels = [
            [token if counts else -100 for token, counts in zip(*row, strict=True)] for row in rows
        ]
        batch: dict[str, Any] = {
            "input_ids": self._padded([ids for ids, _ in rows], self.pad_token_id),
            "attention_mask": self._padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": self._padded(labels, -100),
        }
        batch["counted"] = int((batch["labels"][:, 1:] != -100).sum())
        if REFERENCE[0] in examples[0]:
            reference = [e[name] for e in examples for name in REFERENCE]
            batch["reference"] = torch.tensor(reference, dtype=torch.float32)
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        from torch.nn.functional import pad

        from ..data.batches import padded

        found = padded(rows, value)
        short = -found.shape[1] % (self.multiple or 1)
        return pad(found, (0, short), value=value)


def log_likelihoods(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return of each sequence in a batch its log-likelihood where labels count, float32 [rows] in
    nats, and how many they are, int64 [rows]."""
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return token_log_probs(model, batch).sum(1), counts


def token_log_probs(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the log-likelihood of each token whose label counts, and 0 elsewhere, float32 [rows,
    length - 1] in nats.

    Padding is at the end, where no token that counts sees it, so no attention mask is needed.
    """
    from torch.nn.functional import cross_entropy

    from ..evaluation.predictions import without_head
    from ..model.head import counting

    labels = batch["labels"][:, 1:]
    with without_head(model) as head:
        rows = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    where = counting(labels.flatten(), batch.get("counted"))
    rows, targets = rows[where], labels.flatten()[where]
    if head is not None:
        losses = head.losses(rows, targets)
    else:
        losses = cross_entropy(rows.float(), targets, reduction="none")
    # Each has a place of its own, so that the sum does not depend on who comes first.
    placed = losses.new_zeros(labels.numel()).scatter(0, where, -losses)
    return placed.view(labels.shape)


def with_reference(
    setup: Setup, held_out: Dataset | None, tell: Callable[[str], None]
) -> tuple[Dataset, Dataset | None]:
    """Return data with the columns `REFERENCE`, by the model as it is now.

    That costs a pass through the data, and afterwards neither time nor memory. It is right for
    every start of an adapter, and for one that was trained before.
    """
    from ..distributed.world import world
    from ..evaluation.preferences import answer_log_probs

    tell(_words(setup))
    found = []
    for examples in (setup.dataset, held_out):
        if examples is None or REFERENCE[0] in examples.column_names:
            found.append(examples)
            continue
        size = setup.spec.per_device_train_batch_size * PairTask.sequences
        several = world().size > 1
        made = answer_log_probs(setup.model, examples, batch_size=size, split=several).tolist()
        for name, column in zip(REFERENCE, zip(*made, strict=True), strict=True):
            examples = examples.add_column(name, list(column))
        found.append(examples)
    return found[0], found[1]


def _words(setup: Setup) -> str:
    from ..distributed.world import world

    pairs, train = len(setup.dataset), setup.spec
    words = f"the reference is the model before training: it goes through {pairs:,} pairs first"
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world().size
    if 0 < (seen := train.max_steps * step) < pairs:
        words += f", and training sees {seen:,} of them; data.max_examples: {seen} reads no more"
    return words


def logged(likelihoods: Tensor) -> dict[str, Tensor]:
    """Return TRL's figures of the log-likelihoods of a batch, [2 pairs]."""
    chosen, rejected = likelihoods.detach().view(-1, 2).unbind(1)
    return {"logps/chosen": chosen, "logps/rejected": rejected}


def rewards(ratios: Tensor, beta: float) -> dict[str, Tensor]:
    """Return TRL's figures of pairs: rewards, their margins, and how often the chosen one's is the
    higher.

    Args:
        ratios: log-likelihoods less those of the reference, [pairs, 2].
    """
    chosen, rejected = (beta * ratios.detach()).unbind(1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
