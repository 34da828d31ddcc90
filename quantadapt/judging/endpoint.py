"""A model behind an endpoint that speaks OpenAI's API: asked over plain HTTP, with patience."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import EndpointError, Problem
from ..inputs.documents import parsed

_LONGEST = 2**22
"""Bytes of an answer that are read at most."""
_LONGEST_WAIT = 60.0
_PIECE = 2**16
_BUSY = (408, 409, 425, 429)
_NO_ANSWER = (OSError, http.client.HTTPException)


class _Busy(Exception):
    """It did not answer this time; `wait` is how many seconds it asks for."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        self.why, self.wait = why, wait
        super().__init__(why)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes where the user said, and nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Where chats are completed.

    Attributes:
        url: of the API, e.g. "https://api.openai.com/v1".
        model: what it is called there.
        key: shown to the endpoint alone; empty: none is.
        timeout: seconds that an answer may take.
        retries: how often to ask again where there was none.
        first_wait: seconds before that; twice as long each time.
        max_tokens: longest answer.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    retries: int = 5
    first_wait: float = 1.0
    max_tokens: int = 1024
    sleep: Callable[[float], None] = time.sleep
    _options: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._options = {"temperature": 0, "max_tokens": self.max_tokens}
        handlers: list[Any] = [_NoRedirect]
        if _is_loopback(self.url):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def check(self) -> None:
        """Ask for a word, to find out whether it is there and knows key and model.

        Raises:
            EndpointError: it does not.
        """
        try:
            self._once([{"role": "user", "content": "Say yes."}])
        except _Busy as busy:
            fix = "check --endpoint, and whether it is up"
            raise self._error(busy.why, fix) from None

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the answer to a chat; empty where it has no text.

        Raises:
            EndpointError: there is none, though it was asked again, or it refuses.
        """
        wait = self.first_wait
        for left in range(self.retries, -1, -1):
            try:
                return self._once(messages)
            except _Busy as busy:
                if not left:
                    times = f"asked {self.retries + 1} times" if self.retries else "asked once"
                    fix = "give the command again once it answers: what is done is kept"
                    raise self._error(f"{busy.why} ({times})", fix) from None
                self.sleep(min(max(wait, busy.wait), _LONGEST_WAIT))
                wait *= 2
        raise AssertionError

    def _once(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Ask once; again, without it, where an option is not known there."""
        asked = {"model": self.model, "messages": list(messages)}
        while True:
            status, body, wait = self._post({**asked, **self._options})
            if status == 200:
                return self._text(body)
            said = self._said(body)
            if status == 400 and self._without_refused(said):
                continue
            what = f"it answers with {status}{f': {said}' if said else ''}"
            if status in _BUSY or status >= 500:
                raise _Busy(what, wait)
            raise self._error(what, _WAYS_OUT.get(status, "check --endpoint and --judge-model"))

    def _without_refused(self, said: str) -> bool:
        """Leave out an option that models which think first do not take; say whether there was
        one."""
        if "max_completion_tokens" in said and "max_tokens" in self._options:
            self._options["max_completion_tokens"] = self._options.pop("max_tokens")
            return True
        return "temperature" in said and self._options.pop("temperature", None) is not None

    def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes, float]:
        """Return status, body and the seconds to wait that the answer asks for."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
        end = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return response.status, self._read(response, end), 0.0
        except urllib.error.HTTPError as error:
            with error:
                return error.code, self._read(error, end), _seconds(error.headers)
        except _NO_ANSWER as error:
            raise _Busy(self._why(error)) from None

    def _read(self, response: Any, end: float) -> bytes:
        """Read an answer, however slowly it comes, until `end`."""
        found = b""
        try:
            while piece := response.read1(_PIECE):
                found += piece
                if len(found) > _LONGEST:
                    raise _Busy(f"its answer has more than {_LONGEST:,} bytes")
                if time.monotonic() > end:
                    raise _Busy(f"it has not answered for {self.timeout:g} s")
        except _NO_ANSWER as error:
            raise _Busy(self._why(error)) from None
        return found

    def _why(self, error: BaseException) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"it has not answered for {self.timeout:g} s"
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"it cannot be reached: {' '.join(str(text).split()).lower()}"

    def _text(self, body: bytes) -> str:
        """Return the text of a completed chat."""
        try:
            content = parsed(body)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = self._hidden(" ".join(body[:200].decode(errors="replace").split()))
            raise _Busy(f"what it answers is no chat completion: {shown!r}") from None
        return content if isinstance(content, str) else ""

    def _said(self, body: bytes) -> str:
        """Return what an error says of itself, without the key."""
        try:
            found = parsed(body)
            error = found.get("error", found) if isinstance(found, dict) else found
            text = error.get("message", error) if isinstance(error, dict) else error
        except ValueError:
            text = body.decode(errors="replace")
        return self._hidden(" ".join(str(text).split())[:300])

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _error(self, what: str, fix: str) -> EndpointError:
        return EndpointError(self._hidden(what), fix=fix, where=self.url)


_WAYS_OUT = {
    401: "put the key that it wants into OPENAI_API_KEY",
    403: "put a key that may use this model into OPENAI_API_KEY",
    404: "check --endpoint, which mostly ends with /v1, and --judge-model",
}
_WAYS_OUT |= dict.fromkeys((301, 302, 303, 307, 308), "give the address that it leads to")


def endpoint_problems(url: str) -> list[Problem]:
    """Return what is wrong with the address of an endpoint."""
    where = "--endpoint"
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        return [Problem("it is no address", "write e.g. http://localhost:8000/v1", where)]
    if parts.username or parts.password:
        return [Problem("it holds a password", "put the key into OPENAI_API_KEY", where)]
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_one:
        return [Problem(f"{url!r} is no address", "write e.g. http://localhost:8000/v1", where)]
    if parts.query or parts.fragment:
        what = "it has a query, and the path of the API is put behind it"
        return [Problem(what, "leave that out", where)]
    return []


def is_readable_by_others(url: str) -> bool:
    """Say whether what is sent there goes over a network unencrypted."""
    return urlsplit(url).scheme == "http" and not _is_loopback(url)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except (TypeError, ValueError):  # a date
        return 0.0
