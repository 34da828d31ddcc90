"""The spec's part on data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ..inputs.typed import Strict

# fmt: off
DataFormat = Literal["auto", "text", "prompt-completion", "alpaca", "dolly", "self-instruct",
                     "messages", "sharegpt", "oasst"]
Column = Literal["text", "prompt", "completion", "instruction", "input", "output", "context",
                 "response", "instances", "messages", "tools", "conversations", "system",
                 "message_id", "parent_id", "role", "rank", "chosen", "rejected", "label", "labels",
                 "tokens", "words", "tags", "images", "image", "anchor", "positive", "negative",
                 "sentence1", "sentence2", "score", "query", "passage"]
# fmt: on


class SourceSpec(Strict):
    """One of several sources that are mixed."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    path: str | None = Field(None, description="a file, folder, pattern or hub id")
    weight: float | None = Field(
        None, gt=0, description="share of the tokens; it is begun again as often as that takes"
    )


class DataSpec(Strict):
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
