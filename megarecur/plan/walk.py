"""The walk: the layer map over pipeline ranks, split into stages that exchange activations.

Every block has one owner, so the order of blocks is an order of ranks. A stage is a run of steps on
one rank. Stages send each other the hidden state and the values that later steps read. A rank keeps
each value it received for its later stages of the same micro batch. Gradients travel back along the
same hops; steps without gradient stop them.

The loss also reads the hidden state after each early exit. That state is never sent, because exits
are on the rank of the head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from megarecur.plan.placement import Placement
from megarecur.recurrence.layer_map import TARGET, LayerMap, StackName, Step, stack_of_value


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of consecutive steps on one pipeline rank."""

    index: int
    rank: int
    steps: LayerMap
    first: bool = False
    """True if the stage embeds the tokens first."""
    last: bool = False
    """True if the stage ends in the loss."""
    enters: StackName = "decoder"
    """The stack over whose positions the incoming hidden state extends."""
    receives: tuple[str, ...] = ()
    """Values for later reads that arrive with the hidden state."""
    sends: tuple[str, ...] = ()
    """Values for later reads that leave with the hidden state; the next stage receives them."""
    returns_x: bool = False
    """True if the gradient of the incoming hidden state goes back to the previous stage."""
    returns: tuple[str, ...] = ()
    """Received values whose gradient goes back too."""
    backward: bool = False
    """True if the stage has a backward pass."""
    leaves: tuple[str, ...] = ()
    """Early exits after the stage's steps, whose hidden states stay on its rank for the loss."""
    exits: tuple[str, ...] = ()
    """In the last stage, all early exits in order; its loss reads their hidden states, from earlier
    stages and its own."""

    @property
    def arriving(self) -> tuple[StackName, ...]:
        """The stack of each tensor that arrives: the hidden state, and the received values."""
        return (self.enters, *map(stack_of_value, self.receives))

    @property
    def returning(self) -> tuple[StackName, ...]:
        """The stack of each gradient that goes back."""
        values = tuple(map(stack_of_value, self.returns))
        return (self.enters, *values) if self.returns_x else values

    @property
    def sends_back(self) -> bool:
        """Return True if any gradient goes back to the previous stage."""
        return self.returns_x or bool(self.returns)


Walk = tuple[Stage, ...]


def build_walk(
    steps: LayerMap,
    placement: Placement,
    cuts: Collection[int] = (),
    fresh: Collection[str] = (),
) -> Walk:
    """Return the stages of a map.

    Args:
        placement: where each block, the embedding and the head live.
        cuts: positions in the map before which a stage begins even on the same rank, for example to
        cut the tip of a V in two.
        fresh: values whose writers start from a state of their own, so that the hidden state does
        not pass into them: `prelude`, of a core that starts from zero.
    """
    runs: list[tuple[int, list[int]]] = [(placement.embedding, [])]
    for position, step in enumerate(steps):
        rank = placement.owners[step.block]
        if rank != runs[-1][0] or (position in cuts and runs[-1][1]):
            runs.append((rank, []))
        runs[-1][1].append(position)
    if runs[-1][0] != placement.head:
        runs.append((placement.head, []))
    stages, enters = [], steps[0].stack
    for i, (rank, positions) in enumerate(runs):
        own = tuple(steps[p] for p in positions)
        stages.append(Stage(i, rank, own, i == 0, i == len(runs) - 1, enters))
        enters = own[-1].stack if own else enters
    return tuple(_flow_back(_leave_exits(_carry(stages)), fresh))


def forward_only(walk: Walk) -> Walk:
    """Return a walk without backward passes, as in evaluation."""
    return tuple(replace(stage, backward=False, returns_x=False, returns=()) for stage in walk)


