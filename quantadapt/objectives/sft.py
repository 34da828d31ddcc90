"""`sft`, supervised fine-tuning: the next token is learnt wherever the data say that it counts.

Causal models are trained by TRL's SFTTrainer, encoder-decoder models by transformers'
Seq2SeqTrainer: prompts go to the encoder, completions become the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..data.pixels import PICTURES, PIXELS, joined
from ..errors import DataError, TrainingError
from ..hookspecs import hookimpl
from ..protocols import Task
from ..records import Objective

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.files import Row
    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec, Spec
    from ..training.trainer import Setup


class SFT(Task):
    """The options of `sft`: none. A subclass may have some, and may override

    - `columns`, to have more of each row in its batches than tokens;
    - `loss`, to score a batch: `input_ids`, `attention_mask` and `labels` [batch, length], -100
      where a token does not count; and `counted`, the number of labels that count.
    """

    packs: ClassVar[bool] = True
    by_token: ClassVar[bool] = True
    logits: ClassVar[Literal["model", "chunks", "whole"]] = "model"
    unit: ClassVar[str] = "nats per token"

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Take a loss that is another for one that holds all logits, and knows nothing of packed
        rows or parts of rows, unless the class says otherwise."""
        if "loss" in vars(cls):
            cls.packs = vars(cls).get("packs", False)
            cls.by_token = vars(cls).get("by_token", False)
            cls.logits = vars(cls).get("logits", "whole")

    def columns(self, row: Row) -> dict[str, float]:
        """Return the numbers that a row brings along, by name; each becomes a float32 tensor
        [batch] in the batch. Raises DataError."""
        return {}

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return token ids and masks, as `load_data` makes them, and `columns`."""
        from ..data.reading import load_data

        return load_data(spec, tokenizer, seed=seed, columns=self._numbers)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return formats and rows; None of a subclass that reads in a way of its own."""
        from ..data.reading import survey

        return survey(spec) if self._reads_text else None

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport] | None:
        """Return the first examples; None of a subclass that reads in a way of its own."""
        from ..data.reading import look

        return look(spec, tokenizer, limit) if self._reads_text else None

    @property
    def _reads_text(self) -> bool:
        """Whether `read` makes examples of text as it does here."""
        return type(self).read is SFT.read

    def remarks(self, spec: Spec) -> list[str]:
        """Tell what a step sees of packed examples."""
        train = spec.train
        if not train.packing:
            return []
        row, count = train.row_length or spec.data.max_length, train.per_device_train_batch_size
        rows = f"{count} {'row' if count == 1 else 'rows'} of {row:,} tokens"
        return [
            f"examples are packed: a batch is {rows}, of as many examples as fit; each token that"
            " counts weighs the same"
        ]

    def _numbers(self, row: Row) -> dict[str, float]:
        from ..data.files import kind_of

        found = self.columns(row)
        for name, value in found.items():
            if not isinstance(value, int | float):
                fix = "write a number, or leave the example out"
                what = f"{name!r} is {kind_of(value)}, expected a number"
                raise DataError(what, fix=fix, where=row.where)
        return found

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads examples, or with packing lays them end to end."""
        from ..data.batches import EncoderDecoderCollator, WithColumns

        names = [] if type(self).columns is SFT.columns else _of_numbers(setup.dataset)
        if setup.model.config.is_encoder_decoder:
            eos = setup.model.config.eos_token_id
            return WithColumns(EncoderDecoderCollator(setup.pad_token_id, eos), names)
        return WithColumns(_causal_collator(setup), names)

    def trainer(self, setup: Setup) -> Any:
        """Return TRL's SFTTrainer or transformers' Seq2SeqTrainer. Raises TrainingError."""
        kind = _seq2seq_trainer if setup.model.config.is_encoder_decoder else _causal_trainer
        return kind(self, setup)

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Tensor:
        """Return the mean over all tokens of a step, in nats, without ever holding all logits where
        that can be."""
        from ..training.lent_to_trainers import balances_routers

        counted, _ = batch.pop("counted", None), batch.pop("tokens", None)
        batch["use_cache"] = False
        batch |= joined(batch.pop(PIXELS, ()))
        if model.config.is_encoder_decoder:
            return _share_of_mean(model, batch, count)
        if not balances_routers(model):
            # Padding at the end is seen by no token that counts, and attention without a mask is
            # faster. Only routers look at all tokens.
            batch.pop("attention_mask", None)
        whose = _whose_head(model.get_base_model())
        if whose is None:
            given = {} if count is None else {"num_items_in_batch": count}
            return _loss_of(model(**batch, **given))
        if whose != "trl":
            batch["counted"] = counted
        return _loss_of(model(**batch, fused_lm_head=True, num_items_in_batch=count))

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of labels that count, of which the first token is none."""
        return int(batch["counted"])

    def tokens(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Return the tokens of prompts and completions; both halves of an encoder-decoder model
        see some."""
        if "tokens" in batch:  # of packed rows
            return batch["tokens"]
        seen = super().tokens(model, batch)
        return seen + (batch["labels"] != -100).sum() if model.config.is_encoder_decoder else seen

    def parts(self, batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
        """Yield its parts; how many labels count is known of the whole alone."""
        for number, part in enumerate(super().parts(batch, size)):
            if PIXELS in batch:
                part[PIXELS] = batch[PIXELS][number * size : (number + 1) * size]
            if size < len(batch["input_ids"]):
                part.pop("counted", None)  # in the whole batch
            yield part


_WHOSE = "quantadapt_head"
"""Marks a forward that computes the loss of the next tokens, and says whose it is."""
_NOT_ITS_LOSS = (
    "the loss_function that was given to the model is not used: sft learns the next token; another"
    " loss is an objective of its own"
)


@hookimpl
def quantadapt_objectives() -> list[Objective]:
    """Return the one that is built in."""
    return [Objective("sft", "learn the completions, token by token", SFT)]


def _of_numbers(dataset: Dataset) -> list[str]:
    """Return the names of the columns that hold a number for each example."""
    types = {name: str(getattr(f, "dtype", "")) for name, f in dataset.features.items()}
    return [name for name, type_ in types.items() if type_.startswith(("int", "float", "bool"))]


def _causal_collator(setup: Setup) -> Any:
    from ..data.batches import CausalCollator
    from ..training.packing import packed_collator

    if setup.spec.packing:
        return packed_collator(setup)
    return CausalCollator(setup.pad_token_id, setup.length_multiple)


def _causal_trainer(task: SFT, setup: Setup) -> Any:
    from trl import SFTConfig, SFTTrainer

    from ..training.lent_to_trainers import quiet, with_adapted_heads, without_statistics

    with quiet(), with_adapted_heads(), without_statistics(setup.model):
        if setup.spec.packing:
            setup = _packed(setup)
        # the data are tokenized already; max_length and packing have been dealt with
        options = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = setup.trainer(
            *(SFTTrainer, SFTConfig, task.collator(setup)),
            options=options,
            processing_class=setup.tokenizer,
        )
    if task.logits == "model":
        _fuse_head(setup.model)
        _look_at_loss(task, setup)
    return trainer


def _packed(setup: Setup) -> Setup:
    """Return the setup with several examples in a row. Raises TrainingError where the model does
    not keep them apart, or they have pictures."""
    from ..data.batches import SEQUENCES
    from ..model.ulysses import alone
    from ..training.packing import packed, refuse_leaks

    _refuse_pictures(setup.dataset)
    with alone(setup.model):
        refuse_leaks(setup.model, _causal_collator(setup))
    if SEQUENCES in setup.dataset.column_names:
        return setup
    usual = getattr(getattr(setup.model, "quantadapt", None), "max_length", None) or 0
    return replace(setup, dataset=packed(setup.dataset, setup.spec.row_length, usual))


def _look_at_loss(task: SFT, setup: Setup) -> None:
    """Tell of a loss of the model's that is not used. Raises TrainingError where one is used that
    is not of the next tokens."""
    from ..training.next_tokens import refuse_unshifted

    base = setup.model.get_base_model()
    if _whose_head(base) is not None:
        if hasattr(base, "_loss_function"):
            setup.on_note(_NOT_ITS_LOSS)
        return
    # What the model's is, whatever else a subclass makes of it, and wants of a batch.
    own = partial(SFT.loss, task, setup.model, count=None)
    refuse_unshifted(setup.model, lambda batch: own(batch=batch), setup.on_note)


def _refuse_pictures(dataset: Dataset) -> None:
    if PICTURES in dataset.column_names:
        what = "examples with pictures are not packed"
        raise TrainingError(what, fix="leave train.packing out", where="train.packing")


def _seq2seq_trainer(task: SFT, setup: Setup) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    if all(setup.dataset[0]["completion_mask"]):
        what = "an encoder-decoder model needs prompts, but the data are plain text"
        raise TrainingError(what, fix="use data with prompts and completions", where="data")
    return setup.trainer(Seq2SeqTrainer, Seq2SeqTrainingArguments, task.collator(setup))


def _fuse_head(model: Any) -> None:
    """Compute the loss of the next tokens, without ever holding all logits where that can be.

    A forward that somebody has patched stays in use.
    """
    from ..training.figures import adapter_device
    from ..training.lent_to_trainers import add_head_loss, add_logits_loss, add_trl_loss

    base = model.get_base_model()
    if "forward" in vars(base):
        return
    ways: dict[str, Callable[[Any], bool]] = {"logits": add_logits_loss}
    if base.base_model is not base:
        # On a CPU TRL's way is no faster than one with logits.
        trl = {} if adapter_device(model).type == "cpu" else {"trl": add_trl_loss}
        ways = {"ours": add_head_loss, **trl, **ways}
    whose = next((name for name, add in ways.items() if add(base)), None)
    if whose is not None:
        setattr(vars(base)["forward"].__func__, _WHOSE, whose)


def _whose_head(base: Any) -> Literal["ours", "trl", "logits"] | None:
    """Say whose way of computing the loss is in use; None of the model's own."""
    return getattr(vars(base).get("forward"), _WHOSE, None)


def _share_of_mean(model: Any, batch: dict[str, Any], count: Any) -> Tensor:
    """Return the model's own mean, times the batch's share of the labels that count.

    Most encoder-decoder models (T5, BART) take `num_items_in_batch` and ignore it.
    """
    loss = _loss_of(model(**batch))
    return loss if count is None else loss * ((batch["labels"] != -100).sum() / count)


def _loss_of(outputs: Any) -> Tensor:
    """Return the loss that a model has computed; some return a tuple."""
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss
