"""Tensor parallelism: time of a step on 2 processes against 1, and memory of the loss.

    python benchmarks/tensor.py [--rounds 5] [--trace] [--hidden 1024]

Time: hidden 1,024, sequence 512, batch 4, 16 heads, feed-forward 4,096, 4 blocks run twice each,
8,192 tokens of vocabulary, tied, fp32: forward, backward, clipping, AdamW. One process with one
thread is compared with two with one thread each; both models are in the same processes and
alternate. It prints medians, and the median of the rounds' ratios.

With --trace, the profiler records a step of both layouts on rank 0, and the table gives the share
of the time of collectives in which it computed products, forward and backward.

Memory: the head's product and the loss, forward and backward, of 1,024 tokens of 256 channels at a
vocabulary of 65,536: the peak of resident memory above its value before. The sides are full logits
in torch's functions, our loss on one process, and our loss split over two.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.optim.engine import Engine
from megarecur.parallel.loss import cross_entropy
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.parallel.regions import ALONE
from megarecur.recurrence.schemes import layer_map

LENGTH, BATCH, VOCABULARY = 512, 4, 8192
HIDDEN = int(sys.argv[sys.argv.index("--hidden") + 1]) if "--hidden" in sys.argv else 1024
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
TOKENS, CHANNELS, LARGE_VOCABULARY = 1024, 256, 65536
SIZE = 2
TRACE = "--trace" in sys.argv


def make_config(tensor: int, sequence: bool) -> Config:
    """Return the model's config for `tensor` processes."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": HIDDEN, "num_heads": 16, "ffn_hidden_size": 4 * HIDDEN,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2, 2, 2, 2]},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "parallel": {"tensor": tensor, "sequence_parallel": sequence},
        "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    })  # fmt: skip


def make_batch() -> MicroBatch:
    """Return a micro batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    zeros, samples = torch.zeros_like(both[0]), torch.arange(BATCH)
    return MicroBatch(both[0], both[1], positions, zeros, samples, torch.zeros_like(samples), True)


def step_seconds(model: Transformer, engine: Engine, config: Config) -> float:
    """Return the wall time of one optimizer step, in seconds."""
    batch = make_batch()
    began = time.perf_counter()
    with record_function("forward"):
        ctx = model.context(batch, 0, training=True)
        x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
        loss = model.loss(x, batch)["loss"].total / (BATCH * LENGTH)
    with record_function("backward"):
        engine.backward(loss)
    engine.step(config.optimizer.lr)
    return time.perf_counter() - began


def trace_step(name: str, side: tuple[Transformer, Engine, Config]) -> None:
    """Print how much of the time of collectives is beside products in a step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step_seconds(*side)
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        kind = "sent" if event.name.startswith("gloo:") else event.name
        if kind in ("sent", "forward", "backward", *PRODUCTS):
            kind = "products" if kind in PRODUCTS else kind
            spans.setdefault(kind, []).append((event.time_range.start, event.time_range.end))
    # A product may contain another one.
    products = [p for p in spans["products"] if not any(inside(p, q) for q in spans["products"])]
    for part in ("forward", "backward"):
        ((start, end),) = spans[part]
        sent = [span for span in spans["sent"] if start <= span[0] < end]
        total = sum(stop - first for first, stop in sent)
        beside = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in sent for b in products)
        print(
            f"{name:22} {part:8} {len(sent):3} collectives, {total / 1e3:7.1f} ms, "
            f"{beside / total:.0%} of it beside products"
        )


def inside(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Return True if a span lies in another one."""
    return first != second and second[0] <= first[0] and first[1] <= second[1]


def time_steps(rounds: int) -> None:
    """Print the time of a step on one process, on two, and on two with sequence parallelism."""
    rank, sides = dist.get_rank(), []
    for tensor, sequence in ((1, False), (SIZE, False), (SIZE, True)):
        config = make_config(tensor, sequence)
        mesh = Mesh() if tensor == 1 else build_mesh(config, torch.device("cpu"))
        model = Transformer(config, tp=mesh.tensor_parallel(sequence))
        sides.append((model, build_engine(model, config, mesh), config))
    if TRACE:
        for number, name in ((1, f"tensor={SIZE}"), (2, f"tensor={SIZE} + sequence")):
            step_seconds(*sides[number])  # The first one allocates.
            if rank == 0:
                trace_step(name, sides[number])
            else:
                step_seconds(*sides[number])
        return
    times: list[list[float]] = []
    for number in range(rounds + 1):  # The first round allocates.
        row = []
        for side in sides:
            dist.barrier()  # An idle rank sleeps here.
            alone = side[2].parallel.tensor == 1
            row.append(step_seconds(*side) if rank == 0 or not alone else 0.0)
        times += [row] if number else []
    if rank:
        return
    for column, name in enumerate(("1 process", f"tensor={SIZE}", f"tensor={SIZE} + sequence")):
        seconds = statistics.median(row[column] for row in times)
        ratios = [row[column] / row[0] for row in times]
        print(
            f"{name:22} {seconds:6.3f} s per step   ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of resident memory during a call, above its value before, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
    before = read_status("VmRSS")
    call()
    return read_status("VmHWM") - before


def read_status(key: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def measure_loss(rounds: int) -> None:
    """Print the median peak of memory of each loss."""
    rank = dist.get_rank()
    mesh = build_mesh(make_config(SIZE, False), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS, generator=generator)
    labels = torch.randint(LARGE_VOCABULARY, (TOKENS,), generator=generator)
    whole = torch.randn(LARGE_VOCABULARY, CHANNELS, generator=generator) / CHANNELS**0.5
    share = LARGE_VOCABULARY // SIZE

    def full_logits() -> float:
        weight = whole.requires_grad_()
        loss = F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
        return finish(loss, weight)

    def ours(weight: torch.Tensor, tp: object, first: int) -> float:
        weight.requires_grad_()
        return finish(cross_entropy(F.linear(x, weight), labels, tp=tp, first=first)[0], weight)

    def finish(loss: torch.Tensor, weight: torch.Tensor) -> float:
        loss.backward()
        weight.grad = None
        return float(loss.detach())

    own, tp, first = whole[rank * share :][:share].clone(), mesh.tensor_parallel(), rank * share
    sides = [full_logits, lambda: ours(whole, ALONE, 0), lambda: ours(own, tp, first)]
    losses = [side() for side in sides]
    assert max(losses) - min(losses) <= 1e-5 * losses[0], losses
    peaks: list[list[int]] = []
    for _ in range(rounds):
        row = []
        for number, side in enumerate(sides):
            dist.barrier()
            row.append(peak_bytes(side) if rank == 0 or number == 2 else 0)
        every: list[list[int]] = [[] for _ in range(SIZE)]
        dist.all_gather_object(every, row)
        peaks.append([max(column) for column in zip(*every, strict=True)])
    if rank:
        return
    names = ("full logits, torch", "ours, 1 process", f"ours, tensor={SIZE}")
    medians = [statistics.median(column) for column in zip(*peaks, strict=True)]
    for name, peak in zip(names, medians, strict=True):
        print(
            f"{name:22} {peak / 2**20:7.1f} MiB   {peak / medians[0]:.3f} of full logits, "
            f"{peak / medians[1]:.3f} of one process"
        )


def run(rank: int, folder: str, rounds: int) -> None:
    """Run one process of both measurements."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    if not TRACE:
        measure_loss(rounds)
    time_steps(rounds)


def main() -> None:
    """Start the processes."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, rounds), nprocs=SIZE)


if __name__ == "__main__":
    main()
