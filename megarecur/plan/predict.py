"""Predict the time, memory and traffic of one optimizer step of a layout before it runs.

Predictions come from formulas, not from a run. The time of a stage is that of its products, its
attention and its pointwise work, each at its own rate if the cluster has measured rates, plus the
collectives of tensor parallelism. Where an eager host starts operations more slowly than the device
runs them, the host decides. The time of the pipeline is that of the simulated order. Gradients are
reduced over the replicas afterwards, without overlap; the optimizer's step follows.

Not modelled: loading, logging, and that W of frozen parameters does not run. Times are in seconds,
sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megarecur.config.load import validate
from megarecur.config.mesh import batch_rule
from megarecur.config.recurrence import Loop
from megarecur.config.rules_attention import pick_backend
from megarecur.config.run import Config
from megarecur.errors import MeshError, PlacementError
from megarecur.plan.cluster import Cluster, Link
from megarecur.plan.cost import (
    Seen,
    chunk_tokens,
    count_deferred_bytes,
    count_end_bytes,
    count_exchanged_elements,
    count_flops,
    count_head_flops,
    count_kept_bytes,
    count_logits,
    count_memory_bytes,
    count_memory_flops,
    count_patch_bytes,
    count_patch_flops,
    count_rank,
    count_remade_bytes,
    count_score_flops,
    count_sharded,
    count_span,
    count_step_flops,
    count_stream_bytes,
    count_tokens_per_step,
    deepest_map,
    element_bytes,
    estimate_memory,
    has_copy,
    is_chunked,
    parameter_bytes,
    see_samples,
    vocab_shard,
)
from megarecur.plan.muon import cost_muon
from megarecur.plan.order import StageCost
from megarecur.plan.placement import Placement, place
from megarecur.plan.pointwise import (
    EAGER_LAUNCHES,
    FUSED_LAUNCHES,
    compiles,
    count_logit_bytes,
    count_pointwise_bytes,
)
from megarecur.plan.simulate import (
    CLOSED_FORMS,
    Choice,
    Family,
    Timeline,
    choose_order,
    lower_bound,
)
from megarecur.plan.walk import Stage, Walk, build_walk, cuts_for_v
from megarecur.recurrence.depth import Depth, count_depths, draws_depth
from megarecur.recurrence.inventory import (
    ParameterSpec,
    build_inventory,
    embedding_names,
    is_frozen,
    is_with_embedding,
    uses_muon,
)
from megarecur.recurrence.layer_map import ENCODER, LayerMap
from megarecur.recurrence.schemes import build_map
from megarecur.recurrence.stacks import list_stacks

MOST_OPERATIONS = 3_000
"""Maximum operations of one simulated order, if three rounds of one micro batch per rank need no
more."""
FEW_OPERATIONS = 1_200
"""Maximum operations for which all families of orders are tried; longer walks try only a closed
form."""


class Layout(NamedTuple):
    """The division of a world's ranks into tensor, pipeline, data and context parallelism."""

    tensor: int
    pipeline: int
    data: int
    """Number of replicas that read different samples."""
    zero_stage: int = 0
    context: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same part of the model."""
        return self.data * self.context

    def __str__(self) -> str:
        context = f" x context {self.context}" if self.context > 1 else ""
        zero = f", ZeRO {self.zero_stage}" if self.zero_stage else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}{context}{zero}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one process sends in a step, by purpose."""

    pipeline: int = 0
    """Activations and their gradients between stages."""
    tensor: int = 0
    """Collectives inside steps of the map, the embedding and the head."""
    data: int = 0
    """Gradients reduced over the replicas, and parameters that ZeRO gathers."""
    tied: int = 0
    """The gradient of a tied embedding whose two ends are on two ranks."""
    context: int = 0
    """Heads and positions that attention exchanges."""
    muon: int = 0
    """Parts of matrices sent to their owners, and of the orthogonalized ones sent back."""

    @property
    def total(self) -> int:
        """Bytes of all purposes."""
        named = (self.pipeline, self.tensor, self.data, self.tied, self.context, self.muon)
        return sum(named)


