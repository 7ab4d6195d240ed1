"""The mesh of processes: (dp, pp, tp) with tp fastest. Passed as an argument, never global.

Processes of dp hold the same part of the model. With context parallelism, each `cp` consecutive
ones of them share their sequences: dp_rank = reader * cp + cp_rank.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from xxhash import xxh3_64_intdigest

from megarecur.config.mesh import check_world
from megarecur.config.run import Config
from megarecur.errors import MegarecurError, MeshError
from megarecur.files import raise_file_limit
from megarecur.parallel.channels import Channels
from megarecur.parallel.context import ContextParallel
from megarecur.parallel.objects import broadcast_object, gather_objects
from megarecur.parallel.regions import TensorParallel
from megarecur.parallel.tree import reduce_max
from megarecur.reading import parse_json

log = logging.getLogger(__name__)

# torch 2.13 renames both, and warns of the old names.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

T = TypeVar("T")

STORE_VARIABLE = "MEGARECUR_STORE"
"""Environment variable with the file in which the ranks of one machine meet; `launch` sets it."""
OWN_DESCRIPTORS = 256
"""Open files of a process that do not grow with the world: corpora, logs, peers of its groups."""
TIMEOUT = timedelta(minutes=10)
PATIENCE = 20.0
"""Seconds of waiting for other processes before a warning names the missing ones."""
SAVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of saving; ranks may write checkpoints at very different speeds."""
EXCHANGE_TAG = 7927
"""Tag of tensors that two pipeline ranks exchange, so that they match no message of a pipeline."""


@dataclass(frozen=True)
class Peers:
    """Ranks that hold parts of the same tensors, and this rank's place among them."""

    group: Any
    """Their process group; None if this is the only one."""
    rank: int
    size: int
    device: torch.device

    @property
    def ranks(self) -> range:
        """The places of all."""
        return range(self.size)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every peer's value, in their order."""
        return gather_objects(value, self.group) if self.size > 1 else [value]

    def exchange(self, sent: Tensor, counts: list[int], received: list[int]) -> Tensor:
        """Send the next `counts[i]` elements of a vector to each peer i.

        Returns:
            What the peers sent, `received[i]` elements each, one after the other.
        """
        if self.size == 1:
            return sent
        found = sent.new_empty(sum(received))
        dist.all_to_all_single(found, sent, received, counts, group=self.group)
        return found


