"""Collectives of small values along a binomial tree, for groups over gloo.

gloo reduces and gathers in rings, whose messages follow one another: 2(N - 1) of them among N
processes. Here a process exchanges at most log2(N) messages, with as many peers. Values are bytes
and integers, never pickles. On an NCCL group, values travel through the GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TAG = 7919
"""Tag of these messages, so that they match no others of the group."""


def gather_bytes(own: bytes, group: Any = None) -> list[bytes]:
    """Return the bytes of all ranks, in rank order, on the group's first rank; [] elsewhere."""
    rank, size, bit = group_rank(group), group_size(group), 1
    held = [own]
    while bit < size:
        if rank & bit:
            send_parts(held, rank - bit, group)
            return []
        if rank + bit < size:
            held += receive_parts(min(bit, size - rank - bit), rank + bit, group)
        bit *= 2
    return held


def scatter_bytes(parts: Sequence[bytes], group: Any = None) -> bytes:
    """Return this rank's part of the bytes that the group's first rank passes, one for each rank.

    Args:
        parts: ignored on other ranks.
    """
    rank, size = group_rank(group), group_size(group)
    held, bit = list(parts) if rank == 0 else [], 1 << max(size - 1, 0).bit_length()
    while bit := bit // 2:
        if rank % (2 * bit) == bit:
            held = receive_parts(min(bit, size - rank), rank - bit, group)
        elif rank % (2 * bit) == 0 and rank + bit < size:
            send_parts(held[bit:], rank + bit, group)
            held = held[:bit]
    return held[0]


def reduce_max(values: Tensor, group: Any = None) -> Tensor:
    """Return the elementwise maximum of a CPU tensor over all ranks; the tensor may change."""
    rank, size, bit = group_rank(group), group_size(group), 1
    values = values.to(device_of(group))
    found = torch.empty_like(values)
    while bit < size:
        if rank & bit:
            dist.send(values, global_rank(rank - bit, group), group, TAG)
            break
        if rank + bit < size:
            dist.recv(found, global_rank(rank + bit, group), group, TAG)
            torch.maximum(values, found, out=values)
        bit *= 2
    if size > 1:
        dist.broadcast(values, global_rank(0, group), group)
    return values.cpu()


def send_parts(parts: Sequence[bytes], peer: int, group: Any) -> None:
    """Send bytes to a rank of the group: their lengths, then all of them in one message."""
    to, device = global_rank(peer, group), device_of(group)
    dist.send(torch.tensor([len(part) for part in parts], device=device), to, group, TAG)
    if joined := bytearray().join(parts):
        dist.send(torch.frombuffer(joined, dtype=torch.uint8).to(device), to, group, TAG)


def receive_parts(count: int, peer: int, group: Any) -> list[bytes]:
    """Receive what a rank of the group sends by `send_parts`."""
    source, device = global_rank(peer, group), device_of(group)
    lengths = torch.empty(count, dtype=torch.int64, device=device)
    dist.recv(lengths, source, group, TAG)
    joined = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device)
    if joined.numel():
        dist.recv(joined, source, group, TAG)
    return [part.numpy().tobytes() for part in joined.cpu().split(lengths.tolist())]


def group_rank(group: Any = None) -> int:
    """Return this process's rank in a group; 0 without processes."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def group_size(group: Any = None) -> int:
    """Return the number of processes of a group; 1 without processes."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def device_of(group: Any = None) -> torch.device:
    """Return where a group's messages must lie."""
    on_gpu = dist.is_initialized() and dist.get_backend(group) == "nccl"
    return torch.device("cuda" if on_gpu else "cpu")


def global_rank(rank: int, group: Any) -> int:
    """Return the rank in the world of a group's rank."""
    return rank if group is None else dist.get_global_rank(group, rank)
