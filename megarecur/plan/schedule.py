"""Schedules of a run: the map, walk and order of each depth, chosen once per depth."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.plan.cluster import load_cluster
from megarecur.plan.generate import greedy
from megarecur.plan.order import Kind, Op, PipelineOrder, StageCost
from megarecur.plan.placement import Placement, place
from megarecur.plan.predict import Layout, cost_stages, list_walks, walk_over
from megarecur.plan.simulate import check_family, choose_order
from megarecur.plan.walk import Walk, forward_only
from megarecur.recurrence.depth import Depth, default_depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

ALONE: tuple[Kind, ...] = ("F", "B")
"""Operations of a single pipeline rank for one micro batch."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The map, walk and order of one optimizer step or evaluation pass."""

    steps: LayerMap
    walk: Walk
    order: PipelineOrder
    """Operations of each pipeline rank."""
    name: str
    """Name of the order's family."""
    bubble: float = 0.0
    """Idle share of the ranks' time, by simulation."""


class Schedules:
    """The walks and orders of a run, cached by depth.

    Every rank chooses from formulas alone, so all ranks choose the same.

    Raises:
        PlacementError: blocks that cannot be placed on the config's pipeline ranks.
        ConfigError: an unknown cluster, or an order that does not suit the walk.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.placement: Placement = place(config, build_map(config))
        parallel = config.parallel
        self.layout = Layout(parallel.tensor, parallel.pipeline, 1, context=parallel.context)
        self.cluster = load_cluster(parallel.cluster)
        # Reject an order now, not at the step that draws the depth.
        for walk in list_walks(config, self.placement) if parallel.pipeline > 1 else ():
            check_family(walk, parallel.order, parallel.split_backward)
        self.trained: dict[tuple[Depth | None, int], Future[Scheduled]] = {}
        self.thread = ThreadPoolExecutor(1, "orders")

    def training(self, depth: Depth | None, num_microbatches: int) -> Scheduled:
        """Return the schedule for a depth and a number of micro batches per replica."""
        return self.prepare(depth, num_microbatches).result()

    def prepare(self, depth: Depth | None, num_microbatches: int) -> Future[Scheduled]:
        """Start choosing the order of a coming step."""
        key = depth, num_microbatches
        if key not in self.trained:
            self.trained[key] = self.thread.submit(self.choose, *key)
        return self.trained[key]

    def close(self) -> None:
        """Stop choosing orders."""
        self.thread.shutdown(cancel_futures=True)

    def choose(self, depth: Depth | None, num_microbatches: int) -> Scheduled:
        """Choose the best order by simulation."""
        parallel = self.config.parallel
        steps = build_map(self.config, depth)
        walk = walk_over(self.config, steps, self.placement)
        if len(walk) == 1:
            ops = (Op(kind, 0, j) for j in range(num_microbatches) for kind in ALONE)
            return Scheduled(steps, walk, (tuple(ops),), "1f1b")
        choice = choose_order(
            walk,
            num_microbatches,
            cost_stages(self.config, walk, self.layout, self.cluster),
            split=parallel.split_backward,
            wanted=parallel.order,
        )
        return Scheduled(steps, walk, choice.order, choice.name, choice.timeline.bubble)

    def describe(self, depth: Depth | None, num_microbatches: int) -> str:
        """Return a line about the pipeline of a step, with a remedy if ranks wait for long."""
        ranks, scheduled = self.placement.ranks, self.training(depth, num_microbatches)
        line = (
            f"pipeline: {ranks} ranks, {num_microbatches} micro batches, order "
            f"{scheduled.name}, {scheduled.bubble:.0%} of the ranks' time idle by simulation"
        )
        if num_microbatches < ranks:
            line += (
                f"; that is fewer micro batches than ranks: raise train.global_batch_size or lower "
                f"train.micro_batch_size={self.config.train.micro_batch_size}"
            )
        return line

    def forward(
        self, depth: Depth | int | None = None, exits: bool = False, num_microbatches: int = 1
    ) -> Scheduled:
        """Return a schedule of forward passes alone.

        Args:
            exits: include the config's exits, one after every loop except the last.
            num_microbatches: micro batches in flight; with as many as ranks, all ranks have work
                but at the start and the end.
        """
        config, recurrence = self.config, self.config.recurrence
        if exits and config.exits is not None and isinstance(recurrence, Looped) and depth is None:
            # Treat all loops as if they carried gradient.
            depth = default_depth(recurrence).num_loops
        if not exits:
            config = config.model_copy(update={"exits": None})
        steps = build_map(config, depth)
        walk = forward_only(walk_over(self.config, steps, self.placement))
        # A step of the map is the unit of time; what the ranks do when depends on little else.
        costs = [StageCost(max(len(stage.steps), 1), 0.0, 0.0) for stage in walk]
        order = greedy(walk, num_microbatches, costs, split=False)
        assert order is not None, "forward passes keep nothing, so they fit"
        idle = ((),) * (self.placement.ranks - len(order))  # Ranks behind the last one visited.
        return Scheduled(steps, walk, (*order, *idle), "forward")