@dataclass(frozen=True)
class Mesh:
    """The position of this process in the mesh, and its process groups."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dp_group: Any = None
    """Processes that hold the same part of the model; None if this is the only one."""
    tp_group: Any = None
    """Processes that share each matrix of a replica's stage; None if this is the only one."""
    pp_group: Any = None
    """Processes whose stages form one replica, at one tensor-parallel rank; None if this is the
    only one."""
    replica_group: Any = None
    """All processes of a replica, pipeline and tensor parallel; None if this is the only one."""
    shards: int = 1
    """Number of replicas that shard their state among themselves, neighbours."""
    shard_group: Any = None
    """Processes of these replicas that hold the same part of the model; None if this is the only
    one."""
    across_group: Any = None
    """Processes of all such groups that hold the same shard; None if this is the only one."""
    state_group: Any = None
    """Processes that hold shards of the same blocks: those of the shard group, with their
    tensor-parallel ranks; None if this is the only one."""
    save_group: Any = None
    """All processes, over gloo, for checkpoints that a separate thread may save. None in a world of
    one process."""
    host_group: Any = None
    """All processes, over gloo, for numbers that the host reads; None: the default group is of that
    kind, or this is the only process."""
    channels: Channels | None = None
    """Communicators of the messages between pipeline ranks; None if there is only one."""
    cp: int = 1
    """Processes that share each sequence, of those of dp."""
    cp_group: Any = None
    """These processes, in the order of their positions; None if this is the only one."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.pp * self.tp

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the axes by name."""
        return {"dp": self.dp, "pp": self.pp, "tp": self.tp, "cp": self.cp}

    @property
    def dp_rank(self) -> int:
        """Index of this process among those that hold the same part of the model."""
        return self.rank // (self.pp * self.tp)

    @property
    def shard_rank(self) -> int:
        """Index of this process's shard."""
        return self.dp_rank % self.shards

    @property
    def readers(self) -> int:
        """Number of parts into which samples are divided; the processes of a context read the
        same."""
        return self.dp // self.cp

    @property
    def reader(self) -> int:
        """Index of the part of the samples that this process reads."""
        return self.dp_rank // self.cp

    @property
    def cp_rank(self) -> int:
        """Context-parallel rank of this process, which decides its positions."""
        return self.dp_rank % self.cp

    @property
    def pp_rank(self) -> int:
        """Pipeline rank of this process, which decides its stages."""
        return self.rank // self.tp % self.pp

    def pipeline_peer(self, pp_rank: int) -> int:
        """Return the global rank that runs another pipeline rank's stages for this process."""
        return self.rank + (pp_rank - self.pp_rank) * self.tp

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank of this process, which decides its share of each matrix."""
        return self.rank % self.tp

    def peers(self, sharded: bool) -> Peers:
        """Return the ranks that hold parts of the same matrices: the tensor-parallel ones, and, if
        `sharded`, those of the shard group too."""
        if not sharded:
            return Peers(self.tp_group, self.tp_rank, self.tp, self.device)
        rank, size = self.shard_rank * self.tp + self.tp_rank, self.shards * self.tp
        return Peers(self.state_group, rank, size, self.device)

    def tensor_parallel(self, sequence: bool = False) -> TensorParallel:
        """Return what a model needs to know of the ranks that share its matrices."""
        return TensorParallel(self.tp_group, self.tp_rank, self.tp, sequence and self.tp > 1)

    def context_parallel(self) -> ContextParallel:
        """Return what a model needs to know of the ranks that share its sequences."""
        return ContextParallel(self.cp_group, self.cp_rank, self.cp)

    def sum_over_dp(self, tensor: Tensor) -> Tensor:
        """Sum in place over the processes that hold the same part of the model."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def start_sum_over_dp(self, tensor: Tensor) -> Any:
        """Begin to sum in place over the replicas; returns what to wait for, None if nothing."""
        if self.dp == 1:
            return None
        return dist.all_reduce(tensor, group=self.dp_group, async_op=True)

    def start_gather(self, whole: Tensor, own: Tensor) -> Any:
        """Begin to put together the shards of a vector; returns what to wait for."""
        return _gather(whole, own, group=self.shard_group, async_op=True)

    def start_reduce_scatter(self, own: Tensor, whole: Tensor) -> Any:
        """Begin to sum a vector over the replicas that shard state; each gets its shard of it.
        Returns what to wait for."""
        return _reduce_scatter(own, whole, group=self.shard_group, async_op=True)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Sum in place over the replicas that shard state among themselves."""
        if self.shards > 1:
            dist.all_reduce(tensor, group=self.shard_group)
        return tensor

    def start_sum_over_groups(self, tensor: Tensor) -> Any:
        """Begin to sum in place over the groups of replicas that shard state; returns what to wait
        for, None if nothing."""
        if self.dp == self.shards:
            return None
        return dist.all_reduce(tensor, group=self.across_group, async_op=True)

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
        """Return the largest of one integer per process, without the device."""
        if self.world == 1:
            return value
        return int(reduce_max(torch.tensor([value]), self.host_group))

    def count_over_world(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, without the device."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, group=self.host_group)
        sums: list[float] = tensor.tolist()
        return sums

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return the value of one rank on every rank."""
        return broadcast_object(value, source, self.host_group) if self.world > 1 else value

    def first_over_world(self, value: T | None) -> T | None:
        """Return the value of the first rank that has one on every rank; None if no rank has.

        Costs one reduction of one number; a value is sent only if there is one.
        """
        if self.world == 1:
            return value
        before_end = self.max_over_world(0 if value is None else self.world - self.rank)
        if not before_end:
            return None
        found: T = self.broadcast_object(value, self.world - before_end)
        return found

    def agrees_over_world(self, text: str) -> bool:
        """Return True if all ranks pass the same text; one reduction of two numbers."""
        if self.world == 1:
            return True
        number = xxh3_64_intdigest(text) >> 2  # fits a signed integer, negated too
        extremes = torch.tensor([number, -number])
        largest, smallest = reduce_max(extremes, self.host_group).tolist()
        return bool(largest == -smallest)

    def exchange(self, tensor: Tensor, pp_rank: int) -> Tensor:
        """Exchange tensors with another pipeline rank; returns its tensor."""
        found, peer = torch.empty_like(tensor), self.pipeline_peer(pp_rank)
        tensor = tensor.contiguous()
        # nccl runs messages in order, so only one of the two may send first.
        if self.pp_rank < pp_rank:
            dist.send(tensor, peer, self.pp_group, EXCHANGE_TAG)
            dist.recv(found, peer, self.pp_group, EXCHANGE_TAG)
        else:
            dist.recv(found, peer, self.pp_group, EXCHANGE_TAG)
            dist.send(tensor, peer, self.pp_group, EXCHANGE_TAG)
        return found

    def broadcast_over_pp(self, tensor: Tensor, pp_rank: int) -> Tensor:
        """Copy a pipeline rank's values to all pipeline ranks, in place."""
        if self.pp > 1:
            dist.broadcast(tensor, self.pipeline_peer(pp_rank), group=self.pp_group)
        return tensor

    def gather_over_pp(self, value: Any) -> list[Any]:
        """Return the values of this process's pipeline ranks, in their order."""
        return gather_objects(value, self.pp_group) if self.pp > 1 else [value]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        return gather_objects(value, self.host_group) if self.world > 1 else [value]


