"""Collectives along a tree: every size of the world, also of groups that do not begin at rank 0."""

import pytest
import torch
import torch.distributed as dist

from megarecur.parallel.tree import gather_bytes, reduce_max, scatter_bytes


def part_of(rank: int) -> bytes:
    """Nothing for every third rank."""
    return bytes([rank]) * (rank % 3 * 5)


def collect(members: list[int]) -> object:
    """What this rank gathers, is sent and finds as maximum; None outside the group."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    rank = dist.get_rank(group)
    gathered = gather_bytes(part_of(rank), group)
    own = scatter_bytes([b"to%d" % k for k in range(len(members))] if rank == 0 else [], group)
    found = reduce_max(torch.tensor([rank, -rank, 7]), group)
    return gathered, own, found.tolist()


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [1, 2, 3], [2, 3], [1]])
def test_values_reach_every_rank_of_a_group(world, members) -> None:
    count, found = len(members), world(4).run(collect, members)
    for rank, answer in enumerate(found):
        if rank not in members:
            assert answer is None
            continue
        place = members.index(rank)
        parts = [part_of(k) for k in range(count)] if place == 0 else []
        assert answer == (parts, b"to%d" % place, [count - 1, 0, 7])
