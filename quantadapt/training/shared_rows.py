"""Which rows each of several processes reads, so that they train as one does with the whole batch.

accelerate fills an epoch's last batches with rows of its beginning, so that all processes have as
many; those would count twice. Here its last rows are shared out evenly instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Any

from ..dependencies import in_words
from ..distributed.world import world
from ..errors import TrainingError
from .context_parallel import WHERE, Part


class Evened:
    """The batches of an epoch, of which each of `groups` takes every so-manieth; in the last of
    these rounds all have as many rows, or one more.

    Args:
        batches: a sampler of batches, all but the last one full.
    """

    def __init__(self, batches: Any, groups: int) -> None:
        self.batches, self.groups = batches, groups

    def __getattr__(self, name: str) -> Any:  # sampler, batch_size, drop_last
        return getattr(self.__dict__["batches"], name)

    def __len__(self) -> int:
        return -(-len(self.batches) // self.groups) * self.groups

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of rows, batch by batch. Where the last ones are fewer than groups,
        rows of the beginning stand there again."""
        all_of_them, first = iter(self.batches), list[int]()
        while taken := list(islice(all_of_them, self.groups)):
            rows = list(chain.from_iterable(taken))
            first = first or rows
            if len(taken) == self.groups and len(rows) == self.groups * self.batches.batch_size:
                yield from taken
            else:
                yield from _split(rows, first, self.groups)


def _split(rows: list[int], first: Sequence[int], groups: int) -> Iterator[list[int]]:
    while len(rows) < groups:
        rows = rows + list(first[: groups - len(rows)])
    each, more = divmod(len(rows), groups)
    ends = [each * n + min(n, more) for n in range(groups + 1)]
    for start, end in pairwise(ends):
        yield rows[start:end]


def share_rows(trainer: Any, part: Part, *, evenly: bool) -> None:
    """Let each group of processes that share rows read its own ones.

    Args:
        evenly: whether batches may differ in size among groups.

    Raises:
        TrainingError: with shared rows, the model's own loss is a mean, which of parts is another.
    """
    if part.size > 1 and not trainer.model_accepts_loss_kwargs:
        what = f"the loss of {type(trainer.model.get_base_model()).__name__} takes no count"
        raise TrainingError(what, fix=f"leave {WHERE} out", where=WHERE)
    accelerator = trainer.accelerator
    prepare = accelerator.prepare_data_loader

    def prepared(loader: Any, *args: Any, **kwargs: Any) -> Any:
        made = prepare(loader, *args, **kwargs)
        sampler = made.batch_sampler
        if not hasattr(sampler, "num_processes"):
            what = f"{in_words('accelerate')} does not say which process reads which rows"
            raise TrainingError(what, fix="use another version", where="train")
        sampler.num_processes = groups = world().size // part.size
        sampler.process_index = world().rank // part.size
        if evenly and sampler.even_batches and not isinstance(sampler.batch_sampler, Evened):
            sampler.batch_sampler = Evened(sampler.batch_sampler, groups)
            sampler.even_batches = False
        return made

    accelerator.prepare_data_loader = prepared


def shares_evenly(trainer: Any) -> bool:
    """Say whether the last rows of an epoch can be shared out evenly: not where the loss is one of
    the batches of all processes, or the trainer has an order of its own."""
    from transformers import Trainer

    own = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    return not (own or trainer.task.meets or trainer.task.streams)


def repeated_rows(trainer: Any) -> int:
    """Return how many rows of an epoch's beginning stand at its end again, so that all processes
    have as many: 0 where the run ends before, or the trainer has an order of its own."""
    from transformers import Trainer

    args, groups = trainer.args, world().size // trainer.memory_fit.spec.context_parallel_size
    own = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
    if own or groups < 2 or getattr(trainer, "num_iterations", 1) > 1:  # whole steps alone
        return 0
    # Of prompts that are answered several times, a batch has fewer than the spec says.
    rows, at_once = len(trainer.train_dataset), args.per_device_train_batch_size * groups
    over = rows % at_once
    seen = args.max_steps * args.gradient_accumulation_steps * at_once
    if not over or (args.max_steps > 0 and seen <= rows - over):
        return 0
    return int(max(groups - over, 0) if shares_evenly(trainer) else at_once - over)
