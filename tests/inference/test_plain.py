"""Models that keep no keys and values of every token: their texts, scores, turns and limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoding import VOCAB, build_decoder, disturb

from megarecur.errors import ConfigError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import generate, next_logits
from megarecur.inference.request import Draft, Exit, Handle, Request
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules

HALTING = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 2}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "halting": (HALTING, {}),
    "temporal": (LOOP, {"temporal": {"chunk_length": 4, "num_slots": 2,
                                     "update_ffn_hidden_size": 8}}),
}  # fmt: skip
MISSING = (VOCAB - 1, VOCAB - 2)


def build(name: str) -> Transformer:
    recurrence, options = MODELS[name]
    return disturb(build_decoder(recurrence, precision="fp64", **options))


def ids(handle: Handle) -> list[int]:
    return [event.token for event in handle if event.token is not None]


@pytest.mark.parametrize("name", list(MODELS))
def test_texts_are_those_of_generate_and_scores_those_of_a_forward_pass(name: str) -> None:
    model = build(name)
    engine = Engine(model, missing_ids=MISSING)
    loops = None if name == "halting" else 1
    requests = [
        Request(tokens=(1, 5, 2, 7, 9, 4), max_new_tokens=7, temperature=0.0, logprobs=2,
                score_prompt=True),
        Request(tokens=(3, 1), max_new_tokens=5, temperature=0.9, top_k=9, seed=2, sample=1,
                num_loops=loops),
        Request(tokens=(1, 5), max_new_tokens=20, seed=1, eos_ids=frozenset(range(9))),
    ]  # fmt: skip
    handles = [engine.submit(request) for request in requests]
    engine.run()
    for request, handle in zip(requests, handles, strict=True):
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "sample", "eos_ids",
                 "num_loops")  # fmt: skip
        events = list(handle)
        assert [event.token for event in events if event.token is not None] == list(generate(
            model, request.tokens, missing_ids=MISSING, use_cache=name != "halting",
            **{name: getattr(request, name) for name in names},
        ))  # fmt: skip
        assert events[-1].reason == ("stop" if request.eos_ids else "length")
        if request.logprobs is None:
            assert all(event.score is None for event in events) and not handle.prompt_scores
            continue
        tokens = [*request.tokens, *(event.token for event in events)]
        scores = [*handle.prompt_scores, *(event.score for event in events)]
        assert len(scores) == len(tokens) - 1
        for place, score in enumerate(scores, 1):
            before = torch.tensor([tokens[:place]])
            logits_1V = next_logits(model, Mesh(), Schedules(model.config).forward(), before)
            assert logits_1V is not None and score is not None
            log_p_V = logits_1V[0].log_softmax(-1)
            assert score.logprob == pytest.approx(float(log_p_V[tokens[place]]), abs=1e-9)
            log_p_V[list(MISSING)] = -torch.inf
            assert [i for i, _ in score.top] == log_p_V.topk(2).indices.tolist()


def test_texts_take_turns_within_the_limits() -> None:
    """At most two texts of seven pages together; others wait, the first one first."""
    engine = Engine(build("temporal"), max_texts=2, num_pages=7, page_size=4)
    lengths = (12, 9, 3, 16, 2)
    handles = [
        engine.submit(Request(tokens=(1, 2, 3 + i), max_new_tokens=count, temperature=0.0))
        for i, count in enumerate(lengths)
    ]
    started: list[Handle] = []
    while engine.step():
        running = sorted(engine.plain.running, key=lambda text: text.handle.number)
        started += [text.handle for text in running if text.handle not in started]
        assert len(running) <= 2 and engine.plain.num_used <= 7
        # Texts that began together are equally long, up to the one whose turn it was.
        if {text.handle for text in running} == {*handles[:2]}:
            long, short = sorted((len(text.tokens) for text in running), reverse=True)
            assert long - short <= 1
    assert started == handles
    assert [len(ids(handle)) for handle in handles] == list(lengths)
    assert engine.counts.tokens == sum(lengths)


def test_cancelled_texts_end_with_the_next_step() -> None:
    engine = Engine(build("halting"), max_texts=2)
    request = Request(tokens=(1, 2), max_new_tokens=9, temperature=0.0)
    handles = [engine.submit(request) for _ in range(4)]
    for _ in range(2):
        engine.step()
    handles[0].cancel()
    handles[3].cancel()  # It waits.
    engine.step()
    assert [event.reason for event in handles[0]] == [None, "cancelled"]
    assert [event.reason for event in handles[3]] == ["cancelled"]
    engine.run()
    assert ids(handles[1]) == ids(handles[2]) and engine.num_running == engine.num_waiting == 0


def test_mistakes_are_reported() -> None:
    for name, options, message in (
        ("temporal", {"exit": Exit("kl", 1.0)}, "exit: .* not be written to the temporal memory"),
        ("halting", {"draft": Draft()}, r"draft: recurrence\.halting\.mode=token decides .* draft"),
        ("temporal", {"max_new_tokens": 9}, "need 3 pages, more than num_pages=2"),
    ):
        engine = Engine(build(name), num_pages=2, page_size=4)
        with pytest.raises(ConfigError, match=message):
            engine.submit(Request(**{"tokens": (1,), "max_new_tokens": 2, **options}))
