"""The order: what every pipeline rank does, one operation after the other.

Operations name a stage of the walk and a micro batch:

    F   forward                         B   backward, whole
    I   backward, inputs only           W   backward, the weights that I left
    SEND_F, RECV_F   activations: from stage s, to stage s (from s - 1)
    SEND_B, RECV_B   gradients of activations: from stage s (to s - 1), to stage s (from s + 1)

Per pair of ranks and direction, sends and receives come in the same order.

A forward pass needs that of the stage before. A backward pass needs its own forward pass, that of
the stage after where a gradient comes from there, and those of all later stages of its own rank,
which hand over the gradients of values that they read. W needs I. `plan/generate.py` makes orders.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import xxhash

from megarecur.plan.walk import Walk

if TYPE_CHECKING:
    from megarecur.plan.simulate import StageCost

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]


class Op(NamedTuple):
    """One operation of one rank."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


Order = tuple[tuple[Op, ...], ...]
"""By pipeline rank."""

Computes = Sequence[Sequence[Op]]
"""An order without its messages: F, B, I and W by pipeline rank."""


def count_ranks(walk: Walk) -> int:
    """Pipeline ranks that a walk visits."""
    return 1 + max(stage.rank for stage in walk)


def find_backward_needs(walk: Walk) -> list[tuple[int, ...]]:
    """By stage: the stages whose backward passes its own waits for, others following from them."""
    needs: list[tuple[int, ...]] = []
    for stage in walk:
        after = walk[stage.index + 1 :]
        found = [after[0].index] if after and after[0].sends_back else []
        found += [s.index for s in after if s.rank == stage.rank and s.backward][:1]
        needs.append(tuple(sorted(set(found))) if stage.backward else ())
    return needs


KINDS_BACK: tuple[Kind, ...] = ("B", "I", "W")

PARTNERS: dict[Kind, tuple[Kind, int]] = {
    "SEND_F": ("RECV_F", 1),
    "RECV_F": ("SEND_F", -1),
    "SEND_B": ("RECV_B", -1),
    "RECV_B": ("SEND_B", 1),
}
"""The other end of a message: its kind, and its stage counted from here."""


def find_partner(op: Op) -> Op | None:
    """The receive of a send, the send of a receive; None for F, B, I and W."""
    if op.kind not in PARTNERS:
        return None
    kind, away = PARTNERS[op.kind]
    return Op(kind, op.stage + away, op.microbatch)


def find_messages(op: Op, walk: Walk) -> tuple[Op, Op] | None:
    """The send and the receive that follow an operation; None where nothing leaves its rank."""
    stage, (kind, index, microbatch) = walk[op.stage], op
    if kind == "F" and index + 1 < len(walk) and walk[index + 1].rank != stage.rank:
        return Op("SEND_F", index, microbatch), Op("RECV_F", index + 1, microbatch)
    if kind in "BI" and stage.sends_back and walk[index - 1].rank != stage.rank:
        return Op("SEND_B", index, microbatch), Op("RECV_B", index - 1, microbatch)
    return None


def order_hash(order: Order) -> str:
    """A short name of an order, the same in every process: 16 hexadecimal digits."""
    text = "\n".join(" ".join(map(str, ops)) for ops in order)
    return xxhash.xxh3_64_hexdigest(text.encode())


# ------------------------------------------------------------------------------------- messages


class Agenda(Protocol):
    """What ranks do next. A backward pass is called B here, whether it will be whole or not."""

    def offer(self, rank: int, op: Op) -> None:
        """An F, B or W whose inputs have arrived."""

    def take(self, rank: int) -> Op | None:
        """What an idle rank begins now."""

    def end(self, op: Op) -> None:
        """An operation has ended."""


class FixedAgenda:
    """Every rank follows a list."""

    def __init__(self, computes: Computes) -> None:
        self.waiting = [list(reversed(ops)) for ops in computes]
        self.ready: set[Op] = set()

    def offer(self, rank: int, op: Op) -> None:
        """Remember it."""
        self.ready.add(op)

    def take(self, rank: int) -> Op | None:
        """The next of the list, if it can begin."""
        if not self.waiting[rank]:
            return None
        op = self.waiting[rank][-1]
        if (op._replace(kind="B") if op.kind == "I" else op) not in self.ready:
            return None
        return self.waiting[rank].pop()

    def end(self, op: Op) -> None:
        """Nothing to do."""


