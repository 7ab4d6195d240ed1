"""Collectives of Python objects, each signed with the secret of the job.

Objects travel as pickles, which run code where they are loaded, and gloo and NCCL do not
authenticate their peers: who connects at the right moment may take the place of a rank. So nothing
is unpickled without a signature by the job's secret (`megarecur.private.SECRET_VARIABLE`).
"""

from __future__ import annotations

import hmac
import os
import pickle
from typing import Any

import torch
import torch.distributed as dist

from megarecur.errors import MeshError
from megarecur.parallel.tree import device_of, global_rank, group_rank, group_size
from megarecur.private import SECRET_VARIABLE

DIGEST = "sha256"
DIGEST_BYTES = 32
MAX_BYTES = 1 << 31
"""Largest message in bytes; a stranger's may claim any length."""


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the objects of all ranks of a group on each of them, in rank order; collective.

    Raises:
        MeshError: a message has no signature by the secret of this job.
    """
    if group_size(group) == 1:
        return [value]
    own, device = sign(value), device_of(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group_size(group))]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device), group)
    counts = [check_length(int(length), rank) for rank, length in enumerate(lengths)]
    padded = torch.frombuffer(bytearray(own.ljust(max(counts))), dtype=torch.uint8).to(device)
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group)
    return [
        read_signed(message[:count].cpu().numpy().tobytes(), rank)
        for rank, (message, count) in enumerate(zip(found, counts, strict=True))
    ]


def broadcast_object(value: Any, source: int = 0, group: Any = None) -> Any:
    """Return the object of one rank of a group on each of them; collective.

    Args:
        value: ignored on other ranks.
        source: rank in the group.

    Raises:
        MeshError: the message has no signature by the secret of this job.
    """
    if group_size(group) == 1:
        return value
    device, sends = device_of(group), group_rank(group) == source
    own = sign(value) if sends else b""
    length = torch.tensor([len(own)], device=device)
    dist.broadcast(length, global_rank(source, group), group)
    count = check_length(int(length), source)
    data = bytearray(own) if sends else bytearray(count)
    message = torch.frombuffer(data, dtype=torch.uint8).to(device)
    dist.broadcast(message, global_rank(source, group), group)
    return value if sends else read_signed(message.cpu().numpy().tobytes(), source)


def sign(value: Any) -> bytes:
    """Return an object as bytes: the signature, then the pickle."""
    data = pickle.dumps(value)
    return hmac.digest(secret(), data, DIGEST) + data


def read_signed(message: bytes, rank: int) -> Any:
    """Return the object in a message that `sign` has made; nothing else is unpickled.

    Args:
        rank: sender in the group, for the error.

    Raises:
        MeshError: the signature is not by the secret of this job.
    """
    signature, data = message[:DIGEST_BYTES], message[DIGEST_BYTES:]
    if not hmac.compare_digest(signature, hmac.digest(secret(), data, DIGEST)):
        raise MeshError(
            f"the message of rank {rank} of a group is not signed with the secret of this job and "
            f"was not read; set {SECRET_VARIABLE} to the same value on all ranks; if it is the "
            "same, another process has taken the place of the rank: run on a network that only "
            "the job reaches"
        )
    return pickle.loads(data)


def check_length(count: int, rank: int) -> int:
    """Return the length of a message in bytes.

    Raises:
        MeshError: no rank sends a message of this length.
    """
    if not DIGEST_BYTES <= count <= MAX_BYTES:
        raise MeshError(
            f"rank {rank} of a group announces a message of {count} bytes; another process may "
            "have taken its place: run on a network that only the job reaches"
        )
    return count


def secret() -> bytes:
    """Return the secret of this job; b"" if what started it has made none."""
    return os.environ.get(SECRET_VARIABLE, "").encode()
