"""Run one pipeline rank's operations of an order; activations travel to the weights.

Buffers exist only while they are used. Adjacent stages of one rank pass values on directly. A value
that later steps read stays on a rank once it has arrived. So does the sum of its gradient, which
leaves with the stage that received the value.

Messages of one direction, from one rank to another, are delivered in turn; those of different
directions are independent (`parallel.channels`). `plan.order.replay` plays by the same rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarecur.parallel.linear import DeferredProducts
from megarecur.parallel.mesh import Mesh
from megarecur.plan.order import MOST_SENDS, Kind, Op
from megarecur.plan.walk import Stage, Walk
from megarecur.recurrence.layer_map import StackName

TIMEOUT = timedelta(minutes=10)
"""Timeout of a message; its sender may be compiling."""

Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
"""Function of (outputs, gradients of them); the gradient None belongs to a scalar of the
objective."""


AHEAD = 8
"""Post receives this many operations early on a CPU; a gloo sender starts only then. On a GPU the
order itself has them before the operation that runs when the message is sent. Posted earlier, they
could keep the allocator waiting, and with it the operation that lets the message be sent."""

Way = Literal["F", "B"]
"""Direction of a message: activations forward, gradients backward."""

SENDS: dict[Way, Kind] = {"F": "SEND_F", "B": "SEND_B"}
RECEIVES: dict[Way, Kind] = {"F": "RECV_F", "B": "RECV_B"}


class PipelineError(RuntimeError):
    """An operation failed here, or a message of another rank never arrived."""


class Program(Protocol):
    """The computation of the stages."""

    def shape(self, microbatch: int, stack: StackName) -> tuple[int, ...]:
        """Return the shape of the hidden state of a stack on this rank."""

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (outgoing hidden state, this stage's share of the objective or None).

        `reads` holds the values that the stage's steps may read; the values they write are added to
        it.
        """

    def forget(self, microbatch: int) -> None:
        """Discard the state of a micro batch after its last forward pass on this rank."""


@dataclass
class Held:
    """A value that later steps read, on this rank."""

    value: Tensor
    gradient: Tensor | None = None
    """Gradient summed over the stages of this rank and those that received the value from it."""

    def add(self, gradient: Tensor | None) -> None:
        """Add a share of the gradient."""
        if gradient is not None:
            self.gradient = gradient if self.gradient is None else self.gradient + gradient


@dataclass
class Kept:
    """State that a forward pass keeps for its backward pass."""

    x: Tensor | None
    """The leaf of the incoming hidden state."""
    out: Tensor | None
    objective: Tensor | None
    read: dict[str, tuple[Tensor, Held]] = field(default_factory=dict)
    """Leaves that stand for held values."""
    arrived: dict[str, Held] = field(default_factory=dict)
    written: dict[str, tuple[Tensor, Held]] = field(default_factory=dict)
    sent: dict[str, Held] = field(default_factory=dict)


