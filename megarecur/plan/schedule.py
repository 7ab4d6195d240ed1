"""What runs where and when at an optimizer step: map, walk and order, chosen once per depth."""

from __future__ import annotations

from dataclasses import dataclass

from megarecur.config.schema import Config, Loop
from megarecur.plan.cost import count_head_flops, count_step_flops
from megarecur.plan.order import Op, Order
from megarecur.plan.placement import Placement, place
from megarecur.plan.simulate import StageCost, choose_order
from megarecur.plan.walk import Walk, build_walk, cuts_for_v
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One optimizer step, or one pass."""

    steps: LayerMap
    walk: Walk
    order: Order
    """By pipeline rank."""
    name: str
    """Of the order's family."""


class Schedules:
    """The walks and orders of a run.

    Raises:
        PlacementError: blocks that cannot be placed on the config's pipeline ranks.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.placement: Placement = place(config, layer_map(config.recurrence))
        self.trained: dict[tuple[Depth | None, int], Scheduled] = {}

    def training(self, depth: Depth | None, num_microbatches: int) -> Scheduled:
        """The step of a depth and a number of micro batches per replica."""
        key = depth, num_microbatches
        if key not in self.trained:
            self.trained[key] = self.choose(depth, num_microbatches)
        return self.trained[key]

    def choose(self, depth: Depth | None, num_microbatches: int) -> Scheduled:
        """The best order, by simulation."""
        parallel = self.config.parallel
        steps = layer_map(self.config.recurrence, depth)
        walk = self.walk(steps, tip=parallel.order in ("auto", "zbv"))
        choice = choose_order(
            walk,
            num_microbatches,
            stage_costs(self.config, walk),
            split=parallel.split_backward,
            wanted=parallel.order,
        )
        return Scheduled(steps, walk, choice.order, choice.name)

    def walk(self, steps: LayerMap, tip: bool = False) -> Walk:
        """The stages of a map; tip: a V's tip is cut in two."""
        recurrence = self.config.recurrence
        fresh = isinstance(recurrence, Loop) and recurrence.initial_state != "prelude"
        cuts = cuts_for_v(steps, self.placement) if tip else ()
        return build_walk(steps, self.placement, cuts, fresh)

    def forward(self, depth: Depth | int | None = None) -> Scheduled:
        """One micro batch, forward only: rank after rank."""
        steps = layer_map(self.config.recurrence, depth)
        walk = self.walk(steps)
        ranks: list[list[Op]] = [[] for _ in range(self.placement.ranks)]
        for stage in walk:
            if not stage.first:
                ranks[stage.rank].append(Op("RECV_F", stage.index, 0))
            ranks[stage.rank].append(Op("F", stage.index, 0))
            if not stage.last:
                ranks[stage.rank].append(Op("SEND_F", stage.index, 0))
        return Scheduled(steps, walk, tuple(map(tuple, ranks)), "forward")


def stage_costs(config: Config, walk: Walk) -> tuple[StageCost, ...]:
    """Costs in FLOPs per token, one micro batch each; a hop costs a tenth of a step of the map."""
    each_flops = count_step_flops(config, tuple(step for stage in walk for step in stage.steps))
    flops, hop = iter(each_flops), 0.1 * max(each_flops)
    head = count_head_flops(config)
    costs = []
    for stage in walk:
        forward = inputs = weights = 0
        for step in stage.steps:
            each = next(flops)
            forward += each
            inputs += each * (step.grad + (step.grad and config.train.recompute))
            weights += each * step.grad
        if stage.last:
            forward, inputs, weights = forward + head, inputs + head, weights + head
        costs.append(StageCost(forward, inputs, weights, hop, len(stage.steps)))
    return tuple(costs)
