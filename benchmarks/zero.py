"""Sharded and early reductions against one reduction after the backward pass, and DeepSpeed.

    python benchmarks/zero.py [--rounds 5] [--stage 1] [--deepspeed] [--cuda] [--trace PNG]

Two processes, one thread each (with --cuda: one process on one GPU), 48.8M unique parameters:
hidden 768, feed-forward 2,048, 12 heads, 6 blocks of which the first two run twice, 8,192 tokens of
vocabulary, tied, fp32. A step is 2 micro batches of 2 sequences of 256 tokens per process,
clipping, AdamW. All engines hold their own copy of the model in the same processes and alternate:
plain, with one reduction after the backward pass; plain, with buckets that leave early; native
sharding at --stage; with --deepspeed, DeepSpeed at that stage. It prints medians, and the median of
the rounds' ratios to the first. Bytes of the optimizer's state are those of checkpoint entries.

With --trace, the profiler records one step of every engine on rank 0. The picture shows when it
computes and when collectives are under way; the table gives the share of collectives' time in which
it computed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.optim.engine import Engine
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.recurrence.schemes import layer_map

LENGTH, MICRO, NUM_MICRO, VOCABULARY = 256, 2, 2, 8192
CUDA = "--cuda" in sys.argv
WORLD = 1 if CUDA else 2
COMPUTE = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::_fused_adamw_",
           "aten::_scaled_dot_product_flash_attention_for_cpu",
           "aten::_scaled_dot_product_flash_attention_for_cpu_backward"}  # fmt: skip
"""Operations that take most of a step."""


def option(name: str, default: int) -> int:
    """Return the number after a flag."""
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def make_config(stage: int, engine: str, bucket_mb: float) -> Config:
    """Return the model's config for an engine."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 2048,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2, 2, 1, 1, 1, 1]},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "parallel": {"zero_stage": stage, "zero_engine": engine, "bucket_mb": bucket_mb},
        "train": {"steps": 1, "global_batch_size": WORLD * MICRO * NUM_MICRO,
                  "micro_batch_size": MICRO},
    })  # fmt: skip


def make_batch(number: int, device: torch.device) -> MicroBatch:
    """Return a micro batch of random tokens."""
    generator = torch.Generator().manual_seed(number)
    both = torch.randint(VOCABULARY, (2, MICRO, LENGTH), generator=generator).to(device)
    positions = torch.arange(LENGTH, device=device).expand(MICRO, LENGTH)
    zeros, samples = torch.zeros_like(both[0]), torch.arange(MICRO, device=device)
    return MicroBatch(both[0], both[1], positions, zeros, samples, torch.zeros_like(samples), True)


@dataclass
class Side:
    """An engine with its model."""

    name: str
    model: Transformer
    engine: Engine
    config: Config
    mesh: Mesh
    early: bool
    """Whether gradients may leave before the backward pass is over."""

    def step(self) -> float:
        """Return the wall time of one optimizer step, in seconds."""
        batches = [make_batch(self.mesh.rank * NUM_MICRO + i, self.mesh.device)
                   for i in range(NUM_MICRO)]  # fmt: skip
        tokens, steps = WORLD * MICRO * NUM_MICRO * LENGTH, layer_map(self.config.recurrence)
        dist.barrier()
        began = time.perf_counter()
        if self.early:
            self.engine.expect([steps], NUM_MICRO)
        for batch in batches:
            ctx = self.model.context(batch, 0, training=True)
            x, _ = self.model.run(steps, self.model.embed(batch.tokens_BS, ctx), ctx, {})
            self.engine.backward(self.model.loss(x, batch)["loss"].total / tokens)
        self.engine.step(self.config.optimizer.lr)
        dist.barrier()
        return time.perf_counter() - began

    def state_bytes(self) -> int:
        """Return the bytes of parameters and moments that this process saves."""
        return sum(t.nbytes for shard in self.engine.shards().values() for *_, t in shard.chunks)


