"""The losses of a head whose logits exist for one chunk of tokens at a time.

Backward computes the logits of each chunk again, overwrites them by their gradient, and multiplies
it with the chunk's inputs and the matrix before the next chunk. The matrix's gradient is summed as
`Weight` sums it over uses. `torch.nn.functional.linear_cross_entropy` does not fit here: it returns
no logsumexp (z-loss, shards of the vocabulary), and holds the matrix's gradient, rounded to the
compute dtype, from forward to backward.

Shapes: N tokens, D hidden, V vocabulary or this rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megarecur.parallel.linear import Weight
from megarecur.parallel.loss import Reading, Shares, add_up, overwrite_logits, read_logits

Target = Callable[[slice], Tensor]
"""Function that returns a teacher's logits [n, V] of a slice of the tokens."""


class ChunkedLoss(NamedTuple):
    """The losses of x W^T + b, by chunks.

    Calling it returns the sums of cross-entropy (with the smoothed label, if `shares` has label
    smoothing), of logsumexp^2 and of the divergence from the target, and each token's
    cross-entropy with its label [N], which has no gradient.
    """

    labels_N: Tensor
    shares: Shares
    length: int
    """Tokens of a chunk."""
    softcap: float | None = None
    """Logits are softcap x tanh((x W^T + b) / softcap); None: x W^T + b."""
    target: Target | None = None
    """The teacher; None: no distillation."""

    def __call__(
        self, x_ND: Tensor, weight: Weight, bias_V: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the losses of x [N, D]."""
        sums: tuple[Tensor, Tensor, Tensor, Tensor] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            x_ND, weight.parameter, bias_V, weight, self
        )
        return sums

    def parts(self) -> list[slice]:
        """Return the chunks."""
        return [slice(i, i + self.length) for i in range(0, len(self.labels_N), self.length)]

    def target_of(self, part: slice) -> Tensor | None:
        """Return the teacher's logits of a chunk."""
        return None if self.target is None else self.target(part)


def compute_logits(
    x_ND: Tensor, weight: Weight, softcap: float | None, bias_V: Tensor | None = None
) -> Tensor:
    """Return logits [N, V] of some tokens, outside the graph."""
    with torch.no_grad():
        bias = None if bias_V is None else bias_V.to(weight.product_dtype)
        logits_NV = F.linear(x_ND.to(weight.product_dtype), weight.value(), bias).to(x_ND.dtype)
        return logits_NV if softcap is None else logits_NV.div_(softcap).tanh_().mul_(softcap)


class _HeadLoss(torch.autograd.Function):
    """See `ChunkedLoss`. Parameters are inputs so that autograd returns their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        parameter: Tensor,
        bias_V: Tensor | None,
        weight: Weight,
        loss: ChunkedLoss,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        readings = []
        for part in loss.parts():
            logits_NV = compute_logits(x_ND[part], weight, loss.softcap, bias_V)
            of_part = loss.labels_N[part], loss.shares, loss.target_of(part)
            readings.append(read_logits(logits_NV, *of_part))
            del logits_NV  # before those of the next chunk
        reading = Reading(*map(torch.cat, zip(*readings, strict=True)))
        ctx.save_for_backward(x_ND, parameter, bias_V, *reading)
        ctx.weight, ctx.loss = weight, loss
        ctx.mark_non_differentiable(reading.losses_N)
        return *add_up(reading, loss.shares), reading.losses_N

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, loss = ctx.weight, ctx.loss
        x_ND, parameter, bias_V, *tensors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        db_V = torch.zeros_like(bias_V) if needs_bias else None
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        # Not postponed for a pipeline: the gradients of all chunks would have to exist at a time.
        in_place = weight.sum_in_place and weight.parameter.grad is not None
        dw = None
        for part in loss.parts():
            reading = Reading(*(tensor[part] for tensor in tensors))
            logits_NV = compute_logits(x_ND[part], weight, loss.softcap, bias_V)
            slope_NV = None
            if loss.softcap is not None:
                slope_NV = 1.0 - (logits_NV / loss.softcap).square_()
            overwrite_logits(logits_NV, reading, loss.shares, grads[:3], loss.target_of(part))  # type: ignore[arg-type]
            if slope_NV is not None:
                logits_NV.mul_(slope_NV)
            if db_V is not None:
                db_V += logits_NV.sum(0, dtype=db_V.dtype)
            dy, x = logits_NV.to(weight.product_dtype), x_ND[part].to(weight.product_dtype)
            del logits_NV, slope_NV
            if dx_ND is not None:
                dx_ND[part] = dy @ weight.value()
            if needs_weight and in_place:
                weight.add(dy, x)
            elif needs_weight and dw is None:
                dw = (dy.t() @ x).to(parameter.dtype)
            elif needs_weight and dw is not None:
                dw = dw.addmm_(dy.t(), x) if dy.dtype == dw.dtype else dw.add_(dy.t() @ x)
            del dy, x
        return dx_ND, dw, db_V, None, None
