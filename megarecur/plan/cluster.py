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
of thumb; a YAML file of your own may hold better ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megarecur.config.base import Section
from megarecur.config.load import read_sections, validate_section
from megarecur.errors import ConfigError

Share = Annotated[float, Field(gt=1e-6, le=1.0)]
Speed = Annotated[float, Field(ge=1e-6, le=1e9)]
"""A speed in the unit of its field; values outside the bounds are typing errors."""


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


class Cluster(Section):
    """Equal nodes with equal ranks; a rank is a process with its GPU, or a CPU core."""

    name: str
    ranks_per_node: Annotated[int, Field(gt=0, le=1 << 16)]
    peak_tflops: Peak
    attainable: Share = 0.5
    """Share of the peak that whole steps of the map attain: products, norms and activations
    together."""
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

    def link(self, ranks: int, stride: int, world: int) -> Link:
        """Return the slowest link of groups of `ranks`, taking every `stride`-th rank of a world:
        stride 1 for tensor, tensor x pipeline for data parallelism."""
        block = ranks * stride  # consecutive ranks that interleaved groups cover
        aligned = block == world or self.ranks_per_node % block == 0
        return self.node if block <= self.ranks_per_node and aligned else self.network

    def between(self, first: int, second: int) -> Link:
        """Return the link from one global rank to another."""
        same = first // self.ranks_per_node == second // self.ranks_per_node
        return self.node if same else self.network


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
