"""The routes of the server: completions, models, health, metrics and a page to try them."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from megarecur.inference.request import Request as TextRequest
from megarecur.serving.choice import Choice, Options, Piece, TokenNames, describe_logprobs
from megarecur.serving.metrics import CONTENT_TYPE, write_metrics
from megarecur.serving.protocol import (
    CompletionBody,
    RequestError,
    find_prompts,
    find_stops,
    read_body,
    read_draft,
    read_exit,
)
from megarecur.serving.service import Job, Service

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS = 30.0
"""Most seconds in which a body arrives, so that slow clients do not keep connections forever."""
MOST_DROPPED = 1 << 24
"""Most bytes beyond the limit that are read from a client before it gets its answer."""
CLIENT_LEFT = 499
"""Status of an answer whose client left, as nginx counts it."""
PAGE_HEADERS = {
    # The page loads nothing from elsewhere, and talks to this server alone.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass
class Answer:
    """The texts of one request for completions, on their way."""

    service: Service
    body: CompletionBody
    job: Job
    prompts: list[list[int]]
    choices: list[Choice]
    names: TokenNames
    id: str
    created: int

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (index of the choice, piece) until all choices have ended."""
        left = len(self.choices)
        async with aclosing(self.job.events()) as events:
            async for index, event in events:
                choice = self.choices[index]
                if choice.finished:
                    continue
                piece = choice.add(event, self.job.handles[index].prompt_scores)
                if choice.finished and not event.finished:
                    self.job.cancel(index)
                left -= choice.finished
                if piece.text or piece.tokens or piece.reason:
                    yield index, piece
                if not left:
                    return

    def describe(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return an object of the API around choices."""
        return {"id": self.id, "object": "text_completion", "created": self.created,
                "model": self.service.name, "choices": choices}  # fmt: skip

    def describe_piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice of the API; `loops` has those of its new tokens."""
        return {
            "index": index,
            "text": piece.text,
            "finish_reason": piece.reason,
            "logprobs": describe_logprobs(piece.tokens, self.names, self.body.logprobs),
            "loops": [token.loops for token in piece.tokens if token.loops is not None],
        }

    def count(self) -> dict[str, int]:
        """Return the usage."""
        prompt = sum(map(len, self.prompts))
        new = sum(choice.num_new for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def collect(self) -> dict[str, Any]:
        """Return the whole answer."""
        whole = [Piece() for _ in self.choices]
        async with aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                whole[index].extend(piece)
        described = [self.describe_piece(i, piece) for i, piece in enumerate(whole)]
        return self.describe(described) | {"usage": self.count()}

    async def stream(self) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        with_usage = self.body.stream_options and self.body.stream_options.include_usage
        rest: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            async with aclosing(self.pieces()) as pieces:
                async for index, piece in pieces:
                    yield write_event(self.describe([self.describe_piece(index, piece)]) | rest)
        except RequestError as error:
            yield write_event(error.describe())
            return
        if with_usage:
            yield write_event(self.describe([]) | {"usage": self.count()})
        yield "data: [DONE]\n\n"


def write_event(values: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A stream whose job ends with it, whether it was read to its end or the client left."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.stream(), headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            left = not all(choice.finished for choice in self.answer.choices)
            gone = left and self.answer.service.failure is None
            self.answer.service.statuses[CLIENT_LEFT if gone else 200] += 1
            self.answer.job.close()


def write_error(error: RequestError) -> JSONResponse:
    """Return the answer to a request that is not served."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    # The rest of a body that was not read would be taken for the next request.
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.describe(), error.status, headers)


async def read_content(request: Request, most: int) -> bytes:
    """Return the bytes of a body, which are counted, whatever the header says.

    Raises:
        RequestError: 413 for too many, 408 if they arrive too slowly, 415 for another type.
    """
    too_large = RequestError(413, f"the body has more than {most} bytes; shorten it")
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    # A client whose connection is closed while it sends sees no answer. So what is beyond the limit
    # is read as well, within reason, and dropped; a client that expects an answer first gets it.
    if length > most and ("expect" in request.headers or length > most + MOST_DROPPED):
        raise too_large
    content, count = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                count += len(part)
                if count <= most:
                    content += part
                elif count > most + MOST_DROPPED:
                    raise too_large
    except TimeoutError:
        line = f"the body did not arrive within {BODY_SECONDS:g} seconds; send it faster"
        raise RequestError(408, line) from None
    if count > most:
        raise too_large
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites can send forms and plain text to this server, but no JSON.
        raise RequestError(415, f"Content-Type {kind!r} is not application/json; set it")
    return bytes(content)


async def begin(service: Service, names: TokenNames, body: CompletionBody) -> Answer:
    """Submit the texts of a body.

    Raises:
        RequestError: the request cannot be served, with the reason.
    """
    if body.model is not None and body.model != service.name:
        line = f"model {body.model[:80]!r} does not exist; this server has {service.name!r}"
        raise RequestError(404, line, param="model", code="model_not_found")
    prompts, stops = find_prompts(body.prompt), find_stops(body.stop)
    assert prompts is not None and stops is not None
    count = body.n or 1
    service.check_open(len(prompts) * count)
    most = 16 if body.max_tokens is None else body.max_tokens
    if most > service.limits.max_new_tokens:
        line = f"max_tokens={most} is too large; set it to at most {service.limits.max_new_tokens}"
        raise RequestError(400, line, param="max_tokens")
    deepest = service.engine.max_loops
    if body.depth is not None and deepest is not None and body.depth > deepest:
        line = f"depth={body.depth} was never trained; set it to at most {deepest}"
        raise RequestError(400, line, param="depth")
    ids = [await service.encode(prompt) for prompt in prompts]
    seed = secrets.randbits(31) if body.seed is None else body.seed
    requests, choices = [], []
    for prompt, tokens in zip(prompts, ids, strict=True):
        echo = None
        if body.echo:
            echo = prompt if isinstance(prompt, str) else service.tokenizer.decode(tokens)
        options = Options(stops, body.logprobs, echo, silent=most == 0)
        for sample in range(count):
            requests.append(
                TextRequest(
                    tokens=tuple(tokens),
                    max_new_tokens=max(most, 1),
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_k=body.top_k,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=seed,
                    sample=sample,
                    eos_ids=service.eos_ids,
                    num_loops=body.depth,
                    exit=read_exit(body.exit),
                    draft=read_draft(body.draft),
                    logprobs=body.logprobs,
                    score_prompt=echo is not None and body.logprobs is not None,
                )
            )
            choices.append(Choice(service.tokenizer, tokens, options))
    job = service.submit(requests)
    service.prompt_tokens += sum(map(len, ids))
    name = f"cmpl-{secrets.token_hex(12)}"
    return Answer(service, body, job, ids, choices, names, name, int(time.time()))


async def wait_until_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect_unless_left(answer: Answer, request: Request) -> Response:
    """Return the whole answer; a client that leaves ends the work for it."""
    collecting = asyncio.ensure_future(answer.collect())
    leaving = asyncio.ensure_future(wait_until_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        return JSONResponse(await collecting)
    finally:
        collecting.cancel()
        leaving.cancel()
        answer.job.close()


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    # The library's own pages would load scripts from other hosts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    names = TokenNames(service.tokenizer)
    page = PAGE.read_text(encoding="utf-8")
    model = {
        "id": service.name, "object": "model", "created": int(time.time()),
        "owned_by": "megarecur", "num_loops": service.num_loops,
        "max_depth": service.engine.max_loops,
    }  # fmt: skip

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        try:
            content = await read_content(request, service.limits.max_body)
            answer = await begin(service, names, read_body(content))
            if answer.body.stream:
                return EventStream(answer)
            response = await collect_unless_left(answer, request)
        except RequestError as error:
            response = write_error(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except Exception:
            log.exception("a request failed")
            response = write_error(RequestError(500, "the server failed; see its log"))
        service.statuses[response.status_code] += 1
        return response

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def describe_model(name: str) -> dict[str, Any]:
        if name != service.name:
            line = f"model {name[:80]!r} does not exist; this server has {service.name!r}"
            raise RequestError(404, line, param="model", code="model_not_found")
        return model

    @app.get("/health")
    async def report_health() -> Response:
        status = "ok"
        if service.failure is not None:
            status = "failed"
        elif service.draining:
            status = "stopping"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def report_metrics() -> Response:
        return Response(write_metrics(service), media_type=CONTENT_TYPE)

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.exception_handler(RequestError)
    async def answer_request_error(_: Request, error: RequestError) -> Response:
        return write_error(error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        line = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return write_error(RequestError(error.status_code, line))

    return app
