"""Answers to a harness' requests: those of all meshes are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.configs import make_config
from support.harness import World
from support.meshes import UNSHARDED, build_on_mesh, step_of

from megarecur.config.run import Config
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.answers import Answers, Continued
from megarecur.inference.likelihood import Likelihood, Pair
from megarecur.inference.request import Request
from megarecur.plan.schedule import Schedules

TOKENIZER = load_tokenizer("bytes")
PAIRS = [
    Pair(tuple(range(first, first + length)), (first, 9)[: 1 + first % 2])
    for first, length in ((3, 2), (30, 9), (31, 9), (60, 4), (90, 12), (101, 1), (102, 1))
]
MESHES: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor": 2, "sequence_parallel": True},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "zero": {"zero_stage": 3, "zero_engine": "native"},
    "moments": {"zero_stage": 1, "zero_engine": "native"},
}


def ask(prompt: str, *stops: str, **options: Any) -> tuple[Request, tuple[str, ...]]:
    tokens = tuple(TOKENIZER.encode(prompt))
    return Request(tokens=tokens, max_new_tokens=6, temperature=0.0, **options), stops


ASKED = [ask("def m"), ask("ab", "e", "\\"), ask("zzz", num_loops=1)]
Found = tuple[list[Likelihood], list[str], list[int]]


def answer(config: Config) -> Found | None:
    """Return scores, texts and progress of the first process."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    if config.train.steps == 1:  # Weights are gathered when they are used first.
        step_of(model, engine, config, loader, 0, mesh)
        engine.step(1e-3)
    answers, progress = Answers(model, TOKENIZER, mesh, Schedules(config)), list[int]()
    if mesh.rank > 0:
        answers.follow()
        return None
    try:
        texts = answers.continue_texts(ASKED)
        scores = answers.score(PAIRS, progress.append, batch_size=2)
        # A mistake parts no processes, be it of a request that one of them would answer.
        with pytest.raises(ConfigError, match="exceeds the 8 positions"):
            answers.score([Pair((1,), (2,) * 9)], most_positions=8)
        with pytest.raises(ConfigError, match="top_k=-1"):
            answers.continue_texts([*ASKED[:1], ask("x", top_k=-1)])
        return scores + answers.score(PAIRS[:1], num_loops=2), texts, progress
    finally:
        answers.close()


@pytest.mark.parametrize("name", list(MESHES))
def test_two_processes_answer_as_one(
    world: Callable[[int], World], corpus: Path, name: str
) -> None:
    config = make_config(
        corpus, "loop", parallel=MESHES[name], model={"init_std": 0.5},
        train={"precision": "fp64" if name != "zero" else "fp32",
               "steps": 1 if name == "moments" else 2},
    )  # fmt: skip
    own = config.parallel.model_copy(update=UNSHARDED | dict.fromkeys(
        ("tensor", "pipeline", "context"), 1) | {"sequence_parallel": False}
    )  # fmt: skip
    alone = answer(config.model_copy(update={"parallel": own}))
    found, none = world(2).run(answer, config)
    assert none is None and alone is not None
    (scores, texts, progress), (wanted, expected, _) = found, alone
    assert texts == expected and len({*texts}) == 3
    assert [each.is_greedy for each in scores] == [each.is_greedy for each in wanted]
    likelihoods = [each.log_likelihood for each in wanted]
    exact = 0.0 if name == "data" else 1e-5 if name == "zero" else 1e-9
    assert [each.log_likelihood for each in scores] == pytest.approx(likelihoods, abs=exact)
    # Two replicas take two batches at a time.
    replicas = 1 if name in ("tensor", "pipeline") else 2
    assert progress[0] == 2 * replicas and sum(progress[: 4 // replicas]) == len(PAIRS)


def test_texts_end_before_a_stop_string() -> None:
    text = Continued(TOKENIZER, (65,), ("cd", "x"))
    for letter in "abcd":
        assert not text.ended
        text.add(ord(letter))
    assert text.ended and text.text == "ab"
    whole = Continued(TOKENIZER, (65,), ("cd",))
    whole.add(ord("c"))
    whole.add(None)
    assert whole.ended and whole.text == "c"
