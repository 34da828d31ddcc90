"""Parts of a spec that name a thing of a plugin, with its options."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class FormatSpec(Named):
    """An export and its options, e.g. `{name: onto-base, base: ORG/NAME}`.

    The options are those of the export: `quantadapt exports show NAME` lists them.
    """

    name: str = Field(description="export name, see `quantadapt exports`")
