"""Models of many kinds, requests drawn for them, and an engine that serves these requests."""

from __future__ import annotations

from random import Random
from typing import Any

from support.decoding import VOCAB, build_decoder, disturb

from megarecur.inference.engine import Engine
from megarecur.inference.generate import generate
from megarecur.inference.request import Handle, Request
from megarecur.model.transformer import Transformer

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3, "injection": "linear"}
RING = {"kind": "ring", "depth": 3, "level_rank": 2, "feed_forward_rank": 3}
ADAPTERS = {"rank": 3, "norms": True}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "sequence": ({"kind": "sequence", "num_blocks": 2, "depth": 4}, ADAPTERS, {}),
    "cycle": (CYCLE, {**ADAPTERS, "biases": True}, {"attention_bias": "all", "qk_norm": True}),
    "cycle cut short": ({**CYCLE, "depth": 5}, None, {"num_kv_heads": 2, "norm": "layer"}),
    "cycle_reverse": ({"kind": "cycle_reverse", "num_blocks": 2, "depth": 4}, None,
                      {"residual": "admin", "norm_position": "post"}),
    "loop": (LOOP | {"initial_state": "random", "final_norm_after_core": True}, ADAPTERS, {}),
    "loop without coda": (LOOP | {"coda": 0, "injection": "add"}, None, {"positions": "alibi"}),
    "ring": (RING, None, {"level_encoding": "sinusoidal"}),
    "ring post": (RING, None, {"norm_position": "post", "num_kv_heads": 1}),
    "reuse_map": ({"kind": "reuse_map", "reuse_map": [3, 1, 2], "injection": "add"}, None,
                  {"norm_position": "peri", "attention_softcap": 5.0}),
    "block_recurrence": ({"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3},
                         None, {"positions": "learned", "max_positions": 160}),
    "custom": ({"kind": "custom", "order": [0, 1, 2, 1, 0, 2, 2]}, ADAPTERS,
               {"sliding_window": 4, "attention_types": ["sliding", "full"],
                "rope_theta_local": 50.0}),
    "dense": ({"kind": "dense", "num_layers": 2}, None,
              {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_positions": 8}}),
    "xpos": (CYCLE, None, {"positions": "xpos", "norm_position": "sandwich"}),
}  # fmt: skip


def build(name: str) -> Transformer:
    recurrence, adapters, model = MODELS[name]
    # In fp64, because a batch rounds differently from a single text.
    return disturb(build_decoder(recurrence, adapters, precision="fp64", **model))


def draw_requests(random: Random, count: int, **options: Any) -> list[Request]:
    """Requests of which some begin alike, greedy and sampled."""
    begin = tuple(random.randrange(VOCAB) for _ in range(9))
    found = []
    for number in range(count):
        own = tuple(random.randrange(VOCAB) for _ in range(random.randint(1, 7)))
        tokens = begin[: random.choice([0, 0, 4, 9])] + own
        given: dict[str, Any] = {
            "temperature": random.choice([0.0, 0.9]),
            "top_k": random.choice([None, 20]),
            "top_p": random.choice([1.0, 0.9]),
            "seed": random.randrange(3),
            "sample": number % 2,
            "max_new_tokens": random.randint(1, 9),
        }
        found.append(Request(tokens=tokens, **given | options))
    return found


def alone(model: Transformer, request: Request) -> list[int]:
    """The text of `generate`."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "sample", "eos_ids",
             "num_loops")  # fmt: skip
    options = {name: getattr(request, name) for name in names}
    return list(generate(model, request.tokens, **options))


def read(handle: Handle) -> list[int]:
    return [event.token for event in handle if event.token is not None]


def check_pool(engine: Engine) -> None:
    """Pages have exactly the users that the running texts are; no text has more than it needs."""
    assert engine.passes is not None
    pool = engine.passes.pool
    held = [page for text in engine.scheduler.running for page in text.pages]
    assert pool.users == [held.count(page) for page in range(pool.num_pages)]
    assert pool.num_used == len(set(held)) <= pool.num_pages
    for text in engine.scheduler.waiting:
        assert not text.pages


def serve(engine: Engine, requests: list[Request], random: Random) -> list[Handle]:
    """Submit requests in any order between steps, and run all of them."""
    handles: dict[int, Handle] = {}
    order = random.sample(range(len(requests)), len(requests))
    while order or len(handles) < len(requests):
        for _ in range(min(random.choice([0, 0, 1, 3]), len(order))):
            number = order.pop()
            handles[number] = engine.submit(requests[number])
        engine.step()
        check_pool(engine)
    while engine.step():
        check_pool(engine)
    assert engine.passes is not None and engine.passes.pool.num_used == 0
    assert not engine.scheduler.making
    return [handles[number] for number in range(len(requests))]
