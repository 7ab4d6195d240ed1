"""Cost of stateless dropout against F.dropout, forward and backward.

    python benchmarks/dropout.py [--cuda]

Each runs on [4, 512, 512] and [16, 2048, 1024] (the larger on CUDA only) in fp32 and bf16. The two
sides alternate, and medians are printed. Stateless dropout keeps no generator state, and its mask
does not depend on how the batch is divided.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megarecur.parallel.random import dropout

DEVICE = torch.device("cuda" if "--cuda" in sys.argv else "cpu")
PROBABILITY, ROUNDS = 0.1, 60


def compare(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Alternate both sides, and print medians."""
    x_BSD = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    dy_BSD = torch.randn_like(x_BSD)
    rows = (
        torch.arange(shape[0], device=DEVICE)[:, None],
        torch.arange(shape[1], device=DEVICE)[None],
    )
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "stateless": lambda: dropout(x_BSD, PROBABILITY, 1234567890123, rows),
        "F.dropout": lambda: F.dropout(x_BSD, PROBABILITY),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            began = time.perf_counter()
            torch.autograd.grad(side(), x_BSD, dy_BSD)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    ours, theirs = (1e3 * statistics.median(values[5:]) for values in times.values())
    print(f"{shape} {dtype!s:15} stateless {ours:7.2f} ms   F.dropout {theirs:7.2f} ms   "
          f"cost {ours / theirs:.2f}")  # fmt: skip


def main() -> None:
    """Compare both sides at every shape and dtype."""
    shapes = [(4, 512, 512)] + ([(16, 2048, 1024)] if DEVICE.type == "cuda" else [])
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            compare(shape, dtype)


if __name__ == "__main__":
    main()