@contextmanager
def same_error(mesh: Mesh) -> Iterator[None]:
    """Raise a user error or a full disk of any rank on every rank.

    The body must not communicate. Otherwise, ranks without the error would wait forever.
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
def annotate_rank_errors(mesh: Mesh, what: str) -> Iterator[None]:
    """Annotate errors with their rank and operation."""
    try:
        yield
    except Exception as error:
        error.add_note(f"rank {mesh.rank} (pipeline rank {mesh.pp_rank}), {what}")
        raise


def raise_first(error: Exception | None, mesh: Mesh) -> None:
    """Raise the error of the first rank that has one on every rank; collective."""
    first = mesh.first_over_world(error)
    if first is not None:
        raise first


def join_slurm_step() -> None:
    """Set torchrun's variables from Slurm's, if `srun` started this process and its peers.

    A step of one task is left unchanged: that process runs alone or launches others. The port
    derives from job and step, so that jobs sharing a node use different ports. Existing values of
    MASTER_ADDR and MASTER_PORT are used.

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
    """Return the first node of a Slurm node list, such as `n[3-5,9]`.

    Raises:
        MeshError: scontrol is missing or rejects the list.
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
    """Return Slurm's name of this node, or else the hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def world_size() -> int:
    """Return the number of processes, from the process group or torchrun's variables.

    Raises:
        MeshError: WORLD_SIZE is not a number.
    """
    return dist.get_world_size() if dist.is_initialized() else read_number("WORLD_SIZE", 1)


def check_variables(world: int) -> None:
    """Reject a world that was never started: WORLD_SIZE is set, but the other variables do not fit.

    Raises:
        MeshError: the message names the variables that are missing or do not fit.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    rank = read_number("RANK", 0)
    if missing or rank >= world:
        fault = f"{' and '.join(missing)} not" if missing else f"RANK={rank} is not below it"
        raise MeshError(
            f"WORLD_SIZE={world} is set in the environment, but {fault}; unset WORLD_SIZE to run "
            "one process, or start several with `megarecur launch --nproc N`"
        )


def read_number(name: str, default: int) -> int:
    """Read an integer variable of torchrun.

    Raises:
        MeshError: the value is not a number.
    """
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise MeshError(f"{name}={text} in the environment is not a number; unset or correct it")
    return int(text)


def meet(world: int, patience: float = PATIENCE) -> tuple[Any, int]:
    """Wait for all processes of the world that torchrun's variables describe; return (store, rank).

    Every `patience` seconds, a warning names the missing ranks.

    Raises:
        MeshError: some ranks do not appear, or the port of rank 0 is taken.
    """
    rank, port = read_number("RANK", 0), read_number("MASTER_PORT", 0)
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    hint = (
        f"(WORLD_SIZE={world}, RANK={rank} in the environment; if this process should run alone, "
        "unset them)"
    )
    missing = "rank 0" if rank else "the store"
    try:
        with repeated(
            patience, lambda: log.warning("waiting for %s at %s %s", missing, place, hint)
        ):
            if file := os.environ.get(STORE_VARIABLE):
                place = file
                store = dist.PrefixStore("megarecur", dist.FileStore(file, world))
            elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent's
                store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
            else:
                tcp = open_store(os.environ["MASTER_ADDR"], port, world, rank == 0)
                store = dist.PrefixStore("megarecur", tcp)
    except (RuntimeError, ValueError) as error:  # torch's, for whatever goes wrong
        reason = str(error).splitlines()[0]
        raise MeshError(
            f"MASTER_ADDR and MASTER_PORT {place}: rank {rank} cannot "
            f"{'reach rank 0 there' if rank else 'listen there'} ({reason}) {hint}"
        ) from None
    store.set_timeout(TIMEOUT)
    store.set(f"here/{rank}", "")
    arrived = store.add("arrived", 1)
    started = warned = time.monotonic()
    while rank == 0 and arrived < world:
        arrived, now = store.add("arrived", 0), time.monotonic()
        if now - warned > patience or now - started > TIMEOUT.total_seconds():
            absent = [other for other in range(world) if not store.check([f"here/{other}"])]
            named = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            if now - started > TIMEOUT.total_seconds():
                raise MeshError(f"{named} did not connect to {place} within {TIMEOUT} {hint}")
            log.warning("waiting for %s at %s %s", named, place, hint)
            warned = now
        time.sleep(0.02)
    return store, rank


def open_store(address: str, port: int, world: int, listen: bool) -> dist.TCPStore:
    """Return a store at a TCP port; what is read from it is never unpickled.

    Args:
        listen: whether this process holds the store. Torch would listen on every interface of the
            machine; this listens on that of `address`.

    Raises:
        RuntimeError: torch cannot listen there, or reach it in time.
    """
    listener = listen_on(address, port) if listen else None
    return dist.TCPStore(
        address,
        port,
        world,
        listen,
        TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def listen_on(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens on the interface of an address.

    None if other machines may know that interface by another address: a host name that stands for a
    loopback address on its own machine, or an address that is translated on the way.

    Raises:
        RuntimeError: the port is taken.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None  # torch reports it
    host = str(place[0])
    if host.startswith("127.") and host != address and address != "localhost":
        return None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise RuntimeError(f"{error.strerror} ({address}:{port})") from None
    return listener


@contextmanager
def repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Run an action every `seconds` seconds while the context lasts."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            action()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def pick_device(name: str) -> torch.device:
    """Return the device by name; `auto` is this process's CUDA device if there is one.

    Raises:
        MeshError: another name than auto, cpu or cuda; cuda asked for, but not there; more
            processes than devices.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise MeshError(f"device {name!r} is unknown; set it to auto, cpu or cuda (choose GPUs by "
                        "CUDA_VISIBLE_DEVICES)")  # fmt: skip
    if name == "cuda" and not torch.cuda.is_available():
        raise MeshError("train.device=cuda, but torch finds no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise MeshError(
            f"process {index} of this machine has no GPU: only {torch.cuda.device_count()} exist; "
            "start at most that many processes, or set train.device=cpu"
        )
    return torch.device("cuda", index)


