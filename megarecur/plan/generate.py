"""Generators of pipeline orders: the closed forms of the literature, and a greedy one for any walk.

Closed forms return the operations of every rank without messages (`order.add_messages` adds them),
or None if the walk does not suit them; the greedy generator returns the whole order. Any number of
micro batches is allowed. Stages without a backward pass keep their place and run forward only.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence

from megarecur.plan.order import Computes, Kind, Op, PipelineOrder, StageCost, count_ranks, play
from megarecur.plan.walk import Walk

# --------------------------------------------------------------------------------- closed forms


def one_f_one_b(walk: Walk, num_microbatches: int) -> Computes | None:
    """Return 1F1B (Narayanan et al. 2019), for walks that visit ranks 0..p-1 once; at most p in
    flight."""
    if count_loops(walk) != 1:
        return None
    return _run_loops(walk, num_microbatches, warm_hops=1)


def interleaved(walk: Walk, num_microbatches: int) -> Computes | None:
    """Return interleaved 1F1B (Narayanan et al. 2021), for walks 0..p-1 0..p-1 ..., twice or more.

    Micro batches go in rounds of p through one stage of a rank, then through its next. If p does
    not divide their number, the order is that of the next multiple of p, without the operations of
    the extra micro batches.
    """
    if (count_loops(walk) or 0) < 2:
        return None
    return _run_loops(walk, num_microbatches, warm_hops=2)


def interleaved_zero_bubble(walk: Walk, num_microbatches: int) -> Computes | None:
    """Return interleaved ZB1P (Qi et al. 2023), for walks 0..p-1, once or more, with I and W apart.

    Rank r delays W by r operations to fill the time in which it would wait. Rounds are those of
    `interleaved`; a walk of one loop gives ZB-H1.
    """
    if count_loops(walk) is None:
        return None
    return _run_loops(walk, num_microbatches, warm_hops=1, split=True)


def zbv(walk: Walk, num_microbatches: int) -> Computes | None:
    """Return ZB-V (Qi et al. 2024), for walks 0..p-1 p-1..0 in 2p stages, with I and W apart.

    The tip of the V must be cut into two stages of rank p-1, see `walk.cuts_for_v`. Fewer than 2p-1
    micro batches run as the first ones of 2p-1.
    """
    ranks = count_ranks(walk)
    down = list(range(ranks))
    if [stage.rank for stage in walk] != down + down[::-1]:
        return None
    enough = max(2 * ranks - 1, num_microbatches)
    return [
        _keep_real(_run_v(rank, ranks, enough), walk, num_microbatches) for rank in range(ranks)
    ]


def count_loops(walk: Walk) -> int | None:
    """Return how many times a walk visits ranks 0..p-1 in turn; None if it does otherwise."""
    ranks = count_ranks(walk)
    if len(walk) % ranks or any(stage.rank != stage.index % ranks for stage in walk):
        return None
    return len(walk) // ranks


def _run_loops(walk: Walk, num_microbatches: int, warm_hops: int, split: bool = False) -> Computes:
    """Return 1F1B over walks of loops; `warm_hops` adds forward passes first, per remaining
    rank."""
    ranks, loops = count_ranks(walk), count_loops(walk)
    assert loops is not None
    back: Kind = "I" if split else "B"
    computes = []
    for rank in range(ranks):
        forwards, backwards = [], []
        for first in range(0, num_microbatches, ranks):
            for loop in range(loops):
                for microbatch in range(first, first + ranks):
                    later = loops - 1 - loop
                    forwards.append(Op("F", loop * ranks + rank, microbatch))
                    backwards.append(Op(back, later * ranks + rank, microbatch))
        warm = (loops - 1) * ranks + warm_hops * (ranks - 1 - rank)
        ops = forwards[:warm]
        for i, backward in enumerate(backwards):
            ops += forwards[warm + i : warm + i + 1]
            ops.append(backward)
            if split and i >= rank:
                ops.append(backwards[i - rank]._replace(kind="W"))
        if split and rank:
            ops += [backward._replace(kind="W") for backward in backwards[-rank:]]
        computes.append(_keep_real(ops, walk, num_microbatches))
    return computes


def _run_v(rank: int, ranks: int, num_microbatches: int) -> list[Op]:
    """Return ZB-V on one rank, with its two stages written as the way down and the way up."""
    down, up = rank, 2 * ranks - 1 - rank
    done: dict[tuple[Kind, int], int] = defaultdict(int)
    ops: list[Op] = []

    def run(stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            ops.append(Op(kind, stage, done[kind, stage]))
            done[kind, stage] += 1

    for _ in range(2 * (ranks - rank) - 1):
        run(down, "F")
    for _ in range(rank):
        run(up, "F")
        run(down, "F")
    for _ in range(ranks - rank):
        run(up, "F", "I", "W")
    while done["F", up] < num_microbatches:
        if done["F", down] < num_microbatches:
            run(down, "F")
        run(down, "I", "W")
        run(up, "F", "I", "W")
    for _ in range(rank):
        run(down, "I")
        run(up, "I")
    for _ in range(ranks - rank):
        run(down, "I", "W")
    for stage in (up, down):
        while done["W", stage] < num_microbatches:
            run(stage, "W")
    return ops


def _keep_real(ops: Sequence[Op], walk: Walk, num_microbatches: int) -> list[Op]:
    """Remove micro batches that only rounded up their number, and passes that stages lack."""
    return [
        op
        for op in ops
        if op.microbatch < num_microbatches and (op.kind == "F" or walk[op.stage].backward)
    ]


# --------------------------------------------------------------------------------------- greedy


def greedy(
    walk: Walk,
    num_microbatches: int,
    costs: Sequence[StageCost],
    *,
    split: bool = True,
    alternate: bool = False,
    in_flight: float | None = None,
    room: Sequence[float] | None = None,
) -> PipelineOrder | None:
    """Return an order for any walk, with messages: an idle rank takes the best available operation.

    Backward passes come first, then forward passes, then W; of forward passes those of the oldest
    round of p micro batches, and of these the deepest.

    Args:
        split: run I and W in place of B.
        alternate: forward passes come first right after a backward pass, as in 1F1B. That is better
            if hops take time, and without split.
        in_flight: limit on the activations that a rank keeps at once, in units of one micro
        batch's. None means no limit.
        room: the limit in bytes, by rank. The result is None if one micro batch does not fit.
    """
    agenda = GreedyAgenda(walk, costs, split, alternate, in_flight, room)
    if any(agenda.room[rank] + agenda.slack < whole for rank, whole in enumerate(agenda.whole)):
        return None
    return play(walk, range(num_microbatches), agenda, costs)


class GreedyAgenda:
    """An agenda that picks the most urgent operation that fits in memory.

    A rank may start a forward pass if its kept activations and those that this micro batch will
    still add fit together. So the deepest micro batch can always continue, and no rank deadlocks.
    """

    def __init__(
        self,
        walk: Walk,
        costs: Sequence[StageCost],
        split: bool,
        alternate: bool,
        in_flight: float | None,
        room: Sequence[float] | None,
    ) -> None:
        self.ranks, self.alternate = count_ranks(walk), alternate
        self.last: list[Kind] = ["F"] * self.ranks
        self.back: Kind = "I" if split else "B"
        self.queues: list[dict[tuple[Kind, int], list[int]]] = [
            defaultdict(list) for _ in range(self.ranks)
        ]
        self.rank_of = [stage.rank for stage in walk]
        # Bytes that a stage keeps from F until the end of I (or B), and from there until W has run.
        sized = any(
            costs[s.index].activation or costs[s.index].deferred for s in walk if s.backward
        )
        self.deferred = [(float(c.deferred) if sized else 1.0) if split else 0.0 for c in costs]
        self.kept = [
            max(float(cost.activation) if sized else 1.0, late) if stage.backward else 0.0
            for stage, cost, late in zip(walk, costs, self.deferred, strict=True)
        ]
        # Bytes that one micro batch keeps on the stage's rank from this stage on.
        self.ahead = [
            sum(self.kept[s.index] for s in walk[stage.index :] if s.rank == stage.rank)
            for stage in walk
        ]
        self.whole = [0.0] * self.ranks
        for stage in walk:
            self.whole[stage.rank] += self.kept[stage.index]
        self.room = [math.inf if in_flight is None else in_flight * some for some in self.whole]
        if room is not None and sized:
            self.room = [min(pair) for pair in zip(self.room, room, strict=True)]
        self.slack = 1e-9 * max(self.whole)
        # First stages may keep little; this bounds what later ones would have to receive early.
        self.most = math.inf if in_flight is None else math.ceil(2 * in_flight)
        self.begun = self.ended = 0
        self.final = min((stage.index for stage in walk if stage.backward), default=None)

    def offer(self, rank: int, op: Op) -> None:
        """Queue the operation."""
        heapq.heappush(self.queues[rank][op.kind, op.stage], op.microbatch)

    def take(self, rank: int) -> Op | None:
        """Return the most urgent operation that fits."""
        urgent: Kind = "F" if self.alternate and self.last[rank] == "B" else "B"
        best = min(
            (
                (URGENCY[urgent][kind], queue[0] // self.ranks if kind == "F" else 0, -stage, kind)
                for (kind, stage), queue in self.queues[rank].items()
                if queue and (kind != "F" or self._fits(rank, stage))
            ),
            default=None,
        )
        if best is None:
            return None
        _, _, deep, kind = best
        self.last[rank] = kind
        op = Op(kind, -deep, heapq.heappop(self.queues[rank][kind, -deep]))
        if kind == "F":
            self.room[rank] -= self.kept[op.stage]
            self.begun += op.stage == 0
        return op._replace(kind=self.back) if kind == "B" else op

    def _fits(self, rank: int, stage: int) -> bool:
        if stage == 0 and self.begun - self.ended >= self.most:
            return False
        kept = self.kept[stage]
        return not kept or self.room[rank] + self.slack >= self.ahead[stage]

    def end(self, op: Op) -> None:
        """Release the memory that the operation frees."""
        kind, stage, _ = op
        if kind in ("B", "I"):
            self.room[self.rank_of[stage]] += self.kept[stage] - self.deferred[stage]
            self.ended += stage == self.final
        elif kind == "W":
            self.room[self.rank_of[stage]] += self.deferred[stage]


URGENCY: dict[Kind, dict[Kind, int]] = {
    "B": {"B": 0, "F": 1, "W": 2},
    "F": {"F": 0, "B": 1, "W": 2},
}
"""Priority of each kind, by the kind that comes first."""
