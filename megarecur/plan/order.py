"""Pipeline orders: the sequence of operations of every pipeline rank.

Operations name a stage of the walk and a micro batch:

    F forward B backward, complete I backward, inputs only W backward, the weights that I left
    SEND_F, RECV_F activations: from stage s, to stage s (from s - 1) SEND_B, RECV_B gradients of
    activations: from stage s (to s - 1), to stage s (from s + 1)

A direction is a pair of ranks, sender and receiver. Its messages are received in the order in which
they are sent, one after another, and wait for no message of another direction (`replay`).

A forward pass needs that of the previous stage. A backward pass needs its own forward pass, the
backward pass of the next stage if a gradient comes from there, and those of all later stages on its
rank, which pass on the gradients of values they read. W needs I. `plan/generate.py` generates
orders.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple, Protocol

import xxhash

from megarecur.plan.walk import Walk

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]


class Op(NamedTuple):
    """One operation of one rank."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


PipelineOrder = tuple[tuple[Op, ...], ...]
"""The operations of each pipeline rank."""

Computes = Sequence[Sequence[Op]]
"""An order without its messages: F, B, I and W by pipeline rank."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Costs of one stage for one micro batch; times in any one unit, sizes in bytes."""

    forward: float
    inputs: float
    """Time of the backward pass of the inputs (I), recompute included."""
    weights: float
    """Time of the backward pass of the weights (W). A complete backward (B) takes both."""
    hop: float = 0.0
    """Time for the activations to reach the next stage, or their gradient to come back."""
    activation: int = 0
    """Bytes kept from F until B or I has run."""
    deferred: int = 0
    """Bytes kept from I until W has run."""

    def duration(self, kind: Kind) -> float:
        """Return the time of F, B, I or W; messages take no time of their rank."""
        if kind == "B":
            return self.inputs + self.weights
        return {"F": self.forward, "I": self.inputs, "W": self.weights}.get(kind, 0.0)


def count_ranks(walk: Walk) -> int:
    """Return the number of pipeline ranks that a walk visits."""
    return 1 + max(stage.rank for stage in walk)


def find_backward_needs(walk: Walk) -> list[tuple[int, ...]]:
    """Return, by stage, the stages whose backward passes it directly waits for."""
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
"""The other end of a message: its kind, and its stage relative to this one."""


def find_partner(op: Op) -> Op | None:
    """Return the receive of a send or the send of a receive; None for F, B, I and W."""
    if op.kind not in PARTNERS:
        return None
    kind, away = PARTNERS[op.kind]
    return Op(kind, op.stage + away, op.microbatch)


class Direction(NamedTuple):
    """The ranks of messages that are delivered in turn."""

    sender: int
    receiver: int


def find_messages(op: Op, walk: Walk) -> tuple[Op, Op] | None:
    """Return the send and receive that follow an operation; None if nothing leaves its rank."""
    stage, (kind, index, microbatch) = walk[op.stage], op
    if kind == "F" and index + 1 < len(walk) and walk[index + 1].rank != stage.rank:
        return Op("SEND_F", index, microbatch), Op("RECV_F", index + 1, microbatch)
    if kind in "BI" and stage.sends_back and walk[index - 1].rank != stage.rank:
        return Op("SEND_B", index, microbatch), Op("RECV_B", index - 1, microbatch)
    return None


def order_hash(order: PipelineOrder) -> str:
    """Return a short hash of an order, the same in every process: 16 hexadecimal digits."""
    text = "\n".join(" ".join(map(str, ops)) for ops in order)
    return xxhash.xxh3_64_hexdigest(text.encode())


# ------------------------------------------------------------------------------------- messages


class Agenda(Protocol):
    """The source of each rank's next operation. B stands for a backward pass, complete or split."""

    def offer(self, rank: int, op: Op) -> None:
        """Add an F, B or W whose inputs have arrived."""

    def take(self, rank: int) -> Op | None:
        """Return the operation that an idle rank starts now, or None."""

    def end(self, op: Op) -> None:
        """Record that an operation has ended."""


class FixedAgenda:
    """An agenda in which every rank follows a list."""

    def __init__(self, computes: Computes) -> None:
        self.waiting = [list(reversed(ops)) for ops in computes]
        self.ready: set[Op] = set()

    def offer(self, rank: int, op: Op) -> None:
        """Mark the operation as ready."""
        self.ready.add(op)

    def take(self, rank: int) -> Op | None:
        """Return the next operation of the list, if it can start."""
        if not self.waiting[rank]:
            return None
        op = self.waiting[rank][-1]
        if (op._replace(kind="B") if op.kind == "I" else op) not in self.ready:
            return None
        return self.waiting[rank].pop()

    def end(self, op: Op) -> None:
        """Do nothing: lists are fixed."""


