"""The engine with tensor parallelism: every rank gives the text of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from support.decoding import build_decoder, disturb
from support.harness import World

from megarecur.inference.engine import Engine
from megarecur.inference.request import Draft, Event, Exit, Request, Score
from megarecur.parallel.regions import TensorParallel

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3, "injection": "linear"}
RING = {"kind": "ring", "depth": 3, "level_rank": 2, "feed_forward_rank": 4}
ADAPTERS = {"rank": 4, "norms": True}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "cycle": (CYCLE, ADAPTERS | {"biases": True},
              {"attention_bias": "all", "qk_norm": True, "num_kv_heads": 2}),
    "loop": (LOOP | {"initial_state": "random"}, ADAPTERS, {"positions": "alibi"}),
    "ring": (RING, None, {"level_encoding": "sinusoidal"}),
}  # fmt: skip
REQUESTS = [
    Request(tokens=(1, 5, 2, 7, 1, 1), max_new_tokens=6, temperature=0.0, logprobs=2,
            score_prompt=True),
    Request(tokens=(9,), max_new_tokens=9, temperature=0.9, top_k=20, seed=1),
    Request(tokens=(1, 5, 2, 7, 3), max_new_tokens=7, temperature=0.8, top_p=0.9, seed=2),
]  # fmt: skip
EARLY = [
    Request(tokens=(3, 8, 1), max_new_tokens=9, temperature=0.0, exit=Exit("confidence", 0.5)),
    Request(tokens=(4, 4), max_new_tokens=9, exit=Exit("loop", 1, "share")),
    Request(tokens=(2, 6), max_new_tokens=9, temperature=0.0, draft=Draft(1, 3)),
]

Served = tuple[list[list[Event]], list[list[Score]], int, int]


def serve(name: str, requests: list[Request], sequence: bool = False) -> Served:
    """Return the events and scores of requests, the preemptions, and the bytes of this rank's
    pages."""
    recurrence, adapters, model = MODELS[name]
    tp = TensorParallel()
    if dist.is_initialized():
        tp = TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), sequence)
    # In fp64, because ranks sum in another order.
    built = disturb(build_decoder(recurrence, adapters, precision="fp64", tp=tp, **model))
    engine = Engine(built, page_size=2, num_pages=9, chunk=3, max_rows=6)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        engine.step()
        engine.step()
    handles[-1].cancel()
    engine.run()
    assert engine.passes is not None and engine.passes.pool.num_used == 0
    pool = engine.passes.pool
    held = sum(kept.nbytes for kept in (pool.keys, pool.values))
    events = [list(handle) for handle in handles]
    scores = [handle.prompt_scores for handle in handles]
    return events, scores, engine.scheduler.preemptions, held


def compare(mine: Score | None, wanted: Score | None) -> None:
    assert (mine is None) == (wanted is None)
    if mine is not None and wanted is not None:
        assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-9)
        assert [i for i, _ in mine.top] == [i for i, _ in wanted.top]
        values = [value for _, value in wanted.top]
        assert [value for _, value in mine.top] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("name", list(MODELS))
def test_two_ranks_give_the_texts_of_one_process(world: Callable[[int], World], name: str) -> None:
    """Texts, scores and preemptions, with exits, drafts and a cancelled request; each rank holds
    the pages of its own heads."""
    requests = [*REQUESTS, *(EARLY if name == "cycle" else []), REQUESTS[1]]
    events, scores, preemptions, held = serve(name, requests)
    assert preemptions and events[-1][-1].reason == "cancelled"
    for found in world(2).run(serve, name, requests, name == "loop"):
        assert found[2:] == (preemptions, held // 2)
        for mine, wanted in zip(found[0], events, strict=True):
            for one, other in zip(mine, wanted, strict=True):
                assert (one.token, one.loops, one.reason) == (
                    other.token, other.loops, other.reason
                )  # fmt: skip
                compare(one.score, other.score)
        for one_prompt, other_prompt in zip(found[1], scores, strict=True):
            for one_score, other_score in zip(one_prompt, other_prompt, strict=True):
                compare(one_score, other_score)
