"""The routes: models, chats and completions, streamed or whole."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..errors import QuantadaptError
from ..generation.prompts import PromptWriter
from ..generation.sampling import Sampling
from .origins import foreign
from .wire import ChatRequest, CompletionRequest, Reply, WrongRequest, error_document, usage_of
from .worker import Event, Full, Job, Worker

_MOST_BYTES = 2**24
_TOO_LARGE = "the request is larger than 16 MiB"


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        writer: writes prompts.
        sampling: how to answer where a request does not say.
        context: tokens that prompt and answer may have together.
        token: what clients have to show; empty where nobody is asked.
        writers: for models that learnt prompts in another way, by their names.
    """

    worker: Worker
    writer: PromptWriter
    sampling: Sampling
    context: int
    token: str = ""
    writers: Mapping[str, PromptWriter] = field(default_factory=dict)

    def writer_for(self, name: str) -> PromptWriter:
        """Return what writes prompts for the model that requests call so."""
        return self.writers.get(name, self.writer)


def create_app(served: Served) -> FastAPI:
    """Return the application; it starts the worker and stops it."""
    app = FastAPI(title="quantadapt", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    app.add_middleware(Guard, token=served.token)

    @app.exception_handler(WrongRequest)
    async def wrong(_: Request, error: WrongRequest) -> Response:
        return _refused(error)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _refused(WrongRequest("the body is no JSON"))
        place = ".".join(str(part) for part in first["loc"][1:])
        unknown = first["type"] == "extra_forbidden"
        what = f"{place}: it is not known here" if unknown else f"{place}: {first['msg']}"
        return _refused(WrongRequest(what.removeprefix(": "), param=place or None))

    @app.exception_handler(QuantadaptError)
    async def refused(_: Request, error: QuantadaptError) -> Response:
        problem = error.problems[0]
        what = f"{problem.where}: {problem.what}" if problem.where else problem.what
        what = f"{what}; {problem.fix}" if problem.fix else what
        return _refused(WrongRequest(what, param=problem.where or None))

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        what = error.detail
        if error.status_code in (404, 405):
            what = f"{what}; served are /v1/models, /v1/chat/completions and /v1/completions"
        return JSONResponse(error_document(what, error.status_code), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [_model(name, started) for name in served.worker.names]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _known(served, name)
        return _model(name, started)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        _known(served, asked.model)
        ids = served.writer_for(asked.model).ids(_turns(asked))
        return await _answered(served, asked, Reply("chat", asked.model), [ids], request)

    @app.post("/v1/completions")
    async def completion(asked: CompletionRequest, request: Request) -> Response:
        _known(served, asked.model)
        writer = PromptWriter(served.writer.tokenizer, "text")
        ids = [p if isinstance(p, list) else writer.ids(p) for p in asked.prompts]
        _refuse_unknown_tokens(served, ids)
        return await _answered(served, asked, Reply("text", asked.model), ids, request)

    return app


class Guard:
    """Refuses who does not show the token (or, where there is none, pages of other hosts), and
    bodies that are too large, however they are sent.

    Written for ASGI itself: under the frameworks' own way (`app.middleware`) nobody is told that
    a client has gone.
    """

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await _refused(refusal)(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > _MOST_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, request: Request) -> WrongRequest | None:
        if not self._token and (other := foreign(request.method, request.headers)):
            return WrongRequest(other, status=403)
        if self._token and request.url.path != "/health" and not _shows(request, self._token):
            what = "show the server's token: Authorization: Bearer TOKEN"
            return WrongRequest(what, status=401, code="invalid_api_key")
        if int(request.headers.get("content-length") or 0) > _MOST_BYTES:
            return WrongRequest(_TOO_LARGE, status=413)
        return None


def _shows(request: Request, token: str) -> bool:
    shown = request.headers.get("authorization", "")
    return hmac.compare_digest(shown.encode(), f"Bearer {token}".encode())


def _refused(error: WrongRequest) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.document(), error.status, headers=headers)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "quantadapt"}


def _known(served: Served, name: str) -> None:
    if name not in served.worker.names:
        what = f"there is no model {name!r}; served are {', '.join(served.worker.names)}"
        raise WrongRequest(what, status=404, code="model_not_found", param="model")


def _turns(asked: ChatRequest) -> list[dict[str, Any]]:
    """Return the turns; what `developer` says is what `system` says to templates."""
    names = {"developer": "system"}
    return [{**t, "role": names.get(str(t.get("role")), t.get("role"))} for t in asked.messages]


