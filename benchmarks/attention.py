"""Measure a training step by attention backend, over packed documents or whole samples.

    python benchmarks/attention.py [--documents 200] [--window 256] [--rounds 7] [--batch 1]

Compares `train.attention` dense, with a mask of all pairs, and segments, with each document by
itself: sequences of 2,048 tokens, hidden 512, 4 blocks. Rounds are interleaved, so that a busy
machine slows both; the table has medians and the median of the ratios of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trained import Trained

from megarecur.attention.documents import from_lengths
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch

LENGTH, HIDDEN, HEADS, VOCABULARY, BLOCKS = 2048, 512, 8, 2048, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_config(attention: str, model: dict[str, Any], precision: str, batch: int) -> Config:
    """Return a run of four blocks."""
    shape = {"hidden_size": HIDDEN, "num_heads": HEADS, "ffn_hidden_size": 1408,
             "vocab_size": VOCABULARY, "tie_embeddings": True}  # fmt: skip
    return Config.model_validate({
        "run_dir": "none", "model": shape | model,
        "recurrence": {"kind": "dense", "num_layers": BLOCKS},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": batch,
                  "precision": precision, "attention": attention},
    })  # fmt: skip


def draw_lengths(mean: int, length: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return lengths of documents that fill a sample; 0: one document."""
    if not mean:
        return np.array([length])
    lengths: list[int] = []
    while sum(lengths) < length:
        lengths.append(int(generator.integers(mean // 2, mean * 3 // 2 + 1)))
    lengths[-1] -= sum(lengths) - length
    return np.array([tokens for tokens in lengths if tokens > 0])


def make_batch(
    mean: int, batch: int, length: int = LENGTH, vocabulary: int = VOCABULARY
) -> MicroBatch:
    """Return random tokens in documents of about `mean` tokens; 0: one document per sample."""
    generator = np.random.default_rng(0)
    rows = [draw_lengths(mean, length, generator) for _ in range(batch)]
    documents = np.stack([np.repeat(np.arange(len(row)), row) for row in rows])
    starts = np.stack([np.repeat(row.cumsum() - row, row) for row in rows])
    tokens = torch.from_numpy(generator.integers(0, vocabulary, (2, batch, length)))
    return MicroBatch(
        tokens[0], tokens[1], torch.from_numpy(np.arange(length) - starts),
        torch.from_numpy(documents.astype(np.int32)), torch.arange(batch),
        torch.zeros(batch, dtype=torch.int64), not mean,
        boundaries=from_lengths(np.concatenate(rows), batch, length),
    ).to(DEVICE)  # fmt: skip


def make_step(config: Config, batch: MicroBatch) -> Callable[[], float]:
    """Return a function that runs an optimizer step and returns its seconds."""
    trained = Trained(config, DEVICE)

    def step() -> float:
        started = time.perf_counter()
        trained.step(batch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200, help="mean tokens; 0: whole samples")
    parser.add_argument("--window", type=int, default=0, help="sliding window of every block")
    parser.add_argument("--positions", default="rope")
    parser.add_argument("--kv-heads", type=int, default=HEADS)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backends", nargs="+", default=["dense", "segments"])
    given = parser.parse_args()
    model: dict[str, Any] = {"positions": given.positions, "num_kv_heads": given.kv_heads}
    if given.window:
        model |= {"attention_types": ["sliding"], "sliding_window": given.window}
    batch = make_batch(given.documents, given.batch)
    steps = {
        name: make_step(make_config(name, model, given.precision, given.batch), batch)
        for name in given.backends
    }
    for step in steps.values():
        step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(given.rounds)]
    first = given.backends[0]
    print("| backend | s per step | ratio |")
    print("|---|---|---|")
    for name in given.backends:
        seconds = statistics.median(round_[name] for round_ in rounds)
        ratio = statistics.median(round_[name] / round_[first] for round_ in rounds)
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
