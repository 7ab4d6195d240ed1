"""Placement of parameters: a partition of blocks over pipeline ranks, with one owner per block.

The cost of a block is its executed FLOPs (uses), not its size. Neighbouring blocks stay together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megarecur.config.run import Config
from megarecur.errors import PlacementError
from megarecur.plan.cost import (
    count_head_flops,
    count_patch_flops,
    count_state_bytes,
    count_step_flops,
    is_chunked,
)
from megarecur.recurrence.depth import count_depths, draws_depth
from megarecur.recurrence.inventory import ParameterSpec, build_inventory, is_with_embedding
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

POOR = 0.8
"""Efficiency below which advice is given."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Pipeline rank of every block, of the embedding, and of the final norm with the head."""

    ranks: int
    owners: tuple[int, ...]
    """Pipeline rank of each block."""
    embedding: int
    head: int

    def blocks(self, rank: int) -> tuple[int, ...]:
        """Return the blocks that live on a rank."""
        return tuple(block for block, owner in enumerate(self.owners) if owner == rank)


@dataclass(frozen=True, slots=True)
class Balance:
    """The distribution of work by a placement."""

    loads: tuple[float, ...]
    """FLOPs per token of each rank: forward, backward and recompute, with the head at its owner."""
    efficiency: float
    """Upper bound on how busy any order keeps the ranks, ignoring waits at both ends."""
    block: int
    """The most expensive block of the busiest rank."""
    advice: str
    """The remedy for a poor efficiency; "" if it is good."""


def place(config: Config, steps: LayerMap, *, memory_cap: int | None = None) -> Placement:
    """Return the config's own placement, or the partition that minimises the busiest rank's work.

    The embedding lives with the block of the first step, final norm and head with that of the last;
    blocks from a step with `normalize` to the end need the final norm and share its rank.

    Args:
        config: with `parallel.pipeline` ranks and its vocabulary resolved.
        steps: the layer map; if depth is sampled, work is the mean over the run.
        memory_cap: bytes on each rank for parameters, gradients, moments and copies; a block counts
            once, however often it runs. None means no limit.

    Raises:
        PlacementError: blocks that must stay together do not fit, an early exit is not on the rank
        of the head, or the memory does not suffice.
    """
    placement = assign_blocks(config, steps, memory_cap)
    if figures := find_exit_apart(steps, placement):
        raise PlacementError(f"{EXIT_REASON}; {EXIT_REMEDY}".format_map(figures))
    if memory_cap is not None:
        bytes_of = weigh_blocks(config, steps)
        for rank in range(placement.ranks):
            size = bytes_of(placement.blocks(rank))
            if size > memory_cap:
                raise PlacementError(
                    f"pipeline rank {rank} needs {size:,} bytes of parameters and optimizer "
                    f"state, blocks {list(placement.blocks(rank))}, and has room for "
                    f"{memory_cap:,}; raise parallel.pipeline or parallel.tensor, or set "
                    "parallel.zero_stage to 1"
                )
    return placement


EXIT_REASON = (
    "exits: they come after block {block}, on pipeline rank {rank}, and the head lives with block "
    "{last} on rank {head}"
)
EXIT_REMEDY = (
    "place both blocks on one rank by parallel.placement, or make recurrence.depth a multiple of "
    "recurrence.num_blocks"
)


def find_exit_apart(steps: LayerMap, placement: Placement) -> dict[str, object]:
    """Return the figures of EXIT_REASON if an early exit is not on the rank of the head."""
    for step in steps:
        if step.exit and (rank := placement.owners[step.block]) != placement.head:
            last = steps[-1].block
            return {"block": step.block, "rank": rank, "last": last, "head": placement.head}
    return {}


