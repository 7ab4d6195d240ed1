"""What a layout would take: time, memory and bytes of one optimizer step, before anything runs.

Formulas only, nothing is measured. A stage takes its FLOPs over the rate that a rank attains, and
the collectives of tensor parallelism; the pipeline takes what the simulated order takes; gradients
are reduced over the replicas after it, not overlapped. Left out: the optimizer's own step, loading,
logging, and that W of frozen parameters is not run. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megarecur.config.load import validate
from megarecur.config.schema import Config, Loop
from megarecur.errors import MeshError, PlacementError
from megarecur.plan.cluster import Cluster, Link
from megarecur.plan.cost import (
    count_deferred_bytes,
    count_flops,
    count_head_flops,
    count_kept_bytes,
    count_logits,
    count_memory_bytes,
    count_memory_flops,
    count_rank,
    count_score_flops,
    count_step_bytes,
    count_step_flops,
    count_stream_bytes,
    count_tokens_per_step,
    deepest_map,
    element_bytes,
    estimate_memory,
    has_copy,
    parameter_bytes,
)
from megarecur.plan.placement import Placement, place
from megarecur.plan.simulate import (
    CLOSED_FORMS,
    Choice,
    Family,
    StageCost,
    Timeline,
    choose_order,
    lower_bound,
)
from megarecur.plan.walk import Stage, Walk, build_walk, cuts_for_v
from megarecur.recurrence.depth import is_sampled
from megarecur.recurrence.inventory import (
    ParameterSpec,
    build_inventory,
    is_frozen,
    is_with_embedding,
    uses_muon,
)
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

MOST_OPERATIONS = 3_000
"""Of one simulated order, where three rounds of one micro batch per rank are not more."""
FEW_OPERATIONS = 1_200
"""Up to so many, all kinds of orders are tried; beyond, only a closed form that suits the walk."""


class Layout(NamedTuple):
    """How a world of ranks is shared out."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int = 0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        zero = f", ZeRO {self.zero_stage}" if self.zero_stage else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}{zero}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one process sends in a step, by what they are for."""

    pipeline: int = 0
    """Activations and their gradients, between stages."""
    tensor: int = 0
    """Collectives inside steps of the map, of the embedding and of the head."""
    data: int = 0
    """Gradients over the replicas; parameters that ZeRO gathers."""
    tied: int = 0
    """The gradient of a tied embedding whose two ends live on two ranks."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.pipeline + self.tensor + self.data + self.tied


@dataclass(frozen=True, slots=True)
class RankState:
    """What one pipeline rank owns and does; sizes of one of its tensor-parallel processes."""

    rank: int
    blocks: tuple[int, ...]
    stages: tuple[int, ...]
    unique: int
    """Parameters that live here, whole: over the ranks they add up to the model's, once each."""
    parameters: int
    gradients: int
    moments: int
    copies: int
    workspace: int
    """For a moment: wide logits, one recomputed step, parameters that ZeRO 3 gathers."""
    work: float
    """Seconds of compute and collectives for one micro batch."""
    collectives: float
    """Seconds of it in collectives of tensor parallelism."""
    traffic: Traffic
    reduction: float
    """Seconds to reduce its gradients over the replicas."""

    @property
    def state(self) -> int:
        """Everything but activations."""
        return self.parameters + self.gradients + self.moments + self.copies + self.workspace


@dataclass(frozen=True)
class Draft:
    """A layout with all that is known of it before an order is simulated."""

    config: Config
    """With the layout in `parallel`."""
    cluster: Cluster
    layout: Layout
    placement: Placement
    walk: Walk
    costs: tuple[StageCost, ...]
    ranks: tuple[RankState, ...]
    tied_time: float
    deepest: tuple[Walk, tuple[StageCost, ...]] | None
    """Of the run's step that keeps most, where steps differ in depth."""

    @property
    def num_microbatches(self) -> int:
        """Of one replica and step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.layout.data)

    @property
    def reduction_time(self) -> float:
        """What follows the pipeline."""
        return max(rank.reduction for rank in self.ranks) + self.tied_time

    @property
    def efficiency(self) -> float:
        """At most attainable share of the ranks' time, as the fullest rank decides."""
        work = [rank.work for rank in self.ranks]
        return sum(work) / (len(work) * max(work))

    @property
    def least_time(self) -> float:
        """No order makes a shorter step."""
        split = self.config.parallel.split_backward
        bound = lower_bound(self.walk, self.costs, self.num_microbatches, split)
        return bound + self.reduction_time

    @property
    def least_memory(self) -> int:
        """No order takes less on the fullest rank: one micro batch goes through all stages of a
        rank before it comes back."""
        walk, costs = self.deepest or (self.walk, self.costs)
        kept = [0] * self.layout.pipeline
        for stage in walk:
            kept[stage.rank] += costs[stage.index].activation
        return max(r.state + k for r, k in zip(self.ranks, kept, strict=True))