def cuts_for_v(steps: LayerMap, placement: Placement) -> tuple[int, ...]:
    """Return where to cut a walk that goes down the ranks and up again, for the order `zbv`.

    That order needs two stages on every rank, so the run at the tip of the V, all on the last rank,
    is cut in the middle: `build_walk(steps, placement, cuts_for_v(steps, placement))` is the walk
    for it. Other orders run both the cut walk and the uncut one. Returns () if the walk is not a V,
    or its tip has only one step.
    """
    walk = build_walk(steps, placement)
    last = placement.ranks - 1
    ranks = [stage.rank for stage in walk]
    if ranks != [*range(last), *range(last, -1, -1)] or len(walk[last].steps) < 2 or last == 0:
        return ()
    before = sum(len(stage.steps) for stage in walk[:last])
    return (before + len(walk[last].steps) // 2,)


def _carry(stages: list[Stage]) -> list[Stage]:
    """Fill in the values sent for later reads, over the fewest hops and only to ranks without
    them."""
    arriving: list[list[str]] = [[] for _ in stages]
    for name in sorted({name for stage in stages for step in stage.steps for name in step.reads}):
        source = 0  # the last stage that wrote it
        for stage in stages:
            for step in stage.steps:
                if name in step.writes:
                    source = stage.index
                elif name in step.reads:
                    for hop in _find_hops(stages, arriving, name, source, stage.index):
                        arriving[hop].append(name)
    sends = [*arriving[1:], []]
    return [
        replace(stage, receives=tuple(arriving[i]), sends=tuple(sends[i]))
        for i, stage in enumerate(stages)
    ]


def _leave_exits(stages: list[Stage]) -> list[Stage]:
    """Fill in the exits that each stage leaves for the loss, except those of the last stage
    itself."""
    *before, last = stages
    found = [
        replace(stage, leaves=tuple(step.exit_name for step in stage.steps if step.exit))
        for stage in before
    ]
    own = tuple(step.exit_name for step in last.steps[:-1] if step.exit)
    assert all(stage.rank == last.rank for stage in found if stage.leaves), "exit without its head"
    return [*found, replace(last, exits=(*(name for s in found for name in s.leaves), *own))]


def _find_hops(
    stages: list[Stage], arriving: list[list[str]], name: str, source: int, reader: int
) -> tuple[int, ...]:
    """Return the fewest further stages that must receive a value to bring it from source to reader.

    Any rank that has the value may send it. Among equally short paths, the latest is chosen.
    """
    ways: dict[int, tuple[int, ...]] = {stages[source].rank: ()}  # paths found so far, by rank
    for stage in stages[source + 1 : reader + 1]:
        way = ways[stages[stage.index - 1].rank]
        if name not in arriving[stage.index]:
            way = (*way, stage.index)
        if stage.rank not in ways or len(way) <= len(ways[stage.rank]):
            ways[stage.rank] = way
    return ways[stages[reader].rank]


def _flow_back(stages: list[Stage], fresh: Collection[str]) -> list[Stage]:
    """Fill in the gradients sent back: those that depend on a parameter and are needed."""

    def starts_fresh(step: Step) -> bool:
        return TARGET in step.reads or any(name in fresh for name in step.writes)

    # Forward: whether the hidden state entering a stage, and each value, depends on parameters.
    enters: list[bool] = []
    arrives: list[dict[str, bool]] = []
    writes: list[list[bool]] = []  # the hidden state that enters each step and is kept there
    values: dict[str, bool] = {}
    x = True
    for stage in stages:
        enters.append(x)
        arrives.append(dict(values))
        writes.append([])
        for step in stage.steps:
            writes[-1].append(x)
            values |= dict.fromkeys(step.writes, x)
            x = step.grad
    # Backward: whether the gradient of the hidden state, and of each value on each rank, is needed.
    asked_x, asked = True, dict[tuple[int, str], bool]()
    found: list[Stage] = []
    for stage in reversed(stages):
        backward = asked_x
        for name in stage.sends:  # The next stage returns these.
            if name in found[-1].returns:
                asked[stage.rank, name] = backward = True
        for step, depends in zip(stage.steps[::-1], writes[stage.index][::-1], strict=True):
            asked_x = asked_x and step.grad
            backward = backward or asked_x
            for name in step.reads:
                if asked_x:
                    asked[stage.rank, name] = True
            if starts_fresh(step):
                asked_x = False
            for name in step.writes:
                due = asked.pop((stage.rank, name), False) and depends
                backward = backward or due
                asked_x = asked_x or due
        # A value stays on its rank, so its gradient leaves with the stage that received it.
        returns = tuple(
            name
            for name in stage.receives
            if asked.pop((stage.rank, name), False) and arrives[stage.index][name]
        )
        asked_x = asked_x and enters[stage.index] and not stage.first
        found.append(
            replace(stage, returns_x=asked_x, returns=returns, backward=backward or bool(returns))
        )
    return found[::-1]
