"""Cost of adapters of rank 64: time of an optimizer step with and without, hidden size 1024.

    python benchmarks/adapters.py [--rounds 5] [--rank 64] [--hidden 1024] [--batch 2]

Two blocks, each used twice, sequence length 512, vocabulary 2,048; forward, backward and AdamW of
one micro batch. The two sides alternate. The ratio of executed FLOPs is printed as well: no
implementation can avoid that cost.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops
from megarecur.recurrence.schemes import layer_map
from megarecur.train.step import forward_backward

LENGTH, VOCABULARY = 512, 2048


def make_config(hidden: int, batch: int, rank: int | None) -> Config:
    """Return a config with a cycle of two blocks at depth 4."""
    return Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": hidden, "num_heads": hidden // 64, "vocab_size": VOCABULARY},
        "recurrence": {"kind": "cycle", "num_blocks": 2, "depth": 4},
        "adapters": None if rank is None else {"rank": rank},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 100, "global_batch_size": batch, "micro_batch_size": batch},
    })  # fmt: skip


class Side:
    """A model with its engine, trained on constant random tokens."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = Transformer(config)
        self.engine = PlainEngine(self.model, config, Mesh())
        batch, length = config.train.micro_batch_size, config.data.seq_length
        tokens = torch.randint(VOCABULARY, (batch, length + 1))
        positions = torch.arange(length).expand(batch, length)
        self.batch = MicroBatch(
            tokens[:, :-1], tokens[:, 1:], positions, torch.zeros_like(positions),
            torch.arange(batch), torch.zeros(batch, dtype=torch.long), True,
        )  # fmt: skip
        self.seconds: list[float] = []

    def step(self) -> None:
        """Run and time one optimizer step."""
        began = time.perf_counter()
        forward_backward(self.model, self.engine, self.config, [self.batch], 0, Mesh())
        self.engine.step(1e-4)
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    """Alternate both sides, and print medians."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("rank", 64), ("hidden", 1024), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    configs = [make_config(options.hidden, options.batch, rank) for rank in (None, options.rank)]
    plain, adapted = sides = [Side(config) for config in configs]
    for _ in range(options.rounds + 1):
        for side in sides:
            side.step()
    ratios = [a / p for a, p in zip(adapted.seconds[1:], plain.seconds[1:], strict=True)]
    flops = [count_flops(c, layer_map(c.recurrence)).train for c in configs]
    times = [statistics.median(side.seconds[1:]) for side in sides]
    print(
        f"rank {options.rank} at hidden size {options.hidden}: {times[1]:.2f} s against "
        f"{times[0]:.2f} s, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}); executed FLOPs {flops[1] / flops[0]:.3f}"
    )


if __name__ == "__main__":
    main()