@dataclass(frozen=True)
class Plan:
    """A layout and what it would take."""

    draft: Draft
    choice: Choice
    """The order, of `simulated` micro batches."""
    simulated: int
    pipeline_time: float
    """Of all micro batches: simulated, or what more of them add, extrapolated."""
    tried: Family | Literal["auto"]
    """Which orders; auto: all that suit."""
    activations: tuple[int, ...]
    """The peak of every pipeline rank, at the deepest step of the run."""
    step_time: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_time", self.pipeline_time + self.draft.reduction_time)

    @property
    def layout(self) -> Layout:
        """The draft's."""
        return self.draft.layout

    @property
    def bubble(self) -> float:
        """Idle share of the ranks' time in the pipeline."""
        work = sum(rank.work for rank in self.draft.ranks) * self.draft.num_microbatches
        return max(1.0 - work / (len(self.draft.ranks) * self.pipeline_time), 0.0)

    @property
    def memory(self) -> tuple[int, ...]:
        """Of every pipeline rank, all in all."""
        pairs = zip(self.draft.ranks, self.activations, strict=True)
        return tuple(rank.state + activations for rank, activations in pairs)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return max(self.memory) <= self.draft.cluster.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all replicas."""
        return count_tokens_per_step(self.draft.config) / self.step_time

    @property
    def mfu(self) -> float:
        """Share of the ranks' peak that the model's FLOPs are, recompute left out."""
        config, cluster = self.draft.config, self.draft.cluster
        flops = count_flops(config, build_map(config)).train * self.tokens_per_second
        return flops / (self.layout.world * cluster.peak(config.train.precision))


# --------------------------------------------------------------------------------------- layouts


def with_layout(config: Config, layout: Layout) -> Config:
    """The config on another mesh.

    Raises:
        ConfigError: the config's own checks refuse it.
    """
    values = config.model_dump()
    own = config.parallel
    sequence = own.sequence_parallel and layout.tensor > 1
    offload = own.offload_optimizer and layout.zero_stage in (1, 2)
    placement = own.placement if layout.pipeline == own.pipeline else None
    values["parallel"] |= {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "zero_stage": layout.zero_stage,
        "sequence_parallel": sequence,
        "offload_optimizer": offload,
        "placement": placement,
    }
    return validate(values, str(layout))


def check_batch(config: Config, data: int) -> None:
    """Refuse so many replicas as the batch does not divide among.

    Raises:
        MeshError: naming the numbers.
    """
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (data * micro):
        raise MeshError(
            f"train.global_batch_size={batch} does not divide into {data} replicas x "
            f"train.micro_batch_size={micro}; change one of them, or tensor or pipeline"
        )


def make_draft(
    config: Config, layout: Layout, cluster: Cluster, placement: Placement | None = None
) -> Draft:
    """Place a config's blocks on a layout and count what that costs.

    `config.model.vocab_size` must be resolved. A placement that is known need not be found again:
    it follows from the config and the number of pipeline ranks.

    Raises:
        ConfigError, MeshError, PlacementError: the layout does not suit the config.
    """
    check_batch(config, layout.data)
    config = with_layout(config, layout)
    steps = build_map(config)
    placement = placement or place(config, steps)
    walk = walk_over(config, steps, placement)
    costs = cost_stages(config, walk, layout, cluster)
    deepest = None
    if is_sampled(config.recurrence):
        longest = walk_over(config, deepest_map(config), placement)
        deepest = longest, cost_stages(config, longest, layout, cluster)
    ranks = count_ranks(config, layout, placement, walk, costs, cluster)
    tied = 0.0
    if ends_apart(config, placement):
        table = held([build_inventory(config)["embedding.weight"]], layout.tensor)
        link = _hop_link(placement.embedding, placement.head, layout, cluster)
        tied = link.reduce_time(table * parameter_bytes(config), 2)
    return Draft(config, cluster, layout, placement, walk, costs, ranks, tied, deepest)


def walk_over(config: Config, steps: LayerMap, placement: Placement) -> Walk:
    """The walk of a map of the config."""
    recurrence = config.recurrence
    fresh = isinstance(recurrence, Loop) and recurrence.initial_state != "prelude"
    parallel = config.parallel
    cuts: tuple[int, ...] = ()
    if parallel.split_backward and parallel.order in ("auto", "zbv"):
        cuts = cuts_for_v(steps, placement)
    return build_walk(steps, placement, cuts, fresh_core=fresh)


def ends_apart(config: Config, placement: Placement) -> bool:
    """Whether a tied embedding is needed on two ranks."""
    return config.ties_embeddings and placement.embedding != placement.head


def complete(draft: Draft, most_operations: int = MOST_OPERATIONS, squeeze: bool = True) -> Plan:
    """Choose the order of a draft, and what follows from it.

    Of many micro batches only so many are simulated as make about `most_operations`, three rounds
    of one per rank at least. The others take as long as those in the middle of the simulation.
    Where the fastest order does not fit, `squeeze` looks for the fastest one that does.
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
    return Plan(draft, choice, few, time, wanted, deepest.timeline.peak_bytes)


