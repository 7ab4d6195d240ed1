"""Communicators of pipelines: opened by all ranks, whatever other groups each of them knows."""

from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist

from megarecur.parallel.channels import Channels


def exchange_over(pipelines: list[list[int]]) -> list[float]:
    """Open channels where ranks know different numbers of groups; return what was received."""
    rank = dist.get_rank()
    dist.new_group([2, 3])
    own = next(k for k, members in enumerate(pipelines) if rank in members)
    channels, (low, high) = Channels(pipelines, own, timedelta(seconds=60)), pipelines[own]
    found = torch.zeros(1)
    for sender, receiver in ((0, 1), (1, 0)):
        group = channels.group(sender, receiver)
        if rank == pipelines[own][sender]:
            dist.send(torch.tensor([float(rank)]), (low, high)[receiver], group=group)
        else:
            dist.recv(found, (low, high)[sender], group=group)
    return found.tolist()


def share_group(pipelines: list[list[int]]) -> list[float]:
    """Send a message upwards, and reduce beside it, over the pipeline's own group."""
    rank, own = dist.get_rank(), dist.get_rank() // 2
    shared = [dist.new_group(ranks) for ranks in pipelines][own]
    channels = Channels(pipelines, own, timedelta(seconds=60), shared)
    assert channels.group(0, 1) is shared and channels.group(1, 0) is not shared
    low, high = pipelines[own]
    found, total = torch.zeros(1), torch.ones(1)
    if rank == low:
        # The message is under way while the group reduces.
        message = dist.isend(torch.tensor([5.0]), high, group=channels.group(0, 1))
        dist.all_reduce(total, group=shared)
        message.wait()
    else:
        dist.all_reduce(total, group=shared)
        dist.recv(found, low, group=channels.group(0, 1))
    return [*found.tolist(), *total.tolist()]


def test_over_gloo_the_group_of_a_pipeline_carries_messages(world) -> None:
    sent, received = [0.0, 2.0], [5.0, 2.0]
    assert world(4).run(share_group, [[0, 1], [2, 3]]) == [sent, received, sent, received]


def open_as_on_nccl() -> int:
    """Number of groups among those for both directions and that of the pipeline."""
    shared = dist.new_group([0, 1])
    with mock.patch.object(dist, "get_backend", lambda group: "nccl"):
        channels = Channels([[0, 1]], 0, timedelta(seconds=60), shared)
    return len({shared, channels.group(0, 1), channels.group(1, 0)})


def test_over_nccl_each_direction_has_a_group_without_collectives(world) -> None:
    assert world(2).run(open_as_on_nccl) == [3, 3]


def test_channels_open_where_ranks_know_different_groups(world) -> None:
    assert world(4).run(exchange_over, [[0, 2], [1, 3]]) == [[2.0], [3.0], [0.0], [1.0]]