def assign_blocks(config: Config, steps: LayerMap, memory_cap: int | None = None) -> Placement:
    """Return the placement that `place` checks.

    Raises:
        PlacementError: blocks that must stay together do not fit.
    """
    ranks, units = config.parallel.pipeline, join_blocks(steps)
    owners = config.parallel.placement
    if ranks == 1:
        owners = (0,) * config.num_blocks
    elif owners is not None:
        apart = [unit for unit in units if len({owners[block] for block in unit}) > 1]
        if apart:
            raise PlacementError(
                f"parallel.placement={list(owners)} separates blocks {list(apart[0])}; the final "
                "norm "
                "precedes one of them, so all from there on share its rank: place them on one rank"
            )
    else:
        if ranks > len(units):
            raise PlacementError(
                f"parallel.pipeline={ranks} exceeds the {len(units)} part(s) that the blocks "
                "form, the last ones sharing a rank with the final norm; set it to at most "
                f"{len(units)}"
            )
        owners = _partition_blocks(config, steps, units, ranks, memory_cap)
    return Placement(ranks, owners, owners[steps[0].block], owners[steps[-1].block])


def join_blocks(steps: LayerMap) -> list[tuple[int, ...]]:
    """Return groups of blocks that must share a rank: single blocks, and those after the final
    norm."""
    blocks = 1 + max(step.block for step in steps)
    normed = [i for i, step in enumerate(steps) if step.normalize]
    tail = [step.block for step in steps[normed[0] :]] if normed else [blocks - 1]
    # Neighbours stay together, so everything in between does too.
    start, stop = min(tail), 1 + max(tail)
    alone = [(block,) for block in range(blocks)]
    return [*alone[:start], tuple(range(start, stop)), *alone[stop:]]


def _partition_blocks(
    config: Config,
    steps: LayerMap,
    units: Sequence[tuple[int, ...]],
    ranks: int,
    memory_cap: int | None = None,
) -> tuple[int, ...]:
    """Return the owner of each block; if no partition fits in memory, the smallest one."""
    costs, bytes_of = count_block_costs(config, steps), weigh_blocks(config, steps)

    def blocks_of(start: int, stop: int) -> list[int]:
        return [block for unit in units[start:stop] for block in unit]

    def cost_of(start: int, stop: int) -> float:
        return sum(costs[block] for block in blocks_of(start, stop))

    def size_of(start: int, stop: int) -> float:
        return bytes_of(blocks_of(start, stop))

    def fits(start: int, stop: int) -> bool:
        return memory_cap is None or size_of(start, stop) <= memory_cap

    ends = partition(cost_of, len(units), ranks, fits) or partition(size_of, len(units), ranks)
    assert ends is not None
    return tuple(
        rank
        for rank, (start, stop) in enumerate(pairwise((0, *ends)))
        for unit in units[start:stop]
        for _ in unit
    )


def partition(
    cost: Callable[[int, int], float],
    parts: int,
    ranks: int,
    fits: Callable[[int, int], bool] = lambda start, stop: True,
) -> tuple[int, ...] | None:
    """Split a row of parts into one run per rank so that the costliest run costs least.

    Args:
        cost: cost of parts start to stop - 1.
        parts: their number, at least `ranks`.
        ranks: number of runs, none of them empty.
        fits: whether such a run is allowed.

    Returns:
        The end of each run, or None if nothing fits. Ties go to the least sum of squares, then to
        shorter first runs.
    """
    runs = {
        (start, stop): cost(start, stop)
        for start in range(parts)
        for stop in range(start + 1, parts + 1)
        if fits(start, stop)
    }
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for _ in range(ranks):
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for (start, stop), here in runs.items():
            if start in best:
                most, squares, ends = best[start]
                found = max(most, here), squares + here * here, (*ends, stop)
                longer[stop] = min(longer.get(stop, found), found)
        best = longer
    return best[parts][2] if parts in best else None


