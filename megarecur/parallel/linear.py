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


NARROW = 128
"""Inputs of a matrix whose gradient is small beside what it is made of."""


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
        inputs, outputs = grad.shape[1], grad.shape[0]
        if inputs <= NARROW and 8 * inputs <= outputs:  # Tall: a wide product is faster, and small.
            grad.add_((x.t() @ dy).t())
        elif dy.dtype == grad.dtype:
            grad.addmm_(dy.t(), x)
        else:
            grad.add_(dy.t() @ x)


class _Products(torch.autograd.Function):
    """y_i = x W_i^T + b_i + u_i V_i^T; each dW_i summed over uses in W_i's dtype, dx summed over i
    in place. Biases, and u_i with V_i, may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[Weight],
        factors: Sequence[Weight | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(weights)
        biases, us, parameters = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        # The parameters are saved, never the copies: a copy may be freed and made again.
        ctx.save_for_backward(x, *us, *parameters)
        ctx.weights, ctx.factors = weights, factors
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        wide = x.to(weights[0].product_dtype)
        ys = []
        for weight, bias, u, factor in zip(weights, biases, us, factors, strict=True):
            y = F.linear(wide, weight.value(), None if bias is None else bias.to(wide.dtype))
            if u is not None and factor is not None:
                y.flatten(0, -2).addmm_(u.to(wide.dtype).flatten(0, -2), factor.value().t())
            ys.append(y.to(x.dtype))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights, n = ctx.weights, len(ctx.weights)
        needs_x, _, _, *needs = ctx.needs_input_grad
        x, *us = ctx.saved_tensors[: 1 + n]
        dtype = weights[0].product_dtype
        wide = x.to(dtype).flatten(0, -2)
        dx: Tensor | None = None
        dbs: list[Tensor | None] = [None] * n
        dus: list[Tensor | None] = [None] * n
        dws: list[Tensor | None] = [None] * n
        dvs: list[Tensor | None] = [None] * n
        for i, (weight, u, factor) in enumerate(zip(weights, us, ctx.factors, strict=True)):
            dy = grads[i].flatten(0, -2).to(dtype)
            if needs_x:
                dx = dy @ weight.value() if dx is None else dx.addmm_(dy, weight.value())
            if needs[i]:
                dbs[i] = dy.sum(0, dtype=ctx.bias_dtypes[i])
            if needs[n + i]:
                dus[i] = (dy @ factor.value()).view_as(u).to(u.dtype)
            if needs[2 * n + i]:
                dws[i] = weight.gradient(dy, wide)
            if needs[3 * n + i]:
                dvs[i] = factor.gradient(dy, u.to(dtype).flatten(0, -2))
        dx = dx if dx is None else dx.view_as(x).to(x.dtype)
        return dx, None, None, *dbs, *dus, *dws, *dvs


class _Joined(torch.autograd.Function):
    """(x [W_1; ..; W_n]^T, x): narrow matrices as one product; and x is handed on, so that its
    gradient from elsewhere comes by here and is added to in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Sequence[Weight], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, *parameters)
        ctx.weights = weights
        ctx.set_materialize_grads(False)
        wide = x.to(weights[0].product_dtype)
        u = F.linear(wide, torch.cat([weight.value() for weight in weights]))
        return u.to(x.dtype), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights, (x, *parameters) = ctx.weights, ctx.saved_tensors
        dtype = weights[0].product_dtype
        du, dx = grads[0].flatten(0, -2).to(dtype), grads[1]
        if ctx.needs_input_grad[0]:
            values = torch.cat([weight.value() for weight in weights])
            if dx is None:
                dx = (du @ values).view_as(x).to(x.dtype)
            elif dx.dtype == dtype:
                dx.view(-1, dx.shape[-1]).addmm_(du, values)
            else:
                dx = dx + (du @ values).view_as(x).to(dx.dtype)
        wide = x.to(dtype).flatten(0, -2)
        parts = du.split([len(parameter) for parameter in parameters], -1)
        each = zip(weights, parts, ctx.needs_input_grad[2:], strict=True)
        return dx, None, *(w.gradient(part, wide) if needed else None for w, part, needed in each)


