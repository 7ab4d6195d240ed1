"""The embedding, and the head that computes logits of tokens.

Shapes: B samples, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.batch import END, START
from megarecur.parallel.head_loss import ChunkedLoss
from megarecur.parallel.linear import Weight, product
from megarecur.parallel.regions import ALONE, TensorParallel


class Embedding(nn.Module):
    """The embedding of tokens and learned positions.

    The parameters are attributes of this module, and their use is a call of it: ZeRO 3 gathers only
    a module's direct parameters, for the duration of its call.
    """

    def __init__(
        self,
        weight: Weight,
        positions: nn.Parameter | None,
        scale: float,
        tp: TensorParallel = ALONE,
        first: int = 0,
        ends: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.table, self.positions, self.scale = weight.parameter, positions, scale
        self.weight = weight
        self.tp, self.first = tp, first
        self.start: nn.Parameter | None = ends[0] if ends else None
        self.end: nn.Parameter | None = ends[1] if ends else None
        """Embeddings of START and END, the ends of a task's sequences."""

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Embed ids: [B, S] to [B, S, D], or this rank's positions of it, in the parameters'
        dtype. Rows of the table are rounded to the compute dtype, in which sharded tables
        travel."""
        x = self.look_up(tokens_BS if self.start is None else tokens_BS.clamp(min=0))
        x = x.to(self.weight.compute_dtype).to(self.table.dtype)
        if self.scale != 1.0:
            x = x * self.scale
        if self.start is not None and self.end is not None:
            own = self.tp.own(tokens_BS).unsqueeze(-1)
            x = torch.where(own == START, self.start, torch.where(own == END, self.end, x))
        if self.positions is not None:
            x = x + F.embedding(self.tp.own(positions_BS), self.positions)
        return x

    def look_up(self, tokens_BS: Tensor) -> Tensor:
        """Return rows of the table; if it is sharded by ids, each row comes from the rank that has
        it."""
        if self.tp.size == 1:
            return look_up(tokens_BS, self.weight)
        rows_BS = tokens_BS - self.first
        own_BS = (rows_BS >= 0) & (rows_BS < len(self.table))
        x = look_up(torch.where(own_BS, rows_BS, 0), self.weight)
        return self.tp.leave(torch.where(own_BS[..., None], x, 0.0))


def look_up(rows_BS: Tensor, table: Weight) -> Tensor:
    """Return rows of a table [V, D], as [B, S, D] in its parameter's dtype."""
    if table.hollow:
        found: Tensor = _Rows.apply(table.parameter, rows_BS, table)  # type: ignore[no-untyped-call]
        return found
    return F.embedding(rows_BS, table.parameter)


class _Rows(torch.autograd.Function):
    """Return rows of a hollow table's copy; backward adds to the gradient of the table."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rows_BS: Tensor, table: Weight) -> Tensor:
        ctx.save_for_backward(rows_BS)
        ctx.table = table
        return F.embedding(rows_BS, table.value()).to(parameter.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (rows_BS,) = ctx.saved_tensors
        gradient = ctx.table.parameter.grad
        if gradient is not None:
            made = torch.ops.aten.embedding_dense_backward(
                grads[0].to(gradient.dtype), rows_BS, len(gradient), -1, False
            )
            gradient.add_(made)
        return None, None, None


class Head(nn.Module):
    """The output projection. Its parameter is a direct attribute, as in `Embedding`."""

    def __init__(
        self, weight: Weight, tp: TensorParallel = ALONE, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.table, self.weight, self.tp, self.bias = weight.parameter, weight, tp, bias

    def forward(self, x: Tensor, loss: ChunkedLoss | None = None) -> Any:
        """Return logits: [B, S, D] to [B, S, V], or to this rank's shard of the vocabulary; or
        what `loss` makes of x, [B S, D], and the table."""
        if loss is None:
            return product(x, self.weight, self.bias, self.tp)
        return loss(self.tp.enter(x).flatten(0, 1), self.weight, self.bias)
