"""Visits: the layer map cut into passes over groups of blocks, the engine's units of work.

Blocks that always follow each other form a group: the prelude, the core, the coda, the blocks of a
cycle, a ring's block. A visit is one pass over a group; all visits of a group run the same blocks,
at different loops, so they can share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megarecur.config.recurrence import (
    Cycle,
    Loop,
    Looped,
    RecurrenceConfig,
    Ring,
    Universal,
)
from megarecur.config.run import Config
from megarecur.recurrence.depth import default_depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map, mark_exits

Group = tuple[int, ...]
"""The blocks of a group, in order."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One pass over a group of blocks."""

    steps: LayerMap
    group: Group
    exit: int = 0
    """Number of loops that have run here, if a token may exit after them; 0: it may not."""

    @property
    def loop(self) -> int:
        """The loop of the visit's first step."""
        return self.steps[0].loop_index


@dataclass(frozen=True, slots=True)
class Route:
    """The visits of a text at some depth, in order."""

    visits: tuple[Visit, ...]
    num_loops: int
    """Number of loops, if the model can exit after one; else 1."""
    coda: int
    """Index of the visit after the last loop, which tokens that exit run too; the number of visits
    if nothing follows the loops."""


def list_glued(recurrence: RecurrenceConfig) -> frozenset[tuple[int, int]]:
    """Return the pairs of blocks (a, b) in which a is always followed by b, and b by a preceded."""
    # Two loops show where a group ends; with one, it would merge with its neighbours.
    steps = layer_map(recurrence, 2 if isinstance(recurrence, Looped) else None)
    order = [step.block for step in steps]
    after = {a: {y for x, y in pairwise([*order, -1]) if x == a} for a in order}
    before = {b: {x for x, y in pairwise([-1, *order]) if y == b} for b in order}
    pairs = pairwise(order)
    return frozenset((a, b) for a, b in pairs if after[a] == {b} and before[b] == {a} and a != b)


def refuse_exits(config: Config, num_loops: int | None = None) -> str:
    """Return why no token can exit after an earlier loop of a model; "" if it can.

    Args:
        num_loops: loops of the repeated group, if the scheme has one; None: the trained number.
    """
    kind = config.recurrence.kind
    if config.temporal is not None:
        return (
            "exit: a token that exits early would not be written to the temporal memory as "
            "trained; omit exit"
        )
    if config.halting is not None:
        return (
            f"exit: recurrence.halting.mode={config.halting.mode} decides itself how many steps "
            "a token runs; omit exit"
        )
    if not isinstance(config.recurrence, Cycle | Ring | Universal | Looped):
        return (
            f"exit: recurrence.kind={kind} has no loops to exit after; omit exit, or use a run of "
            "kind cycle, ring, universal, block_recurrence or loop"
        )
    if num_loops == 1:
        return "exit: depth 1 has no earlier loop to exit after; omit exit"
    if not any(step.exit for step in mark_loops(config.recurrence, num_loops)):
        return "exit: recurrence runs one loop, which has no earlier one to exit after; omit exit"
    return ""


def count_coda(recurrence: RecurrenceConfig) -> int:
    """Return the number of blocks that run once after all loops."""
    return recurrence.coda if isinstance(recurrence, Loop) else 0


def mark_loops(recurrence: RecurrenceConfig, num_loops: int | None) -> LayerMap:
    """Return the map with an exit after every loop but the last; arguments as of `cut_visits`."""
    if isinstance(recurrence, Looped):
        num_loops = num_loops or default_depth(recurrence).num_loops
    return mark_exits(layer_map(recurrence, num_loops), count_coda(recurrence))


@lru_cache(maxsize=256)
def cut_visits(recurrence: RecurrenceConfig, num_loops: int | None, exits: bool) -> Route:
    """Return the visits of the map.

    Args:
        num_loops: loops of the repeated group, if the scheme has one; None: the trained number.
        exits: mark the visits after which a token may exit.
    """
    glued, steps = list_glued(recurrence), mark_loops(recurrence, num_loops)
    visits, begin, coda = list[Visit](), 0, len(steps) - count_coda(recurrence)
    for i, step in enumerate(steps, 1):
        leaves = exits and step.exit
        if i < len(steps) and not leaves and (step.block, steps[i].block) in glued:
            continue
        own, begin = steps[begin:i], i
        exit_ = step.loop_index + 1 if leaves else 0
        visits.append(Visit(own, tuple(s.block for s in own), exit_))
    after = sum(visit.steps[0] in steps[coda:] for visit in visits)
    num_loops = 1 + max(visit.exit for visit in visits)
    return Route(tuple(visits), num_loops, len(visits) - after)
