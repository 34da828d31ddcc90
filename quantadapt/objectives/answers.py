"""What objectives share that learn from answers by their log-likelihood.

Logits are made in chunks, as for sft, and of each answer its log-likelihood is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import Problem
from ..memory.shape import language_config
from ..protocols import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from ..training.trainer import Setup


class AnswerTask(Task):
    """Has batches of answers after their prompts, see `answer_batch`."""

    logits: ClassVar[Literal["model", "chunks", "whole"]] = "chunks"

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse encoder-decoder models, and losses of routers."""
        name, instead = type(self).__name__, "objective: sft with the chosen answers"
        return causal_problems(name, "pairs", config, instead)

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
    if language_config(config).get("output_router_logits"):
        what = f"{name} does not balance routers, and the model's config asks for that"
        fix = "set output_router_logits to false in its config.json"
        found.append(Problem(what, fix, "objective", f"{rule}-routers"))
    return found


def answer_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, multiple: int | None
) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` [rows, length], -100 where a token is not
    of the answer, and the number of labels that count, `counted`.

    Args:
        rows: token ids with their masks, 1 where they are of the answer; padded on the right.
        multiple: the length is a multiple of so many tokens.
    """
    labels = [
        [token if counts else -100 for token, counts in zip(*row, strict=True)] for row in rows
    ]
    batch: dict[str, Any] = {
        "input_ids": _padded([ids for ids, _ in rows], pad, multiple),
        "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0, multiple),
        "labels": _padded(labels, -100, multiple),
    }
    return batch | {"counted": int((batch["labels"][:, 1:] != -100).sum())}


def rows_at_once(batch: Mapping[str, Any], size: int) -> Iterator[Mapping[str, Any]]:
    """Yield the token ids and labels of a batch, so many rows at a time, as long as they are."""
    count = len(batch["input_ids"])
    if size >= count:
        yield batch
        return
    for at in range(0, count, size):
        yield {name: batch[name][at : at + size] for name in ("input_ids", "labels")}


def _padded(rows: Sequence[Sequence[int]], value: int, multiple: int | None) -> Tensor:
    from torch.nn.functional import pad

    from ..data.batches import padded

    found = padded(rows, value)
    short = -found.shape[1] % (multiple or 1)
    return pad(found, (0, short), value=value)


def log_likelihoods(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return of each sequence in a batch its log-likelihood where labels count, float32 [rows] in
    nats, and how many they are, int64 [rows]."""
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    return token_log_probs(model, batch).sum(1), counts


def token_log_probs(model: Any, batch: Mapping[str, Any], *, temperature: float = 1.0) -> Tensor:
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
        losses = head.losses(rows, targets, temperature=temperature)
    else:
        losses = cross_entropy(rows.float() / temperature, targets, reduction="none")
    # Each has a place of its own, so that the sum does not depend on who comes first.
    placed = losses.new_zeros(labels.numel()).scatter(0, where, -losses)
    return placed.view(labels.shape)


def with_reference(
    setup: Setup,
    held_out: Dataset | None,
    tell: Callable[[str], None],
    *,
    answers: Mapping[str, tuple[str, str]],
    kind: str,
) -> tuple[Dataset, Dataset | None]:
    """Return data with the log-likelihoods of answers by the model as it is now, in nats.

    That costs a pass through the data, and afterwards neither time nor memory. It is right for
    every start of an adapter, and for one that was trained before.

    Args:
        answers: the names of the new columns, and the columns of token ids and masks that each is
            made of.
        kind: what the examples are called.
    """
    from ..distributed.world import world
    from ..evaluation.preferences import answer_log_probs

    tell(_words(setup, kind))
    found = []
    for examples in (setup.dataset, held_out):
        if examples is None or next(iter(answers)) in examples.column_names:
            found.append(examples)
            continue
        size = setup.spec.per_device_train_batch_size * len(answers)
        measured = partial(
            answer_log_probs,
            *(setup.model, examples, [*answers.values()]),
            split=world().size > 1,
        )
        made = setup.at_once(partial(_sized, measured), size, "reference", "the reference's pass")
        for name, column in zip(answers, made.T.tolist(), strict=True):
            examples = examples.add_column(name, column)
        found.append(examples)
    return found[0], found[1]


def _sized(measured: Callable[..., Tensor], most: int) -> Tensor:
    return measured(batch_size=most)


def _words(setup: Setup, kind: str) -> str:
    from ..distributed.world import world

    count, train = len(setup.dataset), setup.spec
    words = f"the reference is the model before training: it goes through {count:,} {kind} first"
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world().size
    if 0 < (seen := train.max_steps * step) < count:
        words += f", and training sees {seen:,} of them; data.max_examples: {seen} reads no more"
    return words
