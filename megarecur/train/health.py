"""Health check of every process before training: files, disk, correctness and speed.

A job runs at the pace of its slowest node. A node without its shards, its disk or its GPU ends the
job after minutes of loading. So each process first runs these measurements, each a fraction of a
second long: a matrix product that is checked against exact integers, an all-reduce within the node
and one across all processes, an exchange with the neighbouring nodes, the free disk space of the
run folder, the shards of local corpora, the GPUs and their free memory. Rank 0 writes the results
to RUN/health.json, for a supervisor that excludes nodes.

Each value is compared with the job's median: the lower of the two middle values, so that the slower
of two processes can be found. Communication is harder to attribute than compute, since a collective
takes all its ranks as long as its slowest one:

- within a node: a slow all-reduce is attributed to the node, not to a process or GPU. With one
  node, or one process on each, there is nothing to compare.
- between nodes: processes exchange data with those of the same local index on the two neighbouring
  nodes, in a ring. The value of a process is the faster of its two exchanges. A slow node is slow
  with both neighbours, but each neighbour is fast with its other one. With two nodes, both are
  equally slow and nothing is reported. A healthy node between two slow ones is reported as slow.
- across all processes: one value for the job, reported but attributed to no node.

If more than half of a job is slow, the median is slow as well and nothing is detected. Values are
the best of several repetitions, so that intermittent slowness is not detected either.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median_high, median_low
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megarecur.config.run import Config
from megarecur.config.train import HealthConfig
from megarecur.data.foreign import missing_files
from megarecur.errors import DataError, MegarecurError, MeshError
from megarecur.files import replace_file
from megarecur.parallel.mesh import Mesh, node_name, pick_group
from megarecur.parallel.objects import broadcast_object
from megarecur.parallel.tree import gather_bytes
from megarecur.plan.describe import format_bytes, name_ranks
from megarecur.progress import WAITING, Note, note_nothing
from megarecur.reading import parse_json, parse_object

log = logging.getLogger(__name__)

T = TypeVar("T")

GEMM_SIZE = {"cpu": 320, "cuda": 4096}
PRODUCTS = {"cpu": 1, "cuda": 8}
"""Matrix products per measurement; one on a CPU fits between two context switches."""
GEMM_SECONDS = 0.1
"""Seconds during which new measurements start; at least LEAST_ROUNDS are made."""
LEAST_ROUNDS = 3
MESSAGE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
REDUCTIONS = 5
LEAST_DELAY = 1e-3
"""Seconds above the median below which communication is never called slow: that is noise."""
CHECKS = count()
"""Numbers of this process's checks, since keys of the store are used once."""
PATIENCE = 120.0
"""Timeout in seconds of a process's own measurements; later, it is reported as hanging."""


@dataclass
class Figures:
    """Measurements of one process; None: not measured."""

    host: str
    rank: int
    gemm_seconds: float | None = None
    allreduce_seconds: float | None = None
    """Best time of an all-reduce within its node."""
    link_seconds: float | None = None
    """Best time of an exchange with the faster neighbouring node."""
    world_seconds: float | None = None
    """Best time of an all-reduce across all processes."""
    free_disk_bytes: int | None = None
    """Free bytes on the run folder's file system; measured by one process of each node."""
    gpu: str | None = None
    """UUID of its GPU."""
    num_gpus: int = 0
    """Number of GPUs visible to this process."""
    free_gpu_bytes: int | None = None
    faults: list[str] = field(default_factory=list)
    """Faults of this process or its GPU."""
    node_faults: list[str] = field(default_factory=list)
    """Faults of its node."""
    data_faults: list[str] = field(default_factory=list)
    """Faults of corpora on its node."""


@dataclass(frozen=True)
class Finding:
    """A fault found on some ranks."""

    kind: Literal["broken", "data", "slow"]
    text: str
    ranks: tuple[int, ...]

    def is_everywhere(self, hosts: Sequence[str]) -> bool:
        """Return True if every node has it, so that no single node is to blame."""
        return {hosts[rank] for rank in self.ranks} == set(hosts)

    def describe(self, hosts: Sequence[str]) -> str:
        """Return the text, prefixed by the nodes and ranks."""
        if self.kind == "data" and self.is_everywhere(hosts):
            return f"every node: {self.text}"
        places = [
            f"{host} ({name_ranks([r for r in self.ranks if hosts[r] == host])})"
            for host in dict.fromkeys(hosts[rank] for rank in self.ranks)
        ]
        return f"{', '.join(places)}: {self.text}"


