"""Count the bytes that pointwise work reads and writes: norms, activations, rotations, residuals.

Memory bounds the time of this work, not arithmetic; the loss over the logits is counted too.

Eager passes are those of the code (`model/norm.py`, `feed_forward.py`, `positions.py`, `block.py`);
compiled ones are the operands of one fused kernel between two products. Not counted: dropout,
adapters, halting, telemetry, and the copies that a temporal memory makes.
"""

from __future__ import annotations

from typing import NamedTuple

from megarecur.config.rules import find_compile_conflict
from megarecur.config.run import Config
from megarecur.plan.cost import element_bytes

EAGER_LAUNCHES = (47, 69)
"""Kernels of an eager step of the map without attention, counted on a CPU: forward, backward."""
FUSED_LAUNCHES = (14, 26)
"""Kernels of a compiled one: its products, and a fused kernel between each two; an estimate."""


class Passes(NamedTuple):
    """Passes over a tensor of one channel per token, forward and backward, by width."""

    narrow: tuple[int, int]
    """Passes in the compute dtype."""
    wide: tuple[int, int]
    """Passes in promote(dtype, fp32); conversions included, if that is another dtype."""
    converted: tuple[int, int] = (0, 0)
    """Conversions, which read one dtype and write the other; free if they are equal."""

    def count_bytes(self, element: int) -> tuple[int, int]:
        """Return bytes per channel and token, forward and backward."""
        wide = max(element, 4)
        each = (element + wide) * (element != wide)
        forward, backward = (
            element * n + wide * w + each * c
            for n, w, c in zip(self.narrow, self.wide, self.converted, strict=True)
        )
        return forward, backward


EAGER = {
    "rms": Passes((0, 0), (5, 14), (2, 3)),
    "layer": Passes((0, 0), (2, 3), (2, 2)),
    "residual": Passes((3, 3), (0, 0)),  # an addition; in backward the sum of two branches
    "rotary": Passes((0, 0), (5, 5), (2, 2)),
    "gated": Passes((5, 11), (0, 0)),
    "plain": Passes((2, 3), (0, 0)),
}
FUSED = {
    "rms": Passes((2, 3), (0, 0)),
    "layer": Passes((2, 3), (0, 0)),
    "residual": Passes((2, 1), (0, 0)),  # part of the kernel of the norm that follows
    "rotary": Passes((2, 2), (0, 0)),
    "gated": Passes((3, 5), (0, 0)),
    "plain": Passes((2, 3), (0, 0)),
}


def count_pointwise_bytes(config: Config, fused: bool) -> tuple[int, int]:
    """Return bytes per token of one step of the map, (forward, backward), on one tensor-parallel
    rank; `fused`: the block is compiled."""
    model, tp = config.model, config.parallel.tensor
    passes, element = FUSED if fused else EAGER, element_bytes(config)
    stream = model.hidden_size // (tp if config.parallel.sequence_parallel else 1)
    heads = (model.num_heads + max(model.num_kv_heads, tp)) // tp * model.head_dim
    norms = 4 if model.norm_position in ("sandwich", "peri") else 2
    channels = {
        model.norm: norms * stream,
        "residual": 2 * stream,
        "gated" if model.gated else "plain": model.ffn_hidden_size // tp,
    }
    if model.positions in ("rope", "xpos"):
        channels["rotary"] = round(heads * model.rope_fraction)
    pairs = [(count, passes[kind].count_bytes(element)) for kind, count in channels.items()]
    if model.qk_norm:
        pairs.append((heads, passes["rms"].count_bytes(element)))
    forward, backward = (sum(count * each[i] for count, each in pairs) for i in range(2))
    return forward, backward


def count_logit_bytes(config: Config) -> tuple[int, int]:
    """Return bytes per logit that the loss reads and writes, forward and backward; kernels read a
    logit once forward, and read and write it once or, eagerly, three times backward."""
    return Passes((0, 0), (1, 6), (1, 2)).count_bytes(element_bytes(config))


def compiles(config: Config, device: str) -> bool:
    """Return True if a run compiles its blocks on a kind of device (cpu, cuda)."""
    asked = config.train.compile
    wish = device == "cuda" if asked is None else bool(asked)
    return wish and find_compile_conflict(config) is None
