"""Walks for tests: of given ranks, and any that hypothesis can think of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from megarecur.plan.order import StageCost
from megarecur.plan.placement import Placement
from megarecur.plan.walk import Stage, Walk, build_walk, cuts_for_v
from megarecur.recurrence.layer_map import LayerMap, from_order


def visit(*ranks: int) -> Walk:
    """A walk over these ranks, gradients all the way."""
    last = len(ranks) - 1
    return tuple(
        Stage(i, rank, (), i == 0, i == last, returns_x=i > 0, backward=True)
        for i, rank in enumerate(ranks)
    )


def loops(ranks: int, times: int) -> Walk:
    """0..p-1, so many times."""
    return visit(*[*range(ranks)] * times)


def vee(ranks: int) -> Walk:
    """0..p-1 p-1..0."""
    return visit(*range(ranks), *reversed(range(ranks)))


def equal_costs(walk: Walk, hop: float = 0.0) -> tuple[StageCost, ...]:
    """F, I and W take one unit each per rank and micro batch."""
    share = (1 + max(stage.rank for stage in walk)) / len(walk)
    return (StageCost(share, share, share, hop),) * len(walk)


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    """Any order of up to five blocks, with values written and read, and steps without gradient."""
    blocks = draw(st.integers(1, 5))
    down = list(range(blocks))
    order: list[int] = draw(
        st.one_of(
            st.permutations([*down, *draw(st.lists(st.sampled_from(down), max_size=6))]),
            st.integers(1, 3).map(lambda times: down * times),
            st.just(down + down[::-1]),
        )
    )
    some = st.lists(st.sampled_from("ab"), max_size=2, unique=True).map(lambda n: tuple(sorted(n)))
    rare = st.one_of(st.just(()), some)
    written: set[str] = set()
    steps = []
    for step in from_order(order):
        writes: tuple[str, ...] = draw(rare)
        written.update(writes)
        reads = tuple(name for name in draw(rare) if name in written)
        steps.append(replace(step, writes=writes, reads=reads))
    if draw(st.booleans()):
        start = draw(st.integers(0, len(steps)))
        stop = draw(st.integers(start, len(steps)))
        steps[start:stop] = [replace(step, grad=False) for step in steps[start:stop]]
    return tuple(steps)


@st.composite
def placements(draw: st.DrawFn, steps: LayerMap) -> Placement:
    """Any partition of the blocks of a map; every rank has one."""
    blocks = 1 + max(step.block for step in steps)
    ranks = draw(st.integers(1, blocks))
    spare = [draw(st.integers(0, ranks - 1)) for _ in range(blocks - ranks)]
    owners = sorted([*range(ranks), *spare])
    if draw(st.booleans()):
        owners = draw(st.permutations(owners))
    return Placement(ranks, tuple(owners), owners[steps[0].block], owners[steps[-1].block])


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    """The walk of any map over any partition, cut anywhere."""
    steps = draw(layer_maps())
    placement = draw(placements(steps))
    anywhere = st.lists(st.integers(0, len(steps) - 1), max_size=2)
    cuts: Any = draw(st.one_of(st.just(cuts_for_v(steps, placement)), anywhere))
    return build_walk(steps, placement, cuts, fresh=("prelude",) if draw(st.booleans()) else ())


def costs_of(walk: Walk) -> st.SearchStrategy[tuple[StageCost, ...]]:
    """Any costs for a walk, nothing among them."""
    time = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1 / 3])
    size = st.sampled_from([0, 1, 5])
    cost = st.builds(StageCost, time, time, time, time, size, size)
    return st.tuples(*[cost] * len(walk))