def count_block_costs(config: Config, steps: LayerMap) -> list[float]:
    """Return FLOPs per token that each block executes in training, the head counted with its owner.

    A step costs its forward pass, twice as much for the backward pass if it has gradient, and once
    more if it is recomputed. Sampled depths use the mean over the run. A look-up is free.
    """
    maps = [(1.0, steps)]
    if draws_depth(config):
        shares = count_depths(config)
        maps = [(share, build_map(config, depth)) for depth, share in shares.items()]
    costs = [0.0] * config.num_blocks
    for share, some in maps:
        for step, flops in zip(some, count_step_flops(config, some), strict=True):
            again = config.train.recomputes(step.loop_index)
            times = 3 + again if step.grad else 1
            costs[step.block] += share * times * flops
    for share, some in maps:
        exits = sum(step.exit for step in some[:-1])  # four passes: logits are recomputed
        passes = 3 + is_chunked(config) + 4 * exits
        costs[steps[-1].block] += share * passes * count_head_flops(config)
    costs[steps[0].block] += 2 * count_patch_flops(config)  # Pixels need no gradient.
    return costs


def weigh_blocks(config: Config, steps: LayerMap) -> Callable[[Collection[int]], int]:
    """Return a function from blocks to the bytes that their rank keeps between steps.

    It counts parameters, gradients, moments and copies, each block once. The embedding comes with
    the first step's block, final norm and head with the last step's. A tied embedding whose two
    ends are on two ranks is on both.
    """
    first, last, tied = steps[0].block, steps[-1].block, config.ties_embeddings
    parts: dict[int | str, list[ParameterSpec]] = defaultdict(list)
    for name, spec in build_inventory(config).items():
        end = "embedding" if is_with_embedding(name) else "head"
        parts[end if spec.block is None else spec.block].append(spec)
        if name == "embedding.weight" and tied:
            parts["table"].append(spec)
    sizes = {part: count_state_bytes(config, specs) for part, specs in parts.items()}

    def weigh(blocks: Collection[int]) -> int:
        size = sum(sizes[block] for block in blocks)
        if first in blocks:
            size += sizes["embedding"]
        if last in blocks:
            size += sizes.get("head", 0)
        if last in blocks and first not in blocks:
            size += sizes.get("table", 0)
        return size

    return weigh


# --------------------------------------------------------------------------------------- balance


def balance(config: Config, placement: Placement, steps: LayerMap) -> Balance:
    """Return how evenly a placement distributes the work of the run."""
    costs, units = count_block_costs(config, steps), join_blocks(steps)

    def efficiency_of(owners: Sequence[int], ranks: int) -> float:
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
        return sum(loads) / (ranks * max(loads))

    loads = tuple(
        sum(costs[block] for block in placement.blocks(r)) for r in range(placement.ranks)
    )
    efficiency = efficiency_of(placement.owners, placement.ranks)
    block = max(placement.blocks(loads.index(max(loads))), key=lambda b: costs[b])
    if efficiency >= POOR:
        return Balance(loads, efficiency, block, "")
    reach = {
        ranks: efficiency_of(_partition_blocks(config, steps, units, ranks), ranks)
        for ranks in range(min(placement.ranks, len(units)), 1, -1)
    }
    advice = (
        f"parallel.pipeline={placement.ranks} keeps its ranks at most {efficiency:.0%} busy: "
        f"{max(loads) / sum(loads):.0%} of the work is on one rank, "
        f"{costs[block] / sum(costs):.0%} in block {block}"
    )
    fewer = next((ranks for ranks, reached in reach.items() if reached >= POOR), 1)
    if reach.get(placement.ranks, 0.0) >= POOR:
        advice += f"; omit parallel.placement, which gives {reach[placement.ranks]:.0%}"
    elif fewer > 1:
        advice += f"; parallel.pipeline={fewer} would give {reach[fewer]:.0%}"
    else:
        advice += "; set parallel.pipeline to 1"
    if fewer < placement.ranks:
        advice += ", and parallel.tensor or data parallelism can use the other ranks"
    return Balance(loads, efficiency, block, advice)