def add_messages(
    computes: Computes, walk: Walk, costs: Sequence[StageCost] | None = None
) -> PipelineOrder:
    """Return the order that runs these operations, with sends and receives (existing ones are
    replaced).

    Operations are replayed in simulated time (without costs, each takes one unit, B two). When one
    ends, its send is appended to the operations that its rank has started. The receive is added to
    the other rank's, before the operation in progress there, so that the transfer overlaps with it.
    So messages have one global order on all ranks, and no cycle of waits arises even if every send
    waits for its receive.

    Raises:
        ValueError: operations wait for each other in a cycle, or for a missing one.
    """
    computes = [[op for op in ops if op.kind not in PARTNERS] for ops in computes]
    agenda = FixedAgenda(computes)
    microbatches = sorted({op.microbatch for ops in computes for op in ops})
    order = play(walk, microbatches, agenda, costs)
    stuck = [f"rank {rank} at {ops[-1]}" for rank, ops in enumerate(agenda.waiting) if ops]
    if stuck:
        raise ValueError(
            f"operations in an order that cannot run: {', '.join(stuck)}; correct the order"
        )
    return order


def play(
    walk: Walk, microbatches: Iterable[int], agenda: Agenda, costs: Sequence[StageCost] | None
) -> PipelineOrder:
    """Let ranks take operations from an agenda in simulated time; return what they did."""
    needs = find_backward_needs(walk)
    fed_by: list[list[int]] = [
        [] for _ in walk
    ]  # by stage: stages whose backward waits for its own
    for index, stages in enumerate(needs):
        for other in stages:
            fed_by[other].append(index)
    ranks = count_ranks(walk)
    lists: list[list[Op]] = [[] for _ in range(ranks)]
    idle, awake = [True] * ranks, set(range(ranks))
    until = [0.0] * ranks  # by rank: when its last operation ends
    free: dict[Direction, float] = {}  # by direction: when its last message arrives
    arrived: Counter[Op] = Counter()
    # (time, number, operation, whether it ends or one of its inputs arrives)
    events: list[tuple[float, int, Op, bool]] = []
    number = count()
    clock, together = 0.0, 1e-9 * max(_duration(Op("B", s.index, 0), costs) for s in walk)

    def arrive(op: Op, source: int) -> None:
        """Send an input of `op` from stage `source`; it arrives after the hop between them, which
        starts when the direction's earlier messages have arrived."""
        when, direction = clock, Direction(walk[source].rank, walk[op.stage].rank)
        if costs and direction.sender != direction.receiver:
            when = max(clock, free.get(direction, 0.0)) + costs[min(op.stage, source)].hop
            free[direction] = when
        heapq.heappush(events, (when, next(number), op, False))

    def finish(op: Op) -> None:
        kind, index, microbatch = op
        rank = walk[index].rank
        idle[rank] = True
        awake.update((rank, walk[0].rank))
        agenda.end(op)
        messages = find_messages(op, walk)
        if messages:
            lists[rank].append(messages[0])
            other = walk[messages[1].stage].rank
            in_progress = not idle[other] and until[other] > clock + together
            lists[other].insert(len(lists[other]) - in_progress, messages[1])
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
                until[rank] = clock + _duration(taken, costs)
                heapq.heappush(events, (until[rank], next(number), taken, True))
        awake.clear()
    return tuple(map(tuple, lists))


def _duration(op: Op, costs: Sequence[StageCost] | None) -> float:
    if costs is None:
        return 2.0 if op.kind == "B" else 1.0
    return costs[op.stage].duration(op.kind)


# --------------------------------------------------------------------------------------- replay

MOST_SENDS = 4
"""Maximum unfinished sends of a rank: one more waits for the oldest. The sender keeps each message
until it has arrived."""


class Timed(NamedTuple):
    """An operation with its start and end."""

    op: Op
    start: float
    end: float


@dataclass(slots=True)
class _Queue:
    """The messages of one direction, which its communicator delivers in turn."""

    sent: list[tuple[Op, float]] = field(default_factory=list)
    """The receive and the time of each send."""
    posted: list[float] = field(default_factory=list)
    """The time of each receive."""
    delivered: int = 0
    free: float = 0.0
    """Time at which the last delivered message arrives."""


