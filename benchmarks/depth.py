"""Random depth against fixed depth at equal executed FLOPs.

    python benchmarks/depth.py [--rounds 5] [--compile] [--cuda]

A loop model (prelude 1, core 2, coda 1, hidden 512, 2 sequences of 256 tokens) takes optimizer
steps of the trainer's engine. A round is 14 steps with 4 loops each, and 14 steps that run every
number of loops from 1 to 7 twice, in the order in which the sampler draws them: exactly equal
executed FLOPs. Single steps alternate, so that changes in the machine's speed affect both sides;
the median ratio of the rounds' times is printed (target: at most 1.05).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch
from training import COMPILE, DEVICE, FFN, HEADS, HIDDEN, VOCABULARY

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops
from megarecur.recurrence.depth import Depth, draw_depth
from megarecur.recurrence.schemes import layer_map

LENGTH, BATCH = 256, 2
TOKENS = LENGTH * BATCH
SAMPLER = {"sampler": "uniform", "min": 1, "max": 7}


def make_config(num_loops: object) -> Config:
    """Return the model's config; both sides use it."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": HIDDEN, "num_heads": HEADS, "ffn_hidden_size": FFN,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": num_loops},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH,
                 "mask_documents": False},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    })  # fmt: skip


def drawn_depths(config: Config) -> list[int]:
    """Return each of 1 to 7 twice, in the order in which the sampler first draws them."""
    order: list[int] = []
    step = 0
    while len(order) < 14:
        depth = draw_depth(config, step)
        assert depth is not None
        if order.count(depth.num_loops) < 2:
            order.append(depth.num_loops)
        step += 1
    return order


def main() -> None:
    """Measure both sides, and print the ratio."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    config = make_config(SAMPLER)
    model = Transformer(config, DEVICE)
    engine = PlainEngine(model, config, Mesh(device=DEVICE))
    compiled = CompiledModel(model) if COMPILE else None
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator).to(DEVICE)
    tokens_BS, labels_BS = both[0], both[1]
    positions_BS = torch.arange(LENGTH, device=DEVICE).expand(BATCH, LENGTH)
    samples_B = torch.arange(BATCH, device=DEVICE)
    zeros_BS = torch.zeros_like(tokens_BS)
    batch = MicroBatch(
        tokens_BS, labels_BS, positions_BS, zeros_BS, samples_B, torch.zeros_like(samples_B), True
    )

    def seconds(loops: int) -> float:
        began = time.perf_counter()
        ctx = model.context(batch, step=0, training=True)
        steps = layer_map(config.recurrence, Depth(loops, loops))
        x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        loss = model.loss(x, batch)["loss"].total / TOKENS
        engine.backward(loss)
        engine.step(config.optimizer.lr)
        loss.item()
        return time.perf_counter() - began

    fixed, sampled = [4] * 14, drawn_depths(config)

    def work(depths: Sequence[int]) -> int:
        return sum(count_flops(config, layer_map(config.recurrence, d)).train for d in depths)

    assert work(fixed) == work(sampled)
    for loops in (1, 7, 4):
        seconds(loops)
    ratios = []
    for _ in range(rounds):
        times = [0.0, 0.0]
        for pair in zip(fixed, sampled, strict=True):
            for side, loops in enumerate(pair):
                times[side] += seconds(loops)
        ratios.append(times[1] / times[0])
        print(f"fixed {times[0]:.2f} s, sampled {times[1]:.2f} s, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}, wanted at most 1.05")
    print(f"{compiled.graphs} graphs of the block") if compiled else None


if __name__ == "__main__":
    main()
