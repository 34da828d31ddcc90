"""The typed records that plugins yield, one class for each kind of thing that can be added.

Data only, nothing heavy. The hook that yields a kind is `quantadapt_<kind>s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from inspect import isabstract
from typing import Any, TypeVar

from .capabilities import Merge, Rule
from .protocols import Evaluator, Exporter, Quantizer, Task


class Start(StrEnum):
    """What a freshly attached, untrained adapter does to the model's outputs."""

    ZERO = "zero"
    """Nothing: they are bit for bit the same."""
    ROUNDING = "rounding"
    """They differ by rounding only: the weight is taken apart and put together again."""
    CHANGED = "changed"
    """They differ: the method starts from random or rearranged weights."""


def as_call(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with its options, e.g. `hqq(bits=4, group_size=64)`."""
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({given})" if given else name


class _Named:
    """Records are shown by name: their fields fill a page."""

    name: str
    summary: str

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.summary}>"


@dataclass(frozen=True)
class Serving:
    """What a server makes of a backend's checkpoints.

    Attributes:
        server: its name, e.g. "vllm".
        requires: from which version on, as a requirement string.
        adapters: whether it takes LoRA adapters beside the quantized base.
        needs: what has to be installed beside it, and where, in words that follow "with"; empty:
            nothing.
    """

    server: str
    requires: str
    adapters: bool = False
    needs: str = ""


@dataclass(frozen=True, repr=False)
class Backend(_Named):
    """A way to quantize.

    Attributes:
        name: what users write after `--backend`.
        summary: one line for lists.
        quantizer: the options class; its methods do the work.
        requires: the distributions it needs, as requirement strings ("hqq>=0.2.8").
        imports: the modules whose import proves that the requirements work, e.g. ("hqq",).
        extra: the extra that installs them, "quantadapt[hqq]"; empty if none is needed.
        devices: device types it runs on.
        dtypes: compute dtypes it supports, as torch names.
        calibration: whether quantizing needs data.
        merge: the most that may become of its layers at merge time.
        serves: the servers that read its checkpoints as they are.
        rules: combinations that are refused.
    """

    name: str
    summary: str
    quantizer: type[Quantizer]
    requires: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    extra: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    calibration: bool = False
    merge: Merge = Merge.DENSE
    serves: tuple[Serving, ...] = ()
    rules: tuple[Rule, ...] = ()

    def quantizes_experts(self, options: Mapping[str, Any] | None = None) -> bool:
        """Say whether it quantizes stacks of experts, too; with its default options or others."""
        if isabstract(self.quantizer):
            return False
        return self.quantizer.model_construct(**(options or {})).quantizes_experts


@dataclass(frozen=True, repr=False)
class Adapter(_Named):
    """A method of PEFT, or one of the plugin's own, under the name that users write after
    `--adapter`.

    Attributes:
        name: e.g. "lora".
        summary: one line for lists.
        peft_type: PEFT's name of the method, e.g. "LORA". A method that PEFT does not ship gets it
            from here: by default `name` in capitals.
        defaults: options that differ from the defaults of the method's config.
        merge: the most that may become of it at merge time.
        start: what attaching it does to the outputs before any training.
        requires: distributions it needs beside PEFT, as requirement strings.
        rules: combinations that are refused.
        experts: whether it goes onto stacks of experts, too, which are parameters and no layers.
        config: where the options of a method that PEFT does not ship are, as "module:Class": a
            dataclass that derives from `peft.PeftConfig` and has `target_modules`.
        method: where such a method is, as "module:Class": a subclass of PEFT's `BaseTuner`. Both
            are imported when the adapter is attached or loaded, not before.
    """

    name: str
    summary: str
    peft_type: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    merge: Merge = Merge.REQUANTIZE
    start: Start = Start.ZERO
    requires: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    experts: bool = False
    config: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if self.method and not self.peft_type:
            object.__setattr__(self, "peft_type", self.name.upper().replace("-", "_"))


@dataclass(frozen=True, repr=False)
class Objective(_Named):
    """What is learnt: how examples become batches and a loss. Named by `objective:` in the spec.

    Attributes:
        name: e.g. "sft".
        summary: one line for lists.
        task: the options class; its methods do the work.
        requires: the distributions it needs, as requirement strings.
        extra: the extra that installs them; empty if none is needed.
        rules: combinations that are refused.
        evaluations: what is measured, by name, where the spec does not say.
    """

    name: str
    summary: str
    task: type[Task]
    requires: tuple[str, ...] = ()
    extra: str = ""
    rules: tuple[Rule, ...] = ()
    evaluations: tuple[str, ...] = ("perplexity",)


@dataclass(frozen=True, repr=False)
class Evaluation(_Named):
    """Something to measure on a model, before and after training.

    Attributes:
        name: what users write after `--evaluation` and under `evaluate.evaluations`.
        summary: one line for lists.
        evaluator: the options class; its `measure` does the work.
        requires: the distributions it needs, as requirement strings.
        extra: the extra that installs them; empty if none is needed.
        rules: combinations that no run is planned with.
    """

    name: str
    summary: str
    evaluator: type[Evaluator]
    requires: tuple[str, ...] = ()
    extra: str = ""
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, repr=False)
class Export(_Named):
    """Something that is written from a tuned model.

    Attributes:
        name: what users write in `export.formats`, or as NAME in `quantadapt export RUN NAME`.
        summary: one line for lists.
        exporter: the options class; its methods do the work.
        requires: the distributions it needs, as requirement strings.
        extra: the extra that installs them; empty if none is needed.
        rules: combinations that are refused. Beside the facts about backend and adapter, their
            `when` may name `export.<option>`.
    """

    name: str
    summary: str
    exporter: type[Exporter]
    requires: tuple[str, ...] = ()
    extra: str = ""
    rules: tuple[Rule, ...] = ()


Record = Backend | Adapter | Objective | Evaluation | Export
R = TypeVar("R", bound=Record)

KINDS: dict[str, type[Record]] = {
    "backend": Backend,
    "adapter": Adapter,
    "objective": Objective,
    "evaluation": Evaluation,
    "export": Export,
}
"""What each kind of record is called, in the spec, on the command line and in messages."""


def kind_of(record: Record | type[Any]) -> str:
    """Return what the kind of a record is called, e.g. "backend"."""
    cls = record if isinstance(record, type) else type(record)
    return next(kind for kind, known in KINDS.items() if issubclass(cls, known))


OPTIONS = {
    "backend": "quantizer",
    "objective": "task",
    "evaluation": "evaluator",
    "export": "exporter",
}
"""The field of a record, by kind, that holds its options' class."""
