"""Compare predicted with measured step times, at three sizes, eager and compiled.

    python benchmarks/plan.py [--hardware FILE] [--precision fp32] [--rounds 5] [--sizes small]

Without --hardware, the machine is measured first (`megarecur bench hardware`, under two minutes). A
step is forward, backward, clipping and AdamW over packed documents of a quarter of a sample on
average; 4 blocks run twice each. The table has the median of the measured rounds, the predicted
time and the ratio of both. Takes about four minutes on 2 cores.

Nothing else should run meanwhile. On a machine shared with other work, OMP_NUM_THREADS=1 counts
processor time instead of wall time. The last column is the ratio if the machine multiplied as fast
as its description says: every step is followed by products whose rate is compared with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarecur.attention.documents import from_lengths
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.launch.bench import DTYPES, bench_hardware, pick_clock, rate_products
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh, pick_device
from megarecur.plan.cluster import Cluster, load_cluster
from megarecur.plan.cost import count_seen
from megarecur.plan.predict import Layout, complete, make_draft
from megarecur.recurrence.schemes import layer_map

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "cpu": {
        "small": {"hidden": 256, "heads": 4, "length": 256, "batch": 8, "vocabulary": 2048},
        "medium": {"hidden": 512, "heads": 8, "length": 512, "batch": 4, "vocabulary": 8192},
        "large": {"hidden": 1024, "heads": 16, "length": 1024, "batch": 1, "vocabulary": 8192},
    },
    "cuda": {
        "small": {"hidden": 1024, "heads": 8, "length": 2048, "batch": 4, "vocabulary": 32768},
        "medium": {"hidden": 2048, "heads": 16, "length": 4096, "batch": 4, "vocabulary": 32768},
        "large": {"hidden": 4096, "heads": 32, "length": 4096, "batch": 4, "vocabulary": 32768},
    },
}
PRODUCTS = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096)}
"""Sides of the products that are timed after a step."""
DEVICE = pick_device("auto")


def make_config(size: dict[str, int], precision: str, compiled: bool) -> Config:
    """Return a run of 4 blocks, each used twice in a row."""
    return Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": size["hidden"], "num_heads": size["heads"],
                  "vocab_size": size["vocabulary"], "tie_embeddings": True},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2, 2, 2, 2]},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": size["length"]},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": size["batch"], "compile": compiled,
                  "micro_batch_size": size["batch"], "precision": precision},
    })  # fmt: skip


def draw_lengths(length: int, batch: int) -> list[int]:
    """Return the lengths of documents that fill the samples."""
    generator, lengths = np.random.default_rng(0), []
    for _ in range(batch):
        left = length
        while left:
            lengths.append(min(int(generator.integers(length // 8, length // 8 * 3 + 1)), left))
            left -= lengths[-1]
    return lengths


def make_batch(config: Config, lengths: list[int]) -> MicroBatch:
    """Return random tokens in documents of these lengths."""
    shape = config.train.micro_batch_size, config.data.seq_length
    tokens = torch.randint(config.model.vocab_size or 0, (2, *shape))
    documents = np.repeat(np.arange(len(lengths)), lengths).reshape(shape)
    positions = np.concatenate([np.arange(n) for n in lengths]).reshape(shape)
    return MicroBatch(
        tokens[0], tokens[1], torch.from_numpy(positions),
        torch.from_numpy((documents - documents[:, :1]).astype(np.int32)), torch.arange(shape[0]),
        torch.zeros(shape[0], dtype=torch.int64), False,
        boundaries=from_lengths(np.array(lengths), *shape),
    ).to(DEVICE)  # fmt: skip


def measure_step(
    config: Config, batch: MicroBatch, compiled: bool, rounds: int, cluster: Cluster
) -> tuple[float, float]:
    """Return the median seconds of an optimizer step, after two that are not counted; and the
    median if the machine multiplied as fast as its description says."""
    precision, clock = config.train.precision, pick_clock(DEVICE)
    model = Transformer(config, DEVICE)
    engine = PlainEngine(model, config, Mesh(device=DEVICE))
    if compiled:
        CompiledModel(model)
    steps, seconds, relative = layer_map(config.recurrence), [], []
    for _ in range(rounds + 2):
        started = clock()
        ctx = model.context(batch, step=0, training=True)
        x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        engine.backward(model.loss(x, batch)["loss"].total / batch.tokens_BS.numel())
        engine.step(1e-4)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        faster = [
            rate_products(side, DTYPES[precision], DEVICE)[0]
            * 1e12
            / cluster.product_rate(precision, side)
            for side in PRODUCTS[DEVICE.type]
        ]
        relative.append(seconds[-1] * statistics.median(faster))
    return statistics.median(seconds[2:]), statistics.median(relative[2:])


def describe_machine(path: str | None) -> Cluster:
    """Return the description of a file, or of this machine, which is measured now."""
    if path is not None:
        return load_cluster(path, "--hardware ")
    with tempfile.TemporaryDirectory() as folder:
        return bench_hardware(Path(folder, "measured.yaml"), DEVICE.type, 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", help="description to use (default: measure this machine)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium", "large"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    given = parser.parse_args()
    cluster = describe_machine(given.hardware)
    print("\n| size | mode | measured, s | predicted, s | predicted / measured | beside products |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.sizes:
        size: dict[str, Any] = SIZES[DEVICE.type][name]
        lengths = draw_lengths(size["length"], size["batch"])
        for mode in given.modes:
            config = make_config(size, given.precision, mode == "compiled")
            seen = count_seen(config, lengths)
            plan = complete(make_draft(config, Layout(1, 1, 1), cluster, seen=seen))
            batch = make_batch(config, lengths)
            measured = measure_step(config, batch, mode == "compiled", given.rounds, cluster)
            ratios = " | ".join(f"{plan.step_time / seconds:.2f}" for seconds in measured)
            print(f"| {name} | {mode} | {measured[0]:.3f} | {plan.step_time:.3f} | {ratios} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
