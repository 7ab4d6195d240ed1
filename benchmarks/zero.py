"""ZeRO 1 against the plain engine: optimizer memory per process, and time of a step.

    python benchmarks/zero.py [--rounds 5] [--stage 1] [--cuda]

Two processes, one thread each (with --cuda: one process on one GPU), 48.8M unique parameters:
hidden 768, feed-forward 2,048, 12 heads, 6 blocks of which the first two run twice, 8,192 tokens of
vocabulary, tied, fp32. A step is 2 micro batches of 2 sequences of 256 tokens per process,
clipping, AdamW. Both engines hold their own copy of the model in the same processes and alternate.
It prints medians, and the median of the rounds' ratios. Optimizer memory is measured as all tensors
that the optimizer keeps besides parameters and gradients.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.optim.engine import Engine, PlainEngine
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.recurrence.schemes import layer_map

LENGTH, MICRO, NUM_MICRO, VOCABULARY = 256, 2, 2, 8192
CUDA = "--cuda" in sys.argv
WORLD = 1 if CUDA else 2


def option(name: str, default: int) -> int:
    """Return the number after a flag."""
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else default


def make_config(stage: int) -> Config:
    """Return the model's config for an engine of this stage."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 2048,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2, 2, 1, 1, 1, 1]},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "parallel": {"zero_stage": stage},
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


def step_seconds(model: Transformer, engine: Engine, config: Config, mesh: Mesh) -> float:
    """Return the wall time of one optimizer step, in seconds."""
    batches = [make_batch(mesh.rank * NUM_MICRO + i, mesh.device) for i in range(NUM_MICRO)]
    tokens = WORLD * MICRO * NUM_MICRO * LENGTH
    dist.barrier()
    began = time.perf_counter()
    for batch in batches:
        ctx = model.context(batch, 0, training=True)
        steps = layer_map(config.recurrence)
        x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        engine.backward(model.loss(x, batch)["loss"].total / tokens)
    engine.step(config.optimizer.lr)
    dist.barrier()
    return time.perf_counter() - began


def optimizer_bytes(model: Transformer, engine: Engine) -> int:
    """Return the bytes of the optimizer's tensors that are not the model's own parameters."""
    inner = engine.optimizers[0] if isinstance(engine, PlainEngine) else engine.optimizer.optimizer
    kept = [t for state in inner.state.values() for t in state.values()]
    kept += [p for group in inner.param_groups for p in group["params"]]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in own)


def run(rank: int, folder: str, stage: int, rounds: int) -> None:
    """Run one process, with both engines."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=rank, world_size=WORLD)
    sides = []
    for number in (0, stage):
        config = make_config(number)
        mesh = build_mesh(config, device)
        model = Transformer(config, device)
        engine = build_engine(model, config, mesh)
        sides.append((model, engine, config, mesh))
        step_seconds(*sides[-1])  # The first one allocates.
    times = [[step_seconds(*side) for side in sides] for _ in range(rounds)]
    if rank:
        return
    count = sum(p.numel() for p in sides[0][0].parameters())
    sizes = [optimizer_bytes(model, engine) for model, engine, *_ in sides]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [zero / plain for plain, zero in times]
    print(f"{count / 1e6:.1f}M unique parameters, {WORLD} process(es), {rounds} rounds")
    for name, size, seconds in zip(("plain", f"ZeRO {stage}"), sizes, medians, strict=True):
        print(f"{name:8} {size / 2**20:8.1f} MiB of optimizer state   {seconds:7.3f} s per step")
    print(f"memory ratio {sizes[1] / sizes[0]:.3f}")
    print(f"time ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    """Start the processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, option("--stage", 1), option("--rounds", 5)), nprocs=WORLD)


if __name__ == "__main__":
    main()