def agree_on_devices(store: Any, rank: int, world: int, kind: str, problem: str) -> None:
    """Check over the store that all processes found a device of the same kind; collective.
    Processes on different kinds of devices could not form a process group.

    Args:
        kind: type of this process's device, "" for none.
        problem: why it has no device.

    Raises:
        MeshError: raised on every rank; the message names all ranks without a device, or without a
        GPU that others have.
    """
    store.set(f"device/{rank}", json.dumps([node_name(), kind, problem]))
    if rank == 0:
        answers = store.multi_get([f"device/{other}" for other in range(world)])
        said = [parse_json(answer) for answer in answers]
        store.set("device/verdict", judge_devices(said))
    verdict = store.get("device/verdict").decode()
    if not verdict:
        return
    told, deadline = store.add("device/told", 1), time.monotonic() + 10
    # Rank 0 may end the store with its exit, so it waits until the others have read it.
    while rank == 0 and told < world and time.monotonic() < deadline:
        time.sleep(0.02)
        told = store.add("device/told", 0)
    raise MeshError(verdict)


def judge_devices(said: Sequence[tuple[str, str, str]]) -> str:
    """Return the problems of the (node, kind of device, problem) of each rank; "" if there are
    none."""
    lines = [
        f"{host} (rank {rank}): {problem}"
        for rank, (host, _, problem) in enumerate(said)
        if problem
    ]
    if any(kind == "cuda" for _, kind, _ in said):
        lines += [
            f"{host} (rank {rank}): torch finds no CUDA device, which other processes have; "
            "exclude "
            "the node, or set train.device=cpu"
            for rank, (host, kind, _) in enumerate(said)
            if kind == "cpu"
        ]
    return "\n  ".join(lines)


def take_device(device: torch.device) -> torch.device:
    """Make a device this process's current device.

    Raises:
        MeshError: the device does not work.
    """
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.zeros((), device=device).item()
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise MeshError(f"{device} does not work ({first}); exclude the node") from None
    return device


def reserve_descriptors(world: int, rank: int) -> None:
    """Raise this process's limit of open files as far as it may, and check that it suffices.

    Raises:
        MeshError: the limit is too low for a world of this size.
    """
    # Rank 0 hosts the store and hears every process's health; others talk to few.
    needed = OWN_DESCRIPTORS + (2 * world if rank == 0 else 0)
    limit = raise_file_limit(needed)
    if limit < needed:
        raise MeshError(
            f"RLIMIT_NOFILE={limit} is too low: rank {rank} of {world} needs {needed} open files; "
            f"raise the hard limit, for example by `ulimit -n {needed}` as root, "
            "/etc/security/limits.conf or LimitNOFILE of the service that starts the job"
        )


