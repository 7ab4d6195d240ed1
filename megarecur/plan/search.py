"""Search the layouts of a world of ranks for the best ones, and explain why the others lost.

Every layout is drafted (placed, counted, bounded from below) in milliseconds. Orders are simulated
by increasing bound, until no remaining layout can be among the best.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from megarecur.config.rules_run import CONTEXT_RULES
from megarecur.config.run import Config
from megarecur.errors import ConfigError, MegarecurError
from megarecur.plan.cluster import Cluster
from megarecur.plan.cost import Seen
from megarecur.plan.describe import format_bytes, list_blocks
from megarecur.plan.placement import Placement
from megarecur.plan.predict import (
    Draft,
    Layout,
    LayoutPlan,
    complete,
    count_operations,
    make_draft,
    pick_family,
)

MOST_PLANS = 40
"""Maximum number of layouts whose orders are simulated."""
MOST_EFFORT, LONGEST = 100_000, 20_000
"""Maximum operations of all simulated orders (about 60 microseconds each), and of one order.
Layouts beyond these limits are reported."""


class Loss(NamedTuple):
    """Reason why a layout is not among the best; per reason, the loss of least size is reported."""

    layout: Layout
    reason: str
    size: float = 0.0


Losses = dict[str, list[Loss]]
"""Losses by kind of reason."""


@dataclass(frozen=True)
class Family:
    """Layouts that lost for the same reason."""

    layouts: tuple[Layout, ...]
    reason: str

    @property
    def name(self) -> str:
        """Their sizes: each value, or the range from least to largest."""
        contexts = {layout.context for layout in self.layouts}
        shared = "" if contexts == {1} else f" x {_span(contexts)}"
        pairs = sorted({layout[:2] for layout in self.layouts})
        if len(pairs) <= 4:
            return ", ".join(f"{tensor} x {pipeline}{shared}" for tensor, pipeline in pairs)
        tensor = _span({layout.tensor for layout in self.layouts})
        pipeline = _span({layout.pipeline for layout in self.layouts})
        return f"{tensor} x {pipeline}{shared}"


@dataclass(frozen=True)
class Search:
    """Result of a search."""

    best: tuple[LayoutPlan, ...]
    """The best layouts that fit, by time of a step."""
    families: tuple[Family, ...]
    layouts: int
    simulated: int


def list_layouts(
    world: int, tensor: int | None = None, pipeline: int | None = None, context: int = 1
) -> Iterator[Layout]:
    """Yield all layouts, without ZeRO, whose sizes multiply to the world size, with given sizes
    fixed.

    Raises:
        ConfigError: the given sizes do not divide the world size.
    """
    given = (tensor or 1) * (pipeline or 1) * context
    if world % given:
        shared = f" x context={context}" if context > 1 else ""
        raise ConfigError(
            f"--world-size {world} is not a multiple of tensor={tensor or 1} x "
            f"pipeline={pipeline or 1}{shared} = {given}; choose a multiple of {given}"
        )
    world //= context
    for tp in [tensor] if tensor else _divisors(world // (pipeline or 1)):
        for pp in [pipeline] if pipeline else _divisors(world // tp):
            yield Layout(tp, pp, world // (tp * pp), context=context)


def list_contexts(config: Config, ranks: int) -> list[int]:
    """Return the divisors of a number of ranks by which sequences of the config can be cut, if
    tensor parallelism cuts no heads."""
    found = []
    for context in _divisors(ranks):
        parallel = config.parallel.model_copy(update={"tensor": 1, "context": context})
        cut = config.model_copy(update={"parallel": parallel})
        if not any(rule.explain(cut) for rule in CONTEXT_RULES):
            found.append(context)
    return found


def _list_all(
    config: Config, world: int, tensor: int | None, pipeline: int | None, context: int | None
) -> list[Layout]:
    """Return the layouts of a search. Those whose context ranks do not divide the heads of a
    tensor-parallel rank are left out, if other contexts are searched."""
    if context is not None:
        return list(list_layouts(world, tensor, pipeline, context))
    heads = config.model.num_heads
    found = list(list_layouts(world, tensor, pipeline))
    for shared in list_contexts(config, world // ((tensor or 1) * (pipeline or 1)))[1:]:
        each = list_layouts(world, tensor, pipeline, shared)
        found += [layout for layout in each if heads % (layout.tensor * shared) == 0]
    return found


def search(
    config: Config,
    cluster: Cluster,
    world: int,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    context: int | None = None,
    zero_stage: int | None = None,
    keep: int = 10,
    seen: Seen | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Return the best layouts of a world by predicted time of a step.

    Args:
        config: with its vocabulary resolved.
        tensor: tensor-parallel ranks; None means any.
        pipeline: pipeline ranks; None means any.
        context: ranks that share a sequence; None means any.
        zero_stage: ZeRO stage; None means the config's, or the first higher one with which a layout
        fits.
        keep: how many layouts to return.
        seen: keys that queries see; None: those of samples that are one document each.
        report: called with the number of finished layouts and the total.

    Raises:
        ConfigError: the given sizes do not divide the world.
    """
    stages = range(config.parallel.zero_stage, 4) if zero_stage is None else [zero_stage]
    lost: Losses = defaultdict(list)
    layouts = _list_all(config, world, tensor, pipeline, context)
    placements: dict[int, Placement] = {}  # by number of pipeline ranks
    drafts: list[tuple[Draft, Iterator[Draft]]] = []  # the first ZeRO stage, then higher ones
    for done, layout in enumerate(layouts):
        report(done, 2 * len(layouts))
        fitting = _draft_stages(config, cluster, layout, stages, placements, lost, seen)
        first = next(fitting, None)
        if first is not None:
            drafts.append((first, fitting))
    drafts.sort(key=lambda some: some[0].least_time)
    best: list[LayoutPlan] = []
    simulated = effort = 0
    for done, (first, others) in enumerate(drafts):
        report(len(layouts) + done, len(layouts) + len(drafts))
        beaten = len(best) == keep and first.least_time >= best[-1].step_time
        if beaten or simulated == MOST_PLANS:
            _note_slow(first, best, lost)
            continue
        operations = count_operations(first) * (10 if pick_family(first) == "auto" else 1)
        if effort + operations > MOST_EFFORT or count_operations(first) > LONGEST:
            reason = (
                "were not simulated because their orders are long; plan one with "
                "--tensor and --pipeline"
            )
            lost["long"].append(Loss(first.layout, reason, operations))
            continue
        simulated, effort = simulated + 1, effort + operations
        try:
            plan = _first_that_fits(chain([first], others))
        except ConfigError as error:  # parallel.order does not suit the walk.
            _note_refusal(first.layout, error, lost)
            continue
        if plan is None:
            _note_memory(first, lost)
            continue
        best = sorted([*best, plan], key=lambda plan: plan.step_time)
        if len(best) > keep:
            _note_slow(best.pop().draft, best, lost)
    return Search(tuple(best), _join_families(lost), len(layouts), simulated)


