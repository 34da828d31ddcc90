"""What objectives share that learn from rewards for their own answers, in groups to one prompt.

Before each step the model answers prompts by the weights that it has, functions of the user score
the answers, and each is compared with the others to its prompt. Then it is a step like any other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..errors import Problem, RewardError, TrainingError
from ..rewarding.values import gathered, nanstd
from .answers import AnswerTask, answer_batch, rows_at_once, token_log_probs
from .reward_batch import ADVANTAGE, OLD, PLACE, REFERENCE, WEIGHT, PromptCollator

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..generation import Sampling
    from ..rewarding.answering import Rollout
    from ..spec import DataSpec, Spec, TrainSpec
    from ..training.trainer import Setup

DEMO = (
    "the bundled demo gets none of its own prompts right, so it learns nothing from rewards: tune"
    " it a little first, quantadapt run demo --set train.max_steps=30 -o runs/begun, and take what"
    " came out, --model runs/begun/merged"
)


class RewardTask(AnswerTask):
    """Options of all of them. Names are TRL's."""

    generates: ClassVar[bool] = True
    repeats: ClassVar[bool] = False

    rewards: tuple[str, ...] = Field(
        (),
        description="reward functions: file.py:function, module:function, or an entry point",
    )
    reward_weights: tuple[float, ...] = Field((), description="one for each; empty: 1")
    reward_timeout: float = Field(
        60.0, gt=0, description="seconds that a call, or the import, may take"
    )
    num_generations: int = Field(8, ge=2, description="answers to a prompt, which are compared")
    max_completion_length: int = Field(256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(1.0, gt=0.01, le=100, description="of the draws, and of the loss")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest of this share")
    top_k: int | None = Field(None, ge=1, description="draw from so many of the likeliest tokens")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out what is less of the likeliest")
    num_iterations: int = Field(1, ge=1, description="optimizer steps that use the same answers")
    epsilon: float = Field(
        0.2, ge=0, lt=1, description="a ratio of probabilities below 1 - epsilon is clipped"
    )
    epsilon_high: float | None = Field(
        None, ge=0, description="above 1 + epsilon_high, too; null: as epsilon"
    )
    mask_truncated_completions: bool = Field(
        False, description="learn nothing from answers that were cut at the longest length"
    )

    beta: float

    @property
    def compares(self) -> bool:
        """Whether leaving the model as training began costs something."""
        return bool(self.beta)

    # --- the plan ----------------------------------------------------------------------------

    def misfits(self, train: TrainSpec) -> list[Problem]:
        """Refuse a batch that groups do not fill, and functions that are not there."""
        from ..rewarding.evaluation import weight_problems
        from ..rewarding.functions import problems

        found, size = [], train.per_device_train_batch_size
        if size % self.num_generations:
            what = f"{size} answers are no whole groups of {self.num_generations}"
            near = max(size - size % self.num_generations, self.num_generations)
            fix = f"set it to a multiple of num_generations, e.g. {near}"
            where = "train.per_device_train_batch_size"
            found.append(Problem(what, fix, where, "rewards-groups"))
        if not self.rewards:
            what, fix = "it learns from reward functions, and there is none", "name some"
            fix += ", e.g. [rewards.py:function]"
            found.append(Problem(what, fix, "objective.rewards", "rewards-none"))
        found += problems(self.rewards, "objective.rewards")
        weights = weight_problems(self.rewards, self.reward_weights, "objective.reward_weights")
        return found + weights

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Refuse also answers that leave no room for a prompt."""
        found = super().refusals(config)
        most = (config.get("text_config") or config).get("max_position_embeddings") or 0
        if 0 < most <= self.max_completion_length:
            what = f"answers of {self.max_completion_length} tokens leave no room for a prompt: the"
            what += f" model is made for {most}"
            where = "objective.max_completion_length"
            found.append(Problem(what, "lower it", where, "rewards-length"))
        return found

    def evaluated_with(self, evaluation: str) -> Mapping[str, Any]:
        """Return its reward functions, with which `rewarded` measures the likeliest answers."""
        names = ("rewards", "reward_weights", "reward_timeout", "max_completion_length")
        return {name: getattr(self, name) for name in names}

    # --- data --------------------------------------------------------------------------------

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return prompts, as `load_prompts` makes them. Raises RewardError where a function cannot
        be imported, before any work starts."""
        from ..data.prompts import load_prompts

        _ = self.scorer
        return load_prompts(spec, tokenizer, seed=seed)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the first prompts, with what reward functions get."""
        from ..data.prompts import look_at_prompts

        return look_at_prompts(spec, tokenizer, limit)

    def remarks(self, spec: Spec) -> list[str]:
        """Tell that the bundled demo is no start by itself."""
        return [DEMO] if spec.model is None and spec.data.path is None else []

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.prompts import questions
        from ..data.reading import survey

        return survey(spec, questions)

    def prepared(
        self, setup: Setup, held_out: Dataset | None, tell: Callable[[str], None]
    ) -> tuple[Dataset, Dataset | None]:
        """Return data that know their places. Raises TrainingError where the data hold no prompts,
        or the model is no reference."""
        from ..data.prompts import ROW
        from ..evaluation.reference import has_reference
        from ..generation.answers import context_of

        _ = self.scorer
        if ROW not in setup.dataset.column_names:
            what = f"the data hold no prompts as {type(self).__name__} reads them"
            raise TrainingError(what, fix="pass a file with a column prompt", where="data")
        most, longest = context_of(setup.model), max(self.lengths(setup.dataset))
        if most and longest - self.max_completion_length >= most:
            what = f"a prompt has {longest - self.max_completion_length:,} tokens"
            what += f", the model is made for {most:,}"
            raise TrainingError(what, fix="lower data.max_length: it drops such", where="data")
        if self.beta and not has_reference(setup.model):
            what = "the model did not come from quantadapt, and has no reference for beta"
            fix = "make it by quantadapt.quantize and attach, or set objective.beta to 0"
            raise TrainingError(what, fix=fix, where="objective.beta")
        return setup.dataset.add_column(PLACE, [*range(len(setup.dataset))]), held_out

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens each prompt may have with the longest answer."""
        import pyarrow.compute as pc

        from ..data.prompts import PROMPT_IDS

        found: list[int] = []
        for table in dataset.with_format("arrow").iter(10_000):
            found += pc.list_value_length(table[PROMPT_IDS]).to_pylist()
        return [length + self.max_completion_length for length in found]

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of prompts, with answers of the longest length in the place of
        those to come: memory is fitted to them."""
        return PromptCollator(self, setup.pad_token_id, setup.length_multiple)

    def trainer(self, setup: Setup) -> Any:
        """Return transformers' Trainer, whose batches are prompts, each for a group of answers."""
        from dataclasses import replace

        from transformers import Trainer, TrainingArguments

        from ..training.rollouts import RolloutLoop

        prompts = setup.spec.per_device_train_batch_size // self.num_generations
        spec = setup.spec.model_copy(update={"per_device_train_batch_size": prompts})
        kind = type("RewardTrainer", (RolloutLoop, Trainer), {})
        collator = self.collator(setup)
        found = replace(setup, spec=spec).trainer(kind, TrainingArguments, collator)
        found.num_iterations = self.num_iterations
        return found

    # --- before a step -----------------------------------------------------------------------

    def before_step(self, setup: Setup, batches: list[dict[str, Any]], step: int) -> None:
        """Put answers by the model as it is now into the batches, with what they are worth.
        Raises RewardError."""
        places = [batch[PLACE].tolist() for batch in batches]
        size, what = setup.spec.per_device_train_batch_size, f"what comes before step {step}"
        made = self._answers(setup, [place for part in places for place in part], step, what)
        scores, rewards = self._scored(made)
        left = iter(made)
        for batch, part in zip(batches, places, strict=True):
            answers = [*islice(left, len(part) * self.num_generations)]
            batch.clear()
            batch.update(self.batch(setup, answers))
        if self.beta or self.num_iterations > 1:
            remember = partial(self._remember, setup.model, batches)
            setup.at_once(remember, size, "log-probabilities", what)
        self._value(batches, made, scores, rewards)

    def _answers(
        self, setup: Setup, places: Sequence[int], step: int, what: str
    ) -> Sequence[Rollout]:
        """Return a group of answers to each prompt, those to one prompt as neighbours.

        Args:
            places: of the prompts in the data.
            what: they are made for, in words.
        """
        from ..data.prompts import Asked
        from ..distributed.world import world
        from ..rewarding.answering import rollouts

        train, mine = setup.spec, world()
        size = train.per_device_train_batch_size
        asked = [Asked.of(setup.dataset[place]) for place in places]
        answer = partial(
            rollouts,
            *(setup.model, setup.tokenizer),
            [one for one in asked for _ in range(self.num_generations)],
            self.sampling(setup.seed),
            # Each answer of a run has a number of its own, by which it is drawn.
            first=((step - 1) * mine.size + mine.rank) * size * train.gradient_accumulation_steps,
        )
        return setup.at_once(lambda count: answer(batch_size=count), size, "answers", what)

    def sampling(self, seed: int) -> Sampling:
        """Return how answers are drawn."""
        from ..generation import Sampling

        return Sampling(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
        )

    def _scored(self, made: Sequence[Rollout]) -> tuple[dict[str, Tensor], Tensor]:
        """Return what each function gives each answer, and the weighted sums. Raises RewardError,
        in all processes."""
        import torch

        from ..distributed.talking import reduced
        from ..distributed.world import world
        from ..rewarding.answering import scored

        failed: RewardError | None = None
        scorer = self.scorer
        try:
            scores = scored(scorer, made)
        except RewardError as error:
            failed = error
        if world().size > 1 and reduced(float(failed is not None), torch.device("cpu"), "max"):
            failed = failed or RewardError("a reward function failed in another process")
        if failed is not None:
            raise failed
        return dict(zip(scorer.functions, scores.T, strict=True)), scorer.totals(scores)

    @property
    def scorer(self) -> Any:
        """What scores answers. Raises RewardError where a function cannot be imported."""
        from ..rewarding.evaluation import scorer_of

        return scorer_of(self.rewards, self.reward_weights, self.reward_timeout)

    def batch(self, setup: Setup, made: Sequence[Rollout]) -> dict[str, Any]:
        """Return a batch of answers, where the model is."""
        from ..evaluation.predictions import device_of

        rows = []
        for one in made:
            counts = one.ended or not self.mask_truncated_completions
            ids = [*one.asked.ids, *one.ids]
            rows.append((ids, [0] * len(one.asked.ids) + [int(counts)] * len(one.ids)))
        batch = answer_batch(rows, setup.pad_token_id, setup.length_multiple)
        device = device_of(setup.model)
        return {n: v.to(device) if hasattr(v, "to") else v for n, v in batch.items()}

    def _remember(self, model: Any, batches: list[dict[str, Any]], most: int) -> None:
        """Note the log-probabilities of answers before the step, and by the reference, of so many
        answers at a time."""
        import torch

        from ..adapting.fused import without_casts
        from ..evaluation.predictions import evaluating
        from ..evaluation.reference import reference

        with evaluating(model), torch.no_grad():
            for batch in batches:
                batch[OLD] = self._noted(model, batch, most)
            if not self.beta:
                return
            with reference(model), without_casts(model):
                for batch in batches:
                    batch[REFERENCE] = self._noted(model, batch, most)

    def _noted(self, model: Any, batch: Mapping[str, Any], most: int) -> Tensor:
        import torch

        return torch.cat([self.log_probs(model, part) for part in rows_at_once(batch, most)])

    def _value(
        self,
        batches: list[dict[str, Any]],
        made: Sequence[Rollout],
        scores: Mapping[str, Tensor],
        rewards: Tensor,
    ) -> None:
        """Put into the batches what answers are worth, and what is told of them."""
        import torch

        from ..training.rollouts import TOLD, ZERO_STD

        sizes = [len(batch["input_ids"]) for batch in batches]
        worth = self.valued(rewards, batches)
        advantages = self.advantages(worth).nan_to_num()
        groups = worth.view(-1, self.num_generations)
        same = torch.isclose(nanstd(groups), groups.new_zeros(()))
        told = {
            "reward": rewards,
            "reward_std": nanstd(gathered(rewards)[None]).expand(len(rewards)),
            ZERO_STD: same.double().repeat_interleave(self.num_generations),
            "completions/mean_length": rewards.new_tensor([len(one.ids) for one in made]),
            "completions/clipped_ratio": rewards.new_tensor([not one.ended for one in made]),
        }
        if len(scores) > 1:
            told |= {f"rewards/{name}": values for name, values in scores.items()}
        columns = {ADVANTAGE: advantages, **{TOLD + name: v for name, v in told.items()}}
        for name, column in columns.items():
            for batch, part in zip(batches, torch.split(column.float(), sizes), strict=True):
                batch[name] = part.to(batch["input_ids"].device)
        for batch in batches:
            batch[WEIGHT] = self.weights((batch["labels"][:, 1:] != -100).sum(1).float())

    def valued(self, rewards: Tensor, batches: list[dict[str, Any]]) -> Tensor:
        """Return what answers are compared by, float64 [answers]: by default the rewards."""
        return rewards

    @abstractmethod
    def advantages(self, rewards: Tensor) -> Tensor:
        """Return how much better each answer is than the others of its group, float64 [answers],
        NaN where it has no reward; `rewards` [answers] hold groups as neighbours."""
        ...

    def weights(self, lengths: Tensor) -> Tensor:
        """Return how much an answer of a batch weighs, float32 [answers], given their lengths."""
        return lengths.new_ones(len(lengths))

    # --- the step ----------------------------------------------------------------------------

    def log_probs(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the log-probabilities of the tokens of answers, and 0 elsewhere, float32 [answers,
        length - 1] in nats."""
        return token_log_probs(model, batch, temperature=self.temperature)

    def told(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what is told of the answers in a batch, by name."""
        from ..training.rollouts import TOLD

        found = {n.removeprefix(TOLD): v for n, v in batch.items() if n.startswith(TOLD)}
        return {name: values[~values.isnan()] for name, values in found.items()}

    def clipped(self, ratios: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss by ratios of probabilities, in their shape, and where it is clipped."""
        import torch

        low, high = 1 - self.epsilon, 1 + self._epsilon_high
        loss = -torch.min(ratios * advantages, ratios.clamp(low, high) * advantages)
        below = (ratios < low) & (advantages < 0)
        above = (ratios > high) & (advantages > 0)
        told = {"low_mean": below, "high_mean": above, "region_mean": below | above}
        return loss, {f"clip_ratio/{name}": where.float() for name, where in told.items()}

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
