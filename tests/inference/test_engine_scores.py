"""Scores of the engine: log probabilities of new tokens and of prompts, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.decoding import VOCAB, build_decoder, disturb

from megarecur.errors import ConfigError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import next_logits
from megarecur.inference.request import Draft, Handle, Request, Score
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules

MISSING = (VOCAB - 2, VOCAB - 1)
MODELS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "cycle", "num_blocks": 2, "depth": 6}, {}),
    ({"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}, {"positions": "alibi"}),
    ({"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}, {"num_kv_heads": 2}),
]
PROMPTS = [(1, 5, 2, 7, 9, 9, 4), (9, 3), (1, 5, 2, 7, 9, 8), (3, 3, 8, 1, 4, 4, 2, 2)]


def build(recurrence: dict[str, Any], model: dict[str, Any]) -> Transformer:
    # In fp64, because a batch rounds differently from a single text.
    return disturb(build_decoder(recurrence, None, precision="fp64", **model))


def check_scores(
    model: Transformer, tokens: Sequence[int], first: int, scores: Sequence[Score | None]
) -> None:
    """Compare the scores of tokens[first:] with a forward pass over what precedes each of them."""
    scheduled = Schedules(model.config).forward()
    assert len(scores) == len(tokens) - first
    for place, score in enumerate(scores, first):
        assert score is not None
        logits_1V = next_logits(model, Mesh(), scheduled, torch.tensor([tokens[:place]]))
        assert logits_1V is not None
        log_p_V = logits_1V[0].log_softmax(-1)
        assert score.logprob == pytest.approx(float(log_p_V[tokens[place]]), abs=1e-9)
        log_p_V[list(MISSING)] = -torch.inf
        top = log_p_V.topk(len(score.top))
        assert [i for i, _ in score.top] == top.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(top.values.tolist(), abs=1e-9)


def submit(engine: Engine, **options: Any) -> list[Handle]:
    given: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "logprobs": 3} | options
    handles = []
    for prompt in PROMPTS:
        handles.append(engine.submit(Request(tokens=prompt, **given)))
        engine.step()
    engine.run()
    assert engine.passes is not None and engine.passes.pool.num_used == 0
    return handles


@pytest.mark.parametrize("num_pages", [40, 9])
@pytest.mark.parametrize(("recurrence", "sections"), MODELS)
def test_scores_are_those_of_a_forward_pass(recurrence, sections, num_pages) -> None:
    """In chunks, beside other prompts that begin alike, and after preemptions."""
    model = build(recurrence, sections)
    engine = Engine(model, page_size=2, num_pages=num_pages, chunk=3, missing_ids=MISSING)
    for handle in submit(engine, score_prompt=True):
        events = [event for event in handle if event.token is not None]
        prompt = handle.request.tokens
        check_scores(model, prompt, 1, handle.prompt_scores)
        tokens = [*prompt, *(event.token for event in events)]
        check_scores(model, tokens, len(prompt), [event.score for event in events])
    assert num_pages == 40 or engine.scheduler.preemptions


def test_scores_of_verified_drafts_are_those_of_full_depth() -> None:
    model = build(*MODELS[0])
    drafted, plain = (
        submit(Engine(model, page_size=2), draft=draft) for draft in (Draft(1, 3), None)
    )
    for left, right in zip(drafted, plain, strict=True):
        for mine, wanted in zip(left, right, strict=True):
            assert mine.token == wanted.token
            if mine.score is not None and wanted.score is not None:
                assert mine.score.logprob == pytest.approx(wanted.score.logprob, abs=1e-9)


def test_scores_are_reported_only_on_request() -> None:
    engine = Engine(build(*MODELS[0]))
    for handle in submit(engine, logprobs=None):
        assert not handle.prompt_scores
        assert all(event.score is None for event in handle)
    for handle in submit(engine, logprobs=0):
        assert all(event.score is not None and not event.score.top for event in handle)


def test_invalid_scores_are_rejected() -> None:
    engine = Engine(build(*MODELS[0]))
    with pytest.raises(ConfigError, match=r"logprobs=-1 must be at least 0; raise it"):
        engine.submit(Request(tokens=(1,), max_new_tokens=1, logprobs=-1))
