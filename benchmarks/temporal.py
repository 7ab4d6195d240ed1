"""Speed of a temporal memory: forward and backward in chunks against full attention.

    python benchmarks/temporal.py [--length 4096] [--chunk 128] [--slots 32] [--hidden 256]

4,096 tokens, four blocks and a vocabulary of 2,048; the two sides alternate. The ratio of executed
FLOPs is printed as well. On the CPU no attention kernel skips masked scores, so all S x S are
computed.
"""

from __future__ import annotations

import argparse
import statistics

from adapters import VOCABULARY, Side

from megarecur.config.run import Config
from megarecur.plan.cost import count_flops
from megarecur.recurrence.schemes import layer_map


def make_config(options: argparse.Namespace, in_chunks: bool) -> Config:
    """Return a config of four blocks, each used once."""
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


def main() -> None:
    """Measure both sides, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("length", 4096), ("chunk", 128), ("slots", 32), ("hidden", 256),
                        ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sides = {name: Side(make_config(options, name == "chunks")) for name in ("full", "chunks")}
    for _ in range(options.rounds + 1):  # The first round warms up.
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
