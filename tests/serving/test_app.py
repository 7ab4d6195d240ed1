"""The application in this process: bad input, limits, the end of the server, failures."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.served import RECURRENT, make_run

from megarecur.serving.app import make_app
from megarecur.serving.service import Limits, Service
from megarecur.serving.start import ServeOptions, open_service

pytestmark = pytest.mark.usefixtures("one_thread")

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("served") / "tiny", RECURRENT)


def converse(
    run: Path,
    talk: Callable[[httpx2.AsyncClient, Service], Awaitable[None]],
    options: ServeOptions = ServeOptions(device="cpu"),  # noqa: B008
) -> None:
    """Serve a run in this process while `talk` sends requests to it."""
    service = open_service(run, options)

    async def main() -> None:
        service.start()
        transport = httpx2.ASGITransport(make_app(service))
        try:
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                await talk(client, service)
        finally:
            await asyncio.to_thread(service.stop)

    asyncio.run(main())


def hold(service: Service) -> threading.Event:
    """Keep the engine from its next step until the returned event is set."""
    gate, step = threading.Event(), service.engine.step
    # If a test fails, the engine's thread ends nevertheless.
    service.engine.step = lambda: gate.wait(60) and step()  # type: ignore[method-assign]
    return gate


async def post(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await client.post("/v1/completions", json={"prompt": "the man"} | body)


BAD: list[tuple[Any, int, str | None, str]] = [
    ({}, 400, "prompt", "prompt is missing; add it"),
    ({"prompt": []}, 400, "prompt", r"prompt=\[\] is not a string, a list of strings, a list of"),
    ({"prompt": [1, "a"]}, 400, "prompt", "is not a string"),
    ({"prompt": [True]}, 400, "prompt", "is not a string"),
    ({"prompt": [[1], []]}, 400, "prompt", "none of them empty"),
    ({"prompt": [99]}, 400, None, "id 99 of the prompt is outside model.vocab_size=69"),
    ({"prompt": [-1]}, 400, None, "id -1 of the prompt is outside"),
    ({"prompt": "\ud800"}, 400, None, "the body is not JSON in UTF-8"),
    ({"prompt": "the " * 5000}, 400, None, "need 314 pages, more than num_pages=256; shorten"),
    ({"prompt": "a", "model": "other"}, 404, "model", "model 'other' does not exist; this server"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "-1 is too small; set it to at least 0"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens=0 without echo"),
    ({"prompt": "a", "max_tokens": 5000}, 400, "max_tokens", "too large; set it to at most 4096"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "'5' is not a whole number"),
    ({"prompt": "a", "max_tokens": True}, 400, "max_tokens", "True is not a whole number"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", "temperature=-1 is too small"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "top_p=0 is too small; set it above 0"),
    ({"prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p=1.5 is too large; set it to at most 1"),
    ({"prompt": "a", "n": 0}, 400, "n", "n=0 is too small"),
    ({"prompt": "a", "n": 129}, 400, "n", "n=129 is too large; set it to at most 128"),
    ({"prompt": ["a"] * 300, "n": 2}, 400, "prompt", "has 600 texts, more than the 320 of the"),
    ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop", "not a string or a list of 1 to 4 strings"),
    ({"prompt": "a", "stop": ""}, 400, "stop", "stop='' is not a string or a list of 1 to 4"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs", "logprobs=6 is too large; set it to at most"),
    ({"prompt": "a", "seed": 1.5}, 400, "seed", "seed=1.5 is not a whole number"),
    ({"prompt": "a", "stream_options": {}}, 400, "stream_options", "without stream; set stream to"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of", "best_of=3 is not supported; omit it"),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix='b' is not supported; omit it"),
    ({"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias", "is not supported; omit it"),
    ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty", "is not supported"),
    ({"prompt": "a", "max_token": 3}, 400, "max_token", "max_token is unknown; omit it"),
    ({"prompt": "a", "depth": 9}, 400, "depth", "depth=9 was never trained; set it to at most 3"),
    ({"prompt": "a", "depth": 0}, 400, None, "depth 0: must be at least 1 loop"),
    ({"prompt": "a", "exit": {"kind": "never"}}, 400, "exit", "exit.kind='never' is unknown; cho"),
    ({"prompt": "a", "exit": {"kind": "kl"}}, 400, "exit", "exit.threshold is missing; add it, in"),
    ({"prompt": "a", "exit": {"kind": "loop", "threshold": 7}}, 400, None, "must be a number of"),
    ({"prompt": "a", "exit": {"kind": "confidence", "threshold": 2}}, 400, None, "a probability"),
    ({"prompt": "a", "draft": {"loops": 3}}, 400, None, "draft.loops=3 must be from 1 to 2"),
    ({"prompt": "a", "draft": {}, "exit": {"kind": "confidence"}}, 400, None, "draft with exit"),
    ({"prompt": "a", "n": 0, "seed": "x", "top_p": 9}, 400, "top_p",
     "top_p=9 is too large; set it to at most 1; n=0 is .*; seed='x' is not a whole number"),
    (b"{", 400, None, "the body is not JSON in UTF-8: EOF"),
    (b"", 400, None, "the body is not JSON"),
    (b"[]", 400, None, r"the body is not an object of JSON; write it as {\.\.\.}"),
    (b"\xff{}", 400, None, "the body is not JSON in UTF-8"),
    (b'{"prompt": "a", "temperature": NaN}', 400, None, "the body is not JSON in UTF-8"),
    (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature", "is not finite; set it to a"),
    (b"[" * 100_000, 400, None, "the body is not JSON in UTF-8: recursion limit"),
]  # fmt: skip


def check_error(answer: httpx2.Response, status: int, param: str | None, message: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" if status < 429 else error["type"]
    assert error["param"] == param
    assert re.search(message, error["message"]), error["message"]
    assert "Traceback" not in answer.text


def test_bad_input_is_one_clear_error_each(run: Path) -> None:
    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        for body, status, param, message in BAD:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await client.post("/v1/completions", content=content, headers=JSON)
            check_error(answer, status, param, message)
        assert service.statuses == {400: len(BAD) - 1, 404: 1}
        assert not service.jobs
        # The server serves on.
        assert (await post(client, max_tokens=2)).status_code == 200

    converse(run, talk)


@pytest.mark.parametrize(
    ("recurrence", "body", "message"),
    [
        ({"kind": "cycle", "num_blocks": 2, "depth": 4}, {"depth": 2}, "has no loops; omit the de"),
        ({"kind": "dense", "num_layers": 2}, {"exit": {"kind": "confidence"}},
         "kind=dense has no loops to exit after; omit exit"),
        ({"kind": "dense", "num_layers": 2}, {"draft": {}},
         "draft: recurrence.kind=dense has no loops to exit after; omit draft"),
        ({"kind": "universal", "depth": 3, "halting": {"mode": "global"}},
         {"exit": {"kind": "confidence"}}, "halting.mode=global decides itself"),
    ],
)  # fmt: skip
def test_what_a_model_lacks_is_refused(
    tmp_path: Path, recurrence: dict[str, Any], body: dict[str, Any], message: str
) -> None:
    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        check_error(await post(client, **body), 400, None, message)
        answer = (await post(client, max_tokens=3, temperature=0, logprobs=1, echo=True)).json()
        usage, scores = answer["usage"], answer["choices"][0]["logprobs"]["token_logprobs"]
        assert usage["completion_tokens"] in range(4) and len(scores) == usage["total_tokens"]
        assert scores[0] is None and all(score < 0.0 for score in scores[1:])

    positions = {"positions": "xpos"} if "halting" in recurrence else {}
    converse(make_run(tmp_path / "run", recurrence, model=positions), talk)


def test_prompts_beyond_learned_positions_are_refused(tmp_path: Path) -> None:
    async def talk(client: httpx2.AsyncClient, _: Service) -> None:
        answer = await post(client, prompt="the man " * 40)
        check_error(answer, 400, None, "exceed the 64 learned positions of the model; shorten the")

    converse(make_run(tmp_path / "run", RECURRENT, model={"positions": "learned"}), talk)


def test_bodies_are_limited_by_header_and_by_count(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarecur.serving.app.MOST_DROPPED", 500)

    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        sent = 0

        async def parts(count: int) -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(count):
                sent += 100
                yield b" " * 100

        # More than the limit, and more than is dropped; with a length, and without.
        for content in (b" " * 1200, b" " * 2000, parts(12), parts(100)):
            answer = await client.post("/v1/completions", content=content, headers=JSON)
            check_error(answer, 413, None, "the body has more than 1000 bytes; shorten it")
            assert answer.headers["Connection"] == "close"
        assert sent == 1200 + 1600
        kind = {"Content-Type": "text/plain"}
        answer = await client.post("/v1/completions", content=b"{}", headers=kind)
        check_error(answer, 415, None, "'text/plain' is not application/json; set it")

    converse(run, talk, ServeOptions(device="cpu", limits=Limits(max_body=1000)))


def test_a_full_queue_is_said_with_a_time_to_wait(run: Path) -> None:
    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        gate = hold(service)
        first = asyncio.create_task(post(client, n=3, max_tokens=40, temperature=0))
        while not service.jobs:
            await asyncio.sleep(0.001)
        full = await post(client)
        check_error(full, 429, None, "the queue of 3 texts is full; try again later")
        assert full.headers["Retry-After"] == "1"
        assert full.json()["error"]["type"] == "rate_limit_error"
        gate.set()
        texts = {choice["text"] for choice in (await first).json()["choices"]}
        assert len(texts) == 1, "greedy texts of one prompt are equal"
        assert (await post(client)).status_code == 200
        assert service.statuses == {200: 2, 429: 1}

    options = ServeOptions(device="cpu", max_texts=1, limits=Limits(max_queue=2))
    converse(run, talk, options)


def test_a_server_that_stops_finishes_what_runs_and_refuses_what_is_new(run: Path) -> None:
    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        idle = asyncio.Event()
        service.on_idle = idle.set
        gate = hold(service)
        running = asyncio.create_task(post(client, max_tokens=40, temperature=0, n=2))
        while not service.jobs:
            await asyncio.sleep(0.001)
        service.drain()
        check_error(await post(client), 503, None, "the server is stopping; try another")
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        assert not idle.is_set()
        gate.set()
        assert (await running).json()["usage"]["completion_tokens"] == 80
        await idle.wait()

    converse(run, talk)


def test_a_failure_of_the_engine_is_an_error_of_the_server(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(client: httpx2.AsyncClient, service: Service) -> None:
        idle = asyncio.Event()
        service.on_idle = idle.set
        passes = service.engine.passes
        assert passes is not None
        passes.run = lambda items: 1 / 0  # type: ignore[method-assign]
        stream = await post(client, stream=True)
        assert stream.status_code == 200
        assert json.loads(stream.text.removeprefix("data: "))["error"]["type"] == "server_error"
        await idle.wait()
        check_error(await post(client), 503, None, "the server is stopping")
        assert (await client.get("/health")).json() == {"status": "failed"}
        assert "ZeroDivisionError" not in stream.text

    converse(run, talk)
    assert "ZeroDivisionError" in caplog.text


def test_routes_that_do_not_exist_answer_in_the_same_shape(run: Path) -> None:
    async def talk(client: httpx2.AsyncClient, _: Service) -> None:
        check_error(await client.get("/v1/chat"), 404, None, "GET /v1/chat: Not Found")
        check_error(await client.get("/v1/completions"), 405, None, "Method Not Allowed")
        check_error(await client.get("/v1/models/a/b"), 404, "model", "model 'a/b' does not exist")
        for path in ("/docs", "/openapi.json"):
            check_error(await client.get(path), 404, None, "Not Found")
        page = await client.get("/")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "https://" not in page.text and "http://" not in page.text

    converse(run, talk)
