"""What the records that people fill in share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError


class Typed(BaseModel):
    """A record whose numbers are numbers: not nan or inf, and not true or false."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        taken = check(value)
        if _truth_for_a_number(value, taken):
            raise PydanticCustomError("number", "Input should be a number")
        if isinstance(taken, int) and abs(taken) > sys.maxsize:  # what counts, counts in 64 bits
            if taken < 0:
                raise PydanticKnownError("greater_than_equal", {"ge": -sys.maxsize})
            raise PydanticKnownError("less_than_equal", {"le": sys.maxsize})
        return taken


def _truth_for_a_number(given: Any, taken: Any) -> bool:
    """Tell whether pydantic made a number of true or false, here or deeper."""
    if isinstance(given, bool):
        return isinstance(taken, int | float) and not isinstance(taken, bool)
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        return any(_truth_for_a_number(given[key], taken.get(key)) for key in given)
    if isinstance(given, list | tuple) and isinstance(taken, Sequence):
        return any(map(_truth_for_a_number, given, taken))
    return False


class Strict(Typed):
    """A part of a spec: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show what differs from the defaults."""
        for name, value in super().__repr_args__():
            known = type(self).model_fields.get(name or "")
            if known is None or value != known.get_default(call_default_factory=True):
                yield name, value
