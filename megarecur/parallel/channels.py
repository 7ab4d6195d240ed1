"""Communicators of the messages between pipeline ranks, one for each direction.

A communicator delivers its messages in turn: on one for both directions, a send waits behind a
receive whose message another rank has yet to compute. nccl opens a communicator of two ranks per
group at their first message. So one group carries the messages to higher pipeline ranks and one
those to lower ranks, and no communicator has messages of two directions.

Over gloo nothing of a group waits for its other messages: there the group of the pipeline's other
operations carries messages to higher ranks as well. Each group takes four open files and more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from megarecur.plan.order import Direction
from megarecur.plan.walk import Walk


class Channels:
    """The communicators of one process's pipeline ranks.

    Args:
        pipelines: global ranks of the pipeline ranks, in their order, for every pipeline of the
            world. All processes create this object.
        own: index of this process's pipeline.
        timeout: of the groups.
        shared: this process's group of its pipeline; over gloo it carries messages, too.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        own: int,
        timeout: timedelta,
        shared: Any = None,
    ) -> None:
        self.ranks, self.opened = tuple(pipelines[own]), set[Direction]()

        def open_group() -> Any:
            # Every process names the groups of all pipelines. Synchronized among their members
            # alone, a group would be named by the number of groups that a process knows, which may
            # differ between members: each would wait under its own name.
            return [dist.new_group(list(ranks), timeout=timeout) for ranks in pipelines][own]

        shares = shared is not None and dist.get_backend(shared) == "gloo"
        with unbound():
            self.down = open_group()
            self.up = shared if shares else open_group()

    def group(self, sender: int, receiver: int) -> Any:
        """Return the process group of messages between two pipeline ranks."""
        return self.up if sender < receiver else self.down

    def open(self, walk: Walk, pp_rank: int, device: torch.device) -> None:
        """Open the communicators of a walk's messages; all its pipeline ranks must call this.

        The first message of a communicator waits until the other rank sends or receives it. Within
        an order that could be a circle of ranks, so all open theirs beforehand, in one sequence.
        """
        hops = {(a.rank, b.rank) for a, b in pairwise(walk) if a.rank != b.rank}
        both = {Direction(*pair) for a, b in hops for pair in ((a, b), (b, a))}
        for direction in sorted(both - self.opened):
            message = torch.zeros(1, device=device)
            if pp_rank == direction.sender:
                dist.send(message, self.ranks[direction.receiver], group=self.group(*direction))
            elif pp_rank == direction.receiver:
                dist.recv(message, self.ranks[direction.sender], group=self.group(*direction))
        self.opened |= both


@contextmanager
def unbound() -> Iterator[None]:
    """Create groups that open communicators when they are used.

    A world that is bound to its devices splits the communicator of a new group off its own. That
    takes all ranks of the world, and messages of both directions would share the communicator.
    """
    world = dist.group.WORLD
    bound = getattr(world, "bound_device_id", None)
    if world is None or bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound
