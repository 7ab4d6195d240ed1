"""The hardware that a plan assumes: compute, memory and links of each rank.

Presets describe nodes as vendors sell them. Sources of the figures:

    a100    NVIDIA A100 80 GB SXM data sheet: 312 TFLOP/s bf16 (dense), 19.5 fp32, 9.7 fp64; 80 GB;
            NVLink 600 GB/s, half of it per direction. DGX A100: 200 Gb/s InfiniBand per GPU.
    h100    NVIDIA H100 SXM data sheet: 989 TFLOP/s bf16 (dense), 67 fp32, 34 fp64; 80 GB; NVLink
            900 GB/s, half per direction. DGX H100: 400 Gb/s InfiniBand per GPU.
    h200    NVIDIA H200 SXM data sheet: as H100, with 141 GB.
    cpu     A small machine of 2 cores, a process on each, gloo over loopback. ROUGH: the order of
            magnitude of such machines, not measured on yours.

Latencies and the shares that programs attain are on no data sheet. Those of the presets are rules
of thumb: one share for all work. `megarecur bench hardware` measures separate rates of products,
attention and pointwise operations, and writes them as a YAML file.

Links are modelled by rails. Every rank has a network interface of its own, as GPUs of a DGX have:
a rank talks to the rank of the same local index in another node over its own interface, while the
others of its node use theirs. A group with g members in every node sends each byte once over the
link inside the node and, split among g interfaces, over the network; the slower of the two decides.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Section
from megarecur.config.load import read_sections, validate_section
from megarecur.config.rules_attention import Backend
from megarecur.errors import ConfigError

Share = Annotated[float, Field(gt=1e-6, le=1.0)]
Speed = Annotated[float, Field(ge=1e-6, le=1e9)]
"""A speed in the unit of its field; values outside the bounds are typing errors."""


Measured = Annotated[float, Field(ge=1e-12, le=1e9)]
Curve = Annotated[dict[Annotated[int, Field(gt=0, le=1 << 40)], Measured], Field(min_length=1)]
"""A rate by size. Sizes in between are interpolated by logarithms; others take the nearest."""
Precision = Literal["bf16", "fp32", "fp64"]


class Peak(Section):
    """Peak rate of one rank, in 10^12 FLOP/s, by compute precision."""

    bf16: Speed
    fp32: Speed
    fp64: Speed


class Link(Section):
    """The link that carries the messages of one rank."""

    bandwidth_gb_s: Speed
    """Nominal bandwidth in 10^9 bytes per second, per direction and rank."""
    latency_us: Annotated[float, Field(ge=0.0, le=1e9)]
    """Microseconds before the first byte arrives."""
    attainable: Share = 0.8
    """Share of the bandwidth that large messages attain."""

    def time(self, num_bytes: float) -> float:
        """Return the seconds of one message."""
        return self.latency_us * 1e-6 + num_bytes / (self.bandwidth_gb_s * 1e9 * self.attainable)

    def reduce_time(self, num_bytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce: every rank sends 2 (n-1)/n of the bytes, and both
        directions of a tree add latency."""
        if ranks == 1:
            return 0.0
        rounds = 2 * (ranks - 1).bit_length()
        sent = 2 * (ranks - 1) / ranks * num_bytes
        return (rounds - 1) * self.latency_us * 1e-6 + self.time(sent)


class Rates(Section):
    """Measured rates of one rank by kind of work (`megarecur bench hardware`)."""

    products: dict[Precision, Curve]
    """10^12 FLOP/s of matrix products, by the side of a square product of as many FLOPs."""
    attention: dict[Backend, dict[Precision, Curve]] = Field(default_factory=dict)
    """10^12 FLOP/s of attention, forward and backward, by tokens of a document. Counts the pairs
    that a causal query sees; for dense all pairs, and tokens of a sample."""
    pointwise_gb_s: Curve
    """10^9 bytes per second that pointwise operations read and write, by MiB of a tensor."""
    launch_us: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """Microseconds that the host takes to start an operation on a GPU, which limits eager runs with
    small tensors. 0: host and device are one."""


