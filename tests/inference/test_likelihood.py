"""Log-likelihoods of continuations: in batches as one by one, and as the logits say."""

from __future__ import annotations

import random

import pytest
import torch
from support.models import SCHEMES, VOCABULARY, Batch, build, make_model_config
from torch import Tensor

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.inference.likelihood import Likelihood, Pair, score_continuations
from megarecur.model.transformer import Transformer
from megarecur.recurrence.schemes import layer_map

HALTING = {"kind": "universal", "depth": 3, "halting": {"mode": "global"}}
CASES = {name: SCHEMES[name] for name in ("cycle", "loop_linear_random", "reuse_map_add")}
CASES["halting"] = HALTING


def draw_pairs(count: int = 12, longest: int = 20) -> list[Pair]:
    """Texts of many lengths, and choices of one token after the same context."""
    draw = random.Random(5)

    def text(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, most)))

    pairs = [Pair(text(longest), text(4)) for _ in range(count)]
    return pairs + [Pair(pairs[0].context, (choice,)) for choice in range(3)]


@torch.no_grad()
def logits_of(model: Transformer, ids: tuple[int, ...], num_loops: int | None = None) -> Tensor:
    """[S, V], of the model's plain forward pass."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    nothing = torch.zeros_like(tokens)
    batch = Batch(tokens, nothing, positions, nothing, torch.zeros(1, dtype=torch.long))
    ctx = model.context(batch, step=0, training=False)
    steps = layer_map(model.config.recurrence, num_loops)
    x, _ = model.run(steps, model.embed(tokens, ctx), ctx, {})
    return model.logits(x)[0]


def compute(model: Transformer, pair: Pair, num_loops: int | None = None) -> Likelihood:
    """The score of a pair, from the logits of its text alone."""
    logits = logits_of(model, (*pair.context, *pair.continuation)[:-1], num_loops)
    log_p = logits[-len(pair.continuation) :].log_softmax(-1)
    ids = torch.tensor(pair.continuation)
    return Likelihood(
        float(log_p.gather(1, ids[:, None]).sum()), bool((log_p.argmax(-1) == ids).all())
    )


def assert_same(found: list[Likelihood], wanted: list[Likelihood]) -> None:
    assert [each.is_greedy for each in found] == [each.is_greedy for each in wanted]
    sums = [each.log_likelihood for each in found]
    assert sums == pytest.approx([each.log_likelihood for each in wanted], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_batches_score_as_the_logits_of_single_texts(name: str) -> None:
    model = build(make_model_config(CASES[name]))
    pairs = draw_pairs()
    # Greedy continuations, of which random ones are almost never.
    likeliest = logits_of(model, pairs[3].context)[-1].argmax()
    pairs.append(Pair(pairs[3].context, (int(likeliest),)))
    wanted = [compute(model, pair) for pair in pairs]
    assert wanted[-1].is_greedy and not all(each.is_greedy for each in wanted)
    for size, tokens in ((1, 8192), (5, 8192), (64, 40), (64, 8192)):
        assert_same(score_continuations(model, pairs, batch_size=size, batch_tokens=tokens), wanted)
    turned = score_continuations(model, pairs[::-1])
    assert_same(turned[::-1], wanted)


def test_each_depth_is_scored_without_another_model() -> None:
    model = build(make_model_config(SCHEMES["loop_add_zero"]))
    pairs = draw_pairs(4)
    found = {}
    for loops in (1, 2, 3, 5):
        found[loops] = score_continuations(model, pairs, num_loops=loops)
        assert_same(found[loops], [compute(model, pair, loops) for pair in pairs])
    assert found[1] != found[2] != found[3]
    assert_same(score_continuations(model, pairs), found[3])


def test_equal_inputs_run_once() -> None:
    model = build(make_model_config(SCHEMES["dense"]))
    batches: list[int] = []
    context = tuple(range(9))
    choices = [Pair(context, (choice,)) for choice in range(VOCABULARY)]
    found = score_continuations(model, choices, batch_size=1, advance=batches.append)
    assert batches == [VOCABULARY]
    total = torch.tensor([each.log_likelihood for each in found], dtype=torch.float64).exp().sum()
    assert float(total) == pytest.approx(1.0, rel=1e-12)
    assert sum(each.is_greedy for each in found) == 1


def learned(positions: int) -> Config:
    return make_model_config(SCHEMES["dense"], positions="learned", max_positions=positions)


def test_long_contexts_are_cut_from_the_left() -> None:
    model = build(learned(16))
    draw = random.Random(1)
    ids = tuple(draw.randrange(VOCABULARY) for _ in range(30))
    # The last token is not read, so 17 tokens need 16 positions.
    whole, cut = Pair(ids[:25], ids[25:]), Pair(ids[13:25], ids[25:])
    found = score_continuations(model, [whole, Pair(ids[12:25], ids[25:])])
    assert found[0] == score_continuations(model, [cut._replace(context=ids[13:25])])[0]
    assert found[0] == found[1]
    assert found[0] != score_continuations(model, [Pair(ids[14:25], ids[25:])])[0]
    with pytest.raises(ConfigError, match="continuation of 17 tokens exceeds the 16 positions"):
        score_continuations(model, [Pair(ids[:3], ids[3:20])])


def test_what_scores_no_text_is_refused() -> None:
    pairs = draw_pairs(1)
    adapted = make_model_config({"kind": "block_recurrence", "num_blocks": 1, "num_loops": 2})
    adapted = Config.model_validate(adapted.model_dump() | {"adapters": {"rank": 2}})
    dense = make_model_config(SCHEMES["dense"]).model_dump()
    chunks = {"temporal": {"chunk_length": 4, "num_slots": 2, "update_ffn_hidden_size": 8}}
    chunked = Config.model_validate(dense | chunks | {"model": dense["model"] | {"causal": False}})
    for config, depth, said in (
        (make_model_config(SCHEMES["dense"], causal=False), None, "task: the run is a class"),
        (chunked, None, "model.causal=false"),
        (make_model_config(SCHEMES["dense"]), 2, "recurrence.kind=dense has no loops"),
        (make_model_config(SCHEMES["loop_add_zero"]), 0, "must be at least 1 loop"),
        (adapted, 3, "adapters exist for 2 loops"),
    ):
        with pytest.raises(ConfigError, match=f"cannot score text: .*{said}"):
            score_continuations(build(config), pairs, num_loops=depth)