@dataclass(frozen=True, slots=True)
class RankState:
    """The parameters and work of one pipeline rank; sizes are those of one of its tensor-parallel
    processes."""

    rank: int
    blocks: tuple[int, ...]
    stages: tuple[int, ...]
    unique: int
    """Whole parameters owned by this rank; summed over the ranks, they are the model's, each
    once."""
    parameters: int
    gradients: int
    moments: int
    copies: int
    workspace: int
    """Temporary bytes: wide logits, one recomputed step, parameters that ZeRO 3 gathers."""
    work: float
    """Seconds of compute and collectives for one micro batch."""
    collectives: float
    """Seconds of `work` spent in collectives of tensor parallelism."""
    exchanges: float
    """Seconds of `work` spent in exchanges of heads over context ranks."""
    traffic: Traffic
    reduction: float
    """Seconds to reduce the rank's gradients over the replicas."""
    update: float
    """Seconds of clipping and the optimizer's step; pointwise work takes 0 without measured
    rates."""

    @property
    def state(self) -> int:
        """Bytes of everything except activations."""
        return self.parameters + self.gradients + self.moments + self.copies + self.workspace


@dataclass(frozen=True)
class Draft:
    """A layout with everything known before an order is simulated."""

    config: Config
    """The config with the layout in `parallel`."""
    cluster: Cluster
    layout: Layout
    placement: Placement
    walk: Walk
    costs: tuple[StageCost, ...]
    ranks: tuple[RankState, ...]
    tied_time: float
    deepest: tuple[Walk, tuple[StageCost, ...]] | None
    """Walk and costs of the run's step that keeps most, if steps differ in depth."""
    seen: Seen
    """Keys that queries see."""

    @property
    def num_microbatches(self) -> int:
        """Number of micro batches of one replica and step."""
        return count_microbatches(self.config, self.layout)

    @property
    def reduction_time(self) -> float:
        """Seconds of the longest gradient reduction, after the pipeline."""
        return max(rank.reduction for rank in self.ranks) + self.tied_time

    @property
    def update_time(self) -> float:
        """Seconds of the longest optimizer step, after the reduction."""
        return max(rank.update for rank in self.ranks)

    @property
    def efficiency(self) -> float:
        """Upper bound on the used share of the ranks' time, set by the busiest rank."""
        work = [rank.work for rank in self.ranks]
        return sum(work) / (len(work) * max(work))

    @property
    def least_time(self) -> float:
        """Lower bound on the seconds of a step, over all orders."""
        split = self.config.parallel.split_backward
        bound = lower_bound(self.walk, self.costs, self.num_microbatches, split)
        return bound + self.reduction_time + self.update_time

    @property
    def least_memory(self) -> int:
        """Lower bound on the peak memory per rank, over all orders: one micro batch passes all
        stages of a rank before it comes back."""
        walk, costs = self.deepest or (self.walk, self.costs)
        kept = [0] * self.layout.pipeline
        for stage in walk:
            kept[stage.rank] += costs[stage.index].activation
        return max(r.state + k for r, k in zip(self.ranks, kept, strict=True))


@dataclass(frozen=True)
class LayoutPlan:
    """A layout with its predicted time and memory."""

    draft: Draft
    choice: Choice
    """The order of `simulated` micro batches."""
    simulated: int
    pipeline_time: float
    """Seconds for all micro batches: simulated, or extrapolated from the simulated ones."""
    tried: Family | Literal["auto"]
    """The family of orders tried; auto means all that suit."""
    activations: tuple[int, ...]
    """Peak activation bytes of every pipeline rank, at the deepest step of the run."""
    step_time: float = field(init=False)

    def __post_init__(self) -> None:
        after = self.draft.reduction_time + self.draft.update_time
        object.__setattr__(self, "step_time", self.pipeline_time + after)

    @property
    def layout(self) -> Layout:
        """The draft's layout."""
        return self.draft.layout

    @property
    def bubble(self) -> float:
        """Idle share of the ranks' time in the pipeline."""
        work = sum(rank.work for rank in self.draft.ranks) * self.draft.num_microbatches
        return max(1.0 - work / (len(self.draft.ranks) * self.pipeline_time), 0.0)

    @property
    def memory(self) -> tuple[int, ...]:
        """Total bytes of every pipeline rank."""
        pairs = zip(self.draft.ranks, self.activations, strict=True)
        return tuple(rank.state + activations for rank, activations in pairs)

    @property
    def fits(self) -> bool:
        """True if every rank has enough memory."""
        return max(self.memory) <= self.draft.cluster.memory

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all replicas."""
        return count_tokens_per_step(self.draft.config) / self.step_time

    @property
    def mfu(self) -> float:
        """Model FLOPs as a share of the ranks' peak; recompute, and attention beyond what documents
        and windows need, are excluded."""
        config, cluster = self.draft.config, self.draft.cluster
        steps = build_map(config)
        flops = count_flops(config, steps, self.draft.seen).train * self.tokens_per_second
        return flops / (self.layout.world * cluster.peak(config.train.precision))


# --------------------------------------------------------------------------------------- layouts


def count_microbatches(config: Config, layout: Layout) -> int:
    """Return the number of micro batches of one replica and step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * layout.data)


