"""Skipping halted samples against computing all samples and discarding the surplus.

    python benchmarks/halting.py [--depth 20] [--rounds 5] [--cuda]

A Gated Universal Transformer (hidden 512, at most 20 steps, as in the paper on flip-flop strings,
or 8; 8 sequences of 256 tokens) takes optimizer steps of the trainer's engine. The steps of each
sequence are given, not learned: half of the maximum on average. The step that a sequence rejects is
computed too, so 8 steps can gain at most 1.64, and 20 at most 1.84. Single optimizer steps of both
sides alternate, so that changes in the machine's speed affect both; the median ratio of tokens per
second is printed (target: at least 1.6).
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor
from training import DEVICE, FFN, HEADS, HIDDEN, VOCABULARY

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.recurrence.schemes import layer_map

LENGTH, BATCH = 256, 8
DEPTH = int(sys.argv[sys.argv.index("--depth") + 1]) if "--depth" in sys.argv else 20
TAKEN = {8: (1, 1, 2, 3, 4, 6, 7, 8), 20: (1, 3, 5, 8, 11, 14, 18, 20)}[DEPTH]
"""Accepted steps of each sequence."""


def make_config() -> Config:
    """Return the config of the model."""
    halting = {"mode": "global"}
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": HIDDEN, "num_heads": HEADS, "ffn_hidden_size": FFN, "gate": True,
                  "vocab_size": VOCABULARY, "positions": "xpos", "norm": "layer",
                  "feed_forward": "gelu", "feed_forward_bias": True},
        "recurrence": {"kind": "universal", "depth": DEPTH, "halting": halting},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH,
                 "mask_documents": False},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    })  # fmt: skip


class Told(torch.nn.Module):
    """A head that computes what the real head does, but stops every sequence as TAKEN says.

    Sequences are in the order of TAKEN, so the remaining sequences are the last ones.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.step = head, 0

    def forward(self, z: Tensor) -> Tensor:
        """Map z [b, S, 2 D] to probabilities of stopping [b, S]."""
        p = self.head(z) * 1e-6
        stops_b = torch.tensor(TAKEN[-len(z) :], device=p.device) <= self.step
        self.step += 1
        return p + stops_b[:, None].to(p.dtype)


def main() -> None:
    """Measure both sides, and print the ratio."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    config = make_config()
    model = Transformer(config, DEVICE)
    engine = PlainEngine(model, config, Mesh(device=DEVICE))
    told = Told(model.runner.halting)
    model.runner.halting = told  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator).to(DEVICE)
    positions_BS = torch.arange(LENGTH, device=DEVICE).expand(BATCH, LENGTH)
    samples_B = torch.arange(BATCH, device=DEVICE)
    batch = MicroBatch(both[0], both[1], positions_BS, torch.zeros_like(both[0]), samples_B,
                       torch.zeros_like(samples_B), True)  # fmt: skip
    steps = layer_map(config.recurrence)
    shares = {}

    def seconds(compact: bool) -> float:
        began = time.perf_counter()
        model.runner.compact, told.step = compact, 0
        ctx = model.context(batch, step=0, training=True)
        x, terms = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        loss = model.loss(x, batch)["loss"].total / (BATCH * LENGTH)
        engine.backward(loss + terms["halting"].weight * terms["halting"].total / BATCH)
        engine.step(config.optimizer.lr)
        counts = ctx.recorder.counts[0].tolist()
        shares[compact] = counts[-2] / counts[-1]
        mean = sum(i * n for i, n in enumerate(counts[:-2])) / (BATCH * LENGTH)
        assert mean == sum(TAKEN) / BATCH, (mean, counts)
        return time.perf_counter() - began

    for compact in (True, False):
        seconds(compact)  # Warm up.
    times = [(seconds(True), seconds(False)) for _ in range(rounds)]
    rate = BATCH * LENGTH / statistics.median(skipping for skipping, _ in times)
    ratio = statistics.median(whole / skipping for skipping, whole in times)
    print(f"mean depth {sum(TAKEN) / BATCH:g} of {DEPTH}, {rounds} rounds")
    print(f"computed: {shares[True]:.0%} of all steps, against {shares[False]:.0%}")
    print(f"skipping: {rate:,.0f} tokens/s, {ratio:.2f} times that of computing all")


if __name__ == "__main__":
    main()
