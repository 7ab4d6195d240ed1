"""`megarecur serve` as a process, through the official client: texts, streams, clients that leave,
signals, errors at the start."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.commands import megarecur
from support.served import RECURRENT, Served, make_run

SECONDS = 200
"""Patience with a busy machine."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("served") / "tiny", RECURRENT)


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    """A server that the tests of this file share."""
    server = Served(run, "--device", "cpu")
    yield server
    code, err = server.end()
    assert (code, err) == (0, "")


def generate(capsys: pytest.CaptureFixture[str], run: Path, prompt: str, *options: object) -> str:
    """What `megarecur generate` adds to a prompt."""
    code, out, err = megarecur(capsys, "generate", run, prompt, *options)
    assert code == 0, err
    return out.removeprefix(prompt).removesuffix("\n")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_texts_are_those_of_generate(
    served: Served, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy and sampled; at another depth; with exits; drafted texts are those of full depth."""
    prompt = "she can see the"
    greedy = generate(capsys, run, prompt, "--temperature", 0, "--max-new-tokens", 20)
    answer = served.complete(prompt, temperature=0, max_tokens=20)
    assert answer.choices[0].text == greedy and len(greedy.split()) == 20
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 20, 24)
    assert served.complete(prompt, temperature=0, max_tokens=20, draft={}).choices[0].text == greedy
    options = ("--max-new-tokens", 12, "--temperature", 0.9, "--top-p", 0.8, "--seed", 5)
    drawn = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    assert served.complete(prompt, **drawn).choices[0].text == generate(
        capsys, run, prompt, *options
    )
    shallow = served.complete(prompt, depth=1, **drawn).choices[0].text
    assert shallow == generate(capsys, run, prompt, *options, "--depth", 1)
    rule = ("--exit", "confidence", "--exit-threshold", 0.15)
    early = served.complete(prompt, exit={"kind": "confidence", "threshold": 0.15}, **drawn)
    assert early.choices[0].text == generate(capsys, run, prompt, *options, *rule)
    loops = early.choices[0].loops
    assert len(loops) == 12 and loops[0] == 3 and min(loops) < 3
    as_ids = served.complete([35, 10, 34, 44], temperature=0, max_tokens=20)
    assert as_ids.usage.prompt_tokens == 4


def test_a_text_does_not_depend_on_its_neighbours(served: Served) -> None:
    """And samples of one request differ from each other."""
    options: dict[str, Any] = {"max_tokens": 25, "temperature": 1.0, "seed": 3}
    alone = [choice.text for choice in served.complete("we go", n=2, **options).choices]
    assert alone[0] != alone[1]

    def ask(number: int) -> list[str]:
        if number % 3 == 0:
            return [choice.text for choice in served.complete("we go", n=2, **options).choices]
        rule = {"exit": {"kind": "entropy", "threshold": 3.0}} if number % 3 == 1 else {}
        served.complete([f"we go {number}", "who"], max_tokens=20, seed=number, **rule)
        return alone

    with ThreadPoolExecutor(8) as pool:
        assert all(found == alone for found in pool.map(ask, range(12)))


def test_prompts_and_samples_are_choices_in_order(served: Served) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "seed": 1}
    together = served.complete(["the man", "she"], n=2, **options)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    apart = [served.complete(prompt, n=2, **options) for prompt in ("the man", "she")]
    texts = [choice.text for answer in apart for choice in answer.choices]
    assert [choice.text for choice in together.choices] == texts
    assert together.usage.prompt_tokens == 3
    assert together.usage.completion_tokens == sum(a.usage.completion_tokens for a in apart)


def test_streams_give_the_same_answer_in_pieces(served: Served) -> None:
    options: dict[str, Any] = {"max_tokens": 15, "seed": 4, "n": 2, "logprobs": 2, "echo": True}
    whole = served.complete("we will see", **options)
    pieces = list(served.complete(
        "we will see", stream=True, stream_options={"include_usage": True}, **options
    ))  # fmt: skip
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    for choice in whole.choices:
        own = [p for chunk in pieces[:-1] for p in chunk.choices if p.index == choice.index]
        assert len(own) >= len(choice.loops) > 1
        assert "".join(piece.text for piece in own) == choice.text
        assert [loops for piece in own for loops in piece.loops] == choice.loops
        assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [part for piece in own for part in getattr(piece.logprobs, name)]
            assert parts == getattr(choice.logprobs, name)


def test_log_probabilities_and_echo(served: Served) -> None:
    """Scores of an echoed prompt are those that its tokens had when they were generated."""
    options: dict[str, Any] = {"temperature": 0, "logprobs": 3}
    first = served.complete("they like", max_tokens=8, **options).choices[0]
    found = first.logprobs
    assert "".join(found.tokens) == first.text and first.text[:1] == " "
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) and len(top) == 3
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert first.text[offset:].startswith(token)
    echoed = served.complete("they like" + first.text, max_tokens=0, echo=True, **options)
    choice = echoed.choices[0]
    assert choice.text == "they like" + first.text and choice.finish_reason == "length"
    assert echoed.usage.completion_tokens == 0 and choice.loops == []
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[2:] == pytest.approx(found.token_logprobs, abs=1e-9)
    for top, wanted in zip(choice.logprobs.top_logprobs[2:], found.top_logprobs, strict=True):
        assert top == pytest.approx(wanted, abs=1e-9)


def test_stop_strings_end_a_text_and_its_work(served: Served) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30}
    text = served.complete("they like", **options).choices[0].text
    stop = text[9:15]
    ended = served.complete("they like", stop=["no such text", stop], **options)
    assert ended.choices[0].text == text[: text.index(stop)]
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens < 30
    stream = served.complete("they like", stop=stop, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == text[: text.index(stop)]


def test_models_and_health(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert model.id == served.name == "tiny" and model.num_loops == 3
    assert served.client.models.retrieve("tiny").id == "tiny"
    assert served.get("/health") == {"status": "ok"}
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        served.client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="depth=9 was never trained"):
        served.complete("a", depth=9)


def test_metrics_count_the_work(served: Served) -> None:
    before = served.metrics()
    served.complete("the time", max_tokens=9, temperature=0, draft={"loops": 2, "tokens": 3})
    exit_ = {"kind": "confidence", "threshold": 0.15}
    loops = served.complete("the", max_tokens=9, temperature=0, exit=exit_).choices[0].loops
    with pytest.raises(openai.BadRequestError):
        served.complete("", n=0)
    after = served.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('requests_total{status="200"}') == 2
    assert grown('requests_total{status="400"}') == 1
    assert grown("prompt_tokens_total") == 3 and grown("generated_tokens_total") == 18
    for number in set(loops) - {3}:
        assert grown(f'exits_total{{loops="{number}"}}') == loops.count(number)
    assert grown("drafted_tokens_total") >= grown("accepted_tokens_total") >= 0
    assert grown("drafted_tokens_total") > 0 and 0 <= after["draft_acceptance"] <= 1
    assert after["pages_used"] == after["queue_texts"] == after["running_texts"] == 0
    assert after["pages"] == 256


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(served: Served, stream: bool) -> None:
    before, most = served.metrics(), 4000
    body = {"prompt": "the", "max_tokens": most, "temperature": 0, "stream": stream, "echo": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {served.url}\r\nContent-Length: {len(content)}"
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + content)
        wait_until(lambda: served.metrics()["pages_used"] > 0)
        if stream:
            assert b"200 OK" in link.recv(1000)
    name = 'requests_total{status="499"}'
    wait_until(lambda: served.metrics().get(name, 0) > before.get(name, 0))
    wait_until(lambda: served.metrics()["running_texts"] == 0)
    after = served.metrics()
    assert after["pages_used"] == 0
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < most


def test_a_client_that_sends_too_much_reads_why(served: Served) -> None:
    with pytest.raises(openai.APIStatusError, match="more than 1048576 bytes; shorten") as error:
        served.complete("the " * 1_000_000)
    assert error.value.status_code == 413
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {served.url}\r\nContent-Length: 99999999999"
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(f"{head}\r\n\r\n".encode())
        with link.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 413 "), "without waiting for the body"


# ----------------------------------------------------------------------------- start and end


def test_a_port_in_use_is_one_clear_error(
    served: Served, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = megarecur(capsys, "serve", run, "--port", served.port)
    assert (code, out) == (2, "")
    in_use = f"error: 127.0.0.1:{served.port}: Address already in use; choose another one with"
    assert err == f"{in_use} --port\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "no.such.host.invalid"), "name an address of this machine"),
        (("--host", "192.0.2.1"), "Cannot assign requested address; name an address of this"),
        (("--max-depth", 2), "--max-depth 2 is less than the 3 loops of a request without a depth"),
        (("--max-depth", 0), "--max-depth: depth 0: must be at least 1 loop"),
        (("--step", 7), "has no checkpoint of step 7; kept: 1"),
    ],
)
def test_options_that_cannot_be_are_one_clear_error(
    run: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    code, _, err = megarecur(capsys, "serve", run, "--port", 0, *options)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_pages_without_memory_are_one_clear_error(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that promise more memory than they have refuse no allocation: torch's error is
    raised here."""

    def refuse(*args: object) -> None:
        raise RuntimeError("can't allocate memory\nstack")

    monkeypatch.setattr("megarecur.inference.passes.PagePool", refuse)
    code, _, err = megarecur(capsys, "serve", run, "--port", 0, "--pages", 9)
    assert code == 2
    assert err == "error: --pages 9: no memory (can't allocate memory); lower it\n"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"kind": "sequence", "num_classes": 3}},
         "task: the run is a classifier without a language-model head; score it with"),
        ({"encoder": {"kind": "dense", "num_layers": 1}},
         "encoder: the run is an encoder-decoder, which continues no text"),
    ],
)  # fmt: skip
def test_runs_that_continue_no_text_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path / "run", {"kind": "dense", "num_layers": 1}, **sections)
    code, out, err = megarecur(capsys, "serve", run, "--port", 0)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


