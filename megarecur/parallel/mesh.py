"""The mesh of processes: (dp, pp, tp) with tp fastest. Passed as an argument, never global."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarecur.config.mesh import check_world
from megarecur.config.schema import Config
from megarecur.errors import MegarecurError, MeshError
from megarecur.parallel.regions import TensorParallel

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
    """The processes that hold the same part of the model; None: this one alone."""
    tp_group: Any = None
    """Those that share each matrix of a replica's stage; None: this one alone."""
    pp_group: Any = None
    """Those whose stages make one replica, at one place of tensor parallelism; None: this alone."""
    replica_group: Any = None
    """All processes of a replica: pipeline and tensor parallel; None: this one alone."""
    save_group: Any = None
    """All processes, over gloo: for checkpoints, which a thread of its own may be saving. None in a
    world of one process."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.pp * self.tp

    @property
    def shape(self) -> dict[str, int]:
        """Its sizes by name."""
        return {"dp": self.dp, "pp": self.pp, "tp": self.tp}

    @property
    def dp_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // (self.pp * self.tp)

    @property
    def pp_rank(self) -> int:
        """Which stages are its own."""
        return self.rank // self.tp % self.pp

    def pipeline_peer(self, pp_rank: int) -> int:
        """The global rank that runs another pipeline rank's stages for this one."""
        return self.rank + (pp_rank - self.pp_rank) * self.tp

    @property
    def tp_rank(self) -> int:
        """Which share of each matrix is its own."""
        return self.rank % self.tp

    def tensor_parallel(self, sequence: bool = False) -> TensorParallel:
        """What a model needs to know of the ranks that share its matrices."""
        return TensorParallel(self.tp_group, self.tp_rank, self.tp, sequence and self.tp > 1)

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        """Sum in place over the replicas."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def sum_over_tp(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that share matrices."""
        if self.tp > 1:
            dist.all_reduce(tensor, group=self.tp_group)
        return tensor

    def sum_over_replica(self, tensor: Tensor) -> Tensor:
        """Sum in place over the pipeline and tensor-parallel ranks of a replica."""
        if self.pp * self.tp > 1:
            dist.all_reduce(tensor, group=self.replica_group)
        return tensor

    def sum_over_world(self, tensor: Tensor) -> Tensor:
        """Sum in place over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_world(self, value: int) -> int:
        """The largest of one integer per process."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def exchange(self, tensor: Tensor, pp_rank: int) -> Tensor:
        """What another pipeline rank has in place of a tensor, which it is given in turn."""
        found, peer = torch.empty_like(tensor), self.pipeline_peer(pp_rank)
        tensor = tensor.contiguous()
        if self.pp_rank < pp_rank:  # nccl runs one after the other: not both may send first.
            dist.send(tensor, peer, group=self.pp_group)
            dist.recv(found, peer, group=self.pp_group)
        else:
            dist.recv(found, peer, group=self.pp_group)
            dist.send(tensor, peer, group=self.pp_group)
        return found

    def broadcast_over_pp(self, tensor: Tensor, pp_rank: int) -> Tensor:
        """A pipeline rank's values on all of them, in place."""
        if self.pp > 1:
            dist.broadcast(tensor, self.pipeline_peer(pp_rank), group=self.pp_group)
        return tensor

    def gather_over_pp(self, value: Any) -> list[Any]:
        """The values of the pipeline ranks that work with this one, in their order."""
        if self.pp == 1:
            return [value]
        values: list[Any] = [None] * self.pp
        dist.all_gather_object(values, value, group=self.pp_group)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.world == 1:
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
        if mesh.world == 1:
            raise
        error = failure
    raise_first(error, mesh)


@contextmanager
def told_where(mesh: Mesh, what: str) -> Iterator[None]:
    """Have errors tell on which rank, and in what, they happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"rank {mesh.rank} (pipeline rank {mesh.pp_rank}), {what}")
        raise


def raise_first(error: Exception | None, mesh: Mesh) -> None:
    """Raise the first rank's error on every rank, if any has one; collective."""
    errors = [e for e in mesh.gather_objects(error) if e is not None]
    if errors:
        raise errors[0]


def join_slurm_step() -> None:
    """Set torchrun's variables from Slurm's, where `srun` started this process and its peers.

    A step of one task is left alone: that process is by itself, or a launcher of others. The port
    follows from job and step, so that those sharing a node keep apart; MASTER_ADDR and MASTER_PORT
    that are set already are used.

    Raises:
        MeshError: Slurm cannot say which node comes first.
    """
    environ = os.environ
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    environ.setdefault("MASTER_PORT", str(20_000 + (job * 31 + step) % 12_000))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = first_node(environ["SLURM_STEP_NODELIST"])


