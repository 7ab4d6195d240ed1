"""The one owner of a weight's compute copy, and of the sum of its gradient over uses.

A block that runs r times in m microbatches sums r x m gradients. Casting the weight once and
letting autograd sum the uses in bf16 loses the sum: 3.7e-2 off at 256 uses, against 3.7e-3 for an
fp32 sum. So a `Weight` keeps a copy in the compute dtype, made once per optimizer step outside the
graph, and its gradient is summed in the parameter's own dtype.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.parallel.regions import ALONE, TensorParallel

MakeParameter = Callable[[str], nn.Parameter]
"""Global name to parameter: the inventory decides shape and initial value."""


def has_bf16_products(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than fp32 ones."""
    if device.type != "cpu":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class DeferredProducts:
    """Products of weight gradients that a backward pass leaves for later: they wait for nobody and
    nobody waits for them, so that a pipeline fills its waiting time with them."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] | None = None

    @contextmanager
    def collect(self) -> Iterator[list[Callable[[], None]]]:
        """Backward passes inside leave their products here."""
        self.open = []
        try:
            yield self.open
        finally:
            self.open = None


class Weight(nn.Module):
    """A matrix with its compute copy.

    Args:
        parameter: the fp32 (or fp64) master, [out, in].
        compute_dtype: dtype of what products take and give.
    """

    def __init__(self, parameter: nn.Parameter, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.parameter = parameter
        self.compute_dtype = compute_dtype
        self.product_dtype = compute_dtype
        """A CPU without bf16 instructions multiplies the same bf16 numbers in fp32, at several
        times the speed; the result is rounded to bf16 once, as ever."""
        if compute_dtype == torch.bfloat16 and not has_bf16_products(parameter.device):
            self.product_dtype = torch.float32
        self.copy: Tensor | None = None
        self.sum_in_place = False
        """Backward adds to `parameter.grad` itself, sparing a temporary per use. For engines that
        keep their gradient buffers; others need autograd's hooks."""
        self.deferred: DeferredProducts | None = None
        """Where products may be left, if they are added in place."""
        self.transient = False
        """The parameter is whole only for a while, between being gathered and let go of (ZeRO 3).
        Then the copy is made by its first use, and whoever lets go of the parameter calls
        `refresh`."""
        self.refresh()

    def refresh(self) -> None:
        """Make the compute copy anew, or forget it: after every step, load and initialisation."""
        if self.transient:
            self.copy = None
        else:
            self.make_copy()

    def make_copy(self) -> None:
        """Round the parameter, where products take another dtype."""
        if self.parameter.dtype == self.compute_dtype == self.product_dtype:
            return
        with torch.no_grad():
            rounded = self.parameter.to(self.compute_dtype)
            if self.copy is None:
                self.copy = rounded.to(self.product_dtype)
            else:
                self.copy.copy_(rounded)

    def value(self) -> Tensor:
        """The weight in the dtype of products, outside the graph."""
        if self.transient and self.copy is None:
            self.make_copy()
        return self.parameter if self.copy is None else self.copy

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor | None:
        """dW = dy^T x of one use, in the parameter's dtype; None when it is added in place, now or
        later."""
        if not (self.sum_in_place and self.parameter.grad is not None):
            return (dy.t() @ x).to(self.parameter.dtype)
        if self.deferred is not None and self.deferred.open is not None:
            self.deferred.open.append(partial(self.add, dy, x))
        else:
            self.add(dy, x)
        return None

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x to the gradient."""
        grad = self.parameter.grad
        assert grad is not None
        if dy.dtype == grad.dtype:
            grad.addmm_(dy.t(), x)
        else:
            grad.add_(dy.t() @ x)


class _Products(torch.autograd.Function):
    """y_i = x W_i^T + b_i; each dW_i summed over uses in W_i's dtype, dx summed over i in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[Weight], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parameters, biases = tensors[: len(weights)], tensors[len(weights) :]
        # The parameters are saved, never the copies: a copy may be freed and made again.
        ctx.save_for_backward(x, *parameters)
        ctx.weights = weights
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        wide = x.to(weights[0].product_dtype)
        return tuple(
            F.linear(wide, w.value(), None if b is None else b.to(wide.dtype)).to(x.dtype)
            for w, b in zip(weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0]
        weights, (needs_x, _, *needs) = ctx.weights, ctx.needs_input_grad
        dtype = weights[0].product_dtype
        wide = x.to(dtype).flatten(0, -2)
        dx: Tensor | None = None
        dws: list[Tensor | None] = []
        dbs: list[Tensor | None] = []
        for i, weight in enumerate(weights):
            dy = grads[i].flatten(0, -2).to(dtype)
            if needs_x:
                dx = dy @ weight.value() if dx is None else dx.addmm_(dy, weight.value())
            dws.append(weight.gradient(dy, wide) if needs[i] else None)
            dbs.append(dy.sum(0, dtype=ctx.bias_dtypes[i]) if needs[len(weights) + i] else None)
        return dx if dx is None else dx.view_as(x).to(x.dtype), None, *dws, *dbs


class _Value(torch.autograd.Function):
    """The copy, with the parameter's gradient: dW in the parameter's dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def multiply(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """x W_i^T + b_i for each weight.

    A compiler is given the formula and derives the rest: it fuses what `_Products` spares. Its
    graph gives dW of one use, in the parameter's dtype, and autograd sums the uses outside of it.
    """
    if not torch.compiler.is_compiling():
        return _Products.apply(x, weights, *(w.parameter for w in weights), *biases)
    wide, values = x.to(weights[0].product_dtype), []
    for weight, bias in zip(weights, biases, strict=True):
        value = weight.parameter
        if weight.copy is not None:
            value = _Value.apply(value, weight.copy)
        y = F.linear(wide, value, None if bias is None else bias.to(wide.dtype))
        values.append(y.to(x.dtype))
    return tuple(values)


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]."""
    return multiply(x, (weight,), (bias,))[0]


class Linear(nn.Module):
    """A linear layer whose weight may be used any number of times per step.

    Args:
        name: global, of its parameters.
        make: makes them, those that are cut as this rank holds them.
        dtype: of what products take and give.
        bias: whether it has one.
        tp: the ranks that share the matrix.
        cut: by its outputs (column parallel) or its inputs (row parallel); None: every rank holds
            all of it.
    """

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        dtype: torch.dtype,
        bias: bool,
        tp: TensorParallel = ALONE,
        cut: Literal["outputs", "inputs"] | None = None,
    ) -> None:
        super().__init__()
        self.weight = Weight(make(name + ".weight"), dtype)
        self.bias = make(name + ".bias") if bias else None
        self.tp, self.cut = tp, cut if tp.size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]; cut, one of the two is this rank's share."""
        if self.cut == "inputs":
            y = self.tp.leave(product(x, self.weight))
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return apply_all((self,), x)[0]


def apply_all(layers: Sequence[Linear], x: Tensor) -> tuple[Tensor, ...]:
    """Each layer's output for the same x, whose gradient is then summed without temporaries."""
    if layers[0].cut == "outputs":
        x = layers[0].tp.enter(x)
    return multiply(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