def add_messages(computes: Computes, walk: Walk, costs: Sequence[StageCost] | None = None) -> Order:
    """The order that runs these operations, sends and receives included (any there are made anew).

    Operations are replayed by the clock (left out: each takes one unit of time, B two). When one
    ends, its send goes to the end of what its rank has begun so far, and the receive to the end of
    what the other rank has begun. So all ranks have messages in one global order, and no wait for
    another in a circle, even where every send waits for its receive.

    Raises:
        ValueError: operations that wait for each other in a circle, or for one that is missing.
    """
    computes = [[op for op in ops if op.kind not in PARTNERS] for ops in computes]
    agenda = FixedAgenda(computes)
    microbatches = sorted({op.microbatch for ops in computes for op in ops})
    order = play(walk, microbatches, agenda, costs)
    stuck = [f"rank {rank} at {ops[-1]}" for rank, ops in enumerate(agenda.waiting) if ops]
    if stuck:
        raise ValueError(f"operations in an order that cannot run: {', '.join(stuck)}")
    return order


def play(
    walk: Walk, microbatches: Iterable[int], agenda: Agenda, costs: Sequence[StageCost] | None
) -> Order:
    """Let ranks take operations from an agenda by the clock; write down what they did."""
    needs = find_backward_needs(walk)
    fed_by: list[list[int]] = [[] for _ in walk]  # by stage: whose backward passes wait for its own
    for index, stages in enumerate(needs):
        for other in stages:
            fed_by[other].append(index)
    ranks = count_ranks(walk)
    lists: list[list[Op]] = [[] for _ in range(ranks)]
    idle, awake = [True] * ranks, set(range(ranks))
    arrived: Counter[Op] = Counter()
    # (time, number, operation, whether it ends or an input of it arrives)
    events: list[tuple[float, int, Op, bool]] = []
    number = count()
    clock, together = 0.0, 1e-9 * max(_duration(Op("B", s.index, 0), costs) for s in walk)

    def arrive(op: Op, source: int) -> None:
        """An input of `op` leaves stage `source`: it is there after the hop between them."""
        away = walk[op.stage].rank != walk[source].rank
        delay = costs[min(op.stage, source)].hop if costs and away else 0.0
        heapq.heappush(events, (clock + delay, next(number), op, False))

    def finish(op: Op) -> None:
        kind, index, microbatch = op
        rank = walk[index].rank
        idle[rank] = True
        awake.update((rank, walk[0].rank))
        agenda.end(op)
        messages = find_messages(op, walk)
        if messages:
            lists[rank].append(messages[0])
            lists[walk[messages[1].stage].rank].append(messages[1])
        if kind == "F":
            if index + 1 < len(walk):
                arrive(Op("F", index + 1, microbatch), index)
            if walk[index].backward:
                arrive(Op("B", index, microbatch), index)
        elif kind != "W":
            for other in fed_by[index]:
                arrive(Op("B", other, microbatch), index)
        if kind == "I":
            arrive(Op("W", index, microbatch), index)

    for microbatch in microbatches:
        arrive(Op("F", 0, microbatch), 0)
    while events:
        clock = events[0][0]
        while events and events[0][0] <= clock + together:
            _, _, op, ends = heapq.heappop(events)
            if ends:
                finish(op)
                continue
            arrived[op] += 1
            if arrived[op] == (1 + len(needs[op.stage]) if op.kind == "B" else 1):
                rank = walk[op.stage].rank
                agenda.offer(rank, op)
                awake.add(rank)
        for rank in sorted(awake):
            taken = agenda.take(rank) if idle[rank] else None
            if taken is not None:
                idle[rank] = False
                lists[rank].append(taken)
                end = clock + _duration(taken, costs)
                heapq.heappush(events, (end, next(number), taken, True))
        awake.clear()
    return tuple(map(tuple, lists))


def _duration(op: Op, costs: Sequence[StageCost] | None) -> float:
    if costs is None:
        return 2.0 if op.kind == "B" else 1.0
    return costs[op.stage].duration(op.kind)


# ----------------------------------------------------------------------------------- validation


def validate_order(order: Order, walk: Walk, num_microbatches: int) -> list[str]:
    """What is wrong with an order; nothing where it may run.

    Every operation once, on its rank, after what it needs; sends and receives of every pair of
    ranks alike; and it comes to its end where a send ends only when its receive is reached.
    """
    problems = _check_complete(order, walk, num_microbatches)
    if not problems:
        problems = _check_needs(order, walk) + _check_pairs(order, walk)
    return problems or _check_rendezvous(order, walk)