def with_layout(config: Config, layout: Layout) -> Config:
    """Return the config with another mesh.

    Raises:
        ConfigError: the config's own checks reject it.
    """
    values = config.model_dump()
    own = config.parallel
    sequence = own.sequence_parallel and layout.tensor > 1
    offload = own.offload_optimizer and layout.zero_stage in (1, 2)
    placement = own.placement if layout.pipeline == own.pipeline else None
    values["parallel"] |= {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "zero_stage": layout.zero_stage,
        "sequence_parallel": sequence,
        "offload_optimizer": offload,
        "shard_group": own.shard_group if layout.zero_stage else None,
        "gathered_blocks": own.gathered_blocks if layout.zero_stage == 3 else None,
        "placement": placement,
    }
    return validate(values, str(layout))


def make_draft(
    config: Config,
    layout: Layout,
    cluster: Cluster,
    placement: Placement | None = None,
    seen: Seen | None = None,
) -> Draft:
    """Place a config's blocks on a layout and count what that costs.

    Args:
        config: with `model.vocab_size` resolved.
        layout: division of the ranks.
        cluster: their hardware.
        placement: if known, which saves time: it depends only on the config and the number of
            pipeline ranks.
        seen: keys that queries see; None: those of samples that are one document each.

    Raises:
        ConfigError, MeshError, PlacementError: the layout does not suit the config.
    """
    if message := batch_rule(lambda _: layout.data).explain(config):
        raise MeshError(message)
    config = with_layout(config, layout)
    steps = build_map(config)
    placement = placement or place(config, steps)
    walk = walk_over(config, steps, placement)
    seen = seen or see_samples(config)
    costs = cost_stages(config, walk, layout, cluster, seen)
    deepest = None
    if draws_depth(config):
        longest = walk_over(config, deepest_map(config), placement)
        deepest = longest, cost_stages(config, longest, layout, cluster, seen)
    ranks = count_ranks(config, layout, placement, walk, costs, cluster)
    tied = 0.0
    if ends_apart(config, placement):
        table = held([build_inventory(config)["embedding.weight"]], layout.tensor)
        link = _hop_link(placement.embedding, placement.head, layout, cluster)
        tied = link.reduce_time(table * parameter_bytes(config), 2)
    return Draft(config, cluster, layout, placement, walk, costs, ranks, tied, deepest, seen)


def walk_over(config: Config, steps: LayerMap, placement: Placement) -> Walk:
    """Return the walk of a map of the config."""
    parallel = config.parallel
    cuts: tuple[int, ...] = ()
    halts = any(stack.config.halting is not None for stack in list_stacks(config))
    if parallel.split_backward and parallel.order in ("auto", "zbv") and not halts:
        cuts = cuts_for_v(steps, placement)  # A pass that halts is never cut.
    return build_walk(steps, placement, cuts, find_fresh(config))


def find_fresh(config: Config) -> tuple[str, ...]:
    """Return the values whose writers start from a state of their own (`build_walk`)."""
    schemes = {"prelude": config.recurrence, f"{ENCODER}.prelude": config.encoder}
    return tuple(
        name
        for name, scheme in schemes.items()
        if isinstance(scheme, Loop) and scheme.initial_state != "prelude"
    )


def list_walks(config: Config, placement: Placement) -> Iterator[Walk]:
    """Yield the walk of every depth that a run may draw."""
    depths: list[Depth | None] = [None]
    if draws_depth(config):
        depths += list(count_depths(config))
    for depth in depths:
        yield walk_over(config, build_map(config, depth), placement)


def ends_apart(config: Config, placement: Placement) -> bool:
    """Return True if a tied embedding is needed on two ranks."""
    return config.ties_embeddings and placement.embedding != placement.head