def count_simulated(draft: Draft, most_operations: int) -> int:
    """How many micro batches `complete` simulates."""
    ranks = draft.layout.pipeline
    rounds = most_operations // (3 * len(draft.walk) * ranks)
    return min(max(rounds, 3) * ranks, draft.num_microbatches)


def count_operations(draft: Draft) -> int:
    """Of the least that `complete` simulates for one order."""
    return 3 * len(draft.walk) * count_simulated(draft, most_operations=0)


def pick_family(draft: Draft) -> Family | Literal["auto"]:
    """The orders that `complete` tries: the config's, or of a long walk the best closed form."""
    parallel, walk = draft.config.parallel, draft.walk
    if parallel.order != "auto" or count_operations(draft) <= FEW_OPERATIONS:
        return parallel.order
    forms: tuple[Family, ...] = ("1f1b", "interleaved")
    if parallel.split_backward:
        forms = ("interleaved_zero_bubble", "zbv")
    return next((form for form in forms if CLOSED_FORMS[form].make(walk, 1) is not None), "auto")


def measure_pace(timeline: Timeline, num_microbatches: int, alone: float) -> float:
    """Seconds per micro batch that more of them would take.

    How long the busiest rank takes for the second third of its work; but no less than what a micro
    batch takes `alone` over how many are on their way at once, where they mostly wait for hops.
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
    """Most micro batches at once between their first forward and the end of their last backward
    pass, W left out."""
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    for ops in timeline.ranks:
        for (kind, _, microbatch), start, end in ops:
            if kind in ("F", "B", "I"):
                began[microbatch] = min(began.get(microbatch, start), start)
                ended[microbatch] = max(ended.get(microbatch, end), end)
    # At one time, ends come before beginnings.
    events = sorted([(t, 1) for t in began.values()] + [(t, -1) for t in ended.values()])
    count = most = 0
    for _, change in events:
        count += change
        most = max(most, count)
    return max(most, 1)


# ------------------------------------------------------------------------------------ the stages


def cost_stages(
    config: Config, walk: Walk, layout: Layout, cluster: Cluster
) -> tuple[StageCost, ...]:
    """Seconds and bytes of every stage and one micro batch."""
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    seconds = tokens / (layout.tensor * cluster.rate(config.train.precision))  # per FLOP and token
    link = cluster.link(layout.tensor, 1, layout.world)
    collective = link.reduce_time(collective_bytes(config), layout.tensor)
    ends = 2 * count_stream_bytes(config)
    memory, logits = estimate_memory(config, ()), _kept_logits(config)
    masked: set[int] = set()
    costs = []
    for stage, flops in zip(walk, count_stage_flops(config, walk), strict=True):
        forward = backward = 0
        if layout.tensor > 1:
            forward, backward = count_collectives(config, stage)
        activation = deferred = 0
        if stage.backward:
            activation = tokens * count_kept_bytes(config, stage.steps, config.train.recompute)
            deferred = tokens * count_deferred_bytes(config, stage.steps)
            if stage.last:
                # An exit keeps the hidden state alone.
                activation += tokens * (ends + len(stage.exits) * ends // 2) + logits
                activation += tokens * count_memory_bytes(config)
                deferred += tokens * ends // 2 + logits
            if stage.rank not in masked:  # The context of a micro batch outlives its stages.
                masked.add(stage.rank)
                activation += memory.mask
        costs.append(
            StageCost(
                forward=flops.forward * seconds + forward * collective,
                inputs=flops.inputs * seconds + backward * collective,
                weights=flops.weights * seconds,
                hop=_hop_time(config, walk, stage, layout, cluster),
                activation=activation,
                deferred=deferred,
            )
        )
    return tuple(costs)


class StageFlops(NamedTuple):
    """Of one token."""

    forward: int
    inputs: int
    """Backward of inputs; the scores' whole backward, and forward again under recompute."""
    weights: int


