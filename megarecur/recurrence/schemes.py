"""Sharing schemes: each is a function from its config to a layer map.

To add a scheme, write one config class with a `kind` literal in config/recurrence.py, and one
function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from megarecur.config.recurrence import (
    BlockRecurrence,
    Custom,
    Cycle,
    CycleReverse,
    Dense,
    Loop,
    Looped,
    RecurrenceConfig,
    ReuseMap,
    Ring,
    Sequence,
    Universal,
)
from megarecur.config.run import Config
from megarecur.recurrence.depth import Depth, default_depth
from megarecur.recurrence.layer_map import LayerMap, from_order, join_stacks, mark


@lru_cache(maxsize=256)
def layer_map(recurrence: RecurrenceConfig, depth: Depth | int | None = None) -> LayerMap:
    """Return the layer map of an optimizer step.

    Args:
        depth: loops of the repeated group, if the scheme has one. A number means that all loops
        carry gradient; None means the config's num_loops, or the rounded mean of a sampler.
    """
    if isinstance(recurrence, Looped):
        loops = Depth(depth, depth) if isinstance(depth, int) else depth
        return LOOPED[type(recurrence)](recurrence, loops or default_depth(recurrence))
    return SCHEMES[type(recurrence)](recurrence)


def build_map(config: Config, depth: Depth | int | None = None) -> LayerMap:
    """Return the layer map that a run executes: the maps of its stacks, with the config's exits."""
    steps = layer_map(config.recurrence, depth)
    steps = steps if config.exits is None else mark_exits(steps)
    return steps if config.encoder is None else join_stacks(encoder_map(config, depth), steps)


def longest_map(config: Config) -> LayerMap:
    """Return the map in which every loop that has parameters of its own runs, all with gradient."""
    most, below = (
        scheme.most_loops if isinstance(scheme, Looped) else None
        for scheme in (config.recurrence, config.encoder)
    )
    if below is None:
        return build_map(config.model_copy(update={"exits": None}), most)
    loops = most or 1
    depth = Depth(loops, loops, below, below)
    return build_map(config.model_copy(update={"exits": None}), depth)


def encoder_map(config: Config, depth: Depth | int | None = None) -> LayerMap:
    """Return the layer map of an encoder alone, with its blocks numbered from 0."""
    assert config.encoder is not None
    if isinstance(depth, Depth) and depth.encoder_loops:
        return layer_map(config.encoder, Depth(depth.encoder_loops, depth.encoder_backward))
    return layer_map(config.encoder)


@lru_cache(maxsize=256)
def mark_exits(steps: LayerMap, coda: int = 0) -> LayerMap:
    """Add an exit after every loop except the last, where the loop carries gradient.

    Args:
        coda: number of last blocks that run once after all loops.
    """
    end, last = max(step.block for step in steps) - coda, len(steps) - coda - 1
    return tuple(
        replace(step, exit=step.grad and step.block == end and position < last)
        for position, step in enumerate(steps)
    )


def dense(config: Dense) -> LayerMap:
    """Return 0 1 2 3."""
    return from_order(range(config.num_layers))


def sequence(config: Sequence) -> LayerMap:
    """Return 0 0 1 1 2 2: ceil(N/M) uses of each block until N are placed, as in the authors' code.

    If that leaves blocks unused (M=4, N=9), uses are spread evenly instead: floor(i M / N).
    """
    blocks, length = config.num_blocks, config.depth
    uses = -(-length // blocks)
    if (length - 1) // uses == blocks - 1:
        return from_order(i // uses for i in range(length))
    return from_order(i * blocks // length for i in range(length))


def cycle(config: Cycle) -> LayerMap:
    """Return 0 1 2 0 1 2."""
    return from_order(i % config.num_blocks for i in range(config.depth))


def cycle_reverse(config: CycleReverse) -> LayerMap:
    """Return 0 1 2 2 1 0: all blocks, N - 2M cyclic copies, then a last pass counted down from M -
    1.

    The authors' code uses this rule, also if M does not divide N (recurrence of 4 blocks at depth
    10: 0 1 2 3 0 1 3 2 1 0).
    """
    blocks, length = config.num_blocks, config.depth
    middle = max(length - 2 * blocks, 0)
    down = length - blocks - middle
    order = [*range(blocks), *(i % blocks for i in range(middle))]
    return from_order(order + [blocks - 1 - i for i in range(down)])


def reuse_map(config: ReuseMap) -> LayerMap:
    """Return 0 0 0 0 1 1 2 3 for [4, 2, 1, 1] (Nguyen & Lin 2025, section 3).

    With injection, every later repetition of a block reads the input of the first one.
    """
    uses = config.reuse_map
    steps = from_order(block for block, count in enumerate(uses) for _ in range(count))
    if config.injection == "none":
        return steps
    return tuple(
        replace(step, reads=("entry",) if step.loop_index else (),
                writes=("entry",) if not step.loop_index and uses[step.block] > 1 else ())
        for step in steps
    )  # fmt: skip


def block_recurrence(config: BlockRecurrence, depth: Depth) -> LayerMap:
    """Return 0 1 2 3 0 1 2 3, with the embedding added at the start of each later loop."""
    steps = from_order(list(range(config.num_blocks)) * depth.num_loops)
    steps = truncate(steps, 0, config.num_blocks, depth)
    if config.injection == "none" or depth.num_loops == 1:
        return steps
    steps = mark(steps, 0, writes=("embedding",))
    for start in range(config.num_blocks, len(steps), config.num_blocks):
        steps = mark(steps, start, reads=("embedding",))
    return steps


def loop(config: Loop, depth: Depth) -> LayerMap:
    """Return prelude, core x num_loops, coda; every loop of the core reads the prelude's output."""
    core = range(config.prelude, config.prelude + config.core)
    coda = range(core.stop, core.stop + config.coda)
    steps = from_order([*range(config.prelude), *list(core) * depth.num_loops, *coda])
    steps = truncate(steps, config.prelude, config.core, depth)
    if config.injection != "none":
        steps = mark(steps, config.prelude, writes=("prelude",))
        for i in range(depth.num_loops):
            steps = mark(steps, config.prelude + i * config.core, reads=("prelude",))
    if config.final_norm_after_core:
        steps = mark(steps, len(steps) - config.coda, normalize=True)
    return steps


def truncate(steps: LayerMap, start: int, length: int, depth: Depth) -> LayerMap:
    """Run the first loops, of `length` steps each from `start` on, without gradient."""
    stop = start + length * (depth.num_loops - depth.backward_loops)
    return tuple(
        replace(step, grad=False) if start <= position < stop else step
        for position, step in enumerate(steps)
    )


def universal(config: Universal) -> LayerMap:
    """Return 0 0 0, with the maximum number of steps."""
    return from_order([0] * config.depth)


def custom(config: Custom) -> LayerMap:
    """Return the order that the config lists."""
    return from_order(config.order)


def ring(config: Ring) -> LayerMap:
    """Return 0 x depth (Heo et al. 2025)."""
    return from_order([0] * config.depth)


SCHEMES: dict[type, Callable[[Any], LayerMap]] = {
    Dense: dense,
    Sequence: sequence,
    Cycle: cycle,
    CycleReverse: cycle_reverse,
    ReuseMap: reuse_map,
    Custom: custom,
    Ring: ring,
    Universal: universal,
}
LOOPED: dict[type, Callable[[Any, Depth], LayerMap]] = {
    BlockRecurrence: block_recurrence,
    Loop: loop,
}