def replay(
    order: PipelineOrder, walk: Walk, costs: Sequence[StageCost]
) -> tuple[list[list[Timed]], dict[int, Op]]:
    """Run an order by the rules of `parallel.pipeline`; return the operations of each rank with
    their times, and the send or receive that each rank waits for which never finishes.

    - A rank runs its list in order. Sends and receives start and take no time of it; F, B and I
      wait for their message.
    - A message starts when it was sent, its receive was reached, and the previous message of its
      direction has arrived. It arrives one hop later. Other directions do not delay it.
    - A rank with more than MOST_SENDS unfinished sends waits for the oldest.
    """
    queues: defaultdict[Direction, _Queue] = defaultdict(_Queue)
    arrived: dict[Op, float] = {}  # by receive: when its message arrives
    received: set[Op] = set()  # receives that their ranks have reached
    unfinished = [deque[Op]() for _ in order]  # by rank: the receives of its sends
    waiting: dict[int, Op] = {}  # by rank: the receive that has not finished
    clocks, lists = [0.0] * len(order), [list[Timed]() for _ in order]
    pending = list(range(len(order)))

    def deliver(queue: _Queue) -> None:
        while queue.delivered < min(len(queue.sent), len(queue.posted)):
            receive, sent = queue.sent[queue.delivered]
            start = max(sent, queue.posted[queue.delivered], queue.free)
            hop = costs[receive.stage - (receive.kind == "RECV_F")].hop
            arrived[receive] = queue.free = start + hop
            queue.delivered += 1
            for rank in [rank for rank, op in waiting.items() if op == receive]:
                del waiting[rank]
                pending.append(rank)

    while pending:
        rank = pending.pop()
        ops, done, sends = order[rank], lists[rank], unfinished[rank]
        while len(done) < len(ops):
            op = ops[len(done)]
            needed = None
            if len(sends) > MOST_SENDS:
                needed = sends[0]
            elif op.kind in ("F", "B", "I"):
                needed = Op("RECV_F" if op.kind == "F" else "RECV_B", op.stage, op.microbatch)
                needed = needed if needed in received else None
            if needed is not None and needed not in arrived:
                waiting[rank] = needed
                break
            if len(sends) > MOST_SENDS:
                clocks[rank] = max(clocks[rank], arrived[sends.popleft()])
                continue
            start = end = clocks[rank]
            partner = find_partner(op)
            if partner is None:
                start = max(start, arrived[needed]) if needed is not None else start
                clocks[rank] = end = start + costs[op.stage].duration(op.kind)
                done.append(Timed(op, start, end))
                continue
            done.append(Timed(op, start, end))
            other = walk[partner.stage].rank
            if op.kind in ("SEND_F", "SEND_B"):
                queue = queues[Direction(rank, other)]
                queue.sent.append((partner, start))
                sends.append(partner)
            else:
                queue = queues[Direction(other, rank)]
                queue.posted.append(start)
                received.add(op)
            deliver(queue)
    for done in lists:
        for i, (op, start, _) in enumerate(done):
            if op.kind in ("RECV_F", "RECV_B"):
                done[i] = Timed(op, start, max(start, arrived.get(op, start)))
    stuck = {}
    for rank, op in waiting.items():
        mine = walk[op.stage].rank == rank
        stuck[rank] = op if mine else find_partner(op) or op
    return lists, stuck


def describe_stuck(stuck: dict[int, Op]) -> str:
    """Return the ranks that wait forever, with the send or receive that they wait for."""
    return ", ".join(f"rank {rank} at {op}" for rank, op in sorted(stuck.items()))


# ----------------------------------------------------------------------------------- validation


def validate_order(order: PipelineOrder, walk: Walk, num_microbatches: int) -> list[str]:
    """Return the problems of an order; empty if it can run.

    Every operation must run once, on its rank, after the operations it needs; each direction must
    receive its messages in the order in which they are sent; and the order must finish by the rules
    of `replay`.
    """
    problems = _check_complete(order, walk, num_microbatches)
    if not problems:
        problems = _check_needs(order, walk) + _check_pairs(order, walk)
    return problems or _check_finish(order, walk)


def _check_complete(order: PipelineOrder, walk: Walk, num_microbatches: int) -> list[str]:
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


def _check_needs(order: PipelineOrder, walk: Walk) -> list[str]:
    """Check that the operations each operation needs precede it on every rank."""
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
    """Return the operations that must precede an operation on its rank; B stands for I as well."""
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


def _check_pairs(order: PipelineOrder, walk: Walk) -> list[str]:
    """Check that messages of each direction are received in the order in which they are sent."""
    sent: dict[Direction, list[Op]] = defaultdict(list)
    received: dict[Direction, list[Op]] = defaultdict(list)
    for rank, ops in enumerate(order):
        for op in ops:
            partner = find_partner(op)
            if partner is None:
                continue
            other = walk[partner.stage].rank
            if op.kind in ("SEND_F", "SEND_B"):
                sent[Direction(rank, other)].append(partner)
            else:
                received[Direction(other, rank)].append(op)
    problems = []
    for pair, messages in sorted(sent.items()):
        for number, (a, b) in enumerate(zip(messages, received[pair], strict=True)):
            if a != b:
                problems.append(f"ranks {pair[0]} to {pair[1]}: message {number} is {a}, not {b}")
                break
    return problems


def _check_finish(order: PipelineOrder, walk: Walk) -> list[str]:
    """Check that no rank waits forever."""
    _, stuck = replay(order, walk, (StageCost(1.0, 1.0, 1.0),) * len(walk))
    return [f"all ranks wait for each other: {describe_stuck(stuck)}"] if stuck else []