def count_stage_flops(config: Config, walk: Walk) -> list[StageFlops]:
    """FLOPs of every stage: its steps; in the last one the head, for the loss and for all exits,
    whose logits are made again in backward."""
    scores, head = count_score_flops(config), count_head_flops(config)
    each = iter(count_step_flops(config, tuple(step for stage in walk for step in stage.steps)))
    found = []
    for stage in walk:
        forward = inputs = weights = head * (stage.last + len(stage.exits))
        inputs += head * len(stage.exits)
        written = count_memory_flops(config) * stage.last
        forward, inputs, weights = forward + written, inputs + written, weights + written
        for step in stage.steps:
            flops = next(each)
            forward += flops
            if step.grad and stage.backward:
                inputs += flops + scores + (flops if config.train.recompute else 0)
                weights += flops - scores
        found.append(StageFlops(forward, inputs, weights))
    return found


def count_collectives(config: Config, stage: Stage) -> tuple[int, int]:
    """All-reduces of the residual stream over tensor-parallel ranks: (forward, backward).

    Two for every step and direction, a third where it reads a temporal memory, forward again under
    recompute; one where the cut embedding is summed, and one for the gradient that the cut head
    returns, for each exit too. Under sequence parallelism each is a gather and a scatter of as many
    bytes.
    """
    graded = sum(step.grad for step in stage.steps) if stage.backward else 0
    again = graded if config.train.recompute else 0
    each = 2 if config.temporal is None else 3
    backward = each * (graded + again) + stage.last + len(stage.exits)
    return each * len(stage.steps) + stage.first, backward


def collective_bytes(config: Config) -> int:
    """The residual stream of a micro batch, whole; with its share of what lies between the factors
    of adapters, which crosses once in the four collectives of a step of the map."""
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    channels = config.model.hidden_size + count_rank(config) // 4
    return tokens * channels * element_bytes(config)


def count_hop_bytes(config: Config, values: int) -> int:
    """What one process sends where the hidden state or other values of a micro batch, so many in
    all, go to another rank."""
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    return values * tokens * count_stream_bytes(config)


def _hop_time(config: Config, walk: Walk, stage: Stage, layout: Layout, cluster: Cluster) -> float:
    """From a stage to the next, or back."""
    if stage.last or walk[stage.index + 1].rank == stage.rank:
        return 0.0
    link = _hop_link(stage.rank, walk[stage.index + 1].rank, layout, cluster)
    return link.time(count_hop_bytes(config, 1 + len(stage.sends)))


def _hop_link(first: int, second: int, layout: Layout, cluster: Cluster) -> Link:
    """The slowest of all replicas' links between two pipeline ranks."""
    replica = layout.pipeline * layout.tensor
    for start in range(0, min(layout.data, cluster.ranks_per_node) * replica, replica):
        for tensor in range(layout.tensor):
            ends = (start + rank * layout.tensor + tensor for rank in (first, second))
            link = cluster.between(*ends)
            if link is cluster.network:
                return link
    return cluster.node


