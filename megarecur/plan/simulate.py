"""What an order takes: time, bubbles and memory, from the costs of the stages; and the best one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

from megarecur.errors import ConfigError, PlacementError
from megarecur.plan.generate import (
    greedy,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    zbv,
)
from megarecur.plan.order import (
    Computes,
    Kind,
    Op,
    Order,
    add_messages,
    count_ranks,
    find_partner,
    validate_order,
)
from megarecur.plan.walk import Walk


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage and one micro batch; times in any one unit, sizes in bytes."""

    forward: float
    inputs: float
    """Backward pass of the inputs (I), recompute included."""
    weights: float
    """Of the weights (W). A whole backward (B) takes both."""
    hop: float = 0.0
    """For the activations to reach the next stage, or their gradient to come back."""
    activation: int = 0
    """Kept from F until B or I has run."""
    deferred: int = 0
    """Kept from I until W has run."""

    def duration(self, kind: Kind) -> float:
        """Of F, B, I or W; messages take none of their rank's time."""
        if kind == "B":
            return self.inputs + self.weights
        return {"F": self.forward, "I": self.inputs, "W": self.weights}.get(kind, 0.0)


class Timed(NamedTuple):
    """An operation and when it ran."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step, by pipeline rank."""

    ranks: tuple[tuple[Timed, ...], ...]
    """All operations. A send takes no time; a receive lasts from when its rank comes to it until
    the message is there, while the rank goes on to what does not need it."""
    makespan: float
    busy: tuple[float, ...]
    """Time spent in F, B, I and W."""
    peak_bytes: tuple[int, ...]
    """Most that is kept at once; messages that have come early are not counted."""
    peak_live: tuple[int, ...]
    """Most (stage, micro batch) pairs between their F and the end of their backward at once."""

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        if not self.makespan:
            return 0.0
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(order: Order, walk: Walk, costs: Sequence[StageCost]) -> Timeline:
    """Run a valid order by the clock.

    Ranks work through their lists. A send is free for its sender; what needs a receive waits until
    the message is there, its boundary's hop after it was sent.

    Raises:
        ValueError: an order that waits for ever.
    """
    arrived: dict[Op, float] = {}  # by receive: when its message is there
    waiting: dict[Op, int] = {}  # by receive: the rank that stands before it
    clocks, lists = [0.0] * len(order), [list[Timed]() for _ in order]
    pending = list(range(len(order)))
    while pending:
        rank = pending.pop()
        for op in order[rank][len(lists[rank]) :]:
            start = end = clocks[rank]
            partner = find_partner(op)
            if partner is not None and op.kind in ("SEND_F", "SEND_B"):
                arrived[partner] = start + costs[min(op.stage, partner.stage)].hop
                if partner in waiting:
                    pending.append(waiting.pop(partner))
            elif partner is not None:
                if op not in arrived:
                    waiting[op] = rank
                    break
                end = max(start, arrived[op])
            else:
                if op.kind != "W":
                    needed = op._replace(kind="RECV_F" if op.kind == "F" else "RECV_B")
                    start = max(start, arrived.get(needed, 0.0))
                clocks[rank] = end = start + costs[op.stage].duration(op.kind)
            lists[rank].append(Timed(op, start, end))
    if waiting:
        stuck = ", ".join(f"rank {rank} at {op}" for op, rank in sorted(waiting.items()))
        raise ValueError(f"an order that waits for ever: {stuck}")
    peaks = [_find_peaks(ops, walk, costs) for ops in order]
    return Timeline(
        ranks=tuple(map(tuple, lists)),
        makespan=max(clocks),
        busy=tuple(sum(costs[op.stage].duration(op.kind) for op in ops) for ops in order),
        peak_bytes=tuple(size for size, _ in peaks),
        peak_live=tuple(pairs for _, pairs in peaks),
    )


