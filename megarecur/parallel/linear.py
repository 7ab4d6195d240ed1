"""The one owner of a weight's compute copy, and of the sum of its gradient over uses.

A block that runs r times in m microbatches sums r x m gradients. Casting the weight once and
letting autograd sum the uses in bf16 loses the sum: 3.7e-2 off at 256 uses, against 3.7e-3 for an
fp32 sum. So a `Weight` keeps a copy in the compute dtype, made once per optimizer step outside the
graph, and its gradient is summed in the parameter's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MakeParameter = Callable[[str], nn.Parameter]
"""Global name to parameter: the inventory decides shape and initial value."""


class Weight(nn.Module):
    """A matrix with its compute copy.

    Args:
        parameter: the fp32 (or fp64) master, [out, in].
        compute_dtype: dtype of the products.
    """

    def __init__(self, parameter: nn.Parameter, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.parameter = parameter
        self.compute_dtype = compute_dtype
        self.copy: Tensor | None = None
        self.sum_in_place = False
        """Backward adds to `parameter.grad` itself, sparing a temporary per use. For engines that
        keep their gradient buffers; others need autograd's hooks."""
        self.refresh()

    def refresh(self) -> None:
        """Make the compute copy anew: after every step, load and initialisation."""
        if self.parameter.dtype == self.compute_dtype:
            return
        if self.copy is None:
            self.copy = torch.empty_like(self.parameter, dtype=self.compute_dtype)
        with torch.no_grad():
            self.copy.copy_(self.parameter)

    def value(self) -> Tensor:
        """The weight in the compute dtype, outside the graph."""
        return self.parameter if self.copy is None else self.copy


class _Product(torch.autograd.Function):
    """y = x W^T + b in the compute dtype; dW summed over uses in W's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameter: Tensor, bias: Tensor | None, weight: Weight
    ) -> Tensor:
        # The parameter is saved, never the copy: the copy may be freed and made again.
        ctx.save_for_backward(x, parameter)
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return F.linear(x, weight.value(), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, parameter = ctx.saved_tensors
        dy = grads[0]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.weight.value()
        dy = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(ctx.weight, parameter, dy, x.reshape(-1, x.shape[-1]))
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=ctx.bias_dtype)
        return dx, dw, db, None


def weight_gradient(weight: Weight, parameter: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """dW = dy^T x for one use, in the parameter's dtype; None when it was added in place."""
    if not (weight.sum_in_place and parameter.grad is not None):
        return (dy.t() @ x).to(parameter.dtype)
    if dy.dtype == parameter.dtype:
        parameter.grad.addmm_(dy.t(), x)
    else:
        parameter.grad.add_(dy.t() @ x)
    return None


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]."""
    return _Product.apply(x, weight.parameter, bias, weight)


class Linear(nn.Module):
    """A linear layer whose weight may be used any number of times per step."""

    def __init__(self, name: str, make: MakeParameter, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.weight = Weight(make(name + ".weight"), dtype)
        self.bias = make(name + ".bias") if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return product(x, self.weight, self.bias)
