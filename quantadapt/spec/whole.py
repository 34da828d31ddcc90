"""The spec: everything that a run is told, in one strict, typed record.

The command line, YAML files (those in `configs/`, too) and Python all build this record and nothing
else. An unknown key is an error with a suggestion; all mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from ..errors import SpecError
from ..inputs.configs import located
from ..inputs.plain_yaml import read_yaml, to_yaml
from ..inputs.typed import Strict
from .chosen import AdapterSpec, BackendSpec, EvaluationSpec, FormatSpec, ObjectiveSpec
from .data import DataSpec
from .mistakes import problems_of
from .overrides import apply_overrides
from .train import TrainSpec

MergeChoice = Literal["auto", "dense", "requantize", "never"]
Rounding = Literal["auto", "nearest", "grid", "dithered", "refined", "compensated"]
"""How merged weights are rounded when they are quantized again, see `exporting.rounding`."""
MinGain = Annotated[float, Field(ge=0, le=1)]
"""The share of an adapter's gain that a merged model has to keep, see `ExportSpec.min_gain`."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tower = Literal["language", "vision", "projector"]
"""A part of an image-text model, see `model.towers`."""


class EvaluateSpec(Strict):
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


class ExportSpec(Strict):
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


class Spec(Strict):
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
    reuse_base: str | None = Field(
        None,
        description="folder of a run whose base was calibrated: it is taken instead of quantizing "
        "anew, if its model, quantization and calibration data are those of this run",
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
            raise SpecError(problems_of(error, Spec)) from None

    @property
    def inputs(self) -> list[str]:
        """The paths and hub ids that are read, and so must not be written to."""
        data = self.data
        paths = (self.model, *data.named, data.eval_path, data.calibration_path, self.reuse_base)
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