def _find_peaks(ops: Sequence[Op], walk: Walk, costs: Sequence[StageCost]) -> tuple[int, int]:
    """Most bytes and most (stage, micro batch) pairs that a rank keeps at once."""
    size = live = most_size = most_live = 0
    for kind, stage, _ in ops:
        cost = costs[stage]
        if kind == "F" and walk[stage].backward:
            size, live = size + cost.activation, live + 1
        elif kind == "B":
            size, live = size - cost.activation, live - 1
        elif kind == "I":
            size += cost.deferred - cost.activation
        elif kind == "W":
            size, live = size - cost.deferred, live - 1
        most_size, most_live = max(most_size, size), max(most_live, live)
    return most_size, most_live


def lower_bound(
    walk: Walk, costs: Sequence[StageCost], num_microbatches: int, split: bool = True
) -> float:
    """No order of the walk is faster (pipeline.md, section 5).

    Every rank waits for the first micro batch to reach it, then has its work to do; without I and
    W apart the last backward pass that it runs must still travel to the first stage. And one micro
    batch takes its time.
    """
    ranks = count_ranks(walk)
    head: dict[int, float] = {}  # by rank: when the first micro batch is there
    tail: dict[int, float] = {}  # by rank: from its last backward pass to the end
    work = [0.0] * ranks
    reached, returned = 0.0, [0.0] * len(walk)
    for index, (stage, cost) in enumerate(zip(walk, costs, strict=True)):
        hop = costs[index - 1].hop if index and walk[index - 1].rank != stage.rank else 0.0
        reached += hop
        head.setdefault(stage.rank, reached)
        reached += cost.forward
        work[stage.rank] += cost.forward
        if not stage.backward:
            continue
        work[stage.rank] += cost.duration("B")
        returned[index] = cost.weights if split else 0.0
        if stage.sends_back:
            before = costs[index - 1].duration("I" if split else "B")
            returned[index] = max(returned[index], hop + before + returned[index - 1])
        tail.setdefault(stage.rank, 0.0 if split else returned[index])
    alone = reached + costs[-1].duration("I" if split else "B") + returned[-1]
    return max(alone, *(head[r] + num_microbatches * work[r] + tail.get(r, 0.0) for r in head))


# --------------------------------------------------------------------------------------- choice

