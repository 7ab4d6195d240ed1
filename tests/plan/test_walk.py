"""The walk: which stages, what travels with the hidden state, where gradients come back."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.walks import layer_maps, placements
from torch import Tensor

from megarecur.plan.placement import Placement
from megarecur.plan.walk import Walk, build_walk, cuts_for_v
from megarecur.recurrence.layer_map import LayerMap, from_order, mark

FRESH = ("prelude",)


@st.composite
def parts(draw: st.DrawFn) -> tuple[LayerMap, Placement, list[int], bool]:
    steps = draw(layer_maps())
    placement = draw(placements(steps))
    cuts = draw(st.lists(st.integers(0, len(steps) - 1), max_size=2))
    return steps, placement, cuts, draw(st.booleans())


@settings(max_examples=100)
@given(parts())
def test_stages_are_runs_of_one_rank_and_together_the_map(
    made: tuple[LayerMap, Placement, list[int], bool],
) -> None:
    steps, placement, cuts, fresh = made
    walk = build_walk(steps, placement, cuts, FRESH * fresh)
    assert tuple(step for stage in walk for step in stage.steps) == steps
    assert [stage.index for stage in walk] == list(range(len(walk)))
    assert (walk[0].rank, walk[-1].rank) == (placement.embedding, placement.head)
    assert [s.first for s in walk] == [True] + [False] * (len(walk) - 1)
    assert [s.last for s in walk] == [False] * (len(walk) - 1) + [True]
    for stage in walk:
        assert all(placement.owners[step.block] == stage.rank for step in stage.steps)
    for before, after in pairwise(walk):
        assert before.sends == after.receives
        start = len([step for stage in walk[: after.index] for step in stage.steps])
        assert before.rank != after.rank or start in cuts
        assert before.backward or not after.sends_back  # What comes back is passed on.


@settings(max_examples=100)
@given(parts())
def test_a_value_is_there_where_it_is_read_and_comes_to_a_rank_once(
    made: tuple[LayerMap, Placement, list[int], bool],
) -> None:
    steps, placement, cuts, fresh = made
    held: dict[int, dict[str, int]] = defaultdict(dict)  # rank: value: which writing of it
    written: dict[str, int] = {}
    arrivals: list[tuple[int, str, int]] = []
    walk = build_walk(steps, placement, cuts, FRESH * fresh)
    for stage in walk:
        for name in stage.receives:
            source = held[walk[stage.index - 1].rank]
            assert name in source, "what is sent must be there"
            held[stage.rank][name] = source[name]
            if walk[stage.index - 1].rank != stage.rank:
                arrivals.append((stage.rank, name, source[name]))
        for step in stage.steps:
            for name in step.writes:
                written[name] = written.get(name, 0) + 1
                held[stage.rank][name] = written[name]
            for name in step.reads:
                assert held[stage.rank][name] == written[name], "what is read must be the newest"
    assert len(arrivals) == len(set(arrivals))


def run_with_hops(walk: Walk, fresh: bool) -> tuple[list[bool], list[set[str]], list[bool]]:
    """By stage, whether autograd takes gradients back: of x, of which values, and to parameters.

    The whole walk is one graph of scalars; every hop is a node of its own, whose gradient says what
    would travel back over it.
    """
    embedding = torch.ones((), requires_grad=True)
    kept: dict[int, dict[str, Tensor]] = defaultdict(dict)
    x = embedding * 1.0
    hops: list[dict[str, Tensor]] = []
    uses: list[list[Tensor]] = []

    def hop(value: Tensor) -> Tensor:
        value = value * 1.0
        if value.requires_grad:
            value.retain_grad()
        return value

    for stage in walk:
        arrived: dict[str, Tensor] = {}
        if not stage.first:
            source = kept[walk[stage.index - 1].rank]
            x = arrived["x"] = hop(x)
            for name in stage.receives:
                kept[stage.rank][name] = arrived[name] = hop(source[name])
        hops.append(arrived)
        uses.append([])
        for step in stage.steps:
            for name in step.writes:
                kept[stage.rank][name] = x
            if fresh and "prelude" in step.writes:
                x = torch.ones(())
            for name in step.reads:
                x = x + kept[stage.rank][name]
            weight = torch.ones((), requires_grad=True)
            uses[-1].append(weight)
            with torch.set_grad_enabled(step.grad):
                x = x * weight
        if stage.first:
            uses[-1].append(embedding)
        if stage.last:
            head = torch.ones((), requires_grad=True)
            uses[-1].append(head)
            (x * head).backward()
    back = [{name for name, value in some.items() if value.grad is not None} for some in hops]
    trained = [any(weight.grad is not None for weight in some) for some in uses]
    return ["x" in some for some in back], [some - {"x"} for some in back], trained


def rename(steps: LayerMap) -> LayerMap:
    """Value a becomes `prelude`, behind which a fresh core does not pass on the hidden state."""
    names = {"a": "prelude", "b": "b"}
    for i, step in enumerate(steps):
        steps = mark(
            steps,
            i,
            reads=tuple(names[name] for name in step.reads),
            writes=tuple(names[name] for name in step.writes),
        )
    return steps


@settings(max_examples=200)
@given(parts())
def test_gradients_come_back_where_autograd_takes_them(
    made: tuple[LayerMap, Placement, list[int], bool],
) -> None:
    steps, placement, cuts, fresh = made
    walk = build_walk(rename(steps), placement, cuts, FRESH * fresh)
    of_x, of_values, trained = run_with_hops(walk, fresh)
    for stage in walk:
        assert stage.returns_x == of_x[stage.index], stage
        assert set(stage.returns) == of_values[stage.index], stage
        passes_on = stage.sends_back or (not stage.last and walk[stage.index + 1].sends_back)
        assert stage.backward == (trained[stage.index] or passes_on), stage


def test_a_loop_by_hand() -> None:
    """A loop of two blocks on two ranks; its first run without gradient, but for the prelude."""
    steps = from_order([0, 1, 2, 1, 2, 0])
    steps = mark(steps, 1, writes=("prelude",), reads=("prelude",))
    steps = mark(steps, 3, reads=("prelude",))
    steps = mark(steps, 1, grad=False)
    walk = build_walk(steps, Placement(3, (0, 1, 2), 0, 0))
    assert [stage.rank for stage in walk] == [0, 1, 2, 1, 2, 0]
    assert [stage.receives for stage in walk] == [()] * 6  # Written where it is read.
    assert [stage.returns_x for stage in walk] == [False, True, False, True, True, True]
    assert [stage.backward for stage in walk] == [True, True, True, True, True, True]
    walk = build_walk(mark(steps, 4, reads=("prelude",)), Placement(3, (0, 1, 2), 0, 0))
    assert [stage.receives for stage in walk] == [(), (), (), (), ("prelude",), ()]
    assert [stage.returns for stage in walk] == [(), (), (), (), ("prelude",), ()]


def test_a_value_waits_on_a_rank_that_it_has_passed() -> None:
    """Written on rank 0, read on the way up on rank 1: one hop, not once around the V."""
    steps = mark(from_order([0, 1, 2, 1, 0]), 0, writes=("a",))
    walk = build_walk(mark(steps, 3, reads=("a",)), Placement(3, (0, 1, 2), 0, 0))
    assert [stage.receives for stage in walk] == [(), ("a",), (), (), ()]
    assert [stage.returns for stage in walk] == [(), ("a",), (), (), ()]


def test_a_value_that_no_parameter_made_asks_for_no_gradient() -> None:
    """Kept behind a step without gradient, on the rank that reads it in its next stage."""
    steps = mark(mark(from_order([0, 1, 2]), 0, grad=False), 1, grad=False, writes=("a",))
    one = Placement(1, (0, 0, 0), 0, 0)
    walk = build_walk(mark(steps, 2, reads=("a",)), one, cuts=(2,))
    assert [stage.backward for stage in walk] == [False, True]


def test_cuts_of_a_v() -> None:
    down_and_up = from_order([0, 1, 2, 2, 1, 0])
    placement = Placement(3, (0, 1, 2), 0, 0)
    assert cuts_for_v(down_and_up, placement) == (3,)
    walk = build_walk(down_and_up, placement, (3,))
    assert [stage.rank for stage in walk] == [0, 1, 2, 2, 1, 0]
    assert cuts_for_v(from_order([0, 1, 2, 1, 0]), placement) == ()  # A tip of one step.
    assert cuts_for_v(from_order([0, 1, 2, 0, 1, 2]), placement) == ()
    assert cuts_for_v(down_and_up, Placement(1, (0, 0, 0), 0, 0)) == ()
