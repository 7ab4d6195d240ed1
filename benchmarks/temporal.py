"""What a temporal memory spares: time of a forward and backward pass over 4,096 tokens, in chunks
against full attention.

    python benchmarks/temporal.py [--length 4096] [--chunk 128] [--slots 32] [--hidden 256]

Four blocks and a vocabulary of 2,048; the two take turns. Executed FLOPs are printed beside. The
CPU has no kernel for attention that would spare masked scores, so that all S x S are computed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from megarecur.config.schema import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops
from megarecur.recurrence.schemes import layer_map
from megarecur.train.step import forward_backward

VOCABULARY = 2048


def make_config(options: argparse.Namespace, in_chunks: bool) -> Config:
    """Four blocks, each used once."""
    temporal = {"chunk_length": options.chunk, "num_slots": options.slots}
    return Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": options.hidden, "num_heads": options.hidden // 64,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "dense", "num_layers": 4},
        "temporal": temporal if in_chunks else None,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": options.length},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 100, "global_batch_size": 1, "micro_batch_size": 1},
    })  # fmt: skip


class Side:
    """A model that is trained on the same random tokens."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = Transformer(config)
        self.engine = PlainEngine(self.model, config, Mesh())
        length = config.data.seq_length
        tokens = torch.randint(VOCABULARY, (1, length + 1))
        positions = torch.arange(length)[None]
        self.batch = MicroBatch(
            tokens[:, :-1], tokens[:, 1:], positions, torch.zeros_like(positions),
            torch.arange(1), torch.zeros(1, dtype=torch.long), True,
        )  # fmt: skip
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimizer step, timed."""
        start = time.perf_counter()
        forward_backward(self.model, self.engine, self.config, [self.batch], 0, Mesh())
        self.engine.step(1e-4)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("length", 4096), ("chunk", 128), ("slots", 32), ("hidden", 256),
                        ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sides = {name: Side(make_config(options, name == "chunks")) for name in ("full", "chunks")}
    for _ in range(options.rounds + 1):  # The first warms up.
        for side in sides.values():
            side.step()
    medians, flops = {}, {}
    for name, side in sides.items():
        medians[name] = statistics.median(side.seconds[1:])
        flops[name] = count_flops(side.config, layer_map(side.config.recurrence)).train
        print(f"{name:8} {medians[name]:8.3f} s a step   {flops[name] / 1e6:8.2f} MFLOP a token")
    print(
        f"full attention takes {medians['full'] / medians['chunks']:.2f} times as long, at "
        f"{flops['full'] / flops['chunks']:.2f} times the FLOPs"
    )


if __name__ == "__main__":
    main()