Family = Literal["1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "greedy"]


class ClosedForm(NamedTuple):
    """A maker of orders for walks of one shape."""

    make: Callable[[Walk, int], Computes | None]
    split: bool
    """It runs I and W in place of B."""
    shape: str


CLOSED_FORMS: dict[Family, ClosedForm] = {
    "1f1b": ClosedForm(one_f_one_b, False, "0..p-1 once"),
    "interleaved": ClosedForm(interleaved, False, "0..p-1 twice or more"),
    "interleaved_zero_bubble": ClosedForm(interleaved_zero_bubble, True, "0..p-1 once or more"),
    "zbv": ClosedForm(zbv, True, "0..p-1 p-1..0, the tip cut in two (walk.cuts_for_v)"),
}

IN_FLIGHT = (1.0, 1.5, 2.0, 3.0)
"""Times p: micro batches whose activations a rank of a greedy order may keep at once."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An order and what it takes."""

    name: Family
    order: Order
    timeline: Timeline


@lru_cache(maxsize=256)
def choose_order(
    walk: Walk,
    num_microbatches: int,
    costs: tuple[StageCost, ...],
    *,
    memory_cap: int | tuple[int, ...] | None = None,
    split: bool = True,
    wanted: Family | Literal["auto"] = "auto",
) -> Choice:
    """The fastest order, by simulation, of all that are known for a walk; the same everywhere.

    Where several take the same time to a thousandth, the one that keeps least. The walk is taken as
    it is: for `zbv`, build it with `walk.cuts_for_v`.

    Args:
        walk: with one cost per stage.
        num_microbatches: of one optimizer step and replica.
        costs: by stage.
        memory_cap: bytes for the activations of each rank: one number, or one by rank. Left out:
            no bound but that of greedy orders, three times p micro batches.
        split: whether I and W may run apart; without, there is only B.
        wanted: one family of orders alone.

    Raises:
        ConfigError: the family wanted does not suit the walk, or needs I and W apart.
        PlacementError: no order keeps within the memory.
    """
    check_family(walk, wanted, split)
    caps = _list_caps(walk, memory_cap)
    bound = lower_bound(walk, costs, num_microbatches, split)
    best: Choice | None = None
    best_score: tuple[float, ...] = ()
    for name, order in _list_candidates(walk, num_microbatches, costs, caps, split, wanted):
        timeline = simulate(order, walk, costs)
        if caps and any(peak > cap for peak, cap in zip(timeline.peak_bytes, caps, strict=True)):
            continue
        time = round(timeline.makespan / (bound or 1.0), 3)
        score = time, max(timeline.peak_bytes), max(timeline.peak_live)
        if best is None or score < best_score:
            best, best_score = Choice(name, order, timeline), score
        if time <= 1.0:
            break
    if best is None:
        assert caps is not None
        raise PlacementError(_explain_memory(walk, costs, caps, wanted))
    problems = validate_order(best.order, walk, num_microbatches)
    assert not problems, problems
    return best


def check_family(walk: Walk, wanted: Family | Literal["auto"], split: bool = True) -> None:
    """Refuse a family of orders that does not suit a walk, or needs I and W apart.

    Raises:
        ConfigError: naming the walk.
    """
    form = None if wanted == "auto" else CLOSED_FORMS.get(wanted)
    if form is not None and form.split and not split:
        raise ConfigError(
            f"parallel.order={wanted} runs the backward passes of inputs and weights apart; set "
            "parallel.split_backward to true, or parallel.order to auto"
        )
    if form is not None and form.make(walk, 1) is None:
        ranks = " ".join(str(stage.rank) for stage in walk)
        raise ConfigError(
            f"parallel.order={wanted} is for walks over the ranks {form.shape}; this one visits "
            f"{ranks}; set parallel.order to greedy or auto"
        )


def _list_caps(walk: Walk, memory_cap: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    if memory_cap is None or isinstance(memory_cap, tuple):
        return memory_cap
    return (memory_cap,) * count_ranks(walk)


def _list_candidates(
    walk: Walk,
    num_microbatches: int,
    costs: Sequence[StageCost],
    caps: Sequence[int] | None,
    split: bool,
    wanted: str,
) -> Iterator[tuple[Family, Order]]:
    """Closed forms first, then greedy orders, those that keep little first."""
    for name, form in CLOSED_FORMS.items():
        if wanted in ("auto", name) and split >= form.split:
            computes = form.make(walk, num_microbatches)
            if computes is not None:
                yield name, add_messages(computes, walk, costs)
    if wanted not in ("auto", "greedy"):
        return
    # Where memory is short, B may fit where what I leaves for W does not.
    splits = (True, False) if split and caps else (split,)
    for apart, times, alternate in product(splits, IN_FLIGHT, (True, False)):
        order = greedy(
            walk,
            num_microbatches,
            costs,
            split=apart,
            alternate=alternate,
            in_flight=times * count_ranks(walk),
            room=caps,
        )
        if order is not None:
            yield "greedy", order


def _explain_memory(
    walk: Walk, costs: Sequence[StageCost], caps: Sequence[int], wanted: str
) -> str:
    """Which rank is short of memory for a single micro batch; all others have room for one."""
    alone = [0] * len(caps)
    for stage, cost in zip(walk, costs, strict=True):
        alone[stage.rank] += cost.activation if stage.backward else 0
    rank = max(range(len(caps)), key=lambda r: alone[r] - caps[r])
    short = alone[rank] > caps[rank]
    remedy = "" if short or wanted in ("auto", "greedy") else "set parallel.order to auto, or "
    return (
        f"no order{'' if wanted == 'auto' else f' of parallel.order={wanted}'} fits: pipeline rank "
        f"{rank} keeps {alone[rank]:,} bytes of activations of each micro batch and has room for "
        f"{caps[rank]:,}; {remedy}set train.recompute to true, lower train.micro_batch_size, or "
        "raise parallel.tensor"
    )
