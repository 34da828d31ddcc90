"""The spec: everything that a run is told, in one strict, typed record.

The command line, YAML files (those in `configs/`, too) and Python all build this record and nothing
else.
An unknown key is an error with a suggestion; all mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .errors import Problem, SpecError, did_you_mean, likely_name
from .inputs.configs import located
from .inputs.plain_yaml import YAMLError, parse, read_yaml, to_yaml
from .inputs.typed import Typed

MergeChoice = Literal["auto", "dense", "requantize", "never"]
Rounding = Literal["auto", "nearest", "grid", "dithered", "refined", "compensated"]
"""How merged weights are rounded when they are quantized again, see `exporting.rounding`."""
MinGain = Annotated[float, Field(ge=0, le=1)]
"""The share of an adapter's gain that a merged model has to keep, see `ExportSpec.min_gain`."""
# fmt: off
DataFormat = Literal["auto", "text", "prompt-completion", "alpaca", "dolly", "self-instruct",
                     "messages", "sharegpt", "oasst"]
Column = Literal["text", "prompt", "completion", "instruction", "input", "output", "context",
                 "response", "instances", "messages", "tools", "conversations", "system",
                 "message_id", "parent_id", "role", "rank", "chosen", "rejected", "label", "labels",
                 "tokens", "words", "tags", "images", "image", "anchor", "positive", "negative",
                 "sentence1", "sentence2", "score", "query", "passage"]
# fmt: on
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Streaming = Literal["auto", "none", "experts", "all"]
"""What of the quantized base lies in CPU memory, see `streaming`."""
Tower = Literal["language", "vision", "projector"]
"""A part of an image-text model, see `model.towers`."""


class _Strict(Typed):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show what differs from the defaults."""
        for name, value in super().__repr_args__():
            known = type(self).model_fields.get(name or "")
            if known is None or value != known.get_default(call_default_factory=True):
                yield name, value


SHORTHAND = {"backend": "name", "adapter": "name", "objective": "name", "data": "path"}
"""The key that a bare string stands for, e.g. `backend: hqq`."""


class Named(BaseModel):
    """`name` plus the options of the thing named; a bare string is taken as the name."""

    model_config = ConfigDict(extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What is said beside the name."""
        return dict(self.model_extra or {})


class BackendSpec(Named):
    """A backend and its options, e.g. `{name: hqq, bits: 4, group_size: 64}`.

    The options are those of the backend's quantizer: `quantadapt backends show NAME` lists them.
    """

    name: str = Field("hqq", description="backend name, see `quantadapt backends`")


class AdapterSpec(Named):
    """An adapter and its options, e.g. `{name: lora, r: 16, target_modules: all-linear}`.

    The options are those of the method's PEFT config, under PEFT's names.
    """

    name: str = Field("lora", description="adapter name, see `quantadapt adapters`")


class ObjectiveSpec(Named):
    """What is learnt, and options of that.

    The options are those of the objective's task: `quantadapt objectives show NAME` lists them.
    """

    name: str = Field("sft", description="objective name, see `quantadapt objectives`")


class EvaluationSpec(Named):
    """An evaluation and its options, e.g. `{name: perplexity}`.

    The options are those of its evaluator: `quantadapt evaluations show NAME` lists them.
    """

    name: str = Field("perplexity", description="evaluation name, see `quantadapt evaluations`")


class SourceSpec(_Strict):
    """One of several sources that are mixed."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    path: str | None = Field(None, description="a file, folder, pattern or hub id")
    weight: float | None = Field(
        None, gt=0, description="share of the tokens; it is begun again as often as that takes"
    )


class DataSpec(_Strict):
    """Where the training and evaluation text comes from."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"sources": value}
        return {"path": value} if isinstance(value, str) else value

    @property
    def named(self) -> list[str]:
        """The sources that it names; none means the bundled demo's."""
        return [path for path in (self.path, *(one.path for one in self.sources)) if path]

    path: str | None = Field(
        None,
        description="JSONL, JSON, CSV, Parquet or text file, folder or pattern of those, or hub id",
    )
    sources: list[SourceSpec] = Field(
        default_factory=list,
        description="several in place of `path`, for objectives that stream, e.g. "
        "[{path: web/*.jsonl, weight: 3}, {path: books.txt, weight: 1}]; all with a weight or none",
    )
    eval_path: str | None = Field(None, description="held-out data; otherwise split off `path`")
    eval_examples: int | None = Field(
        None, ge=1, description="where data are streamed: hold out the first so many documents"
    )
    eval_fraction: float = Field(0.05, gt=0, lt=1, description="share split off as held-out data")
    split_seed: int | None = Field(
        None, ge=0, lt=2**32, description="of that split; `seed` if missing"
    )
    format: DataFormat = Field("auto", description="how to read the columns")
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="your names for the columns, e.g. {prompt: question, completion: answer}",
    )
    max_length: int = Field(512, ge=8, description="longest example in tokens; longer ones are cut")
    max_examples: int | None = Field(None, ge=1, description="use only the first so many examples")
    image_folder: str | None = Field(
        None, description="folder that pictures are named in; that of the data file if missing"
    )
    max_pixels: int | None = Field(
        None, ge=1, description="larger pictures are made smaller to so many pixels"
    )
    calibration_path: str | None = Field(
        None, description="what backends calibrate on; the training data if missing"
    )
    calibration_examples: int = Field(128, ge=1, description="how many examples that takes")