def _check_complete(order: Order, walk: Walk, num_microbatches: int) -> list[str]:
    found = Counter((rank, op) for rank, ops in enumerate(order) for op in ops)
    expected: set[tuple[int, Op]] = set()
    for stage in walk:
        for microbatch in range(num_microbatches):
            kinds: tuple[Kind, ...] = ("F",)
            if stage.backward:
                whole, *apart = (
                    found[stage.rank, Op(kind, stage.index, microbatch)] for kind in KINDS_BACK
                )
                kinds = ("F", "I", "W") if any(apart) and not whole else ("F", "B")
            for kind in kinds:
                op = Op(kind, stage.index, microbatch)
                messages = find_messages(op, walk) or ()
                expected |= {(walk[some.stage].rank, some) for some in (op, *messages)}
    problems = [f"rank {rank}: {op} is missing" for rank, op in sorted(expected - found.keys())]
    for (rank, op), times in sorted(found.items()):
        if (rank, op) not in expected:
            problems.append(f"rank {rank}: {op} does not belong there")
        elif times > 1:
            problems.append(f"rank {rank}: {op} comes {times} times")
    return problems


def _check_needs(order: Order, walk: Walk) -> list[str]:
    """On every rank, what an operation needs comes before it."""
    needs, problems = find_backward_needs(walk), []
    for rank, ops in enumerate(order):
        done: set[Op] = set()
        for op in ops:
            late = [some for some in _list_needs(op, walk, needs) if some not in done]
            problems += [f"rank {rank}: {op} comes before {some}" for some in late]
            done.add(op)
            if op.kind == "I":
                done.add(op._replace(kind="B"))
    return problems


def _list_needs(op: Op, walk: Walk, needs: Sequence[Sequence[int]]) -> list[Op]:
    """What must have run on the rank of an operation before it; B stands for I as well."""
    kind, index, microbatch = op

    def here(other: int) -> bool:
        return walk[other].rank == walk[index].rank

    if kind == "F" and index:
        return [Op("F", index - 1, microbatch) if here(index - 1) else op._replace(kind="RECV_F")]
    if kind in ("B", "I"):
        return [op._replace(kind="F")] + [
            Op("B", other, microbatch) if here(other) else op._replace(kind="RECV_B")
            for other in needs[index]
        ]
    before: dict[Kind, Kind] = {"W": "I", "SEND_F": "F", "SEND_B": "B"}
    return [op._replace(kind=before[kind])] if kind in before else []


def _check_pairs(order: Order, walk: Walk) -> list[str]:
    """Per pair of ranks, messages are received in the order in which they are sent."""
    sent: dict[tuple[int, int], list[Op]] = defaultdict(list)
    received: dict[tuple[int, int], list[Op]] = defaultdict(list)
    for rank, ops in enumerate(order):
        for op in ops:
            partner = find_partner(op)
            if partner is None:
                continue
            other = walk[partner.stage].rank
            if op.kind in ("SEND_F", "SEND_B"):
                sent[rank, other].append(partner)
            else:
                received[other, rank].append(op)
    problems = []
    for pair, messages in sorted(sent.items()):
        for number, (a, b) in enumerate(zip(messages, received[pair], strict=True)):
            if a != b:
                problems.append(f"ranks {pair[0]} to {pair[1]}: message {number} is {a}, not {b}")
                break
    return problems


def _check_rendezvous(order: Order, walk: Walk) -> list[str]:
    """A replay in which sends and receives wait for each other."""
    position = [0] * len(order)
    pending = list(range(len(order)))
    while pending:
        rank = pending.pop()
        while position[rank] < len(order[rank]):
            partner = find_partner(order[rank][position[rank]])
            if partner is None:
                position[rank] += 1
                continue
            other = walk[partner.stage].rank
            if order[other][position[other] : position[other] + 1] != (partner,):
                break  # The other rank comes back here when it has reached this message.
            position[rank] += 1
            position[other] += 1
            pending.append(other)
    stuck = [
        f"rank {rank} at {ops[position[rank]]}"
        for rank, ops in enumerate(order)
        if position[rank] < len(ops)
    ]
    return [f"all wait for each other: {', '.join(stuck)}"] if stuck else []