def _draft_stages(
    config: Config,
    cluster: Cluster,
    shape: Layout,
    stages: Sequence[int],
    placements: dict[int, Placement],
    lost: Losses,
    seen: Seen | None,
) -> Iterator[Draft]:
    """Yield drafts of a layout for the ZeRO stages with which it may fit."""
    closest: Draft | None = None
    fits = False
    for stage in stages:
        layout = shape._replace(zero_stage=stage)
        if stage == 2 and layout.pipeline > 1 and stage != stages[0]:
            continue  # It saves nothing over stage 1.
        try:
            known = placements.get(layout.pipeline)
            candidate = make_draft(config, layout, cluster, known, seen)
        except MegarecurError as error:
            if stage == stages[0]:
                _note_refusal(layout, error, lost)
                return
            continue  # Other settings rule out this higher stage.
        placements[layout.pipeline] = candidate.placement
        if candidate.least_memory <= cluster.memory:
            fits = True
            yield candidate
        elif closest is None or candidate.least_memory < closest.least_memory:
            closest = candidate
        if layout.copies == 1:
            break  # With one copy there is nothing to shard.
    if closest is not None and not fits:
        _note_memory(closest, lost)


def _first_that_fits(drafts: Iterator[Draft]) -> LayoutPlan | None:
    """Return the plan of the least ZeRO stage that the fastest order fits, or of the last with
    another order."""
    for last in drafts:
        plan = complete(last, most_operations=0, squeeze=False)
        if plan.fits:
            return plan
    plan = complete(last, most_operations=0)
    return plan if plan.fits else None


