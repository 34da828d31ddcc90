"""The training loop of objectives that answer prompts: answers are used for several steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from ..distributed.world import world
from ..errors import RewardError, TrainingError
from .figures import adapter_device
from .loop import TrainingLoop

if TYPE_CHECKING:
    from torch import Tensor

TOLD = "told:"
"""Begins the names of what is told of each answer, in a batch."""
ZERO_STD = "frac_reward_zero_std"


class RolloutLoop(TrainingLoop):
    """Takes the same prompts for `num_iterations` steps, and answers that were made before the
    first of them. Attributes beside those of `TrainingLoop`:

    Attributes:
        num_iterations: how many steps use the same answers.
        rollouts: the batches of answers that go on being used, of this process.
    """

    model: Any
    train_dataset: Any
    num_iterations: int = 1
    rollouts: list[dict[str, Any]] | None = None
    _has_warned: bool = False
    _has_told: bool = False

    def begin_step(self, batches: list[Any]) -> None:
        """Make answers, or take those of the step before. A reward function that fails ends the
        run, which goes on from a checkpoint of what was learnt so far."""
        if self.state.global_step % self.num_iterations:
            for batch, kept in zip(batches, self._kept_rollouts(), strict=True):
                batch.clear()
                batch.update(kept)
            return
        if not self._has_told:
            self._tell_of_answering()
        try:
            super().begin_step(batches)
        except RewardError as error:
            raise self._kept(error) from error
        self.rollouts = [dict(batch) for batch in batches] if self.num_iterations > 1 else None
        self._tell_of_equal(batches)

    def _tell_of_answering(self) -> None:
        """Say, before the first step, why answers take longer than they might."""
        from ..generation.slots import unrecorded

        self._has_told = True
        if self.memory_fit is None or adapter_device(self.model).type != "cuda":
            return
        if why := unrecorded(self.model):
            what = f"answers are drawn without CUDA graphs, which takes longer: {why}"
            self.memory_fit.on_note(what)

    def _kept_rollouts(self) -> list[dict[str, Any]]:
        if self.rollouts is None:
            what = f"the answers of step {self.state.global_step} are not in this checkpoint"
            fix = "leave num_iterations as it was, or delete it to go on from the one before"
            raise TrainingError(what, fix=fix, where=str(self.resumed and self.resumed.path))
        return self.rollouts

    def _kept(self, error: RewardError) -> RewardError:
        """Return an error that says which checkpoint is there, once it is."""
        problem, step = error.problems[0], self.state.global_step
        if not step:
            return error
        self._save_checkpoint(self.model, None)
        fix = f"{problem.fix}; then go on with --resume: a checkpoint of step {step} is there"
        return RewardError(problem.what, fix=fix, where=problem.where)

    def _tell_of_equal(self, batches: list[Any]) -> None:
        if self._has_warned or self.memory_fit is None:
            return
        if all(bool((batch[TOLD + ZERO_STD] == 1).all()) for batch in batches):
            self._has_warned = True
            reward = float(batches[0][TOLD + "reward"].nanmean())
            found = f"all answers to each prompt got the same reward ({reward:.3g} on the mean)"
            fix = "Start from a model that gets some right, let the functions tell better from"
            fix += " worse, or raise num_generations or temperature"
            if math.isnan(reward):
                found = "no reward function applies to any answer, as all gave None"
                fix = "Let one return numbers"
            self.memory_fit.on_note(
                f"step {self.state.global_step + 1}: {found}, so nothing is learnt from them."
                f" {fix}; {ZERO_STD} in metrics.jsonl counts such prompts"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.num_iterations == 1:
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        step, count = step * world().size, len(self.train_dataset)
        if count < step:
            what = f"a step takes {step} prompts, and there are {count}"
            fix = "lower train.per_device_train_batch_size, or leave num_iterations out"
            raise TrainingError(what, fix=fix, where="objective.num_iterations")
        return Repeated(count, step, self.num_iterations, self.args.seed)

    # What a process holds between steps goes beside its random state.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.rollouts is not None:
            torch.save(self.rollouts, self._file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (file := self._file(resume_from_checkpoint)).is_file():
            self.rollouts = torch.load(file, weights_only=True, map_location="cpu")

    @staticmethod
    def _file(folder: str) -> Path:
        return Path(folder) / f"rollouts-{world().rank}.pt"


class Repeated(Sampler):  # type: ignore[type-arg]
    """Yields the places of the prompts of each step several times, shuffled anew in each epoch. The
    last step of an epoch, which would have fewer, is left out."""

    def __init__(self, count: int, step: int, times: int, seed: int) -> None:
        self.count, self.step, self.times, self.seed = count, step, times, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.step * self.step * self.times

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        order: Tensor = torch.randperm(self.count, generator=draws)
        for start in range(0, self.count - self.step + 1, self.step):
            for _ in range(self.times):
                yield from order[start : start + self.step].tolist()