class _Value(torch.autograd.Function):
    """The copy, with the parameter's gradient: dW in the parameter's dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


Added = tuple[Tensor, Weight] | None
"""u [..., r] and V [out, r]: u V^T is added to a product."""


def multiply(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    added: Sequence[Added] = (),
) -> tuple[Tensor, ...]:
    """x W_i^T + b_i for each weight, and u_i V_i^T where something is added.

    A compiler is given the formula and derives the rest: it fuses what `_Products` spares. Its
    graph gives dW of one use, in the parameter's dtype, and autograd sums the uses outside of it.
    """
    pairs = [(None, None) if pair is None else pair for pair in added or [None] * len(weights)]
    us, factors = [u for u, _ in pairs], [factor for _, factor in pairs]
    if not torch.compiler.is_compiling():
        parameters = [None if w is None else w.parameter for w in (*weights, *factors)]
        return _Products.apply(x, weights, factors, *biases, *us, *parameters)
    wide, values = x.to(weights[0].product_dtype), []
    for weight, bias, u, factor in zip(weights, biases, us, factors, strict=True):
        y = F.linear(wide, graph_value(weight), None if bias is None else bias.to(wide.dtype))
        if u is not None and factor is not None:
            y = y + F.linear(u.to(wide.dtype), graph_value(factor))
        values.append(y.to(x.dtype))
    return tuple(values)


def multiply_joined(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, Tensor]:
    """x times all of these narrow weights [r_i, in], transposed: [..., sum of r_i]; and x, for all
    else that reads it."""
    if not torch.compiler.is_compiling():
        u, same = _Joined.apply(x, weights, *(weight.parameter for weight in weights))
        return u, same if x.requires_grad else x
    wide = x.to(weights[0].product_dtype)
    return F.linear(wide, torch.cat([graph_value(weight) for weight in weights])).to(x.dtype), x


def graph_value(weight: Weight) -> Tensor:
    """The weight in the dtype of products, inside the graph of a compiler."""
    if weight.copy is None:
        return weight.parameter
    return _Value.apply(weight.parameter, weight.copy)


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]."""
    return multiply(x, (weight,), (bias,))[0]


class LowRank(nn.Module):
    """scale B A x, which one loop of a block adds to a linear layer (Hu et al. 2022, eq. 3), and
    what it adds to its bias.

    With tensor parallelism one factor is cut as the layer's matrix is and the other is whole on
    every rank: B with the outputs, A with the inputs.

    Args:
        name: global, of its parameters.
        make: makes them, those that are cut as this rank holds them.
        dtype: of what products take and give.
        scale: of B A x.
        bias: whether something is added to the layer's bias.
        factors: what the factor that takes x, and the other one, are called.
    """

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        dtype: torch.dtype,
        scale: float = 1.0,
        bias: bool = False,
        factors: tuple[str, str] = ("lora_a", "lora_b"),
    ) -> None:
        super().__init__()
        self.a = Weight(make(f"{name}.{factors[0]}"), dtype)
        self.b = Weight(make(f"{name}.{factors[1]}"), dtype)
        self.bias = make(name + ".lora_bias") if bias else None
        self.scale = scale

    def scaled(self, u: Tensor) -> Tensor:
        """What A made of x, times the scale, which is mostly 1."""
        return u if self.scale == 1.0 else u * self.scale


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

    def forward(self, x: Tensor, delta: LowRank | None = None) -> Tensor:
        """[..., in] to [..., out]; cut, one of the two is this rank's share."""
        if self.cut != "inputs":
            return apply_all((self,), x, (delta,))[0]
        y = self.tp.leave(product(x, self.weight))
        if delta is not None:
            y = y + product(delta.scaled(self.tp.leave(product(x, delta.a))), delta.b)
        bias = self.bias_with(delta)
        return y if bias is None else y + bias.to(y.dtype)

    def bias_with(self, delta: LowRank | None) -> Tensor | None:
        """[out], or this rank's share."""
        if self.bias is None or delta is None or delta.bias is None:
            return self.bias
        return self.bias + delta.bias


def apply_all(
    layers: Sequence[Linear],
    x: Tensor,
    deltas: Sequence[LowRank | None] = (),
    tap: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Each layer's output for the same x, whose gradient is then summed without temporaries; deltas
    may read something else than x, the tap."""
    tp, cut = layers[0].tp, layers[0].cut
    inside = tp if cut == "outputs" else ALONE
    if tap is None:
        added, x = add_deltas(deltas, x, inside)
    else:
        added, _ = add_deltas(deltas, tap, inside)
    each = zip(layers, deltas or [None] * len(layers), strict=True)
    biases = [layer.bias_with(delta) for layer, delta in each]
    return multiply(inside.enter(x), [layer.weight for layer in layers], biases, added)


def add_deltas(
    deltas: Sequence[LowRank | None], x: Tensor, tp: TensorParallel
) -> tuple[list[Added], Tensor]:
    """What `multiply` adds: scale A x [..., r] and B, for each delta there is; and x, for all else
    that reads it.

    The factors A are whole on every rank and take x as it is before it enters; what they make of it
    enters in its place, which is r channels of each, not all of x's.
    """
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return [], x
    joined, x = multiply_joined(x, [delta.a for delta in present])
    made = iter(tp.enter(joined).split([len(delta.a.parameter) for delta in present], -1))
    added = [None if d is None else (d.scaled(next(made)), d.b) for d in deltas]
    return added, x