def first_node(nodes: str) -> str:
    """The first of a list as Slurm writes it, such as `n[3-5,9]`.

    Raises:
        MeshError: scontrol is missing or refuses the list.
    """
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise MeshError(
            f"{' '.join(command)} did not name the first node ({said}); set MASTER_ADDR to it"
        ) from None


def node_name() -> str:
    """What Slurm calls this node, or else the machine's own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def world_size() -> int:
    """Number of processes, by the process group or torchrun's variables."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def agree_on_devices(store: Any, rank: int, world: int, kind: str, problem: str) -> None:
    """Wait until every process has said what it found; collective over the store, as processes on
    unlike devices do not even meet in a process group.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world: how many there are.
        kind: type of its device, "" for none.
        problem: why it has none.

    Raises:
        MeshError: on every rank, naming all without a device, or without a GPU that others have.
    """
    store.set(f"device/{rank}", json.dumps([node_name(), kind, problem]))
    if rank == 0:
        said = [json.loads(store.get(f"device/{other}")) for other in range(world)]
        store.set("device/verdict", judge_devices(said))
    verdict = store.get("device/verdict").decode()
    if not verdict:
        return
    told, deadline = store.add("device/told", 1), time.monotonic() + 10
    # The store may end with rank 0: not before the others have read it.
    while rank == 0 and told < world and time.monotonic() < deadline:
        time.sleep(0.02)
        told = store.add("device/told", 0)
    raise MeshError(verdict)


def judge_devices(said: Sequence[tuple[str, str, str]]) -> str:
    """What is wrong with the (node, kind of device, problem) of each rank; "" if nothing."""
    lines = [
        f"{host} (rank {rank}): {problem}"
        for rank, (host, _, problem) in enumerate(said)
        if problem
    ]
    if any(kind == "cuda" for _, kind, _ in said):
        lines += [
            f"{host} (rank {rank}): torch finds no CUDA device, which other processes have; leave "
            "the node out, or set train.device=cpu"
            for rank, (host, kind, _) in enumerate(said)
            if kind == "cpu"
        ]
    return "\n  ".join(lines)


def take_device(device: torch.device) -> torch.device:
    """Make a device that of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def open_mesh(config: Config) -> Iterator[Mesh]:
    """This process's mesh; the process group ends with the context, unless it was there before.

    The world is that of the process group, torchrun or the Slurm step, in this order.

    Raises:
        MeshError: a world that does not fit the config, or processes without the device they need.
    """
    join_slurm_step()
    world = world_size()
    check_world(config, world)
    if world == 1 or dist.is_initialized():
        device = take_device(pick_device(config.train.device))
        if not dist.is_initialized():
            yield Mesh(device=device)
            return
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    found, problem = None, ""
    try:
        found = pick_device(config.train.device)
    except MeshError as error:
        problem = str(error)
    agree_on_devices(store, rank, world, found.type if found else "", problem)
    assert found is not None, "a rank without a device is an error of all"
    device = take_device(found)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def build_mesh(config: Config, device: torch.device) -> Mesh:
    """The mesh over the process group that exists; collective."""
    tp, pp = config.parallel.tensor, config.parallel.pipeline
    world, rank = dist.get_world_size(), dist.get_rank()
    ranks = torch.arange(world).view(-1, pp, tp)
    dp_group = pick_group(ranks.movedim(0, -1).flatten(0, -2).tolist(), rank)
    tp_group = pick_group(ranks.flatten(0, -2).tolist(), rank)
    pp_group = pick_group(ranks.movedim(1, -1).flatten(0, -2).tolist(), rank)
    replica_group = (
        tp_group
        if pp == 1
        else pp_group
        if tp == 1
        else pick_group(ranks.flatten(1).tolist(), rank)
    )
    return Mesh(len(ranks), pp, tp, rank, device, dp_group, tp_group, pp_group, replica_group)


def pick_group(members: list[list[int]], rank: int) -> Any:
    """This process's group, of groups that share out the world; None: it is alone. Collective."""
    if len(members[0]) == 1:
        return None
    if len(members) == 1:
        return dist.group.WORLD
    groups = [dist.new_group(each) for each in members]
    return next(group for group, each in zip(groups, members, strict=True) if rank in each)


@contextmanager
def saving_apart(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh with a process group for saving, which ends with the context."""
    group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
    try:
        yield replace(mesh, save_group=group)
    finally:
        dist.destroy_process_group(group)
