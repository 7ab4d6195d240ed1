"""Communicators of pipelines: opened by all ranks, whatever other groups each of them knows."""

from datetime import timedelta

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


def test_channels_open_where_ranks_know_different_groups(world) -> None:
    assert world(4).run(exchange_over, [[0, 2], [1, 3]]) == [[2.0], [3.0], [0.0], [1.0]]
