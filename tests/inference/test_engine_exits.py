"""Exits and drafts of the engine: rules, keys and values of skipped loops, acceptance."""

from __future__ import annotations

from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.decoding import build_decoder, disturb
from torch import Tensor

from megarecur.errors import ConfigError
from megarecur.inference.early import ExitRule
from megarecur.inference.engine import Engine, cut_skipped
from megarecur.inference.generate import generate
from megarecur.inference.request import Draft, Event, Exit, Handle, Request
from megarecur.model.transformer import Transformer

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
MODELS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    (CYCLE, None),
    (CYCLE, {"rank": 3, "norms": True}),
    ({"kind": "cycle", "num_blocks": 2, "depth": 5}, None),
    ({"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}, {"rank": 3}),
    ({"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 3}, None),
    ({"kind": "loop", "prelude": 1, "core": 2, "coda": 2, "num_loops": 3, "injection": "linear",
      "final_norm_after_core": True, "initial_state": "random"}, {"rank": 3}),
    ({"kind": "ring", "depth": 3, "level_rank": 2, "feed_forward_rank": 3}, None),
    ({"kind": "universal", "depth": 3}, None),
]  # fmt: skip
CODA = 5
"""The model with a coda."""
PROMPTS = [(1, 5, 2, 7), (9,), (3, 3, 8, 1, 4, 4)]


def build(recurrence: dict[str, Any], adapters: dict[str, Any] | None = None) -> Transformer:
    # In fp64, because a batch rounds differently from a single text.
    return disturb(build_decoder(recurrence, adapters, precision="fp64"))


def serve(engine: Engine, count: int = 3, **options: Any) -> list[list[Event]]:
    """The events of some prompts that arrive one pass after the other."""
    handles: list[Handle] = []
    for prompt in PROMPTS[:count]:
        given: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.0} | options
        handles.append(engine.submit(Request(tokens=prompt, **given)))
        engine.step()
    engine.run()
    assert engine.passes is not None and engine.passes.pool.num_used == 0
    return [list(handle) for handle in handles]


def ids(events: list[Event]) -> list[int | None]:
    return [event.token for event in events]


@pytest.mark.parametrize(("recurrence", "adapters"), MODELS)
@pytest.mark.parametrize(
    ("kind", "threshold"), [("confidence", 0.5), ("entropy", 1.6), ("kl", 0.9), ("kl", 99.0)]
)
def test_exits_are_those_of_generate(recurrence, adapters, kind, threshold) -> None:
    """Tokens and loops; also those of texts that are preempted and recomputed."""
    model = build(recurrence, adapters)
    engine = Engine(model, page_size=2, num_pages=8, chunk=3)
    found = serve(engine, exit=Exit(kind, threshold))
    for prompt, events in zip(PROMPTS, found, strict=True):
        rule = ExitRule(kind, threshold)
        text = generate(model, prompt, max_new_tokens=10, temperature=0.0, exit_rule=rule)
        assert ids(events) == list(text)
        # The first new token comes of the prompt, which runs all loops.
        assert [event.loops for event in events] == [3, *rule.loops]
    assert engine.scheduler.preemptions


@pytest.mark.parametrize(("recurrence", "adapters"), MODELS)
def test_an_exit_at_a_loop_always_exits_there(recurrence, adapters) -> None:
    model = build(recurrence, adapters)
    for loops in (1, 2, 3):
        for events in serve(Engine(model), exit=Exit("loop", loops)):
            assert [event.loops for event in events] == [3] + [loops] * 9
    full = [ids(events) for events in serve(Engine(model))]
    assert [ids(events) for events in serve(Engine(model), exit=Exit("loop", 3))] == full
    rule = ExitRule("kl", 99.0)  # Always after the second loop.
    text = list(generate(model, PROMPTS[0], max_new_tokens=10, temperature=0.0, exit_rule=rule))
    assert ids(serve(Engine(model), exit=Exit("loop", 2))[0]) == text


@pytest.mark.parametrize("number", [1, CODA])
def test_neighbours_with_other_rules_change_nothing(number: int) -> None:
    model = build(*MODELS[number])
    rules = [None, Exit("loop", 1), Exit("entropy", 1.6), Exit("loop", 2, "share"),
             Exit("oracle"), Exit("confidence", 0.5, "share")]  # fmt: skip
    alone = []
    for number, rule in enumerate(rules):
        engine = Engine(model)
        request = Request(tokens=(1, number), max_new_tokens=12, seed=number, exit=rule)
        alone.append(engine.submit(request))
        engine.run()
    engine, random = Engine(model, page_size=2, num_pages=12, chunk=2), Random(2)
    handles = dict[int, Handle]()
    for number in random.sample(range(len(rules)), len(rules)):
        handles[number] = engine.submit(alone[number].request)
        engine.step()
    engine.run()
    assert engine.scheduler.preemptions
    for number, handle in enumerate(alone):
        assert list(handles[number]) == list(handle)


@pytest.mark.parametrize("fill", ["state", "share"])
@pytest.mark.parametrize(("recurrence", "adapters"), MODELS)
def test_skipped_loops_are_filled(recurrence, adapters, fill) -> None:
    """Share: with the keys and values of the last loop that the block ran. State: with others."""
    model = build(recurrence, adapters)
    engine = Engine(model, page_size=4, num_pages=8)
    assert engine.passes is not None
    pool = engine.passes.pool
    request = Request(
        tokens=(1, 5, 2), max_new_tokens=7, temperature=0.0, exit=Exit("loop", 1, fill)
    )
    handle = engine.submit(request)
    while not engine.scheduler.running or engine.scheduler.running[0].num_new < 5:
        engine.step()
    (text,) = engine.scheduler.running
    assert text.exits == {3: 1, 4: 1, 5: 1, 6: 1}
    # No token has read them so far; as many wait as a chunk has.
    engine.chunk = len(text.unfilled)
    engine.step()
    assert [item.positions for item in text.unfilled] == [[7]]
    steps = [step for visit in text.route.visits for step in visit.steps]
    for step in steps:
        number = int(engine.passes.step_of[step.block, step.loop_index])
        first = int(engine.passes.step_of[step.block, 0])
        for position in range(7):
            own, other = (
                [kept[pool.num_pages * n + text.pages[position // 4], position % 4]
                 for kept in (pool.keys, pool.values)]
                for n in (number, first)
            )  # fmt: skip
            assert all(values.abs().sum() > 0 for values in own)
            if step.loop_index and position >= 3 and fill == "share":
                assert torch.equal(torch.stack(own), torch.stack(other))
            elif step.loop_index and (adapters or position < 3):
                assert not torch.equal(torch.stack(own), torch.stack(other))
    engine.run()
    assert len(list(handle)) == 7


@pytest.mark.parametrize("number", [0, CODA])
def test_the_oracle_exits_where_the_likeliest_token_is_that_of_all_loops(number: int) -> None:
    """Greedy texts begin as those of full depth, up to the first token that attends to another one
    that left."""
    model = build(*MODELS[number])
    full = serve(Engine(model))
    found = serve(Engine(model), exit=Exit("oracle"))
    loops = [event.loops for events in found for event in events]
    assert {1, 3} <= set(loops)
    for events, others in zip(found, full, strict=True):
        early = next(i for i, event in enumerate(events) if event.loops < 3)
        assert ids(events)[: early + 1] == ids(others)[: early + 1]


def decode_second(model: Transformer, prompt: tuple[int, ...], rule: Exit) -> tuple[int, Tensor]:
    """Return the loops of the token that follows the first new one, and what all steps keep of the
    first, [steps, 2, N, H]."""
    engine = Engine(model, num_pages=2, chunk=1)  # Skipped keys are made before the next pass.
    handle = engine.submit(Request(tokens=prompt, max_new_tokens=4, temperature=0.0, exit=rule))
    while not engine.scheduler.running or engine.scheduler.running[0].num_new < 3:
        engine.step()
    (text,), _, event = engine.scheduler.running, handle.events.get(), handle.events.get()
    assert engine.passes is not None
    pool = engine.passes.pool
    kept = [pool.keys, pool.values]
    found = [each[text.pages[0] :: pool.num_pages, len(prompt)] for each in kept]
    return event.loops, torch.stack(found, 1)


@pytest.mark.parametrize("number", [0, CODA])
def test_the_oracle_keeps_what_an_exit_at_its_loop_keeps(number: int) -> None:
    model, compared = build(*MODELS[number]), 0
    for prompt in [*PROMPTS, (7, 7), (2, 9, 9), (1, 2, 3)]:
        loops, kept = decode_second(model, prompt, Exit("oracle"))
        if loops < 3:
            other, wanted = decode_second(model, prompt, Exit("loop", loops))
            assert other == loops
            torch.testing.assert_close(kept, wanted, rtol=0.0, atol=1e-12)
            compared += 1
    assert compared


# ------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize(("recurrence", "adapters"), MODELS)
@pytest.mark.parametrize(
    ("draft", "temperature"), [(Draft(1, 4), 0.0), (Draft(2, 2), 0.8), (Draft(1, 1), 0.8)]
)
def test_drafts_do_not_change_the_text(recurrence, adapters, draft, temperature) -> None:
    """Greedy or sampled, also of texts that are preempted, with neighbours that do not draft."""
    model = build(recurrence, adapters)
    options: dict[str, Any] = {"max_new_tokens": 11, "temperature": temperature}
    engine = Engine(model, page_size=2, num_pages=11, chunk=3)
    handles = [
        engine.submit(Request(tokens=prompt, draft=None if i == 1 else draft, **options))
        for i, prompt in enumerate(PROMPTS)
    ]
    engine.run()
    assert engine.scheduler.preemptions
    for prompt, handle in zip(PROMPTS, handles, strict=True):
        assert ids(list(handle)) == list(generate(model, prompt, **options))
    assert engine.counts.drafted > 0
    assert 0.0 <= engine.counts.acceptance <= 1.0


def test_accepted_drafts_save_passes() -> None:
    """If later loops add nothing, full depth confirms every proposal."""
    model = build(*MODELS[0])
    for block in model.blocks().values():
        for matrix in (block.attention.output, block.feed_forward.down):
            matrix.weight.parameter.data.zero_()
    counts = []
    for draft in (None, Draft(1, 4)):
        engine = Engine(model)
        (events,) = serve(engine, 1, draft=draft, max_new_tokens=13)
        assert len(events) == 13
        counts.append(engine.counts)
    # The prompt gives one token, 3 loops each; then 12 of 3 loops, or 3 times 4 of 1 loop and a
    # verification of 2 loops.
    assert [c.passes for c in counts] == [3 + 12 * 3, 3 + 3 * (4 * 1 + 2)]
    assert counts[1].acceptance == 1.0 and counts[1].drafted == 12


def test_a_drafted_end_ends_the_text() -> None:
    model = build(*MODELS[0])
    whole = list(generate(model, PROMPTS[0], max_new_tokens=12, seed=2))
    end = whole[6]
    engine = Engine(model)
    (events,) = serve(engine, 1, draft=Draft(2, 4), temperature=1.0, seed=2, max_new_tokens=12,
                      eos_ids=frozenset([end]))  # fmt: skip
    assert ids(events) == [*whole[: whole.index(end)], None]
    assert events[-1].reason == "stop"


@pytest.mark.parametrize(
    ("recurrence", "options", "message"),
    [
        (
            CYCLE,
            {"exit": Exit("loop", 4)},
            "exit_threshold=4 must be a number of loops from 1 to 3",
        ),
        (CYCLE, {"exit": Exit("loop", 1.5)}, "exit_threshold=1.5 must be a number of loops"),
        (CYCLE, {"exit": Exit("sure")}, "exit=sure is none of confidence, kl"),
        (CYCLE, {"exit": Exit("kl", 1.0, "zero")}, "fill=zero is none of state, share"),
        (CYCLE, {"exit": Exit("confidence", 2.0)}, "exit_threshold=2.0 is a probability"),
        (CYCLE, {"draft": Draft(3)}, "draft.loops=3 must be from 1 to 2"),
        (CYCLE, {"draft": Draft(1, 0)}, "draft.tokens=0 must be at least 1"),
        (CYCLE, {"draft": Draft(), "exit": Exit("kl")}, "omit one of the two"),
        ({"kind": "dense", "num_layers": 2}, {"draft": Draft()}, "kind=dense has no loops"),
        ({"kind": "dense", "num_layers": 2}, {"exit": Exit("oracle")}, "kind=dense has no loops"),
    ],
)
def test_mistakes_are_reported(recurrence, options, message) -> None:
    engine = Engine(build_decoder(recurrence))
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(tokens=(1,), max_new_tokens=2, **options))


# ------------------------------------------------------------------------------- rows of a pass


def test_skipped_visits_are_filled_in_passes_of_bounded_rows() -> None:
    short, long = Mock(positions=[3]), Mock(positions=[0, 1, 2, 3, 4])
    skipped = {short: [1, 2, 3], long: [2, 3]}
    parts = list(cut_skipped(skipped, 4))
    assert parts == [{short: [1, 2, 3]}, {long: [2]}, {long: [3]}]
    assert list(cut_skipped(skipped, 8)) == [{short: [1, 2, 3], long: [2]}, {long: [3]}]
    assert list(cut_skipped(skipped, 99)) == [skipped]


def test_passes_of_few_rows_fill_what_one_pass_fills() -> None:
    model = build(*MODELS[3])
    whole = serve(Engine(model), exit=Exit("loop", 1))
    assert serve(Engine(model, max_rows=2), exit=Exit("loop", 1)) == whole
