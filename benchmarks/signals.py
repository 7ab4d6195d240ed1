"""Cost of level signals in factored form, A^T (B x), against the full matrix M = A^T B.

    python benchmarks/signals.py [--rounds 5] [--hidden 512] [--rank 32] [--tokens 2048]

The authors of RingFormer build M first and then apply it. Both sides compute the three signals of
attention, forward and backward, together with the products that the signals are added to; the sides
alternate. The ratio by formula is printed as well: 4 pairs of rank r take 8 r d multiply-adds per
token and level, 4 full matrices 4 d^2, and 4 r d^2 once to build them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megarecur.parallel.linear import Linear, LowRank, apply_all


def make(shapes: dict[str, tuple[int, int]]) -> Callable[[str], nn.Parameter]:
    """Return a function that makes parameters of the shape listed for the last part of their
    name."""
    return lambda name: nn.Parameter(torch.randn(shapes[name.rsplit(".", 1)[1]]) / 32)


def main() -> None:
    """Alternate the sides, and print medians."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("hidden", 512), ("rank", 32), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    d, r = options.hidden, options.rank
    parameter = make({"weight": (d, d), "a": (d, r), "b": (r, d)})
    layers = [Linear(f"{i}", parameter, torch.float32, False) for i in range(3)]
    signals = [
        LowRank(f"{i}", parameter, torch.float32, factors=("b", "a")) for i in range(len(layers))
    ]
    x = torch.randn(1, options.tokens, d, requires_grad=True)

    def thin() -> tuple[Tensor, ...]:
        return apply_all(layers, x, signals)

    def whole() -> tuple[Tensor, ...]:
        matrices = [s.b.parameter @ s.a.parameter for s in signals]
        plain = apply_all(layers, x)
        return tuple(y + x @ m.T for y, m in zip(plain, matrices, strict=True))

    def none() -> tuple[Tensor, ...]:
        return apply_all(layers, x)

    for ours, theirs in zip(thin(), whole(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {"thin": [], "whole": [], "none": []}
    for _ in range(options.rounds + 1):
        for kind, run in (("thin", thin), ("whole", whole), ("none", none)):
            began = time.perf_counter()
            torch.stack([y.sum() for y in run()]).sum().backward()
            seconds[kind].append(time.perf_counter() - began)
    times = {kind: statistics.median(each[1:]) for kind, each in seconds.items()}
    print(
        f"hidden size {d}, rank {r}, {options.tokens} tokens: thin {times['thin'] * 1e3:.1f} ms, "
        f"whole {times['whole'] * 1e3:.1f} ms (ratio {times['whole'] / times['thin']:.2f}), "
        f"without signals {times['none'] * 1e3:.1f} ms; multiply-adds of the signals, whole over "
        f"thin: {(d * d + r * d * d / options.tokens) / (2 * r * d):.1f}"
    )


if __name__ == "__main__":
    main()
