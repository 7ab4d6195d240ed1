"""Every sharing scheme as a function from its config to a layer map.

Adding a scheme: one config class with a `kind` literal in config/schema.py, one function here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megarecur.config.schema import (
    BlockRecurrence,
    Custom,
    Cycle,
    CycleReverse,
    Dense,
    Loop,
    RecurrenceConfig,
    ReuseMap,
    Sequence,
)
from megarecur.recurrence.layer_map import LayerMap, from_order, mark


def layer_map(recurrence: RecurrenceConfig, depth: int | None = None) -> LayerMap:
    """What runs at an optimizer step.

    Args:
        recurrence: the config section.
        depth: loops to run where the scheme repeats a group; left out: the config's num_loops.
    """
    return SCHEMES[type(recurrence)](recurrence, depth)


def dense(config: Dense, depth: int | None) -> LayerMap:
    """0 1 2 3."""
    return from_order(range(config.num_layers))


def sequence(config: Sequence, depth: int | None) -> LayerMap:
    """0 0 1 1 2 2: ceil(N/M) uses of each block until N are placed, as the authors' code does.

    Where that leaves blocks unused (M=4, N=9), uses are spread evenly instead: floor(i M / N).
    """
    blocks, length = config.num_blocks, config.depth
    uses = -(-length // blocks)
    if (length - 1) // uses == blocks - 1:
        return from_order(i // uses for i in range(length))
    return from_order(i * blocks // length for i in range(length))


def cycle(config: Cycle, depth: int | None) -> LayerMap:
    """0 1 2 0 1 2."""
    return from_order(i % config.num_blocks for i in range(config.depth))


def cycle_reverse(config: CycleReverse, depth: int | None) -> LayerMap:
    """0 1 2 2 1 0: all blocks, N - 2M cyclic copies, then the last uses counted down from M - 1.

    The rule of the authors' code, also where M does not divide N (recurrence of 4 blocks at depth
    10: 0 1 2 3 0 1 3 2 1 0).
    """
    blocks, length = config.num_blocks, config.depth
    middle = max(length - 2 * blocks, 0)
    down = length - blocks - middle
    order = [*range(blocks), *(i % blocks for i in range(middle))]
    return from_order(order + [blocks - 1 - i for i in range(down)])


def reuse_map(config: ReuseMap, depth: int | None) -> LayerMap:
    """[4, 2, 1, 1] is 0 0 0 0 1 1 2 3 (Nguyen & Lin 2025, section 3)."""
    return from_order(block for block, uses in enumerate(config.reuse_map) for _ in range(uses))


def block_recurrence(config: BlockRecurrence, depth: int | None) -> LayerMap:
    """0 1 2 3 0 1 2 3, the embedding added at the start of each later loop."""
    loops = depth or config.num_loops
    steps = from_order(list(range(config.num_blocks)) * loops)
    if config.injection == "none" or loops == 1:
        return steps
    steps = mark(steps, 0, writes=("embedding",))
    for start in range(config.num_blocks, len(steps), config.num_blocks):
        steps = mark(steps, start, reads=("embedding",))
    return steps


def loop(config: Loop, depth: int | None) -> LayerMap:
    """Prelude, core x num_loops, coda; every loop of the core reads the prelude's output."""
    loops = depth or config.num_loops
    core = range(config.prelude, config.prelude + config.core)
    coda = range(core.stop, core.stop + config.coda)
    steps = from_order([*range(config.prelude), *list(core) * loops, *coda])
    if config.injection != "none":
        steps = mark(steps, config.prelude, writes=("prelude",))
        for i in range(loops):
            steps = mark(steps, config.prelude + i * config.core, reads=("prelude",))
    if config.final_norm_after_core:
        steps = mark(steps, len(steps) - config.coda, normalize=True)
    return steps


def custom(config: Custom, depth: int | None) -> LayerMap:
    """Any order."""
    return from_order(config.order)


SCHEMES: dict[type, Callable[[Any, int | None], LayerMap]] = {
    Dense: dense,
    Sequence: sequence,
    Cycle: cycle,
    CycleReverse: cycle_reverse,
    ReuseMap: reuse_map,
    BlockRecurrence: block_recurrence,
    Loop: loop,
    Custom: custom,
}