def complete(
    draft: Draft, most_operations: int = MOST_OPERATIONS, squeeze: bool = True
) -> LayoutPlan:
    """Choose the order of a draft and derive the plan from it.

    Simulates about `most_operations` operations, and at least three rounds of one micro batch per
    rank. The time of further micro batches is extrapolated from the middle of the simulation. If
    the fastest order does not fit, `squeeze` searches for the fastest one that does.
    """
    few, wanted = count_simulated(draft, most_operations), pick_family(draft)
    room = tuple(draft.cluster.memory - rank.state for rank in draft.ranks)

    def choose(walk: Walk, costs: tuple[StageCost, ...]) -> Choice:
        split = draft.config.parallel.split_backward
        fastest = choose_order(walk, few, costs, split=split, wanted=wanted)
        peaks = fastest.timeline.peak_bytes
        fits = all(peak <= cap for peak, cap in zip(peaks, room, strict=True))
        if fits or not squeeze or wanted not in ("auto", "greedy"):
            return fastest
        try:
            return choose_order(walk, few, costs, memory_cap=room, split=split, wanted=wanted)
        except PlacementError:
            return fastest

    choice = choose(draft.walk, draft.costs)
    more = draft.num_microbatches - few
    alone = lower_bound(draft.walk, draft.costs, 1, draft.config.parallel.split_backward)
    time = choice.timeline.makespan + more * measure_pace(choice.timeline, few, alone)
    deepest = choice
    if draft.deepest is not None:
        deepest = choose(*draft.deepest)
    return LayoutPlan(draft, choice, few, time, wanted, deepest.timeline.peak_bytes)


def count_simulated(draft: Draft, most_operations: int) -> int:
    """Return how many micro batches `complete` simulates."""
    ranks = draft.layout.pipeline
    rounds = most_operations // (3 * len(draft.walk) * ranks)
    return min(max(rounds, 3) * ranks, draft.num_microbatches)


def count_operations(draft: Draft) -> int:
    """Return the least number of operations that `complete` simulates for one order."""
    return 3 * len(draft.walk) * count_simulated(draft, most_operations=0)


def pick_family(draft: Draft) -> Family | Literal["auto"]:
    """Return the orders that `complete` tries: the config's, or for a long walk the best closed
    form."""
    parallel, walk = draft.config.parallel, draft.walk
    if parallel.order != "auto" or count_operations(draft) <= FEW_OPERATIONS:
        return parallel.order
    forms: tuple[Family, ...] = ("1f1b", "interleaved")
    if parallel.split_backward:
        forms = ("interleaved_zero_bubble", "zbv")
    return next((form for form in forms if CLOSED_FORMS[form].make(walk, 1) is not None), "auto")


def measure_pace(timeline: Timeline, num_microbatches: int, alone: float) -> float:
    """Return the seconds per additional micro batch.

    This is the pace of the busiest rank in the second third of its work, but at least the time of a
    micro batch `alone` over the number in flight, which matters if they mostly wait for hops.
    """
    rank = max(range(len(timeline.ranks)), key=lambda rank: timeline.busy[rank])
    done, marks = 0.0, [(0.0, 0.0)]  # (work, clock)
    for op, start, end in timeline.ranks[rank]:
        if op.kind in ("F", "B", "I", "W"):
            done += end - start
            marks.append((done, end))
    (first, began), (last, ended) = (
        next(mark for mark in marks if mark[0] >= share * done * (1 - 1e-9))
        for share in (1 / 3, 2 / 3)
    )
    pace = done / num_microbatches
    if last > first:
        pace *= (ended - began) / (last - first)
    return max(pace, alone / count_in_flight(timeline))


def count_in_flight(timeline: Timeline) -> int:
    """Return the maximum number of micro batches between their first forward and the end of their
    last backward pass, W excluded."""
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    for ops in timeline.ranks:
        for (kind, _, microbatch), start, end in ops:
            if kind in ("F", "B", "I"):
                began[microbatch] = min(began.get(microbatch, start), start)
                ended[microbatch] = max(ended.get(microbatch, end), end)
    # At equal times, ends come before starts.
    events = sorted([(t, 1) for t in began.values()] + [(t, -1) for t in ended.values()])
    count = most = 0
    for _, change in events:
        count += change
        most = max(most, count)
    return max(most, 1)


# ------------------------------------------------------------------------------------ the stages


