"""What an objective implements: a `Task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import Problem
from .options import Options

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec, Spec, TrainSpec
    from ..training.trainer import Setup


class Task(Options, ABC):
    """The options of an objective: how examples become batches and a loss.

    A subclass says how to read, to batch and to score; all else has a default. An objective that
    learns from the tokens of a text is less work: subclass `quantadapt.SFT` and override what
    differs.

    Attributes:
        sequences: how many sequences an example sends through the model; in a batch they are
            neighbours.
        adds_up: whether the loss of a batch is a sum over its examples, divided by a count: then a
            batch may go through the model in parts.
        repeats: whether every step does the same with batches of one shape, so that passes through
            the decoder may be recorded as CUDA graphs.
        packs_by_default: whether they do where `train.packing` says nothing.
        streams: whether it reads several sources (`data.sources`), and its training examples are
            taken in the order in which they were read.
        wants_lm: whether it learns from a model that predicts tokens; classifiers and bare encoders
            are refused then.
        packs: whether several examples may share a row (`train.packing`).
        meets: whether its loss is of the batches of all processes, which then wait for each other
            in each pass.
        by_token: whether its loss is a sum over tokens, to which the processes that share a row
            (`train.context_parallel_size`) may add the tokens that they have: `shift_labels` of a
            batch then says what comes after each token.
        logits: who makes logits, and how many are held. "model": the model, with its own loss;
            "chunks": `loss`, some at a time; "whole": `loss`, all of a batch. A loss that is not
            the model's lacks what a PEFT method adds to that (AdaLoRA does).
        unit: what its loss is counted in; empty where it has no unit.
        generates: whether it answers prompts while it trains, which a sharded base does not do,
            and has no loss on held-out data.
        head: what it learns with: "sequence" or "token", a head that classifies those, which a
            language model gets anew; empty for the model as it is.
    """

    sequences: ClassVar[int] = 1
    adds_up: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    by_token: ClassVar[bool] = False
    meets: ClassVar[bool] = False
    packs_by_default: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    wants_lm: ClassVar[bool] = True
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "whole"
    unit: ClassVar[str] = ""
    head: ClassVar[Literal["", "sequence", "token"]] = ""
    generates: ClassVar[bool] = False

    @property
    def compares(self) -> bool:
        """Whether it compares with the model as training began, which is remembered then:
        `evaluation.reference`."""
        return False

    @abstractmethod
    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Read and tokenize what `spec` names, and hold a part out.

        The columns of `train` are the task's own; backends calibrate on `input_ids`. Evaluations
        read `input_ids` and `completion_mask` of `eval`. Raises DataError.
        """
        ...

    def read_for(
        self, spec: Spec, tokenizer: PreTrainedTokenizerBase, *, processes: int = 1
    ) -> Data:
        """Read what a run of `spec` needs, for a task that reads no more than its steps take; by
        default as `read`, whatever the training is like."""
        return self.read(spec.data, tokenizer, seed=spec.seed)

    def known_by(self, dataset: Dataset) -> list[int]:
        """Return numbers by which a resumed run knows its data again: by default their lengths."""
        return self.lengths(dataset)

    def conflicts(self, spec: Spec) -> list[Problem]:
        """Return why it does not go with data and training of `spec`; empty if it does."""
        if not spec.data.sources:
            return []
        what = f"{type(self).__name__} reads one source"
        fix = "write data.path, a folder or a pattern; or use objective: pretrain"
        return [Problem(what, fix, "data.sources", "task-sources")]

    def remarks(self, spec: Spec) -> list[str]:
        """Return what a plan should tell of its data, a sentence each."""
        return []

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return formats and rows of what `read` would read, for a plan: without a tokenizer, and
        None where that is not to be had at once. Raises DataError."""
        return None

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport] | None:
        """Return what is shown of the first `limit` examples that `read` would read, and a report
        on all of them; None for the tokens that it trains on. Raises DataError."""
        return None

    def refusals(self, config: Mapping[str, Any]) -> list[Problem]:
        """Return why it does not learn from a model with this config.json; empty if it does."""
        return []

    def teacher_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the config.json of a dense model that is held beside one with this config; empty
        where that is not here yet, None where there is no such model. Memory is planned for it."""
        return None

    def holding(self, setup: Setup, tell: Callable[[str], None]) -> AbstractContextManager[None]:
        """Hold what the loss needs beside the model while that trains, such as another model."""
        return nullcontext()

    def misfits(self, train: TrainSpec) -> list[Problem]:
        """Return why its options do not go with how it is to be trained; empty if they do. Looks at
        local files at most, and runs no code of the user's."""
        return []

    def evaluated_with(self, evaluation: str) -> Mapping[str, Any]:
        """Return the options of one of its evaluations where the spec does not name any."""
        return {}

    def prepared(
        self, setup: Setup, held_out: Dataset | None, tell: Callable[[str], None]
    ) -> tuple[Dataset, Dataset | None]:
        """Return training data, `setup.dataset`, and held-out data with what the model says of them
        before it is trained, in more columns of numbers. A checkpoint keeps those, so that a
        resumed run, which does not call this, has the same.

        Args:
            tell: gets a sentence that the user may want to know.
        """
        return setup.dataset, held_out

    def before_step(self, setup: Setup, batches: list[dict[str, Any]], step: int) -> None:
        """Look at the batches of an optimizer step before any of them goes through the model, and
        change them in place: what depends on the model as it is now, and on all of them. Where
        memory may run out, let examples go through the model by `setup.at_once`, as many at a time
        as it holds; else that ends a run of several processes.

        Args:
            setup: with the data set that `prepared` returned.
            batches: as `collator` makes them, on the model's device, of this process.
            step: the number of the step, from 1 on.
        """

    @abstractmethod
    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of examples: tensors with a row for each sequence or example,
        among them `input_ids`."""
        ...

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Any], count: Any
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of a batch, a scalar; and perhaps figures to log with it, by name, each
        with a number for each example.

        Args:
            model: a PeftModel in training mode.
            batch: what `collator` made, on the model's device; may be changed.
            count: the `count` of all batches of a step, a float32 scalar, to divide a sum by; on
                several processes their mean. None only where `logits` is "model" and the model does
                not take one: its loss is a mean then.
        """
        ...

    def trainer(self, setup: Setup) -> Any:
        """Return what trains: by default transformers' own Trainer, which is told to use `loss`."""
        from transformers import Trainer, TrainingArguments

        return setup.trainer(Trainer, TrainingArguments, self.collator(setup))

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return what the loss of a batch is divided by: the number of its examples."""
        return len(batch["input_ids"]) // self.sequences

    def tokens(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return how many tokens without padding a batch sends through the model, an int or a
        scalar tensor, which need not be waited for."""
        seen = batch.get("attention_mask")
        return batch["input_ids"].numel() if seen is None else seen.sum()

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens each example has, in the longest of its sequences. Memory is
        planned for the longest."""
        import pyarrow.compute as pc

        found: list[int] = []
        for table in dataset.with_format("arrow").iter(10_000):  # makes no Python lists of them
            found += pc.list_value_length(table["input_ids"]).to_pylist()
        return found

    def parts(self, batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
        """Yield a batch in parts of `size` examples, where it `adds_up`."""
        rows, each = len(batch["input_ids"]), self.sequences
        steps = {rows: size * each, rows // each: size}  # of what has a row a sequence, an example
        for part in range(-(-rows // (size * each))):
            yield {
                name: value[part * step : (part + 1) * step]
                if getattr(value, "ndim", 0) and (step := steps.get(len(value)))
                else value
                for name, value in batch.items()
            }
