"""The mesh of processes: (dp, pp, tp) with tp fastest. Passed as an argument, never global."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.errors import MegarecurError, MeshError

TIMEOUT = timedelta(minutes=10)
SAVE_TIMEOUT = timedelta(minutes=30)
"""Ranks may write checkpoints at very different speeds."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dp_group: Any = None
    """None in a world of one process."""
    save_group: Any = None
    """All processes, over gloo: for checkpoints, which a thread of its own may be saving. None in a
    world of one process."""

    @property
    def dp_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // (self.pp * self.tp)

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        """Sum in place over the replicas."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def max_over_world(self, value: int) -> int:
        """The largest of one integer per process."""
        if self.dp_group is None:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.dp_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.dp_group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values


@contextmanager
def same_error(mesh: Mesh) -> Iterator[None]:
    """Raise on every rank what a user's mistake or a full disk raised on any of them.

    The body must not communicate. Without this, ranks without the error would wait for ever.
    """
    error: Exception | None = None
    try:
        yield
    except (MegarecurError, OSError) as failure:
        if mesh.dp_group is None:
            raise
        error = failure
    raise_first(error, mesh)


def raise_first(error: Exception | None, mesh: Mesh) -> None:
    """Raise the first rank's error on every rank, if any has one; collective."""
    errors = [e for e in mesh.gather_objects(error) if e is not None]
    if errors:
        raise errors[0]


def world_size() -> int:
    """Number of processes, by the process group or torchrun's variables."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world(config: Config, world: int) -> None:
    """Refuse a world that does not fit the config, before any process group is made.

    Raises:
        MeshError: naming the numbers.
    """
    replica = config.parallel.tensor * config.parallel.pipeline
    if world % replica:
        raise MeshError(
            f"{world} processes do not divide into replicas of tensor={config.parallel.tensor} x "
            f"pipeline={config.parallel.pipeline} = {replica}; start a multiple of {replica}"
        )
    dp, batch, micro = (
        world // replica,
        config.train.global_batch_size,
        config.train.micro_batch_size,
    )
    if batch % (dp * micro):
        fitting = [d for d in range(1, batch // micro + 1) if (batch // micro) % d == 0]
        raise MeshError(
            f"train.global_batch_size={batch} does not divide into {dp} replicas x "
            f"train.micro_batch_size={micro}; use {', '.join(map(str, fitting))} replica(s), "
            "or another micro batch size"
        )


def pick_device(name: str) -> torch.device:
    """`auto` is this process's CUDA device where there is one.

    Raises:
        MeshError: cuda asked for, but not there; more processes than devices.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise MeshError("train.device=cuda, but torch finds no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise MeshError(
            f"process {index} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start at most that many, or set train.device=cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def open_mesh(config: Config) -> Iterator[Mesh]:
    """This process's mesh; the process group ends with the context, unless it was there before.

    Raises:
        MeshError: a world that does not fit the config.
    """
    world = world_size()
    check_world(config, world)
    device = pick_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
        return
    if world == 1:
        yield Mesh(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def build_mesh(config: Config, device: torch.device) -> Mesh:
    """The mesh over the process group that exists."""
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    world, rank = dist.get_world_size(), dist.get_rank()
    return Mesh(world // (pp * tp), pp, tp, rank, device, dist.group.WORLD)


@contextmanager
def saving_apart(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh with a process group for saving, which ends with the context."""
    group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
    try:
        yield replace(mesh, save_group=group)
    finally:
        dist.destroy_process_group(group)