class Pipeline:
    """The execution of one order on one rank for one optimizer step.

    Args:
        program: the computation of the stages.
        backward: computes gradients; None means forward only.
        deferred: holds the products of weight gradients that I postpones for W.
    """

    def __init__(
        self,
        mesh: Mesh,
        walk: Walk,
        program: Program,
        dtype: torch.dtype,
        backward: Backward | None = None,
        deferred: DeferredProducts | None = None,
    ) -> None:
        self.mesh, self.walk, self.program, self.dtype = mesh, walk, program, dtype
        self.backward, self.deferred = backward, deferred
        self.inbox: dict[tuple[Way, int, int], list[Tensor]] = {}
        """Messages that have arrived, or will when their receives finish; by direction, stage,
        micro batch."""
        self.outbox: dict[tuple[Way, int, int], list[Tensor]] = {}
        self.receives: dict[tuple[Way, int, int], list[Any]] = {}
        self.sends: list[tuple[Op, list[Any], list[Tensor]]] = []
        self.kept: dict[tuple[int, int], Kept] = {}
        self.held: defaultdict[int, dict[str, Held]] = defaultdict(dict)
        """Held values by micro batch and name."""
        self.left: dict[tuple[int, int], list[Any]] = {}
        """Postponed products for W."""
        self.runs: dict[Kind, Callable[[Stage, int], None]] = {
            "F": self.run_forward,
            "B": self.run_backward,
            "I": self.run_inputs,
            "W": self.run_weights,
            "SEND_F": partial(self.send, "F"),
            "SEND_B": partial(self.send, "B"),
            "RECV_F": partial(self.receive, "F"),
            "RECV_B": partial(self.receive, "B"),
        }
        self.most_live = 0
        """Maximum (stage, micro batch) pairs between F and the end of their backward pass at
        once."""
        self.bytes_sent = 0

    def run(self, ops: Sequence[Op]) -> None:
        """Run this rank's operations.

        Raises:
            PipelineError: the message names rank, stage, operation and micro batch.
        """
        for _ in self.run_in_turn(ops):
            pass

    def run_in_turn(self, ops: Sequence[Op]) -> Iterator[Op]:
        """Run this rank's operations, and yield each one that has ended; see `run`."""
        if self.mesh.channels is not None:
            self.mesh.channels.open(self.walk, self.mesh.pp_rank, self.mesh.device)
        for i, op in enumerate(ops):
            if self.mesh.device.type == "cpu":
                self.begin_receives(ops[i : i + AHEAD])
            self.run_one(op)
            yield op
        for op, works, _ in self.sends:
            self.wait(works, op)
        assert not (self.inbox or self.outbox or self.kept or self.left), (
            "the order left operations unfinished"
        )

    def begin_receives(self, ops: Sequence[Op]) -> None:
        """Post the receives of the next operations."""
        for op in ops:
            if op.kind in ("RECV_F", "RECV_B"):
                self.perform(op)

    def run_one(self, op: Op) -> None:
        """Run one operation at its place in the order."""
        self.perform(op)

    def perform(self, op: Op) -> None:
        """Run one operation; errors are annotated with it."""
        try:
            self.runs[op.kind](self.walk[op.stage], op.microbatch)
        except Exception as error:
            error.add_note(self.describe(op))
            raise

    def describe(self, op: Op) -> str:
        """Describe an operation and its rank."""
        return (
            f"rank {self.mesh.rank} (pipeline rank {self.mesh.pp_rank}), stage {op.stage}, "
            f"{op.kind} of micro batch {op.microbatch}"
        )

    # ------------------------------------------------------------------------------- computation

    def run_forward(self, stage: Stage, j: int) -> None:
        """F."""
        held = self.held[j]
        arrived = [] if stage.first else self.take("F", stage.index, j)
        kept = Kept(arrived[0] if arrived else None, None, None)
        graph = stage.backward and self.backward is not None
        if kept.x is not None and graph:
            kept.x.requires_grad_(stage.returns_x)
        held.update({n: Held(t) for n, t in zip(stage.receives, arrived[1:], strict=True)})
        needed = {name for step in stage.steps for name in step.reads} | set(stage.exits)
        for name in needed & held.keys():
            kept.read[name] = (held[name].value.detach().requires_grad_(graph), held[name])
        kept.arrived = {name: held[name] for name in stage.receives}
        reads = {name: leaf for name, (leaf, _) in kept.read.items()}
        with torch.set_grad_enabled(graph):
            kept.out, kept.objective = self.program.forward(stage, j, kept.x, reads)
        for name in {name for step in stage.steps for name in step.writes} | set(stage.leaves):
            held[name] = Held(reads[name].detach())
            kept.written[name] = (reads[name], held[name])
        if not stage.last:
            assert kept.out is not None
            kept.sent = {name: held[name] for name in stage.sends}
            message = [kept.out.detach(), *(held[name].value for name in stage.sends)]
            self.give("F", stage.index + 1, j, message, self.walk[stage.index + 1].rank)
        if graph:
            self.kept[stage.index, j] = kept
            self.most_live = max(self.most_live, len(self.kept) + len(self.left))
        if all(other.index <= stage.index for other in self.walk if other.rank == stage.rank):
            del self.held[j]
            self.program.forget(j)

    def run_backward(self, stage: Stage, j: int) -> None:
        """Run B, or I if products are deferred."""
        kept = self.kept.pop((stage.index, j))
        outputs: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if kept.objective is not None:
            outputs, gradients = [kept.objective], [None]
        following = None if stage.last else self.walk[stage.index + 1]
        if following is not None and following.sends_back:
            arrived = self.take("B", stage.index, j)
            if following.returns_x:
                assert kept.out is not None
                outputs.append(kept.out)
                gradients.append(arrived.pop(0))
            for name, gradient in zip(following.returns, arrived, strict=True):
                kept.sent[name].add(gradient)
        for tensor, value in kept.written.values():
            if value.gradient is not None:
                outputs.append(tensor)
                gradients.append(value.gradient)
        due = [i for i, tensor in enumerate(outputs) if tensor.requires_grad]
        assert self.backward is not None
        if due:
            self.backward([outputs[i] for i in due], [gradients[i] for i in due])
        for leaf, value in kept.read.values():
            value.add(leaf.grad)
        if stage.sends_back:
            back = [kept.x] if stage.returns_x else []
            message = [leaf.grad for leaf in back if leaf is not None]
            message += [kept.arrived[name].gradient for name in stage.returns]
            filled = [
                self.allocate(torch.zeros, j, stack) if gradient is None else gradient
                for stack, gradient in zip(stage.returning, message, strict=True)
            ]
            self.give("B", stage.index - 1, j, filled, self.walk[stage.index - 1].rank)

    def run_inputs(self, stage: Stage, j: int) -> None:
        """Run I: gradients of inputs; products of weight gradients are postponed for W."""
        assert self.deferred is not None
        with self.deferred.collect() as products:
            self.run_backward(stage, j)
        self.left[stage.index, j] = products

    def run_weights(self, stage: Stage, j: int) -> None:
        """W."""
        with torch.no_grad():
            for product in self.left.pop((stage.index, j)):
                product()

    # ---------------------------------------------------------------------------------- messages

    def give(self, way: Way, to: int, j: int, message: list[Tensor], rank: int) -> None:
        """Pass a message to a stage of this rank, or keep it for its SEND."""
        box = self.inbox if rank == self.mesh.pp_rank else self.outbox
        box[way, to, j] = message

    def take(self, way: Way, stage: int, j: int) -> list[Tensor]:
        """Return a message; wait for it if it has not arrived."""
        key = (way, stage, j)
        self.wait(self.receives.pop(key, []), Op(RECEIVES[way], stage, j))
        return self.inbox.pop(key)

    def send(self, way: Way, stage: Stage, j: int) -> None:
        """Start sending a stage's message to its neighbour."""
        to = stage.index + (1 if way == "F" else -1)
        tensors = [tensor.contiguous() for tensor in self.outbox.pop((way, to, j))]
        receiver = self.walk[to].rank
        peer, group = self.mesh.pipeline_peer(receiver), self.group(self.mesh.pp_rank, receiver)
        works = [dist.isend(tensor, peer, group=group) for tensor in tensors]
        self.bytes_sent += sum(tensor.nbytes for tensor in tensors)
        # The order was validated with this limit.
        if len(self.sends) == MOST_SENDS:
            begun, waited, _ = self.sends.pop(0)
            self.wait(waited, begun)
        self.sends.append((Op(SENDS[way], stage.index, j), works, tensors))

    def receive(self, way: Way, stage: Stage, j: int) -> None:
        """Start receiving a stage's message from its neighbour, unless already posted."""
        if (way, stage.index, j) in self.inbox:
            return
        source = stage.index - 1 if way == "F" else stage.index + 1
        sender = self.walk[source]
        stacks = stage.arriving if way == "F" else sender.returning
        peer, group = self.mesh.pipeline_peer(sender.rank), self.group(sender.rank, stage.rank)
        tensors = [self.allocate(torch.empty, j, stack) for stack in stacks]
        self.receives[way, stage.index, j] = [
            dist.irecv(tensor, peer, group=group) for tensor in tensors
        ]
        self.inbox[way, stage.index, j] = tensors

    def group(self, sender: int, receiver: int) -> Any:
        """Return the process group of messages from one pipeline rank to another."""
        assert self.mesh.channels is not None
        return self.mesh.channels.group(sender, receiver)

    def allocate(self, make: Callable[..., Tensor], j: int, stack: StackName) -> Tensor:
        """Return a new tensor for a message."""
        return make(self.program.shape(j, stack), dtype=self.dtype, device=self.mesh.device)

    def wait(self, works: Sequence[Any], op: Op) -> None:
        """Wait until messages are complete.

        Raises:
            PipelineError: the other rank has ended, or did not answer within the timeout.
        """
        for work in works:
            try:
                # With a timeout nccl blocks the host; its group has its own timeout.
                work.wait(TIMEOUT) if self.mesh.device.type == "cpu" else work.wait()
            except RuntimeError as error:
                raise PipelineError(f"{self.describe(op)} did not complete: {error}") from error