@pytest.mark.slow
def test_the_first_signal_finishes_what_runs_and_the_second_ends_it(run: Path) -> None:
    server = Served(run, "--device", "cpu")
    chunks = server.complete("the", max_tokens=400, temperature=0, stream=True)
    texts = [next(chunks).choices[0].text]
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses(server))
    texts += [chunk.choices[0].text for chunk in chunks]
    assert len("".join(texts).split()) == 400
    code, err = server.end()
    assert (code, err) == (0, "")

    server = Served(run, "--device", "cpu")
    chunks = server.complete("the", max_tokens=4000, temperature=0, stream=True)
    next(chunks)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: refuses(server))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(SECONDS) == 0
    count = 0
    with suppress(openai.APIError, httpx2.HTTPError):
        for _ in chunks:
            count += 1
    assert count < 3999


def refuses(server: Served) -> bool:
    """Whether new requests are refused because the server stops."""
    try:
        server.complete("a", max_tokens=1)
    except openai.InternalServerError as error:
        assert error.status_code == 503 and "the server is stopping" in str(error)
        return True
    except openai.APIConnectionError:
        return True  # This process was stalled for so long that the server is done.
    return False


def test_missing_libraries_are_one_clear_error(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarecur.serving.service.find_spec", lambda name: None)
    code, _, err = megarecur(capsys, "serve", run)
    message = "serve needs fastapi and uvicorn, not installed; pip install 'megarecur[serve]'"
    assert (code, err) == (2, f"error: {message}\n")
