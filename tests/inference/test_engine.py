"""The engine: any arrivals, depths, page sizes and preemptions give the text of `generate`."""

from __future__ import annotations

from random import Random
from threading import Thread
from typing import Any

import pytest
from support.decoding import VOCAB
from support.engine_texts import MODELS, alone, build, check_pool, draw_requests, read, serve

from megarecur.config.recurrence import RecurrenceConfig
from megarecur.errors import ConfigError
from megarecur.inference import paged
from megarecur.inference.engine import Engine
from megarecur.inference.request import Request
from megarecur.inference.visits import cut_visits


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("number", [0, 1])
def test_texts_are_those_of_generate(name: str, number: int) -> None:
    """Whatever the arrivals, neighbours, page size, chunk and size of the pool."""
    random = Random(f"{name} {number}")
    model, size = build(name), random.choice([1, 3, 4])
    requests = draw_requests(random, 7)
    most = max(-(-request.most_tokens // size) for request in requests)
    engine = Engine(
        model,
        page_size=size,
        # With number 1 hardly more than one text fits, so that texts are preempted.
        num_pages=most + 1 if number else 60,
        chunk=random.choice([1, 3, 5]),
        max_rows=random.choice([4, 100]),
    )
    for request, handle in zip(requests, serve(engine, requests, random), strict=True):
        assert read(handle) == alone(model, request)


@pytest.mark.parametrize("name", ["cycle", "loop without coda", "custom"])
def test_texts_that_are_padded_apart_are_those_of_generate(name: str, monkeypatch) -> None:
    """Texts of different lengths in several buckets of a pass, at several loops."""
    monkeypatch.setattr(paged, "LEAST_SAVED", 1)
    model, random = build(name), Random(name)
    requests = draw_requests(random, 7)
    engine = Engine(model, page_size=2, num_pages=40, chunk=3)
    for request, handle in zip(requests, serve(engine, requests, random), strict=True):
        assert read(handle) == alone(model, request)


def test_small_pools_preempt_and_drop_no_request() -> None:
    model, random = build("cycle"), Random(1)
    requests = draw_requests(random, 6, max_new_tokens=12, temperature=0.0)
    engine = Engine(model, page_size=2, num_pages=14, max_texts=4)
    handles = serve(engine, requests, random)
    assert engine.scheduler.preemptions > 2
    for request, handle in zip(requests, handles, strict=True):
        assert read(handle) == alone(model, request)


def test_items_at_different_loops_share_a_pass() -> None:
    """A text that arrives between two loops of another runs in the same passes, at other loops."""
    model = build("cycle")
    engine, seen = Engine(model), []
    assert engine.passes is not None
    run = engine.passes.run

    def record(items: Any) -> None:
        seen.append([(item.visit.group, item.visit.loop) for item in items])
        run(items)
        if len(seen) == 2:
            engine.submit(Request(tokens=(3,), max_new_tokens=4, temperature=0.0))

    engine.passes.run = record  # type: ignore[method-assign]
    request = Request(tokens=(1, 2), max_new_tokens=4, temperature=0.0)
    engine.submit(request)
    engine.run()
    assert any(len({loop for _, loop in pass_}) > 1 for pass_ in seen)
    assert all(len({group for group, _ in pass_}) == 1 for pass_ in seen)


def test_depths_of_requests_differ() -> None:
    model = build("loop")
    engine = Engine(model, max_loops=3)
    requests = [
        Request(tokens=(1, 2, 3), max_new_tokens=5, temperature=0.0, num_loops=loops)
        for loops in (None, 1, 2, 3)
    ]
    handles = [engine.submit(request) for request in requests]
    engine.run()
    texts = [read(handle) for handle in handles]
    assert texts == [alone(model, request) for request in requests]
    assert texts[1] != texts[0] == texts[3]


def test_beginnings_are_computed_once() -> None:
    """Also those of requests that arrive together; the pages remain when a text ends."""
    model = build("cycle")
    engine = Engine(model, page_size=4)
    begin = tuple(range(1, 18))
    handles = [
        engine.submit(Request(tokens=(*begin, i), max_new_tokens=1, temperature=0.0))
        for i in range(5)
    ]
    engine.run()
    # 18 tokens of the first one; 2 of each other, after 16 shared ones; 3 loops each.
    assert engine.counts.rows == 3 * (18 + 4 * 2)
    last = engine.submit(Request(tokens=begin[:17], max_new_tokens=1, temperature=0.0))
    engine.run()
    assert engine.counts.rows == 3 * (18 + 4 * 2 + 1)
    for handle in (*handles, last):
        assert read(handle) == alone(model, handle.request)


def test_cancelled_requests_free_their_pages() -> None:
    model = build("sequence")
    engine = Engine(model, page_size=2, num_pages=12)
    requests = [Request(tokens=(1, 2, 3, i), max_new_tokens=15, temperature=0.0) for i in range(4)]
    handles = [engine.submit(request) for request in requests]
    for _ in range(9):
        engine.step()
        check_pool(engine)
    handles[0].cancel()
    handles[3].cancel()  # It waits: no two of these texts fit.
    engine.step()
    check_pool(engine)
    engine.run()
    assert engine.passes is not None and engine.passes.pool.num_used == 0
    for number in (0, 3):
        *_, last = handles[number]
        assert last.reason == "cancelled" and last.token is None
    for number in (1, 2):
        assert read(handles[number]) == alone(model, requests[number])


def test_ends_of_texts() -> None:
    """The end-of-text id is no part of the text, and unused ids are never chosen."""
    model = build("dense")
    request = Request(tokens=(2, 9), max_new_tokens=20, seed=4)
    whole = alone(model, request)
    end = whole[5]
    engine = Engine(model, missing_ids=[end])
    stopped = engine.submit(
        Request(tokens=(2, 9), max_new_tokens=20, seed=4, eos_ids=frozenset([end]))
    )
    without = engine.submit(request)
    engine.run()
    events = list(stopped)
    assert [e.token for e in events] == [*whole[: whole.index(end)], None]
    assert [e.reason for e in events] == [None] * whole.index(end) + ["stop"]
    events = list(without)
    assert [e.reason for e in events] == [None] * 19 + ["length"]
    assert end not in [e.token for e in events]


def test_other_threads_submit_and_read() -> None:
    model = build("cycle")
    engine, texts = Engine(model), dict[int, list[int]]()
    requests = draw_requests(Random(5), 6)

    def client(number: int) -> None:
        texts[number] = read(engine.submit(requests[number]))

    threads = [Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        engine.step()
    for thread in threads:
        thread.join()
    assert [texts[number] for number in range(6)] == [alone(model, r) for r in requests]


def test_mistakes_are_reported_together() -> None:
    engine = Engine(build("dense"), num_pages=2, page_size=4)
    with pytest.raises(ConfigError) as found:
        engine.submit(Request(tokens=(1, VOCAB), max_new_tokens=10, top_p=0.0))
    for text in ("need 3 pages, more than num_pages=2", f"id {VOCAB} of the prompt", "top_p=0.0"):
        assert text in str(found.value)
    with pytest.raises(ConfigError, match=r"depth 9: the engine has room for 3 loops"):
        Engine(build("loop")).submit(Request(tokens=(1,), max_new_tokens=1, num_loops=9))
    with pytest.raises(ConfigError, match=r"depth 3: the engine has room for 1 loops"):
        Engine(build("loop"), max_loops=1).submit(Request(tokens=(1,), max_new_tokens=1))
    with pytest.raises(ConfigError, match=r"num_pages=0 must be at least 1(\n|.)*chunk=-1"):
        Engine(build("dense"), num_pages=0, chunk=-1)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("sequence", [(0,), (0,), (1,), (1,)]),
        ("cycle", [(0, 1)] * 3),
        ("loop", [(0,), *[(1, 2)] * 3, (3,)]),
        ("ring", [(0,)] * 3),
        ("dense", [(0, 1)]),
        ("block_recurrence", [(0, 1)] * 3),
        ("custom", [(0,), (1,), (2,), (1,), (0,), (2,), (2,)]),
    ],
)
def test_groups_of_the_map(name: str, groups: list[tuple[int, ...]]) -> None:
    recurrence: RecurrenceConfig = build(name).config.recurrence
    visits = cut_visits(recurrence, None, False).visits
    assert [visit.group for visit in visits] == groups
    if name == "loop":
        # With one loop too, so that texts of other depths share its passes.
        one = cut_visits(recurrence, 1, False).visits
        assert [visit.group for visit in one] == [(0,), (1, 2), (3,)]