class Cluster(Section):
    """Equal nodes with equal ranks; a rank is a process with its GPU, or a CPU core."""

    name: str
    device: Literal["cpu", "cuda"] = "cuda"
    """Kind of device, which decides the defaults of train.attention and train.compile."""
    ranks_per_node: Annotated[int, Field(gt=0, le=1 << 16)]
    peak_tflops: Peak
    attainable: Share = 0.5
    """Share of the peak that whole steps of the map attain, products, norms and activations
    together; for work without measured rates."""
    rates: Rates | None = None
    """Separate rates by kind of work. Default: `attainable` for all work."""
    memory_gb: Speed
    """Memory of one rank, in 10^9 bytes."""
    usable_memory: Share = 0.9
    """Share of the memory left after allocator gaps and libraries."""
    node: Link
    """Link between ranks of a node."""
    network: Link
    """Link between ranks of different nodes."""

    @property
    def memory(self) -> int:
        """Bytes of one rank that a plan may fill."""
        return int(self.memory_gb * 1e9 * self.usable_memory)

    def peak(self, precision: str) -> float:
        """Return the FLOP/s of one rank that MFU is computed against."""
        return float(getattr(self.peak_tflops, precision)) * 1e12

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of one rank that a plan assumes."""
        return self.peak(precision) * self.attainable

    def product_rate(self, precision: str, side: float) -> float:
        """Return the FLOP/s of products with as many FLOPs as a square one of this side."""
        curve = self.rates.products.get(precision) if self.rates else None  # type: ignore[call-overload]
        return self.rate(precision) if curve is None else read_curve(curve, side) * 1e12

    def attention_rate(self, backend: Backend, precision: str, tokens: float) -> float:
        """Return the FLOP/s of attention over documents of this many tokens."""
        curves = self.rates.attention.get(backend, {}) if self.rates else {}
        curve = curves.get(precision)  # type: ignore[call-overload]
        return self.rate(precision) if curve is None else read_curve(curve, tokens) * 1e12

    def pointwise_time(self, num_bytes: float, tensor_bytes: float) -> float:
        """Return the seconds of pointwise operations that read and write `num_bytes` in tensors of
        `tensor_bytes`; 0 without measured rates, as `attainable` covers them."""
        if self.rates is None:
            return 0.0
        return num_bytes / (read_curve(self.rates.pointwise_gb_s, tensor_bytes / 2**20) * 1e9)

    def link(self, ranks: int, stride: int, world: int) -> Link:
        """Return the slowest link of groups of `ranks`, taking every `stride`-th rank of a world:
        stride 1 for tensor, tensor x pipeline for data parallelism.

        A group that fills its share of every node uses the interface of each of its members there;
        one that begins or ends inside a node has the interface of a single one.
        """
        block = ranks * stride  # consecutive ranks that interleaved groups cover
        size = self.ranks_per_node
        aligned = block == world or size % block == 0
        if block <= size and aligned:
            return self.node
        rails = size // stride if block % size == 0 and size % stride == 0 else 1
        if rails <= 1:
            return self.network
        rail, inside = self.network, self.node
        sums = rails * rail.bandwidth_gb_s * rail.attainable
        bandwidth = min(sums, inside.bandwidth_gb_s * inside.attainable)
        return Link(bandwidth_gb_s=bandwidth, latency_us=rail.latency_us, attainable=1.0)

    def between(self, first: int, second: int) -> Link:
        """Return the link from one global rank to another."""
        same = first // self.ranks_per_node == second // self.ranks_per_node
        return self.node if same else self.network


def read_curve(curve: dict[int, float], size: float) -> float:
    """Return a rate at a size: interpolated between the logarithms of its neighbours, or the
    nearest."""
    sizes = sorted(curve)
    for low, high in pairwise(sizes):
        if low < size < high:
            share = math.log(size / low) / math.log(high / low)
            return float(curve[low] ** (1.0 - share) * curve[high] ** share)
    return curve[sizes[0] if size <= sizes[0] else max(s for s in sizes if s <= size)]


def _gpus(name: str, bf16: float, fp32: float, fp64: float, memory: float, nvlink: float,
          infiniband: float) -> Cluster:  # fmt: skip
    return Cluster(
        name=name,
        ranks_per_node=8,
        peak_tflops=Peak(bf16=bf16, fp32=fp32, fp64=fp64),
        memory_gb=memory,
        node=Link(bandwidth_gb_s=nvlink, latency_us=5.0),
        network=Link(bandwidth_gb_s=infiniband, latency_us=15.0),
    )


PRESETS: dict[str, Cluster] = {
    "cpu": Cluster(
        name="cpu",
        device="cpu",
        ranks_per_node=2,
        peak_tflops=Peak(bf16=0.05, fp32=0.05, fp64=0.025),
        memory_gb=4.0,
        node=Link(bandwidth_gb_s=3.0, latency_us=200.0),
        network=Link(bandwidth_gb_s=1.0, latency_us=500.0),
    ),
    "a100": _gpus("a100", 312, 19.5, 9.7, memory=80, nvlink=300, infiniband=25),
    "h100": _gpus("h100", 989, 67, 34, memory=80, nvlink=450, infiniband=50),
    "h200": _gpus("h200", 989, 67, 34, memory=141, nvlink=450, infiniband=50),
}


def load_cluster(name: str, option: str = "") -> Cluster:
    """Load a preset by name, or a YAML file by path.

    Args:
        name: of the preset, or the path.
        option: what named it, for the error.

    Raises:
        ConfigError: no preset or file has that name, or the file has mistakes (all are listed).
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{option}{name}: is none of {', '.join(PRESETS)}, nor a .yaml file; choose one of them"
        )
    return validate_section(Cluster, {"name": path.stem, **read_sections(path)}, str(path))
