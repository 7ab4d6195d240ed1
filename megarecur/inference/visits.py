"""Visits: the layer map cut into passes over groups of blocks, the engine's units of work.

Blocks that always follow each other form a group: the prelude, the core, the coda, the blocks of a
cycle, a ring's block. A visit is one pass over a group; all visits of a group run the same blocks,
at different loops, so they can share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megarecur.config.objective import ExitConfig
from megarecur.config.recurrence import Looped, RecurrenceConfig
from megarecur.config.rules import find_conflicts
from megarecur.config.rules_objective import EXIT_RULES
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
    """Number of loops after which the final norm and head may be applied here; 0: not here."""

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

    def find_exit(self, loops: int) -> int:
        """Return the index of the visit after which `loops` loops have run."""
        return next(i for i, visit in enumerate(self.visits) if visit.exit == loops)


def list_glued(recurrence: RecurrenceConfig) -> frozenset[tuple[int, int]]:
    """Return the pairs of blocks (a, b) in which a is always followed by b, and b by a preceded."""
    # Two loops show where a group ends; with one, it would merge with its neighbours.
    steps = layer_map(recurrence, 2 if isinstance(recurrence, Looped) else None)
    order = [step.block for step in steps]
    after = {a: {y for x, y in pairwise([*order, -1]) if x == a} for a in order}
    before = {b: {x for x, y in pairwise([-1, *order]) if y == b} for b in order}
    pairs = pairwise(order)
    return frozenset((a, b) for a, b in pairs if after[a] == {b} and before[b] == {a} and a != b)


def can_exit(config: Config) -> bool:
    """Return True if the model has loops after which a token may exit."""
    with_exits = config.model_copy(update={"exits": ExitConfig()})
    return config.temporal is None and not list(find_conflicts(with_exits, EXIT_RULES))


@lru_cache(maxsize=256)
def cut_visits(recurrence: RecurrenceConfig, num_loops: int | None, exits: bool) -> Route:
    """Return the visits of the map.

    Args:
        num_loops: loops of the repeated group, if the scheme has one; None: the trained number.
        exits: mark the visits after which a token may exit.
    """
    if isinstance(recurrence, Looped):
        num_loops = num_loops or default_depth(recurrence).num_loops
    glued, steps = list_glued(recurrence), layer_map(recurrence, num_loops)
    steps = mark_exits(steps) if exits else steps
    visits, begin = list[Visit](), 0
    for i, step in enumerate(steps, 1):
        if i < len(steps) and not step.exit and (step.block, steps[i].block) in glued:
            continue
        own, begin = steps[begin:i], i
        exit_ = step.loop_index + 1 if step.exit else 0
        visits.append(Visit(own, tuple(s.block for s in own), exit_))
    return Route(tuple(visits), 1 + max(visit.exit for visit in visits))
