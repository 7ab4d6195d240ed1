"""Simulate the time, bubbles and memory of an order from the costs of its stages; choose the
best."""

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
    Op,
    PipelineOrder,
    StageCost,
    Timed,
    add_messages,
    count_ranks,
    describe_stuck,
    replay,
    validate_order,
)
from megarecur.plan.walk import Walk


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step, by pipeline rank."""

    ranks: tuple[tuple[Timed, ...], ...]
    """All operations with their times. A send takes no time. A receive lasts from when its rank
    reaches it until the message arrives; meanwhile the rank runs operations that do not need it."""
    makespan: float
    busy: tuple[float, ...]
    """Time spent in F, B, I and W."""
    peak_bytes: tuple[int, ...]
    """Maximum bytes kept at once; messages that arrive early are not counted."""
    peak_live: tuple[int, ...]
    """Maximum (stage, micro batch) pairs between F and the end of their backward pass at once."""

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        if not self.makespan:
            return 0.0
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(order: PipelineOrder, walk: Walk, costs: Sequence[StageCost]) -> Timeline:
    """Simulate a valid order, by the rules of `replay`.

    Raises:
        ValueError: the order deadlocks.
    """
    lists, stuck = replay(order, walk, costs)
    if stuck:
        raise ValueError(f"the order deadlocks: {describe_stuck(stuck)}; correct the order")
    peaks = [_find_peaks(ops, walk, costs) for ops in order]
    return Timeline(
        ranks=tuple(map(tuple, lists)),
        makespan=max(timed.end for ops in lists for timed in ops),
        busy=tuple(sum(costs[op.stage].duration(op.kind) for op in ops) for ops in order),
        peak_bytes=tuple(size for size, _ in peaks),
        peak_live=tuple(pairs for _, pairs in peaks),
    )


def _find_peaks(ops: Sequence[Op], walk: Walk, costs: Sequence[StageCost]) -> tuple[int, int]:
    """Return the maximum bytes and (stage, micro batch) pairs that a rank keeps at once."""
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
    """Return a lower bound on the time of any order of the walk (pipeline.md, section 5).

    Every rank waits for the first micro batch, then does its work; unless I and W are apart, its
    last backward pass must still travel to the first stage. No step is shorter than one micro
    batch.
    """
    ranks = count_ranks(walk)
    head: dict[int, float] = {}  # by rank: when the first micro batch arrives
    tail: dict[int, float] = {}  # by rank: time from its last backward pass to the end
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
    """A generator of orders for walks of one shape."""

    make: Callable[[Walk, int], Computes | None]
    split: bool
    """True if it runs I and W in place of B."""
    shape: str


CLOSED_FORMS: dict[Family, ClosedForm] = {
    "1f1b": ClosedForm(one_f_one_b, False, "0..p-1 once"),
    "interleaved": ClosedForm(interleaved, False, "0..p-1 twice or more"),
    "interleaved_zero_bubble": ClosedForm(interleaved_zero_bubble, True, "0..p-1 once or more"),
    "zbv": ClosedForm(zbv, True, "0..p-1 p-1..0, the tip cut in two (walk.cuts_for_v)"),
}

IN_FLIGHT = (1.0, 1.5, 2.0, 3.0)
"""Limits for greedy orders, in units of p: micro batches whose activations a rank keeps at once."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An order and its simulated timeline."""

    name: Family
    order: PipelineOrder
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
    """Return the fastest of all orders known for a walk, by simulation; the result is
    deterministic.

    Among orders within a thousandth of the best time, the one that keeps least is chosen. The walk
    is used as given: for `zbv`, build it with `walk.cuts_for_v`.

    Args:
        num_microbatches: number per optimizer step and replica.
        memory_cap: bytes for the activations of each rank: one number, or one per rank. None means
        no limit except that of greedy orders, 3 p micro batches.
        split: allow I and W to run apart; otherwise only B is used.
        wanted: restrict the choice to one family of orders.

    Raises:
        ConfigError: the family wanted does not suit the walk, or needs I and W apart.
        PlacementError: no order fits into the memory.
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
    """Reject a family of orders that does not suit a walk, or needs I and W apart.

    Raises:
        ConfigError: the message names the walk.
    """
    form = None if wanted == "auto" else CLOSED_FORMS.get(wanted)
    if form is not None and form.split and not split:
        raise ConfigError(
            f"parallel.order={wanted} runs the backward passes of inputs and weights apart; set "
            "parallel.split_backward to true, or parallel.order to auto"
        )
    if figures := find_unsuited(walk, wanted):
        raise ConfigError(f"{ORDER_REASON}; {ORDER_REMEDY}".format_map(figures))


ORDER_REASON = "parallel.order={order} requires a walk over ranks {shape}; this one visits {ranks}"
ORDER_REMEDY = "set parallel.order to greedy or auto"


def find_unsuited(walk: Walk, wanted: Family | Literal["auto"]) -> dict[str, object]:
    """Return the figures of ORDER_REASON if a family of orders does not suit a walk."""
    form = None if wanted == "auto" else CLOSED_FORMS.get(wanted)
    if form is None or form.make(walk, 1) is not None:
        return {}
    ranks = " ".join(str(stage.rank) for stage in walk)
    return {"order": wanted, "shape": form.shape, "ranks": ranks}


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
) -> Iterator[tuple[Family, PipelineOrder]]:
    """Yield closed forms first, then greedy orders, starting with those that keep little."""
    for name, form in CLOSED_FORMS.items():
        if wanted in ("auto", name) and split >= form.split:
            computes = form.make(walk, num_microbatches)
            if computes is not None:
                yield name, add_messages(computes, walk, costs)
    if wanted not in ("auto", "greedy"):
        return
    # If memory is short, B may fit where the values that I leaves for W do not.
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
    """Return which rank lacks memory for a single micro batch, or for more than one."""
    alone = [0] * len(caps)
    for stage, cost in zip(walk, costs, strict=True):
        alone[stage.rank] += cost.activation if stage.backward else 0
    rank = max(range(len(caps)), key=lambda r: alone[r] - caps[r])
    short = alone[rank] > caps[rank]
    remedy = "" if short or wanted in ("auto", "greedy") else "set parallel.order to auto, or "
    return (
        f"no order{'' if wanted == 'auto' else f' of parallel.order={wanted}'} fits into memory: "
        "pipeline rank "
        f"{rank} keeps {alone[rank]:,} bytes of activations of each micro batch and has room for "
        f"{caps[rank]:,}; {remedy}set train.recompute to selective or full, lower "
        "train.micro_batch_size, or raise parallel.tensor"
    )