class TrainSpec(_Strict):
    """How to train. Names and meanings are those of transformers' TrainingArguments."""

    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1 means num_train_epochs")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the training data")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    per_device_train_batch_size: int = Field(8, ge=1, description="examples per forward pass")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="forward passes per optimizer step"
    )
    lr_scheduler_type: str = Field("cosine", description="linear, cosine, constant, ...")
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

    @field_validator("memory", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValueError:
            text = "use auto, min, or a number of GiB above 0"
            raise PydanticCustomError("memory", text) from None


class EvaluateSpec(_Strict):
    """What to measure."""

    evaluations: list[EvaluationSpec] = Field(
        [EvaluationSpec(name="perplexity")],
        description="what is measured on every model of the run, see `quantadapt evaluations`",
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="tasks of lm-evaluation-harness that are measured beside them, e.g. [mmlu, "
        "gsm8k]; their options are those of the evaluation `tasks`",
    )
    max_examples: int = Field(200, ge=1, description="held-out examples that are measured on")
    batch_size: int = Field(8, ge=1, description="examples per forward pass")
    unquantized: bool = Field(True, description="also measure the base before quantization")
    samples: int = Field(2, ge=0, description="prompts answered greedily before and after")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")

    @field_validator("evaluations", mode="before")
    @classmethod
    def _from_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _from_words(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @property
    def wanted(self) -> list[EvaluationSpec]:
        """The evaluations, with that of the tasks."""
        if not self.tasks:
            return self.evaluations
        named = [named for named in self.evaluations if named.name == "tasks"]
        others = [named for named in self.evaluations if named.name != "tasks"]
        options = named[0].options if named else {}
        listed = options.pop("tasks", [])
        tasks = dict.fromkeys([*(listed if isinstance(listed, list) else [listed]), *self.tasks])
        return [*others, EvaluationSpec(name="tasks", tasks=list(tasks), **options), *named[1:]]


class FormatSpec(Named):
    """An export and its options, e.g. `{name: onto-base, base: ORG/NAME}`.

    The options are those of the export: `quantadapt exports show NAME` lists them.
    """

    name: str = Field(description="export name, see `quantadapt exports`")


class ExportSpec(_Strict):
    """What to write besides the adapter."""

    merge: MergeChoice = Field(
        "auto",
        description="auto: a dense merged model where the combination allows it, a quantized one "
        "of a run with train.merge_aware",
    )
    min_gain: MinGain = Field(
        0.9,
        description="the share of what the adapter gained on held-out data, in nats, that a merged "
        "model has to keep that is quantized again; one that keeps less is refused. 0 takes any",
    )
    rounding: Rounding = Field(
        "auto",
        description="how such a model is rounded: nearest (as the backend quantizes), grid "
        "(nearest, with the scales of the base), dithered (with those, so that changes below a "
        "step are kept on the whole), refined (dithered, after some steps of training for it, on "
        "data), compensated (layers make up for their errors, on data); "
        "auto: the best of those tried until min_gain and, by quick ones, 0.95 are kept",
    )
    formats: list[FormatSpec] = Field(
        default_factory=list,
        description="more to write, each a name from `quantadapt exports` or "
        "{name: ..., option: ...}",
    )


class Spec(_Strict):
    """One run."""

    model: str | None = Field(None, description="checkpoint folder or hub id; the demo if missing")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; without it that is refused"
    )
    backend: BackendSpec = Field(default_factory=lambda: BackendSpec(name="hqq"))
    adapter: AdapterSpec = Field(default_factory=lambda: AdapterSpec(name="lora"))
    objective: ObjectiveSpec = Field(default_factory=lambda: ObjectiveSpec(name="sft"))
    data: DataSpec = Field(default_factory=DataSpec)
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    export: ExportSpec = Field(default_factory=ExportSpec)
    output: str | None = Field(
        None, description="run folder; `runs/<backend>-<adapter>` if missing"
    )
    overwrite: bool = Field(False, description="replace an earlier run in `output`")
    force_base: bool = Field(
        False, description="resume though the model's files are not those that it was begun with"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field(
        "auto", description="compute dtype; auto: bfloat16 on cuda where it can, else float32"
    )
    skip_modules: list[str] | None = Field(
        None, description="modules left dense; default: the head"
    )
    towers: list[Tower] = Field(
        ["language"],
        min_length=1,
        description="the parts of an image-text model that are quantized and adapted: language, "
        "vision, projector; the others stay as they are",
    )
    skip_misfits: bool = Field(
        False, description="also leave layers dense whose size the backend cannot quantize"
    )
    new_modules: list[str] = Field(
        default_factory=list,
        description="modules that the checkpoint does not hold and that start at random, such as "
        "the head of a classifier; whatever else is missing is refused",
    )
    unused_modules: list[str] = Field(
        default_factory=list,
        description="modules that the checkpoint holds and the model has not, such as layers "
        "beyond those of its config; without it, those are refused",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="of the adapter, the shuffling and the held-out split"
    )

    @field_validator("towers", mode="before")
    @classmethod
    def _from_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(_problems(error)) from None

    @property
    def inputs(self) -> list[str]:
        """The paths and hub ids that are read, and so must not be written to."""
        data = self.data
        paths = (self.model, *data.named, data.eval_path, data.calibration_path)
        return [path for path in paths if path]

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Spec:
        """Read a YAML file and apply `a.b=c` overrides. Raises SpecError with all mistakes.

        Args:
            path: of the file, or the bare name of a config that comes along: `quantadapt init`
                lists those.
            overrides: assignments to dotted keys; values are read as YAML.
        """
        return cls(**apply_overrides(read_yaml(located(path)), overrides))

    def to_yaml(self) -> str:
        """Return the spec as YAML that `load` reads back."""
        return to_yaml(self.model_dump(mode="json"))


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with `a.b=c` assignments applied; values are read as YAML."""
    result = _copy(values)
    problems = [problem for item in overrides if (problem := _override(result, item))]
    if problems:
        raise SpecError(problems)
    return result


def _override(values: dict[str, Any], item: str) -> Problem | None:
    """Apply one `a.b=c` to `values`, or return why it cannot be applied."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        fix = "write it as key=value, e.g. --set train.max_steps=100"
        return Problem(f"{item!r} is no assignment", fix, where="--set")
    *parents, last = key.strip().split(".")
    node = values
    for name in parents:
        child = node.get(name)
        if isinstance(child, str) and name in SHORTHAND:
            child = {SHORTHAND[name]: child}
        elif child is not None and not isinstance(child, dict):
            return Problem(f"{name!r} is {child!r}, which has no {last!r}", where=f"--set {key}")
        child = child or {}
        node[name] = child
        node = child
    node[last] = _yaml_value(text)
    return None


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. What is no mapping stays, for the spec to complain about."""
    *parents, last = key.split(".")
    for name in parents:
        child = values.get(name)
        if isinstance(child, str) and name in SHORTHAND:
            child = {SHORTHAND[name]: child}
        elif child is not None and not isinstance(child, dict):
            return
        values[name] = child = child or {}
        values = child
    values[last] = value


def named(before: Any, name: str) -> dict[str, Any]:
    """Return the thing called `name`, with the options that `before` gives to that very thing."""
    same = isinstance(before, dict) and before.get("name", name) == name
    return {**before, "name": name} if same else {"name": name}


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _yaml_value(text: str) -> Any:
    try:
        return parse(text)
    except YAMLError:
        return text


def _problems(error: ValidationError) -> list[Problem]:
    return [_problem(dict(detail)) for detail in error.errors()]


def _problem(detail: dict[str, Any]) -> Problem:
    path = [str(part) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return Problem(f"unknown key {path[-1]!r}", _hint(path), where=where)
    if detail["type"] == "model_type":
        return _no_mapping(where, detail["input"])
    return wrong_value(detail, where)


def _hint(path: list[str]) -> str:
    """Say which key an unknown one may stand for, in its section or in another."""
    *section, name = path
    known = _known_keys(Spec, section)
    if not likely_name(name, known):
        for other in ("", *_sections(), "adapter"):
            keys = _LORA if other == "adapter" else _known_keys(Spec, [other] if other else [])
            if there := likely_name(name, keys):
                return f"did you mean {'.'.join(filter(None, (other, there)))!r}?"
    return did_you_mean(name, known)


_LORA = ["r", "lora_alpha", "lora_dropout", "target_modules"]
"""Options of adapters that people write elsewhere."""


def _sections() -> list[str]:
    return [key for key in Spec.model_fields if _known_keys(Spec, [key]) not in ([], ["name"])]


def _no_mapping(where: str, found: Any) -> Problem:
    what = "it is empty" if found is None else f"{found!r} is no mapping"
    key = SHORTHAND.get(where)
    fix = f"write a {key}, or {{{key}: ...}}" if key else "write keys and values"
    return Problem(what, f"leave it out, or {fix}" if found is None else fix, where)


def wrong_value(detail: Mapping[str, Any], where: str) -> Problem:
    """Return what pydantic's `detail` says about a value, and what may stand there instead."""
    if detail["type"] == "missing":
        return Problem("it has to be set, and is not", where=where)
    what, message = f"{detail['input']!r} is not possible", str(detail["msg"])
    if detail["type"] == "literal_error":
        return Problem(what, f"use one of {detail['ctx']['expected']}", where)
    if not message.startswith("Input should be "):
        message = message.removeprefix("Value error, ")
        return Problem(f"{message}, got {detail['input']!r}", where=where)
    wanted = message.removeprefix("Input should be ").partition(",")[0]
    bound = wanted.startswith(("greater", "less"))
    return Problem(what, f"use a value {wanted}" if bound else f"use {wanted}", where)


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        annotation = model.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