def build(name: str, stage: int, engine: str, early: bool, bucket_mb: float) -> Side:
    """Build a side."""
    config = make_config(stage, engine, bucket_mb)
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    mesh = build_mesh(config, device)
    model = Transformer(config, device, hollow=config.parallel.shards_natively)
    return Side(name, model, build_engine(model, config, mesh), config, mesh, early)


Spans = list[tuple[float, float]]
"""Beginnings and ends, in milliseconds."""


def merge(spans: Spans) -> Spans:
    """Return the union of spans, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def shared_time(first: Spans, second: Spans) -> float:
    """Return the time covered by both of two lists of merged spans."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def record(side: Side) -> tuple[Spans, Spans]:
    """Return when a step computes products and when collectives are under way."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.step()
    found: tuple[Spans, Spans] = [], []
    for event in profiler.events():
        span = event.time_range.start / 1e3, event.time_range.end / 1e3
        if event.name.startswith(("gloo:", "nccl:")) and "barrier" not in event.name:
            found[1].append(span)
        elif event.name in COMPUTE:
            found[0].append(span)
    return merge(found[0]), merge(found[1])


def draw_traces(traces: dict[str, tuple[Spans, Spans]], path: str) -> None:
    """Draw the two lanes of each engine below each other, and print the overlap."""
    figure, axes = plt.subplots(len(traces), 1, figsize=(10, 1.5 * len(traces)), sharex=True)
    for axis, (name, lanes) in zip(axes, traces.items(), strict=True):
        first = min(lane[0][0] for lane in lanes)
        for height, (lane, colour) in enumerate(zip(lanes, ("#4c78a8", "#f58518"), strict=True)):
            bars = [(start - first, end - start) for start, end in lane]
            axis.broken_barh(bars, (1 - height, 0.8), color=colour)
        both, sent = shared_time(*lanes), sum(end - start for start, end in lanes[1])
        axis.set_yticks([1.4, 0.4], ["products", "collectives"])
        axis.set_title(
            f"{name}: computes in {both / sent:.0%} of its collectives' time", loc="left"
        )
        print(f"{name:32} collectives {sent:6.0f} ms, of which {both:6.0f} ms beside products")
    axes[-1].set_xlabel("ms of one step on rank 0")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run(rank: int, folder: str, stage: int, rounds: int, deepspeed: bool, trace: str) -> None:
    """Run one process, with all engines."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=rank, world_size=WORLD)
    sides = [
        build("plain, one reduction at the end", 0, "native", False, 1e6),
        build("plain, buckets of 25 MB", 0, "native", True, 25.0),
        build(f"native ZeRO {stage}", stage, "native", True, 25.0),
    ]
    if deepspeed:
        sides.append(build(f"DeepSpeed ZeRO {stage}", stage, "deepspeed", False, 25.0))
    for side in sides:
        side.step()  # The first one allocates.
    times = [[side.step() for side in sides] for _ in range(rounds)]
    traces = {side.name: record(side) for side in sides} if trace else {}
    if rank:
        return
    if trace:
        draw_traces(traces, trace)
    count = sum(p.numel() for p in sides[0].model.parameters())
    print(f"{count / 1e6:.1f}M unique parameters, {WORLD} process(es), {rounds} rounds")
    for i, side in enumerate(sides):
        seconds = statistics.median(each[i] for each in times)
        ratios = [each[i] / each[0] for each in times]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        size = side.state_bytes() / 2**20
        print(f"{side.name:32} {size:7.1f} MiB  {seconds:6.3f} s per step  {ratio}")


def main() -> None:
    """Start the processes."""
    with tempfile.TemporaryDirectory() as folder:
        trace = sys.argv[sys.argv.index("--trace") + 1] if "--trace" in sys.argv else ""
        given = option("--stage", 1), option("--rounds", 5), "--deepspeed" in sys.argv, trace
        mp.spawn(run, (folder, *given), nprocs=WORLD)


if __name__ == "__main__":
    main()