def check_health(
    config: Config,
    run_dir: Path,
    mesh: Mesh,
    host: str | None = None,
    patience: float = PATIENCE,
    note: Note = note_nothing,
) -> str:
    """Measure every process and compare; collective. Returns a one-line summary, "" if off.

    With one process, only the disk and the corpora are checked.

    Args:
        config: `health` says whether and how strictly to check, `data` which files must exist.
        host: name of this node; None: Slurm's node name, else the hostname.
        patience: timeout in seconds of a process's own measurements.
        note: called with the progress.

    Raises:
        DataError: on every rank, if the only faults are missing corpus files.
        MeshError: on every rank, for any other fault, or for slow nodes if health.on_slow=stop; one
            message lists all faults of all nodes.
    """
    settings, started = config.health, time.perf_counter()
    if settings.enabled is False or (settings.enabled == "auto" and mesh.world == 1):
        return ""
    host = host or node_name()
    hosts, devices = gather_hosts(host, mesh)
    nodes = group_by_host(hosts)
    if settings.enabled == "auto" and len(nodes) == 1 and "cuda" not in devices:
        return ""
    figures = Figures(host, mesh.rank)
    if nodes[host][0] == mesh.rank:
        look_at_node(config, run_dir, figures)
    if mesh.world > 1:
        measure_device(config, mesh.device, figures)
        note(WAITING)
        wait_for_all(hosts, mesh, patience)
    every = gather(figures, mesh)
    findings = find_faults(every) if mesh.rank == 0 else []
    if not tell_all(findings, mesh) and mesh.world > 1:
        # Only if all processes are sound: a broken one could block the others.
        note("measuring communication in the health check")
        measure_communication(list(nodes.values()), mesh, figures)
        every = gather(figures, mesh)
        findings = find_faults(every) + find_slow(every, settings) if mesh.rank == 0 else []
    outcome: tuple[Exception | None, str] = (None, "")
    if mesh.rank == 0:
        seconds = time.perf_counter() - started
        outcome = conclude(every, findings, config, run_dir, seconds)
    failure, line = tell_all(outcome, mesh)
    if failure is not None:
        raise failure
    return line


def conclude(
    every: Sequence[Figures],
    findings: Sequence[Finding],
    config: Config,
    run_dir: Path,
    seconds: float,
) -> tuple[Exception | None, str]:
    """Write RUN/health.json and log findings that do not stop the run.

    Returns:
        The error that ends the run on every rank, None if there is none; and the summary.
    """
    settings, hosts = config.health, [figures.host for figures in every]
    stopping = [f for f in findings if f.kind != "slow" or settings.on_slow == "stop"]
    failure: Exception | None = None
    try:
        text = report_health(every, findings, stopping, seconds)
        replace_file(run_dir / "health.json", text)
    except OSError as error:
        failure = error
    if stopping:
        return one_error(stopping, hosts), ""
    if failure is not None:
        return failure, ""
    for finding in findings:
        log.warning("%s; training continues with it (health.on_slow=warn)",
                    finding.describe(hosts))  # fmt: skip
    return None, sum_up(every, len(set(hosts)), seconds)


# Over gloo, since a broken GPU cannot communicate.


def gather(figures: Figures, mesh: Mesh) -> list[Figures]:
    """Return the figures of all ranks on rank 0; empty elsewhere."""
    parts = gather_bytes(json.dumps(asdict(figures)).encode(), mesh.save_group)
    return [Figures(**parse_object(part)) for part in parts]


def gather_hosts(host: str, mesh: Mesh) -> tuple[list[str], list[str]]:
    """Return the host and the kind of device of every rank, on every rank."""
    parts = gather_bytes(f"{mesh.device.type} {host}".encode(), mesh.save_group)
    pairs = [part.decode().partition(" ") for part in tell_all(parts, mesh)]
    return [host for _, _, host in pairs], [device for device, _, _ in pairs]


