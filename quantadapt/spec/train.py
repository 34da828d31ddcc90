"""The spec's part on training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..inputs.typed import Strict

Streaming = Literal["auto", "none", "experts", "all"]
"""What of the quantized base lies in CPU memory, see `streaming`."""
_IN_ONE_MESSAGE = {
    "memory": "use auto, min, or a number of GiB above 0",
    "packing": "use true, false, or the tokens of a row, 64 or more",
}
"""What is said of fields with several types, where pydantic has a message for each."""


class TrainSpec(Strict):
    """How to train. Names and meanings are those of transformers' TrainingArguments."""

    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1 means num_train_epochs")
    num_train_epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the training data")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    per_device_train_batch_size: int = Field(8, ge=1, description="examples per forward pass")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="forward passes per optimizer step"
    )
    lr_scheduler_type: str = Field("cosine", description="linear, cosine, constant, ...")
    lr_scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the schedule, by the names of transformers, e.g. {min_lr: 1e-5} of "
        "cosine_with_min_lr",
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0, description="of the adapter's weights")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm")
    optim: str = Field(
        "adamw_torch_fused", description="adamw_torch_fused, adamw_8bit, paged_adamw_8bit, ..."
    )
    memory: Literal["auto", "min"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="GiB of the GPU that training may fill; auto: all that is free; min: as little "
        "as possible. What is computed again in backward follows from it",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="true: compute every layer again, false: none; by default memory decides"
    )
    stream: Streaming = Field(
        "auto",
        description="keep the quantized base in CPU memory and copy it to the GPU block by block "
        "while it computes: all of it, its stacks of experts, or none; auto: as little of it as "
        "possible where training does not fit otherwise",
    )
    stream_folder: str | None = Field(
        None,
        description="a folder on a fast disk, to keep what is streamed of the base in instead of "
        "CPU memory",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="with several processes: ddp, each holds the whole model, or fsdp, each holds "
        "its share of the base; auto: fsdp where the whole base does not fit and a share does",
    )
    context_parallel_size: int = Field(
        1,
        ge=1,
        description="so many processes share each row, a part of its tokens each: for rows that "
        "are too long for one GPU",
    )
    use_reentrant: bool = Field(False, description="which kind of gradient checkpointing")
    use_liger_kernel: bool = Field(
        True, description="fused RMSNorm, SwiGLU and RoPE, on CUDA where liger-kernel is installed"
    )
    cuda_graphs: bool = Field(
        True,
        description="record passes of equal shape and replay them, on CUDA where nothing but plain "
        "LoRA is trained",
    )
    compute: Literal["dtype", "fp8"] = Field(
        "dtype",
        description="what products with the frozen base are computed in while it trains: the "
        "compute dtype, or 8-bit floats with a scale for each token and each output, which are "
        "faster and round more; on GPUs from Hopper on",
    )
    merge_aware: bool = Field(
        False,
        description="train through the quantizer: adapted layers compute with the weights that a "
        "merge keeps on the scales of the base, so that `export.merge: requantize` writes the very "
        "model that was trained; a step takes longer",
    )
    packing: bool | Annotated[int, Field(ge=64)] | None = Field(
        None,
        description="pack several examples into one row, of `data.max_length` tokens, or of so "
        "many; refused for models that mix them up. By default the objective says: pretrain does",
    )
    logging_steps: int = Field(5, ge=1)
    save_steps: int | None = Field(None, ge=1, description="checkpoint every so many steps")
    eval_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="when to measure the loss on held-out data; steps where eval_steps is set",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="measure it every so many steps, and after the last"
    )
    load_best_model_at_end: bool = Field(
        False, description="keep the adapter of the step where that loss was lowest"
    )
    metric_for_best_model: Literal["eval_loss", "loss"] = Field(
        "eval_loss", description="by which a step is best: the loss on held-out data"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a lower loss"
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="by how much it has to be lower, in nats per token"
    )
    max_time: float | None = Field(
        None,
        gt=0,
        description="minutes from the start of the run after which training ends with a "
        "checkpoint, to go on with `resume`",
    )
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers that get the curves, e.g. [tensorboard, trackio, wandb, mlflow]",
    )
    resume: bool = Field(False, description="go on from the last checkpoint in the output folder")

    @property
    def row_length(self) -> int | None:
        """Tokens of a packed row, where `packing` gives a number."""
        return None if self.packing is None or isinstance(self.packing, bool) else self.packing

    @property
    def validates(self) -> Literal["no", "steps", "epoch"]:
        """When the loss on held-out data is measured while training."""
        return self.eval_strategy or ("steps" if self.eval_steps else "no")

    @field_validator("eval_strategy", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML takes a bare `no` for false

    @field_validator(*_IN_ONE_MESSAGE, mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
        try:
            return check(value)
        except ValueError:
            name = str(info.field_name)
            raise PydanticCustomError(cast(Any, name), _IN_ONE_MESSAGE[name]) from None
