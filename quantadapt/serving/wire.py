"""What requests say and answers hold, in the words of OpenAI's API
(https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator

from ..generation.sampling import Sampling

_OURS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "audio": (None,),
}
"""Options that are not served, with the values that ask for nothing, by type as well: `logprobs: 0`
asks for those of the answer's own tokens."""


class WrongRequest(Exception):
    """A request that cannot be served.

    Attributes:
        status: of HTTP.
        code, param: as OpenAI's errors have them.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def document(self) -> dict[str, Any]:
        """Return it as the body of an answer."""
        return error_document(str(self), self.status, code=self.code, param=self.param)


def error_document(
    message: str, status: int, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error as the body of an answer."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of requests share. `user`, `metadata` and the like change no answer."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    n: int = Field(1, ge=1, le=64)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    response_format: Any = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None
    audio: Any = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        """What is null says nothing: OpenAI takes it for each option."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("stop")
    @classmethod
    def _few(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError("more than 16 texts")
        return value

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens

    def sampling(self, otherwise: Sampling, room: int) -> Sampling:
        """Return how to answer; what the request leaves open is as the server was told.

        Args:
            room: tokens that the context has room for after the prompt.

        Raises:
            WrongRequest: something is asked that is not served.
        """
        for name, nothing in _UNSUPPORTED.items():
            value = getattr(self, name)
            if not any(value == none and type(value) is type(none) for none in nothing):
                what = f"{name}={value!r} is not served here; leave it out"
                raise WrongRequest(what, param=name, code="unsupported_parameter")
        wanted = {name: value for name in _OURS if (value := getattr(self, name)) is not None}
        if self.stop is not None:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        most = min(self.most_tokens or otherwise.max_new_tokens, room)
        return Sampling(**{**otherwise.model_dump(), **wanted, "max_new_tokens": most})


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    reasoning_effort: Any = None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is asked for, by its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]] = ""

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Reply:
    """Writes the answer to one request, whole or in chunks.

    Args:
        kind: "chat" or "text".
        model: its name.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str) -> None:
        prefix, self._chat = ("chatcmpl" if kind == "chat" else "cmpl"), kind == "chat"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, texts: list[str], finishes: list[str], usage: Mapping[str, int]
    ) -> dict[str, Any]:
        """Return the whole answer."""
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            said = {"role": "assistant", "content": text}
            body: dict[str, Any] = {"message": said} if self._chat else {"text": text}
            choices.append({"index": index, **body, "logprobs": None, "finish_reason": finish})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": dict(usage)}

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield what a chat's stream begins with: who speaks."""
        for index in range(count if self._chat else 0):
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return a chunk with more text of one choice."""
        return self._chunk(index, {"delta": {"content": text}} if self._chat else {"text": text})

    def end(self, index: int, finish: str) -> dict[str, Any]:
        """Return the last chunk of one choice."""
        return self._chunk(index, {"delta": {}} if self._chat else {"text": ""}, finish)

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the chunk that counts tokens."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": dict(usage)}

    def _chunk(self, index: int, body: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choice = {"index": index, **body, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": kind, "choices": [choice]}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Return the count of tokens as answers have it."""
    total = prompt_tokens + tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": total}