def cost_stages(
    config: Config, walk: Walk, layout: Layout, cluster: Cluster, seen: Seen | None = None
) -> tuple[StageCost, ...]:
    """Return the seconds and bytes of every stage for one micro batch."""
    tokens = config.tokens_per_rank
    times = time_stages(config, walk, layout, cluster, seen or see_samples(config))
    link = cluster.link(layout.tensor, 1, layout.world)
    collective = link.reduce_time(collective_bytes(config), layout.tensor)
    exchange = time_exchange(config, layout, cluster)
    stream, ends = count_stream_bytes(config), count_end_bytes(config)
    memory, logits = estimate_memory(config, ()), _kept_logits(config)
    masked: set[int] = set()
    costs = []
    for stage, time in zip(walk, times, strict=True):
        forward = backward = 0
        if layout.tensor > 1:
            forward, backward = count_collectives(config, stage)
        exchanged = [count * exchange for count in count_exchanges(config, stage)]
        activation = deferred = 0
        if stage.backward:
            activation = tokens * count_kept_bytes(config, stage.steps)
            deferred = tokens * count_deferred_bytes(config, stage.steps)
            if stage.first:
                activation += tokens * count_patch_bytes(config)
            if stage.last:
                # An exit keeps only the hidden state.
                activation += tokens * (ends + len(stage.exits) * stream) + logits
                activation += tokens * count_memory_bytes(config)
                deferred += tokens * stream + logits
            if stage.rank not in masked:  # The context of a micro batch outlives its stages.
                masked.add(stage.rank)
                activation += memory.mask
        costs.append(
            StageCost(
                forward=time.forward + forward * collective + exchanged[0],
                inputs=time.inputs + backward * collective + exchanged[1],
                weights=time.weights,
                hop=_hop_time(config, walk, stage, layout, cluster),
                activation=activation,
                deferred=deferred,
            )
        )
    return tuple(costs)


class StageTime(NamedTuple):
    """Seconds of one stage for one micro batch, collectives excluded."""

    forward: float
    inputs: float
    weights: float


class StageFlops(NamedTuple):
    """FLOPs of one stage per token: of products, then of attention scores."""

    forward: int
    inputs: int
    """Backward pass of the inputs, and under recompute forward."""
    weights: int
    forward_scores: int
    inputs_scores: int
    """The whole backward of the scores, and under recompute forward."""


def count_stage_flops(config: Config, walk: Walk, seen: Seen | None = None) -> list[StageFlops]:
    """Return the FLOPs of every stage: its steps, and in the last one the head, for the loss and
    all exits, whose logits are recomputed in backward."""
    seen, head = seen or see_samples(config), count_head_flops(config)
    steps = tuple(step for stage in walk for step in stage.steps)
    each = iter(count_step_flops(config, steps, seen))
    found = []
    for stage in walk:
        forward = inputs = weights = head * (stage.last + len(stage.exits))
        inputs += head * (len(stage.exits) + (stage.last and is_chunked(config)))
        written = count_memory_flops(config) * stage.last
        forward, inputs, weights = forward + written, inputs + written, weights + written
        cut = count_patch_flops(config) * stage.first  # Pixels need no gradient.
        forward, weights = forward + cut, weights + cut
        forward_scores = inputs_scores = 0
        for step in stage.steps:
            scores = count_score_flops(config, step, seen)
            products = next(each) - scores
            forward, forward_scores = forward + products, forward_scores + scores
            if step.grad and stage.backward:
                times = 1 + config.train.recomputes(step.loop_index)
                inputs += products * times
                inputs_scores += scores * (1 + times)
                weights += products
        found.append(StageFlops(forward, inputs, weights, forward_scores, inputs_scores))
    return found


def time_stages(
    config: Config, walk: Walk, layout: Layout, cluster: Cluster, seen: Seen
) -> list[StageTime]:
    """Return the seconds of every stage: products and attention at their rates, pointwise work at
    the memory's; at least the time in which the host starts the operations."""
    tokens = config.tokens_per_rank
    fused = compiles(config, cluster.device)
    of_products = tokens * product_seconds(config, layout, cluster)
    of_scores = tokens * score_seconds(config, layout, cluster, seen)
    stream = tokens * config.model.hidden_size * element_bytes(config)
    # A CPU's fused kernels took as long as eager passes: arithmetic bounds them there.
    work = [tokens * n for n in count_pointwise_bytes(config, fused and cluster.device == "cuda")]
    passes = [cluster.pointwise_time(n, stream) for n in work]
    logits = count_logits(config, tokens) * element_bytes(config)
    all_logits = 0 if config.classifies else tokens * vocab_shard(config)
    losses = [cluster.pointwise_time(all_logits * n, logits) for n in count_logit_bytes(config)]
    launch = cluster.rates.launch_us * 1e-6 if cluster.rates else 0.0
    starts = [launch * count for count in (FUSED_LAUNCHES if fused else EAGER_LAUNCHES)]
    found = []
    for stage, flops in zip(walk, count_stage_flops(config, walk, seen), strict=True):
        graded = [step for step in stage.steps if step.grad and stage.backward]
        again = sum(config.train.recomputes(step.loop_index) for step in graded)
        remade = len(graded) if config.train.recompute == "selective" else again
        heads = stage.last + len(stage.exits)
        forward = flops.forward * of_products + flops.forward_scores * of_scores
        forward += len(stage.steps) * passes[0] + heads * losses[0]
        inputs = flops.inputs * of_products + flops.inputs_scores * of_scores
        inputs += len(graded) * passes[1] + remade * passes[0] + heads * losses[1]
        least = len(graded) * starts[1] + again * starts[0]  # weights are products of the same
        weights = flops.weights * of_products
        inputs = max(inputs, least - weights)
        found.append(StageTime(max(forward, len(stage.steps) * starts[0]), inputs, weights))
    return found