@contextmanager
def open_mesh(config: Config) -> Iterator[Mesh]:
    """Yield this process's mesh; a process group that this call created ends with the context.

    The world comes from the process group, torchrun or the Slurm step, in this order of preference.

    Raises:
        MeshError: the world does not fit the config, or processes lack the device they need.
    """
    join_slurm_step()
    # Without it, gloo connects every pair of a group's processes, whether they talk or not.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    world = world_size()
    if world > 1 and not dist.is_initialized():
        check_variables(world)
    check_world(config, world)
    if world == 1 or dist.is_initialized():
        device = take_device(pick_device(config.train.device))
        if not dist.is_initialized():
            yield Mesh(device=device)
            return
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
        return
    raise_file_limit()  # rank 0 is about to accept every process's connection
    store, rank = meet(world)
    found, problem = None, ""
    try:
        reserve_descriptors(world, rank)
        found = take_device(pick_device(config.train.device))
    except MeshError as error:
        problem = str(error)
    agree_on_devices(store, rank, world, found.type if found else "", problem)
    assert found is not None, "agree_on_devices raises on every rank if one has no device"
    device = found
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,  # Groups are then split from one communicator.
    )
    try:
        with saving_apart(build_mesh(config, device)) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def build_mesh(config: Config, device: torch.device) -> Mesh:
    """Build the mesh over the existing process group; collective."""
    tp, pp, cp = config.parallel.tensor, config.parallel.pipeline, config.parallel.context
    world, rank = dist.get_world_size(), dist.get_rank()
    ranks = torch.arange(world).view(-1, pp, tp)
    dp_group = pick_group(ranks.movedim(0, -1).flatten(0, -2).tolist(), rank)
    tp_group = pick_group(ranks.flatten(0, -2).tolist(), rank)
    pipelines = ranks.movedim(1, -1).flatten(0, -2).tolist()
    pp_group = pick_group(pipelines, rank)
    replica_group = (
        tp_group
        if pp == 1
        else pp_group
        if tp == 1
        else pick_group(ranks.flatten(1).tolist(), rank)
    )
    shards = config.parallel.shard_group or len(ranks)
    groups = ranks.view(-1, shards, pp, tp)
    shard_group, across_group = dp_group, None
    if shards < len(ranks):
        shard_group = pick_group(groups.movedim(1, -1).flatten(0, -2).tolist(), rank)
        across_group = pick_group(groups.movedim(0, -1).flatten(0, -2).tolist(), rank)
    state_group = tp_group if shards == 1 else shard_group
    if shards > 1 and tp > 1 and config.parallel.shards_natively:
        state_group = pick_group(groups.transpose(1, 2).flatten(2).flatten(0, 1).tolist(), rank)
    cp_group = pick_group(ranks.view(-1, cp, pp * tp).movedim(1, -1).flatten(0, 1).tolist(), rank)
    mesh = Mesh(
        len(ranks), pp, tp, rank, device, dp_group, tp_group, pp_group, replica_group,
        shards, shard_group, across_group, state_group, cp=cp, cp_group=cp_group,
    )  # fmt: skip
    if pp == 1:
        return mesh
    own = next(k for k, members in enumerate(pipelines) if rank in members)
    return replace(mesh, channels=Channels(pipelines, own, TIMEOUT, pp_group))


def pick_group(members: list[list[int]], rank: int) -> Any:
    """Return this process's group among groups that partition the world; None if it is alone.
    Collective."""
    if all(len(each) == 1 for each in members):
        return None
    if len(members) == 1:
        return dist.group.WORLD
    if dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None:
        groups = [dist.split_group(split_ranks=members)]  # one split of the communicator for all
    else:
        groups = [dist.new_group(each) for each in members]
    return next((group for group in groups if is_shared(group)), None)


def is_shared(group: Any) -> bool:
    """Return True if this process is in the group, with others."""
    return group is not dist.GroupMember.NON_GROUP_MEMBER and dist.get_world_size(group) > 1


@contextmanager
def saving_apart(mesh: Mesh) -> Iterator[Mesh]:
    """Yield the mesh with a process group for saving and, beside a GPU, one for numbers of the
    host; they end with the context."""
    group, host = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT), None
    if mesh.device.type == "cuda":
        host = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield replace(mesh, save_group=group, host_group=host)
    finally:
        for each in (group, host) if host is not None else (group,):
            dist.destroy_process_group(each)