def tell_all(value: T, mesh: Mesh) -> T:
    """Return rank 0's value on every rank."""
    found: T = broadcast_object(value, group=mesh.save_group)
    return found


def group_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """Return the ranks of each node, nodes in the order of their first ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    return nodes


def wait_for_all(hosts: Sequence[str], mesh: Mesh, patience: float) -> None:
    """Wait until every process has finished its own measurements.

    Processes arrive at the store of the job, to which all are connected already.

    Raises:
        MeshError: some processes timed out; the message names them.
    """
    store, place = dist.distributed_c10d._get_default_store(), f"health/{next(CHECKS)}"
    store.set(f"{place}/{mesh.rank}", "")
    arrived, deadline = store.add(f"{place}/arrived", 1), time.monotonic() + patience
    if mesh.rank == 0:
        while arrived < mesh.world and time.monotonic() < deadline:
            time.sleep(0.02)
            arrived = store.add(f"{place}/arrived", 0)
        late = [r for r in range(mesh.world) if not store.check([f"{place}/{r}"])]
        store.set(f"{place}/late", json.dumps(late))
    else:
        try:  # Rank 0 may have begun to wait later, by as much as its patience.
            store.wait([f"{place}/late"], timedelta(seconds=2 * patience))
            late = parse_json(store.get(f"{place}/late"))
        except RuntimeError:
            late = [0]
    if not late:
        return
    told, deadline = store.add(f"{place}/told", 1), time.monotonic() + 10
    # Rank 0 may end the store with its exit, so it waits until the others have read it.
    while mesh.rank == 0 and told < arrived and time.monotonic() < deadline:
        time.sleep(0.02)
        told = store.add(f"{place}/told", 0)
    text = (
        f"did not finish the health check in {patience:g} s; the GPU, or the folders of the "
        "run and its corpora, may hang: exclude the node"
    )
    raise MeshError(Finding("broken", text, tuple(late)).describe(hosts))


# -------------------------------------------------------------------------------- local checks


def look_at_node(config: Config, run_dir: Path, figures: Figures) -> None:
    """Check the run folder's free disk space and the files of local corpora; fill in `figures`."""
    least = config.health.min_free_disk_gb * 1e9
    try:
        figures.free_disk_bytes = free = free_disk(run_dir)
        if free < least:
            figures.node_faults.append(
                f"run_dir={run_dir} has {free / 1e9:.3f} GB left, less than "
                f"health.min_free_disk_gb={config.health.min_free_disk_gb:g}; free some space, or "
                "lower it"
            )
        if not os.access(run_dir, os.W_OK):
            figures.node_faults.append(
                f"run_dir={run_dir} cannot be written; mount it for writing, or choose another one"
            )
    except OSError as error:
        figures.node_faults.append(
            f"run_dir={run_dir} is not visible ({error.strerror}), though rank 0 has made it; "
            "choose a folder that all nodes share"
        )
    for path in dict.fromkeys(s.path for s in (*config.data.train, *config.data.val)
                              if s.remote is None):  # fmt: skip
        try:
            missing = missing_files(Path(path))
        except DataError as error:
            figures.data_faults.append(str(error))
            continue
        except OSError as error:
            missing = [f"(the folder cannot be listed: {error.strerror})"]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            figures.data_faults.append(
                f"{path}: {', '.join(missing[:3])}{more} missing; copy the corpus to this node, "
                "or name a folder that all nodes share"
            )


def free_disk(path: Path) -> int:
    """Return the free bytes available to users on a folder's file system."""
    return shutil.disk_usage(path).free


def measure_device(config: Config, device: torch.device, figures: Figures) -> None:
    """Identify the GPU and time a checked matrix product; fill in `figures`."""
    try:
        if device.type == "cuda":
            figures.num_gpus = torch.cuda.device_count()
            figures.gpu = str(torch.cuda.get_device_properties(device).uuid)
            figures.free_gpu_bytes = torch.cuda.mem_get_info(device)[0]
        half = config.train.precision == "bf16" and device.type == "cuda"
        figures.gemm_seconds, wrong = time_gemm(device, torch.bfloat16 if half else torch.float32)
        if wrong:
            figures.faults.append(
                f"{wrong} of {GEMM_SIZE[device.type]} rows of a product of small integers came out "
                f"wrong on {device}; exclude the node and have it tested"
            )
    except RuntimeError as error:  # from torch, for any failure of a device
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        figures.faults.append(f"a matrix product on {device} failed ({first}); exclude the node")


