"""Context parallelism: ranks share each sequence, and attention exchanges heads for positions.

Every rank holds consecutive positions of the residual stream, all channels. Before attention, one
all-to-all gives each rank all positions of its share of the heads; after it, another one returns
all heads of its own positions (DeepSpeed-Ulysses, Jacobs et al. 2023, section 3). Everything else
in a block works on single positions. Attention sees whole sequences, so documents, windows, biases
and dropout need no changes; only the head with which a rank begins differs.

Shapes: B samples, S positions, P of them on this rank, N heads, H head_dim, C ranks.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

CONTEXTS: WeakValueDictionary[int, ContextParallel] = WeakValueDictionary()
"""Every `ContextParallel` by number, for operators of compiled graphs."""
_numbers = itertools.count()


class ContextParallel:
    """The rank of this process among those that share each sequence.

    Args:
        group: their process group; None if there is only one.
        rank: rank in the group.
        size: size of the group.
    """

    def __init__(self, group: Any = None, rank: int = 0, size: int = 1) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.number = next(_numbers)
        """Number in `CONTEXTS`."""
        CONTEXTS[self.number] = self

    def span(self, length: int) -> tuple[int, int]:
        """Return the first of this rank's positions, and their number."""
        assert length % self.size == 0, f"{length} positions are not divisible by {self.size} ranks"
        return self.rank * (length // self.size), length // self.size

    def own(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's positions of values known for all positions, as a view."""
        return values if self.size == 1 else values.narrow(dim, *self.span(values.shape[dim]))

    def gather_positions(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all positions, for this rank's share of the heads:
        [B, P, N, H] to [B, S, N/C, H].

        If there are fewer key heads than ranks, several ranks get the same one.
        """
        if self.size == 1:
            return q, k, v
        copies = max(self.size // k.shape[2], 1)
        shares = [
            (t if i == 0 or copies == 1 else t.repeat_interleave(copies, 2))
            .unflatten(2, (self.size, -1))
            .movedim(2, 0)
            for i, t in enumerate((q, k, v))
        ]
        heads = [share.shape[3] for share in shares]
        given_CBPNH = self.exchange(torch.cat(shares, 3))
        first, second, third = given_CBPNH.movedim(0, 1).flatten(1, 2).split(heads, 2)
        return first, second, third

    def gather_heads(self, x: Tensor) -> Tensor:
        """Return all heads of this rank's positions: [B, S, N/C, H] to [B, P, N, H]."""
        if self.size == 1:
            return x
        given_CBPNH = self.exchange(x.unflatten(1, (self.size, -1)).movedim(1, 0))
        return given_CBPNH.movedim(0, 2).flatten(2, 3)

    def exchange(self, parts: Tensor) -> Tensor:
        """Send part i, parts[i], to rank i; return what the ranks sent, in their order."""
        exchanged: Tensor = _Exchange.apply(parts, self)  # type: ignore[no-untyped-call]
        return exchanged

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Exchange parts outside the graph of autograd; see `exchange`."""
        if torch.compiler.is_compiling():
            swapped: Tensor = torch.ops.megarecur.all_to_all(parts, self.number)
            return swapped
        parts = parts.contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=self.group)
        return out


WHOLE = ContextParallel()
"""The context of a process that holds whole sequences."""


class _Exchange(torch.autograd.Function):
    """Exchange parts; backward exchanges their gradients, which returns each to its sender."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, cp: ContextParallel) -> Tensor:
        ctx.cp = cp
        return cp.all_to_all(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.cp.all_to_all(grads[0]), None


@torch.library.custom_op("megarecur::all_to_all", mutates_args=())
def _all_to_all(parts: Tensor, number: int) -> Tensor:
    return CONTEXTS[number].all_to_all(parts)


@_all_to_all.register_fake
def _(parts: Tensor, number: int) -> Tensor:
    return torch.empty_like(parts, memory_format=torch.contiguous_format)