# --------------------------------------------------------------------------------------- reasons


def _note_refusal(layout: Layout, error: MegarecurError, lost: Losses) -> None:
    """Record a rejected layout by the words of the message, whatever its numbers."""
    reason = str(error).splitlines()[-1].strip().removeprefix("config: ")
    lost[re.sub(r"\d+", "0", reason)].append(Loss(layout, reason))


def _note_memory(candidate: Draft, lost: Losses) -> None:
    need, room = candidate.least_memory, candidate.cluster.memory
    stage = candidate.layout.zero_stage
    over = f"{format_bytes(need - room)} too much" if need > room else "its orders keep more"
    reason = (
        f"do not fit into {format_bytes(room)} per rank; the smallest takes at least "
        f"{format_bytes(need)} ({over})" + (f" with ZeRO {stage}" if stage else "")
    )
    lost["memory"].append(Loss(candidate.layout, reason, need))


def _note_slow(candidate: Draft, best: list[LayoutPlan], lost: Losses) -> None:
    """Record a slow layout by its largest overhead over an ideal layout."""
    fastest = best[0].step_time
    microbatches, ranks = candidate.num_microbatches, candidate.ranks
    spent = {
        "collectives of tensor parallelism": microbatches * max(r.collectives for r in ranks),
        "exchange of heads over context ranks": microbatches * max(r.exchanges for r in ranks),
        "reduction of gradients over the replicas": candidate.reduction_time,
    }
    mean = microbatches * sum(rank.work for rank in ranks) / len(ranks)
    idle = candidate.least_time - candidate.reduction_time - mean
    uneven = microbatches * max(rank.work for rank in ranks) - mean
    spent["busiest rank"] = uneven
    spent["pipeline bubble"] = idle - uneven
    cause = max(spent, key=lambda name: spent[name])
    times = candidate.least_time / fastest
    share = spent[cause] / candidate.least_time
    why = _explain(candidate, cause)
    text = f"take at least {times:.2f} x the best time, {share:.0%} of it {why}"
    lost["slow, " + cause].append(Loss(candidate.layout, text, times))


def _explain(candidate: Draft, cause: str) -> str:
    if cause != "busiest rank":
        return f"in the {cause}"
    fullest = max(candidate.ranks, key=lambda rank: rank.work)
    text = f"waiting for the busiest rank, which owns {list_blocks(fullest.blocks)}"
    text += " and the head" * (fullest.rank == candidate.placement.head)
    text += f": at most {candidate.efficiency:.0%} of the ranks' time is used"
    hot = len(fullest.blocks) == 1 and fullest.rank != candidate.placement.head
    return text + "; use tensor or data parallelism for its expensive block" * hot


def _join_families(lost: Losses) -> tuple[Family, ...]:
    """Return one family per reason, described by its best member."""
    families = []
    for members in lost.values():
        told = min(members, key=lambda loss: loss.size)
        families.append(Family(tuple(loss.layout for loss in members), told.reason))
    return tuple(families)


def _span(values: set[int]) -> str:
    """Format a set of values as "2" or "2 to 64"."""
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
