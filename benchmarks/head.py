"""Peak memory and time of head and loss by chunks of tokens, against whole logits.

    python benchmarks/head.py [--vocabulary 131072] [--tokens 4096] [--hidden 512]

Each row is a process of its own: one forward and backward pass of `Head` and the cross-entropy with
z-loss in fp32, the matrix's gradient summed in place. The rise of resident memory is that above the
hidden states, the matrix and its gradient; full logits are tokens x vocabulary x 4 bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch
from torch import nn

from megarecur.model.embedding import Head
from megarecur.parallel.head_loss import ChunkedLoss
from megarecur.parallel.linear import Weight
from megarecur.parallel.loss import EAGER, Shares, cross_entropy
from megarecur.plan.cost import chunk_tokens


def peak() -> int:
    """Return the peak of resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(kind: str, tokens: int, vocabulary: int, hidden: int) -> tuple[int, float, float]:
    """Return (rise of resident memory in bytes, seconds, loss) of one pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, hidden, generator=generator, requires_grad=True)
    table = nn.Parameter(torch.empty(vocabulary, hidden).normal_(0.0, 0.02, generator=generator))
    table.grad = torch.full_like(table, 0.0)
    x.grad = torch.full_like(x, 0.0)
    labels_N = torch.randint(vocabulary, (tokens,), generator=generator)
    weight = Weight(table, torch.float32)
    weight.sum_in_place = True
    head, before, began = Head(weight), peak(), time.perf_counter()
    if kind == "whole":
        total, square, _ = cross_entropy(head(x).flatten(0, 1), labels_N)
    elif kind == "torch":
        logits_NV = nn.functional.linear(x.flatten(0, 1), table)
        total = nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
        square = logits_NV.logsumexp(-1).square().sum()
    else:
        length = chunk_tokens(tokens, vocabulary)
        total, square, _, _ = head(x, ChunkedLoss(labels_N, Shares(EAGER), length))
    (total + 1e-4 * square).div(tokens).backward()
    return peak() - before, time.perf_counter() - began, total.item() / tokens


def main() -> None:
    """Print a row for chunks, one for whole logits, and one for torch's functions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--hidden", type=int, default=512)
    sizes = parser.parse_args()
    full = sizes.tokens * sizes.vocabulary * 4
    for kind in ("chunks", "whole", "torch"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            case = (kind, sizes.tokens, sizes.vocabulary, sizes.hidden)
            rise, seconds, loss = pool.apply(measure, case)
        print(
            f"{kind:7} {rise / 2**20:8,.0f} MiB  {rise / full:.3f} of full logits  "
            f"{seconds:6.1f} s  loss {loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