def time_gemm(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Time products of integer matrices. Returns (best time in seconds, number of wrong rows).

    Elements are 0 with probability 7/8, else 1 or -1, so that every sum is small enough to be exact
    in bf16. C = A B is verified without a second matrix product (Freivalds 1977): C V is compared
    with A (B V), for a random integer matrix V [size, 4], exact in fp64.
    """
    size, products = GEMM_SIZE[device.type], PRODUCTS[device.type]
    with torch.no_grad(), measured_apart(device):
        generator = torch.Generator(device).manual_seed(size)

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device)

        a, b = (
            (drawn == 0).to(dtype) - (drawn == 1).to(dtype)
            for drawn in (draw(0, 16, size, size) for _ in range(2))
        )
        probe = draw(-100, 101, size, 4).double()
        expected = a.double() @ (b.double() @ probe)
        product = multiply(a, b)
        wrong = (product.double() @ probe != expected).any(1)
        best, rounds, started = float("inf"), 0, time.perf_counter()
        while rounds < LEAST_ROUNDS or time.perf_counter() - started < GEMM_SECONDS:
            begun = settled(device)
            for _ in range(products):
                product = multiply(a, b)
            best, rounds = min(best, settled(device) - begun), rounds + 1
        wrong |= (product.double() @ probe != expected).any(1)
        return best, int(wrong.sum())


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, the product that is measured."""
    return a @ b


def settled(device: torch.device) -> float:
    """Synchronize the device and return the clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def measured_apart(device: torch.device) -> Iterator[None]:
    """Free the memory of a measurement and reset the peak memory statistics afterwards."""
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# ---------------------------------------------------------------------------- collective checks


def measure_communication(nodes: list[list[int]], mesh: Mesh, figures: Figures) -> None:
    """Time all-reduces within the node and across all, and neighbour exchanges; collective.

    Raises:
        MeshError: a connection broke and the failure was detected.
    """
    own = next(k for k, ranks in enumerate(nodes) if mesh.rank in ranks)
    try:
        with measured_apart(mesh.device):
            count = MESSAGE_BYTES[mesh.device.type] // 4
            tensor = torch.empty(count, device=mesh.device)
            if len(nodes) > 1:
                group = pick_group(nodes, mesh.rank)
                if group is not None:
                    figures.allreduce_seconds = time_all_reduce(
                        tensor, group, len(nodes[own]), "within the node", figures
                    )
                    dist.destroy_process_group(group)
                figures.link_seconds = time_links(tensor, nodes, own, mesh)
            figures.world_seconds = time_all_reduce(
                tensor, None, mesh.world, "across all processes", figures
            )
            if len(nodes) == 1:
                figures.allreduce_seconds = figures.world_seconds
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeshError(
            f"{figures.host} (rank {mesh.rank}): communication failed in the health check "
            f"({first}); the processes of the job cannot reach each other, or one has ended"
        ) from None


def time_all_reduce(tensor: Tensor, group: Any, size: int, where: str, figures: Figures) -> float:
    """Return the best time of an all-reduce in seconds; a wrong sum is recorded as a fault.

    All elements are 1, so that every sum must equal `size`.
    """

    def reduce() -> None:
        dist.all_reduce(tensor.fill_(1), group=group)

    seconds = time_best(reduce, tensor.device)
    if (tensor != size).any():
        figures.faults.append(
            f"an all-reduce {where} gave wrong sums; exclude the nodes and have their network and "
            "GPUs tested"
        )
    return seconds


def time_links(tensor: Tensor, nodes: list[list[int]], own: int, mesh: Mesh) -> float | None:
    """Return the best time of an exchange with the faster neighbouring node, in seconds.

    The peer has the same local index on its node. None: no neighbour has such a process.
    """
    place, found, best = nodes[own].index(mesh.rank), torch.empty_like(tensor), None
    for pairs in ring_rounds(len(nodes)):
        for pair in pairs:
            if own not in pair:
                continue
            there = nodes[pair[0] + pair[1] - own]
            if place < len(there):
                work = partial(exchange, tensor, found, there[place])
                seconds = time_best(work, tensor.device)
                best = seconds if best is None else min(best, seconds)
    return best


def exchange(tensor: Tensor, found: Tensor, peer: int) -> None:
    """Send to a rank and receive from it at the same time."""
    operations = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, found, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def ring_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return the neighbour pairs of a ring of `count` nodes, in rounds of disjoint pairs."""
    pairs = [(k, k + 1) for k in range(count - 1)]
    rounds = [pairs[::2], pairs[1::2]]
    if count > 2:
        closing = [(count - 1, 0)]
        rounds = [*rounds, closing] if count % 2 else [rounds[0], rounds[1] + closing]
    return [each for each in rounds if each]


def time_best(work: Callable[[], None], device: torch.device) -> float:
    """Return the best of several times in seconds, after one warm-up call that connects."""
    work()
    best = float("inf")
    for _ in range(REDUCTIONS):
        begun = settled(device)
        work()
        best = min(best, settled(device) - begun)
    return best


# ------------------------------------------------------------------------------------ evaluation


def find_faults(every: Sequence[Figures]) -> list[Finding]:
    """Return the faults of all ranks; equal faults of several ranks are one finding."""
    nodes = group_by_host([figures.host for figures in every])
    found: dict[tuple[Literal["broken", "data"], str], list[int]] = {}
    for figures in every:
        ranks = nodes[figures.host]
        for text in figures.node_faults:
            found.setdefault(("broken", text), []).extend(ranks)
        for text in figures.data_faults:
            found.setdefault(("data", text), []).extend(ranks)
        for text in figures.faults:
            found.setdefault(("broken", text), []).append(figures.rank)
    on_gpus = [figures for figures in every if figures.gpu is not None]
    if on_gpus and not any(figures.faults for figures in every):
        without = [figures.rank for figures in every if figures.gpu is None]
        if without:
            text = "no GPU is seen, other processes have one; exclude the node or have it repaired"
            found[("broken", text)] = without
    for ranks in nodes.values():
        gpus = {every[rank].gpu for rank in ranks} - {None}
        seen = max(every[rank].num_gpus for rank in ranks)
        if gpus and len(gpus) < len(ranks) and seen < len(ranks):
            text = (
                f"{len(ranks)} processes share {len(gpus)} GPU(s); start at most one process on "
                "each GPU, or exclude the node if some are missing"
            )
            found.setdefault(("broken", text), []).extend(ranks)
    return [Finding(kind, text, tuple(sorted(ranks))) for (kind, text), ranks in found.items()]


def find_slow(every: Sequence[Figures], settings: HealthConfig) -> list[Finding]:
    """Find nodes slower than the median by the factor, or with GPU memory already in use.

    Returns one finding per node and measure.
    """
    hosts = [figures.host for figures in every]
    sizes = {host: len(ranks) for host, ranks in group_by_host(hosts).items()}
    found = []
    for name, what, least in (
        ("gemm_seconds", "a matrix product", 0.0),
        ("allreduce_seconds", "an all-reduce within the node", LEAST_DELAY),
        ("link_seconds", "an exchange with the faster of its neighbouring nodes", LEAST_DELAY),
    ):
        # All-reduces over more processes take longer: compare only nodes of equal size.
        for kind in sorted(set(sizes.values())) if name == "allreduce_seconds" else (0,):
            values = {
                figures.rank: getattr(figures, name)
                for figures in every
                if kind in (0, sizes[figures.host]) and getattr(figures, name) is not None
            }
            if not values:
                continue
            usual = median_low(values.values())
            bound = max(settings.slow_factor * usual, usual + least)
            slow = {rank: value for rank, value in values.items() if value > bound}
            for ranks in group_by_host_of(slow, hosts):
                worst = max(slow[rank] for rank in ranks)
                found.append(Finding("slow", (
                    f"{what} took {1e3 * worst:.3g} ms, the job's median is {1e3 * usual:.3g} ms "
                    f"(health.slow_factor={settings.slow_factor:g}); exclude the node or have it "
                    "looked at"
                ), ranks))  # fmt: skip
    free = {f.rank: f.free_gpu_bytes for f in every if f.free_gpu_bytes is not None}
    if free:
        usual_bytes = median_high(free.values())
        least_bytes = settings.min_free_gpu * usual_bytes
        taken = [rank for rank, value in free.items() if value < least_bytes]
        for ranks in group_by_host_of(taken, hosts):
            worst_bytes = min(free[rank] for rank in ranks)
            found.append(Finding("slow", (
                f"a GPU has {format_bytes(worst_bytes)} of memory free, the job's median is "
                f"{format_bytes(usual_bytes)} (health.min_free_gpu={settings.min_free_gpu:g}); end "
                "what else runs there, or exclude the node"
            ), ranks))  # fmt: skip
    return found


def group_by_host_of(ranks: Any, hosts: Sequence[str]) -> list[tuple[int, ...]]:
    """Group the given ranks by node."""
    names = dict.fromkeys(hosts[rank] for rank in ranks)
    return [tuple(sorted(r for r in ranks if hosts[r] == name)) for name in names]


def one_error(findings: Sequence[Finding], hosts: Sequence[str]) -> MegarecurError:
    """Return one error that lists all findings that stop the run."""
    kind = DataError if all(finding.kind == "data" for finding in findings) else MeshError
    lines = "".join(f"\n  {finding.describe(hosts)}" for finding in findings)
    count = f"{len(findings)} fault{'s' if len(findings) > 1 else ''}"
    everywhere = all(finding.is_everywhere(hosts) for finding in findings)
    without = "" if everywhere else "start without those nodes, "
    return kind(
        f"the health check before training found {count}; correct what is named, {without}"
        f"or skip the check with health.enabled=off:{lines}"
    )


def report_health(
    every: Sequence[Figures],
    findings: Sequence[Finding],
    stopping: Sequence[Finding],
    seconds: float,
) -> str:
    """Return the content of RUN/health.json.

    A node's values are the worst of its processes'. `faults` stop the run, `slow` was only warned
    of; null: not measured.
    """

    def worst(name: str, ranks: Sequence[int], choose: Callable[..., Any] = max) -> Any:
        values = [v for v in (getattr(every[rank], name) for rank in ranks) if v is not None]
        return choose(values) if values else None

    def texts(of: Sequence[Finding], ranks: Sequence[int]) -> list[str]:
        return [finding.text for finding in of if set(finding.ranks) & set(ranks)]

    warned = [finding for finding in findings if finding not in stopping]
    nodes = {
        host: {
            "ranks": ranks,
            "gemm_seconds": worst("gemm_seconds", ranks),
            "allreduce_seconds": worst("allreduce_seconds", ranks),
            "link_seconds": worst("link_seconds", ranks),
            "free_disk_bytes": worst("free_disk_bytes", ranks, min),
            "gpus": worst("num_gpus", ranks),
            "free_gpu_bytes": worst("free_gpu_bytes", ranks, min),
            "faults": texts(stopping, ranks),
            "slow": texts(warned, ranks),
        }
        for host, ranks in group_by_host([figures.host for figures in every]).items()
    }
    content = {
        "time": time.time(),
        "seconds": seconds,
        "allreduce_seconds": worst("world_seconds", range(len(every))),
        "nodes": nodes,
    }
    return json.dumps(content, indent=1) + "\n"


def sum_up(every: Sequence[Figures], num_nodes: int, seconds: float) -> str:
    """Return a one-line summary."""
    parts = [
        f"{len(every)} process{'es' if len(every) > 1 else ''} on {num_nodes} "
        f"node{'s' if num_nodes > 1 else ''}",
        f"{seconds:.1f} s",
    ]
    for name, what in (
        ("gemm_seconds", "matrix product"),
        ("allreduce_seconds", "all-reduce within nodes"),
        ("link_seconds", "exchange between nodes"),
        ("world_seconds", "all-reduce across all"),
    ):
        values = [1e3 * v for v in (getattr(figures, name) for figures in every) if v is not None]
        if values:
            parts.append(f"{what} {min(values):.3g} to {max(values):.3g} ms")
    free = [f.free_disk_bytes for f in every if f.free_disk_bytes is not None]
    if free:
        parts.append(f"free disk {format_bytes(min(free))}")
    return "health: " + ", ".join(parts)