def _refuse_unknown_tokens(served: Served, prompts: Sequence[Sequence[int]]) -> None:
    most = len(served.writer.tokenizer)
    for ids in prompts:
        if not ids or min(ids) < 0 or max(ids) >= most:
            what = f"a prompt of token ids needs some, each from 0 to {most - 1}"
            raise WrongRequest(what, param="prompt")


async def _answered(
    served: Served,
    asked: ChatRequest | CompletionRequest,
    reply: Reply,
    prompts: Sequence[list[int]],
    request: Request,
) -> Response:
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    jobs = _jobs(served, asked, prompts, events)
    try:
        for job in jobs:
            served.worker.submit(job)
    except Full:
        _cancel(jobs)
        raise WrongRequest("too many wait already; try again later", status=429) from None
    counted = sum(map(len, prompts))  # once, as OpenAI does, however many answers
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        body = _stream(reply, jobs, events, counted if usage else None)
        return StreamingResponse(body, media_type="text/event-stream")
    return await _whole(reply, jobs, events, counted, request)


def _jobs(
    served: Served,
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    events: asyncio.Queue[tuple[int, Event]],
) -> list[Job]:
    loop, jobs = asyncio.get_running_loop(), list[Job]()
    most = served.worker.max_waiting
    if not 0 < len(prompts) * asked.n <= most:
        what = f"a request asks for 1 to {most} answers, not {len(prompts) * asked.n}"
        raise WrongRequest(what, param="prompt")
    for ids in prompts:
        room = served.context - len(ids)
        if room < 1:
            what = f"the prompt has {len(ids):,} tokens; the model takes {served.context:,} with"
            what = f"{what} the answer"
            param = "messages" if isinstance(asked, ChatRequest) else "prompt"
            raise WrongRequest(what, code="context_length_exceeded", param=param)
        sampling = asked.sampling(served.sampling, room)
        for _ in range(asked.n):
            index = len(jobs)

            def tell(event: Event, index: int = index) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            jobs.append(Job(asked.model, ids, sampling, index, tell))
    return jobs


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancelled.set()


async def _whole(
    reply: Reply,
    jobs: Sequence[Job],
    events: asyncio.Queue[tuple[int, Event]],
    prompt_tokens: int,
    request: Request,
) -> Response:
    texts, finishes, counts = [""] * len(jobs), [""] * len(jobs), [0] * len(jobs)
    looked = time.monotonic()
    try:
        while not all(finishes):
            if time.monotonic() - looked > 0.5:
                if await request.is_disconnected():
                    return JSONResponse(None, 499)
                looked = time.monotonic()
            try:
                index, event = await asyncio.wait_for(events.get(), timeout=0.5)
            except TimeoutError:
                continue
            if event.finish == "error":
                return JSONResponse(error_document(event.text, 500), 500)
            texts[index] += event.text
            finishes[index], counts[index] = event.finish, event.tokens
    finally:
        _cancel(jobs)
    return JSONResponse(reply.whole(texts, finishes, usage_of(prompt_tokens, sum(counts))))


async def _stream(
    reply: Reply,
    jobs: Sequence[Job],
    events: asyncio.Queue[tuple[int, Event]],
    prompt_tokens: int | None,
) -> AsyncIterator[str]:
    """Yield server-sent events. A client that goes away ends it, and its answers."""
    counts, running = [0] * len(jobs), len(jobs)
    try:
        for chunk in reply.opening(len(jobs)):
            yield _sent(chunk)
        while running:
            index, event = await events.get()
            if event.finish == "error":
                yield _sent(error_document(event.text, 500))
                return
            counts[index] = event.tokens
            if event.text:
                yield _sent(reply.piece(index, event.text))
            if event.finish:
                running -= 1
                yield _sent(reply.end(index, event.finish))
        if prompt_tokens is not None:
            yield _sent(reply.usage(usage_of(prompt_tokens, sum(counts))))
        yield "data: [DONE]\n\n"
    finally:
        _cancel(jobs)


def _sent(document: dict[str, Any]) -> str:
    """Return an event. All but ASCII is escaped: there are ends of lines among it (U+2028, U+0085),
    at which clients that read by Python's splitlines would cut it."""
    return f"data: {json.dumps(document)}\n\n"