def _kept_logits(config: Config) -> int:
    """Bytes of a micro batch's logits, which become their own gradient."""
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    kept = count_logits(config, tokens) * element_bytes(config)
    return kept if config.model.logit_softcap is None else 2 * kept  # with tanh's output


# ------------------------------------------------------------------------------------- the ranks


def held(specs: Iterable[ParameterSpec], tensor: int) -> int:
    """Elements on the last tensor-parallel rank, whose shards are the largest."""
    return sum(math.prod(spec.part(tensor - 1, tensor)[1]) for spec in specs)


def owner(spec: ParameterSpec, placement: Placement) -> int:
    """The pipeline rank that a parameter lives on."""
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
    """What every pipeline rank owns, computes and sends."""
    inventory = build_inventory(config)
    by_rank: list[list[ParameterSpec]] = [[] for _ in range(layout.pipeline)]
    for spec in inventory.values():
        by_rank[owner(spec, placement)].append(spec)
    link = cluster.link(layout.data, layout.tensor * layout.pipeline, layout.world)
    inside = cluster.link(layout.tensor, 1, layout.world)
    collective = inside.reduce_time(collective_bytes(config), layout.tensor)
    ranks = []
    for rank, own in enumerate(by_rank):
        stages = tuple(stage for stage in walk if stage.rank == rank)
        copied = rank == placement.head and ends_apart(config, placement)
        specs = [*own, inventory["embedding.weight"]] if copied else own
        state = _count_state(config, specs, stages, layout)
        messages = _count_messages(config, walk, stages, layout)
        sent, seconds = _reduce(config, specs, layout, link)
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
                traffic=Traffic(*messages, sent, tied),
                reduction=seconds,
            )
        )
    return tuple(ranks)


def _count_state(
    config: Config, specs: list[ParameterSpec], stages: tuple[Stage, ...], layout: Layout
) -> dict[str, int]:
    """Bytes that stay on a rank, and those of a moment (as `cost.estimate_memory`)."""
    tensor, stage = layout.tensor, layout.zero_stage
    parts = [layout.data if stage >= first else 1 for first in range(4)]
    if layout.pipeline > 1:
        parts[2] = 1  # Gradients are summed over a whole order before they are reduced.
    wide, element = parameter_bytes(config), element_bytes(config)
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    trained = held(moving, tensor)
    muon = held((s for s in moving if uses_muon(config.optimizer, s.name, len(s.shape))), tensor)
    matrices = (s for s in specs if has_copy(s))
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    workspace = 0
    if config.train.recompute and any(step.grad for s in stages for step in s.steps):
        workspace += tokens * count_step_bytes(config)
    if any(s.last for s in stages):
        workspace += estimate_memory(config, ()).logits - _kept_logits(config)
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


def _count_messages(
    config: Config, walk: Walk, stages: tuple[Stage, ...], layout: Layout
) -> tuple[int, int]:
    """(pipeline, tensor) bytes that a process of a rank sends in a step."""
    train = config.train
    microbatches = train.global_batch_size // (train.micro_batch_size * layout.data)
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
    """(bytes sent by a process, seconds) to reduce gradients over the replicas, once a step.

    Shared out by ZeRO 1, gradients go one way and new parameters the other: as many bytes. Without
    a pipeline, ZeRO 2 reduces after every micro batch, and ZeRO 3 also gathers parameters for every
    forward and every backward pass.
    """
    wide, data = parameter_bytes(config), layout.data
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    gradients = held(moving, layout.tensor) * wide
    parameters = held(specs, layout.tensor) * wide
    train = config.train
    microbatches = train.global_batch_size // (train.micro_batch_size * data)
    reduced, gathered = 1, 1  # times
    if layout.zero_stage >= 2 and layout.pipeline == 1:
        reduced = microbatches
    if layout.zero_stage == 3:
        gathered = 2 * microbatches
    other = parameters if layout.zero_stage == 3 else gradients
    seconds = link.reduce_time(gradients, data) * reduced + link.reduce_time(other, data) * gathered
    ways = gradients * reduced + other * gathered
    return round(ways * (data - 1) / data), seconds / 2
