"""Tensor-parallel regions: where activations cross ranks (Shoeybi et al. 2019).

Of each pair of products, a block's first is cut by output (column parallel) and its second by input
(row parallel): activations enter before the first and leave, summed, after the second. Without
sequence parallelism the residual stream is the same on all ranks; with it (Korthikanti et al. 2022)
every rank holds its own positions of it, and norms and dropout work on those alone.

In a compiled graph every collective is one opaque operator, so that ranks communicate as in eager
mode.

Shapes: B samples, S positions, P of them on this rank, D channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames them.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

Finish = Callable[[], Tensor]
"""Function that waits for a collective and returns its result."""

REGIONS: WeakValueDictionary[int, TensorParallel] = WeakValueDictionary()
"""Every `TensorParallel` by number, for operators of compiled graphs."""
_numbers = itertools.count()


class TensorParallel:
    """The rank of this process among those that share each matrix.

    Args:
        group: their process group; None if there is only one.
        rank: rank in the group.
        size: size of the group.
        sequence: cut the residual stream by position.
    """

    def __init__(
        self, group: Any = None, rank: int = 0, size: int = 1, sequence: bool = False
    ) -> None:
        self.group, self.rank, self.size, self.sequence = group, rank, size, sequence
        self.number = next(_numbers)
        """Number in `REGIONS`."""
        REGIONS[self.number] = self

    def enter(self, x: Tensor) -> Tensor:
        """Enter a region before products cut by output: [B, P or S, D] to [B, S, D]."""
        if self.size == 1:
            return x
        entered: Tensor = _Enter.apply(x, self)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, y: Tensor) -> Tensor:
        """Leave a region after products cut by input: sum shares [B, S, D] to [B, P or S, D].

        Overwrites y.
        """
        if self.size == 1:
            return y
        left: Tensor = _Leave.apply(y, self)  # type: ignore[no-untyped-call]
        return left

    def total(self, share: Tensor) -> Tensor:
        """Sum shares over the ranks, each of which computes its part of the results from the total:
        both passes sum."""
        if self.size == 1:
            return share
        total: Tensor = _Total.apply(share, self)  # type: ignore[no-untyped-call]
        return total

    def own(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's positions of values known for all positions, as a view."""
        if not self.sequence:
            return values
        return values.narrow(dim, *self.span(values.shape[dim]))

    def span(self, length: int) -> tuple[int, int]:
        """Return the first of this rank's positions, and their number."""
        if not self.sequence:
            return 0, length
        assert length % self.size == 0, f"{length} positions are not divisible by {self.size} ranks"
        return self.rank * (length // self.size), length // self.size

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Let every rank hold all positions inside this context: a prompt's length need not be
        divisible."""
        before, self.sequence = self.sequence, False
        try:
            yield
        finally:
            self.sequence = before

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place and outside the graph of autograd. Use the result: inside a
        compiled graph it is a new tensor."""
        if self.size == 1:
            return tensor
        if torch.compiler.is_compiling():
            summed: Tensor = torch.ops.megarecur.sum_over_ranks(tensor, self.number)
            return summed
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the ranks, in place and outside the graph."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather_last(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Join shards of the last dim, with the ranks' sizes given, outside the graph."""
        if self.size == 1:
            return tensor
        most = max(sizes)
        padded = torch.nn.functional.pad(tensor, (0, most - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def gather_positions(self, x: Tensor) -> Tensor:
        """Gather [B, P, D] of each rank to [B, S, D]."""
        if torch.compiler.is_compiling():
            gathered: Tensor = torch.ops.megarecur.gather_positions(x, self.number)
            return gathered
        return self.start_gather(x)()

    def start_gather(self, x: Tensor) -> Finish:
        """Start to gather [B, P, D] of each rank to [B, S, D], outside of graphs."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        work = all_gather(parts.view(-1, *x.shape[1:]), x, group=self.group, async_op=True)
        return partial(_join, work, parts, x)

    def scatter_sum(self, y: Tensor) -> Tensor:
        """Sum [B, S, D] of all ranks and return this rank's [B, P, D]. May overwrite y."""
        if torch.compiler.is_compiling():
            scattered: Tensor = torch.ops.megarecur.scatter_sum(y, self.number)
            return scattered
        return self.start_sum(y, sequence=True)()

    def start_sum(self, y: Tensor, sequence: bool) -> Finish:
        """Start to sum [B, S, D] of all ranks, outside of graphs. The result is the sum or, with
        `sequence`, this rank's positions of it: [B, P, D]. May overwrite y."""
        if self.size == 1:
            return lambda: y
        if sequence and y.device.type != "cpu":
            parts = y.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
            out = torch.empty_like(parts[0])
            work = reduce_scatter(out, parts.flatten(0, 1), group=self.group, async_op=True)
            return partial(_wait, work, out, parts)
        y = y.contiguous()
        work = dist.all_reduce(y, group=self.group, async_op=True)
        length = y.shape[1] // self.size if sequence else 0
        # gloo sums on every rank.
        own = y.narrow(1, self.rank * length, length) if sequence else y
        return partial(_wait, work, own, y)


def _wait(work: Any, result: Tensor, kept: Tensor) -> Tensor:
    """Wait for a collective. `kept` lives until then."""
    work.wait()
    return result.contiguous()


def _join(work: Any, parts: Tensor, kept: Tensor) -> Tensor:
    """Wait for a gather, and join the ranks' positions. `kept` lives until then."""
    work.wait()
    # With one position per rank, `flatten` alone would return a view.
    return parts.transpose(0, 1).flatten(1, 2).contiguous()


ALONE = TensorParallel()


class _Enter(torch.autograd.Function):
    """Gather all positions; backward sums the gradients of the ranks' products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.sequence = tp, tp.sequence
        return tp.gather_positions(x) if tp.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        return (ctx.tp.scatter_sum(grad) if ctx.sequence else ctx.tp.sum(grad)), None


class _Leave(torch.autograd.Function):
    """Sum over the ranks; backward passes the gradient to each rank."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.sequence = tp, tp.sequence
        return tp.scatter_sum(y) if tp.sequence else tp.sum(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (ctx.tp.gather_positions(grads[0]) if ctx.sequence else grads[0]), None


class _Total(torch.autograd.Function):
    """Sum over the ranks; backward sums the gradients of the ranks' uses."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.sum(share.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


# ------------------------------------------------------------------- operators of compiled graphs


@torch.library.custom_op("megarecur::sum_over_ranks", mutates_args=())
def _sum_over_ranks(x: Tensor, number: int) -> Tensor:
    return REGIONS[number].sum(x.clone(memory_format=torch.contiguous_format))


@_sum_over_ranks.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("megarecur::gather_positions", mutates_args=())
def _gather_positions(x: Tensor, number: int) -> Tensor:
    return REGIONS[number].gather_positions(x)


@_gather_positions.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * REGIONS[number].size, *x.shape[2:])


@torch.library.custom_op("megarecur::scatter_sum", mutates_args=())
def _scatter_sum(y: Tensor, number: int) -> Tensor:
    return REGIONS[number].scatter_sum(y.clone(memory_format=torch.contiguous_format))


@_scatter_sum.register_fake
def _(y: Tensor, number: int) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // REGIONS[number].size, *y.shape[2:])


# A collective that a graph starts and waits for later is two operators. The first returns a buffer
# that nothing else uses; the second takes it and names the collective by its address.

_started: dict[int, Finish] = {}
"""Functions that finish the collectives that graphs started, by the address of their buffer."""


def _finish(buffer: Tensor) -> Tensor:
    result = _started.pop(buffer.data_ptr())()
    shares = result.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    return result.clone() if shares else result  # An operator returns no part of its input.


@torch.library.custom_op("megarecur::start_gather", mutates_args=())
def _start_gather(x: Tensor, number: int) -> Tensor:
    finish = REGIONS[number].start_gather(x)
    buffer = x.new_empty(1)
    _started[buffer.data_ptr()] = finish
    return buffer


@_start_gather.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return x.new_empty(1)


@torch.library.custom_op("megarecur::finish_gather", mutates_args=())
def _finish_gather(buffer: Tensor, x: Tensor, number: int) -> Tensor:
    return _finish(buffer)


@_finish_gather.register_fake
def _(buffer: Tensor, x: Tensor, number: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * REGIONS[number].size, *x.shape[2:])


@torch.library.custom_op("megarecur::start_sum", mutates_args=())
def _start_sum(y: Tensor, number: int, sequence: bool) -> Tensor:
    buffer = y.clone(memory_format=torch.contiguous_format)
    _started[buffer.data_ptr()] = REGIONS[number].start_sum(buffer, sequence)
    return buffer


@_start_sum.register_fake
def _(y: Tensor, number: int, sequence: bool) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("megarecur::finish_sum", mutates_args=())
def _finish_sum(buffer: Tensor, number: int, sequence: bool) -> Tensor:
    return _finish(buffer)


@_finish_sum.register_fake
def _(buffer: Tensor, number: int, sequence: bool) -> Tensor:
    length = buffer.shape[1] // (REGIONS[number].size if sequence else 1)
    return buffer.new_empty(buffer.shape[0], length, *buffer.shape[2:])