def product_seconds(config: Config, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds per FLOP and token of the model's products, every matrix counted once."""
    precision, tokens = config.train.precision, config.tokens_per_rank
    matrices = [
        (tokens, spec.size)
        for spec in build_inventory(config).values()
        if spec.block is not None and len(spec.shape) == 2
    ]
    if not config.classifies:
        logits = config.model.hidden_size * vocab_shard(config) * layout.tensor
        matrices.append((chunk_tokens(tokens, vocab_shard(config)), logits))
    seconds = flops = 0.0
    for rows, size in matrices:
        side = (rows * size / layout.tensor) ** (1 / 3)
        flops += size
        seconds += size / layout.tensor / cluster.product_rate(precision, side)
    return seconds / flops


def score_seconds(config: Config, layout: Layout, cluster: Cluster, seen: Seen) -> float:
    """Return the seconds per FLOP and token of attention that queries need. A backend that masks
    computes all pairs of a sample for them."""
    backend, precision = pick_backend(config, cluster.device), config.train.precision
    span = count_span(config)
    masks = backend == "dense" and cluster.rates is not None
    tokens = span if masks else max(2 * seen.full - 1, 1) if config.model.causal else seen.full
    seconds = 1.0 / (layout.tensor * cluster.attention_rate(backend, precision, tokens))
    return seconds * span / seen.full if masks else seconds


def count_collectives(config: Config, stage: Stage) -> tuple[int, int]:
    """Return the all-reduces of the residual stream over tensor-parallel ranks: (forward,
    backward).

    Counts two for every step and direction, a third if it attends to a temporal memory or to an
    encoder, and the forward ones again under recompute; one for the sum of each cut embedding, and
    one for the gradient that the cut head returns, also for each exit. Under sequence parallelism
    each is a gather and a scatter of the same number of bytes, and backward gathers inputs again:
    half of one for each in a step.
    """
    reads_more = config.temporal is not None
    each = [2 + (reads_more or ENCODER in step.reads) for step in stage.steps]
    backward = stage.last + len(stage.exits)
    for step, count in zip(stage.steps, each, strict=True):
        if step.grad and stage.backward:
            backward += count * (2 if config.train.recomputes(step.loop_index) else 1)
            backward += count // 2 if config.parallel.sequence_parallel else 0
    embeddings = 0 if config.reads_images else len(embedding_names(config))
    return sum(each) + stage.first * embeddings, backward


def count_exchanges(config: Config, stage: Stage) -> tuple[int, int]:
    """Return how often attention exchanges heads over context ranks, there and back: (forward,
    backward); the forward ones again under recompute."""
    graded = [step for step in stage.steps if step.grad and stage.backward]
    again = sum(config.train.recomputes(step.loop_index) for step in graded)
    return len(stage.steps), len(graded) + again


def exchange_bytes(config: Config) -> int:
    """Return the bytes that a context rank sends in one exchange, there and back."""
    context = config.parallel.context
    whole = config.tokens_per_rank * count_exchanged_elements(config) * element_bytes(config)
    return whole * (context - 1) // context


def time_exchange(config: Config, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds of one exchange, there and back; 0 without context parallelism."""
    if layout.context == 1:
        return 0.0
    link = cluster.link(layout.context, layout.tensor * layout.pipeline, layout.world)
    return link.latency_us * 1e-6 + link.time(exchange_bytes(config))


def collective_bytes(config: Config) -> int:
    """Return the bytes of a micro batch's residual stream on a context rank, plus the share of the
    values between adapter factors, which are sent once in the four collectives of a step of the
    map."""
    tokens = config.tokens_per_rank
    ranks = [count_rank(stack.config) for stack in list_stacks(config)]
    channels = config.model.hidden_size + max(ranks) // 4
    return tokens * channels * element_bytes(config)


def count_hop_bytes(config: Config, values: int) -> int:
    """Return the bytes one process sends when `values` hidden states or other values of a micro
    batch move to another rank."""
    tokens = config.tokens_per_rank
    return values * tokens * count_stream_bytes(config)


def _hop_time(config: Config, walk: Walk, stage: Stage, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds from a stage to the next, or back."""
    if stage.last or walk[stage.index + 1].rank == stage.rank:
        return 0.0
    link = _hop_link(stage.rank, walk[stage.index + 1].rank, layout, cluster)
    return link.time(count_hop_bytes(config, 1 + len(stage.sends)))


def _hop_link(first: int, second: int, layout: Layout, cluster: Cluster) -> Link:
    """Return the slowest link between two pipeline ranks over all replicas."""
    replica = layout.pipeline * layout.tensor
    for start in range(0, min(layout.copies, cluster.ranks_per_node) * replica, replica):
        for tensor in range(layout.tensor):
            ends = (start + rank * layout.tensor + tensor for rank in (first, second))
            link = cluster.between(*ends)
            if link is cluster.network:
                return link
    return cluster.node


def _kept_logits(config: Config) -> int:
    """Return the bytes of a micro batch's logits, which are reused for their gradient; 0 if they
    are computed in chunks, which nothing keeps."""
    if is_chunked(config):
        return 0
    tokens = config.tokens_per_rank
    kept = count_logits(config, tokens) * element_bytes(config)
    return kept if config.model.logit_softcap is None else 2 * kept  # and tanh's output


# ------------------------------------------------------------------------------------- the ranks


def held(specs: Iterable[ParameterSpec], tensor: int) -> int:
    """Return the elements on the last tensor-parallel rank, which has the largest shards."""
    return sum(math.prod(spec.part(tensor - 1, tensor)[1]) for spec in specs)


def owner(spec: ParameterSpec, placement: Placement) -> int:
    """Return the pipeline rank that owns a parameter."""
    if spec.block is not None:
        return placement.owners[spec.block]
    return placement.embedding if is_with_embedding(spec.name) else placement.head


def count_ranks(
    config: Config,
    layout: Layout,
    placement: Placement,
    walk: Walk,
    costs: tuple[StageCost, ...],
    cluster: Cluster,
) -> tuple[RankState, ...]:
    """Return what every pipeline rank owns, computes and sends."""
    inventory = build_inventory(config)
    by_rank: list[list[ParameterSpec]] = [[] for _ in range(layout.pipeline)]
    for spec in inventory.values():
        by_rank[owner(spec, placement)].append(spec)
    link = cluster.link(layout.copies, layout.tensor * layout.pipeline, layout.world)
    inside = cluster.link(layout.tensor, 1, layout.world)
    collective = inside.reduce_time(collective_bytes(config), layout.tensor)
    exchange = time_exchange(config, layout, cluster)
    ranks = []
    for rank, own in enumerate(by_rank):
        stages = tuple(stage for stage in walk if stage.rank == rank)
        copied = rank == placement.head and ends_apart(config, placement)
        specs = [*own, inventory["embedding.weight"]] if copied else own
        state = _count_state(config, specs, stages, layout)
        messages = _count_messages(config, walk, stages, layout)
        exchanges = sum(sum(count_exchanges(config, stage)) for stage in stages)
        exchanged = exchanges * count_microbatches(config, layout) * exchange_bytes(config)
        sent, seconds = _reduce(config, specs, layout, link)
        muon = cost_muon(config, specs, *_muon_peers(config, layout, cluster), cluster)
        trained = held((s for s in specs if not is_frozen(config.optimizer, s.name)), layout.tensor)
        tied = 0
        if ends_apart(config, placement) and rank in (placement.embedding, placement.head):
            tied = held([inventory["embedding.weight"]], layout.tensor) * parameter_bytes(config)
        work = sum(
            costs[s.index].forward + costs[s.index].inputs + costs[s.index].weights for s in stages
        )
        ranks.append(
            RankState(
                rank=rank,
                blocks=placement.blocks(rank),
                stages=tuple(stage.index for stage in stages),
                unique=sum(spec.size for spec in own),
                **state,
                work=work,
                collectives=sum(sum(count_collectives(config, s)) for s in stages) * collective,
                exchanges=exchanges * exchange,
                traffic=Traffic(*messages, sent, tied, exchanged, muon.sent),
                reduction=seconds,
                update=_update_time(config, trained, layout, cluster) + muon.seconds,
            )
        )
    return tuple(ranks)


def _count_state(
    config: Config, specs: list[ParameterSpec], stages: tuple[Stage, ...], layout: Layout
) -> dict[str, int]:
    """Return the bytes that a rank keeps, and its temporary bytes (like `cost.estimate_memory`)."""
    tensor, stage = layout.tensor, layout.zero_stage
    parts = [layout.copies if stage >= first else 1 for first in range(4)]
    if layout.pipeline > 1:
        parts[2] = 1  # Gradients are summed over a whole order before they are reduced.
    wide, element = parameter_bytes(config), element_bytes(config)
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    trained = held(moving, tensor)
    muon = held((s for s in moving if uses_muon(config.optimizer, s.name, len(s.shape))), tensor)
    matrices = (s for s in specs if has_copy(s))
    tokens = config.tokens_per_rank
    workspace = 0
    workspace += tokens * count_remade_bytes(config, tuple(t for s in stages for t in s.steps))
    if any(s.last for s in stages):
        workspace += estimate_memory(config, ()).logits - _kept_logits(config)
    steps = tuple(step for s in stages for step in s.steps)
    if config.parallel.shards_natively:
        state = count_sharded(config, specs, steps, layout.copies)
        workspace += state.pop("gathered")
        return {**state, "workspace": workspace}
    if parts[3] > 1:
        workspace += held(specs, tensor) * wide
    offload = config.parallel.offload_optimizer
    return {
        "parameters": -(-held(specs, tensor) // parts[3]) * wide,
        "gradients": -(-trained // parts[2]) * wide,
        "moments": 0 if offload else -(-(2 * trained - muon) // parts[1]) * wide,
        "copies": held(matrices, tensor) * element if element < wide else 0,
        "workspace": workspace,
    }


UPDATE_PASSES = 10
"""Passes over a rank's parameters after backward: the norm of gradients, AdamW (reads 4 tensors,
writes 3), zeroing gradients, the copy in the compute dtype."""


def _update_time(config: Config, trained: int, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds of clipping and the optimizer's step over `trained` elements, which ZeRO
    shards over the replicas; an offloaded one is not modelled apart."""
    elements = trained / (layout.copies if layout.zero_stage else 1)
    size = elements * parameter_bytes(config)
    return cluster.pointwise_time(UPDATE_PASSES * size, size)


def _muon_peers(config: Config, layout: Layout, cluster: Cluster) -> tuple[int, Link]:
    """Return the number of ranks that hold parts of the same matrices, and their slowest link."""
    copies = (config.parallel.shard_group or layout.copies) if layout.zero_stage else 1
    stride = layout.tensor * layout.pipeline if copies > 1 else 1
    peers = layout.tensor * copies
    return peers, cluster.link(copies if copies > 1 else layout.tensor, stride, layout.world)


def _count_messages(
    config: Config, walk: Walk, stages: tuple[Stage, ...], layout: Layout
) -> tuple[int, int]:
    """Return the (pipeline, tensor) bytes that a process of a rank sends in a step."""
    microbatches = count_microbatches(config, layout)
    hops = collectives = 0
    for stage in stages:
        if not stage.last and walk[stage.index + 1].rank != stage.rank:
            hops += 1 + len(stage.sends)
        if stage.sends_back and walk[stage.index - 1].rank != stage.rank:
            hops += stage.returns_x + len(stage.returns)
        collectives += sum(count_collectives(config, stage))
    share = 2 * (layout.tensor - 1) / layout.tensor
    return (
        microbatches * count_hop_bytes(config, hops),
        round(microbatches * collectives * share * collective_bytes(config)),
    )


def _reduce(
    config: Config, specs: list[ParameterSpec], layout: Layout, link: Link
) -> tuple[int, float]:
    """Return (bytes sent by a process, seconds) of reducing gradients over the replicas, once a
    step.

    Under ZeRO 1, gradients are scattered and new parameters gathered. Without a pipeline, ZeRO 2
    reduces after every micro batch, and ZeRO 3 also gathers parameters for every forward and every
    backward pass. Native sharding gathers in the compute dtype.
    """
    wide, data = parameter_bytes(config), layout.copies
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    gradients = held(moving, layout.tensor) * wide
    parameters = held(specs, layout.tensor) * wide
    microbatches = count_microbatches(config, layout)
    reduced, gathered = 1, 1  # how often each is sent per step
    if layout.zero_stage >= 2 and layout.pipeline == 1:
        reduced = microbatches
    if layout.zero_stage == 3 and layout.pipeline == 1:
        gathered = 2 * microbatches
    other = parameters if layout.zero_stage == 3 else gradients
    if config.parallel.shards_natively:
        matrices = held((spec for spec in specs if has_copy(spec)), layout.tensor)
        other = matrices * element_bytes(config)
    if config.parallel.reduce_dtype == "bf16":
        gradients //= wide // 2
    seconds = link.reduce_time(gradients, data) * reduced + link.reduce_time(other, data) * gathered
    ways = gradients * reduced + other * gathered
    return round(ways * (data - 1) / data), seconds / 2
