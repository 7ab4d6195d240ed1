"""Where activations cross the ranks of tensor parallelism (Shoeybi et al. 2019).

A block's first products of a pair are cut by output (column parallel), its second ones by input
(row parallel): activations enter before the first and leave, summed, after the second. Without
sequence parallelism the residual stream is the same on all ranks; with it (Korthikanti et al. 2022)
every rank holds its own positions of it, and norms and dropout work on those alone.

Shapes: B samples, S positions, P of them on this rank, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 names them anew.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class TensorParallel:
    """This process among those that share each matrix.

    Args:
        group: their process group; None: there is one.
        rank: in the group.
        size: of the group.
        sequence: cut the residual stream by position.
    """

    def __init__(
        self, group: Any = None, rank: int = 0, size: int = 1, sequence: bool = False
    ) -> None:
        self.group, self.rank, self.size, self.sequence = group, rank, size, sequence

    def enter(self, x: Tensor) -> Tensor:
        """Before products cut by output: [B, P or S, D] to [B, S, D]."""
        return x if self.size == 1 else _Enter.apply(x, self)

    def leave(self, y: Tensor) -> Tensor:
        """After products cut by input: each rank's share [B, S, D] of a sum to [B, P or S, D].

        Overwrites y.
        """
        return y if self.size == 1 else _Leave.apply(y, self)

    def own(self, values: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of what is known for all: a view."""
        if not self.sequence:
            return values
        return values.narrow(dim, *self.span(values.shape[dim]))

    def span(self, length: int) -> tuple[int, int]:
        """Where this rank's positions begin, and how many they are."""
        if not self.sequence:
            return 0, length
        assert length % self.size == 0, f"{length} positions do not divide among {self.size} ranks"
        return self.rank * (length // self.size), length // self.size

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """For a while every rank holds all positions: a prompt's length need not divide."""
        before, self.sequence = self.sequence, False
        try:
            yield
        finally:
            self.sequence = before

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, outside of the graph."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """In place, outside of the graph."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather_last(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Join shards of the last dim, whose sizes are those of the ranks; outside of the graph."""
        if self.size == 1:
            return tensor
        most = max(sizes)
        padded = torch.nn.functional.pad(tensor, (0, most - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def gather_positions(self, x: Tensor) -> Tensor:
        """[B, P, D] of each rank to [B, S, D]."""
        parts = x.new_empty(self.size, *x.shape)
        all_gather(parts.view(-1, *x.shape[1:]), x.contiguous(), group=self.group)
        return parts.transpose(0, 1).flatten(1, 2)

    def scatter_sum(self, y: Tensor) -> Tensor:
        """[B, S, D] of each rank, summed, to this rank's [B, P, D]."""
        if y.device.type == "cpu":  # gloo sums everywhere
            return self.own(self.sum(y.contiguous())).contiguous()
        parts = y.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        out = torch.empty_like(parts[0])
        reduce_scatter(out, parts.flatten(0, 1), group=self.group)
        return out


ALONE = TensorParallel()


class _Enter(torch.autograd.Function):
    """All positions; backward sums over ranks what their products give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.sequence = tp, tp.sequence
        return tp.gather_positions(x) if tp.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        return (ctx.tp.scatter_sum(grad) if ctx.sequence else ctx.tp.sum(grad)), None


class _Leave(torch.autograd.Function):
    """The sum over ranks; backward gives each its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.sequence = tp, tp.sequence
        return tp.scatter_sum(y) if tp.sequence else tp.sum(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (ctx.tp.gather_positions(grads[0]) if ctx.sequence else grads[0]), None
