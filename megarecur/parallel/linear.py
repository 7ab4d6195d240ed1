"""Linear layers whose weights own a compute copy and sum gradients over their uses.

A block that runs r times in m micro batches sums r x m gradients. If the weight were cast once and
autograd summed the uses in bf16, the error at 256 uses would be 3.7e-2, against 3.7e-3 for an fp32
sum. So a `Weight` keeps a copy in the compute dtype, made once per optimizer step outside the
graph, and sums its gradient in the parameter's own dtype. A compiled graph sums it the same way,
through the operator `megarecur::sum_gradients`.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.parallel.regions import ALONE, Finish, TensorParallel

MakeParameter = Callable[[str], nn.Parameter]
"""Function from a global name to its parameter; the inventory decides shape and initial value."""


def has_bf16_products(device: torch.device) -> bool:
    """Return True if the device multiplies bf16 matrices faster than fp32 ones."""
    if device.type != "cpu":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_hollow(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a tensor with a shape, but without memory: every element is the same NaN."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(tuple(shape))


def is_hollow(tensor: Tensor) -> bool:
    """Return True if the tensor was made by `make_hollow`."""
    return tensor.numel() > 1 and not any(tensor.stride())


class DeferredProducts:
    """Products of weight gradients postponed by a backward pass. They depend on no message and no
    message depends on them, so a pipeline runs them in its waiting time."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] | None = None

    @contextmanager
    def collect(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the products that backward passes postpone inside this context."""
        self.open = []
        try:
            yield self.open
        finally:
            self.open = None


HANDLES: WeakValueDictionary[int, Weight] = WeakValueDictionary()
"""The weights whose gradients compiled graphs sum, by number (`Weight.open_handle`)."""
_numbers = itertools.count()

SUMS_WIDE = hasattr(torch.ops.aten.addmm, "dtype_out")
"""Whether torch can add a product of bf16 matrices to an fp32 one on CUDA, without rounding it."""
NARROW = 128
"""Maximum inputs of a matrix whose gradient is small compared with its operands."""


class Weight(nn.Module):
    """A matrix with its compute copy.

    Args:
        parameter: the fp32 (or fp64) master, [out, in].
        compute_dtype: dtype of the operands and results of products.
    """

    def __init__(self, parameter: nn.Parameter, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.parameter = parameter
        self.compute_dtype = compute_dtype
        self.product_dtype = compute_dtype
        """A CPU without bf16 instructions multiplies the same bf16 numbers in fp32, several times
        faster; the result is still rounded to bf16 once."""
        if compute_dtype == torch.bfloat16 and not has_bf16_products(parameter.device):
            self.product_dtype = torch.float32
        self.copy: Tensor | None = None
        self.hollow = is_hollow(parameter)
        """Whether the parameter has no values. Then an engine that shards it lends the copy, in the
        dtype of products, while the weight is used (`optim.sharded`)."""
        self.sum_in_place = False
        """If True, backward adds to `parameter.grad` itself and saves a temporary per use. For
        engines that keep their gradient buffers; others need autograd's hooks."""
        self.deferred: DeferredProducts | None = None
        """Queue of postponed products, if they are added in place."""
        self.handle: Tensor | None = None
        """Number of this weight in `HANDLES`, if compiled graphs sum its gradient in place."""
        self.transient = False
        """If True, the parameter is whole only between its gather and its release (ZeRO 3). Then
        the first use makes the copy, and the code that releases the parameter calls `refresh`."""
        self.refresh()

    def refresh(self) -> None:
        """Renew the compute copy, or discard it: after every step, load and initialisation."""
        if self.hollow:
            return
        if self.transient:
            self.copy = None
        else:
            self.make_copy()

    def make_copy(self) -> None:
        """Round the parameter, if products use another dtype."""
        if self.parameter.dtype == self.compute_dtype == self.product_dtype:
            return
        with torch.no_grad():
            rounded = self.parameter.to(self.compute_dtype)
            if self.copy is None:
                self.copy = rounded.to(self.product_dtype)
            else:
                self.copy.copy_(rounded)

    def open_handle(self) -> None:
        """Let compiled graphs sum the gradient in place.

        One graph serves many weights, so it takes the handle, [1] on the CPU, as an input. The
        handle requires a gradient, always 0, because a graph drops what computes no result.
        """
        if self.handle is None:
            number = next(_numbers)
            HANDLES[number] = self
            self.handle = torch.tensor([float(number)], dtype=torch.float64, requires_grad=True)

    @property
    def summed_by_graphs(self) -> bool:
        """Whether a compiled graph adds to the gradient itself and returns none."""
        return self.sum_in_place and self.handle is not None

    def value(self) -> Tensor:
        """Return the weight in the dtype of products, outside the graph."""
        assert self.copy is not None or not self.hollow, "used while it is not gathered"
        if self.transient and self.copy is None:
            self.make_copy()
        return self.parameter if self.copy is None else self.copy

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor | None:
        """Return dW = dy^T x of one use in the parameter's dtype; None if it is added in place, now
        or later."""
        if not (self.sum_in_place and self.parameter.grad is not None):
            return (dy.t() @ x).to(self.parameter.dtype)
        if self.deferred is not None and self.deferred.open is not None:
            self.deferred.open.append(partial(self.add, dy, x))
        else:
            self.add(dy, x)
        return None

    @property
    def postpones(self) -> bool:
        """Whether products that are added in place wait in the queue."""
        return self.deferred is not None and self.deferred.open is not None

    @property
    def waits(self) -> bool:
        """Whether `gradient` postpones a product."""
        return self.sum_in_place and self.parameter.grad is not None and self.postpones

    def add_late(self, dy: Tensor, inputs: Late) -> None:
        """Add dy^T x to the gradient, of inputs that are gathered now."""
        self.add(dy, inputs.take())

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x to the gradient."""
        grad = self.parameter.grad
        assert grad is not None
        if SUMS_WIDE and grad.device.type == "cuda" and dy.dtype != grad.dtype:
            torch.ops.aten.addmm.dtype_out(grad, dy.t(), x, grad.dtype, out=grad)
            return
        inputs, outputs = grad.shape[1], grad.shape[0]
        # The matrix is tall: a wide product is faster, and small.
        if inputs <= NARROW and 8 * inputs <= outputs:
            grad.add_((x.t() @ dy).t())
        elif dy.dtype == grad.dtype:
            grad.addmm_(dy.t(), x)
        else:
            grad.add_(dy.t() @ x)


class Late:
    """Inputs of several products, made for the first of them and freed after the last."""

    def __init__(self, make: Callable[[], Tensor], uses: int) -> None:
        self.make, self.uses = make, uses
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """Return the inputs."""
        value = self.make() if self.value is None else self.value
        self.uses -= 1
        self.value = value if self.uses else None
        return value


def multiply_plainly(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    us: Sequence[Tensor | None],
    factors: Sequence[Weight | None],
) -> tuple[Tensor, ...]:
    """Return x W_i^T + b_i + u_i V_i^T, outside the graph; see `multiply`."""
    wide, ys = x.to(weights[0].product_dtype), []
    for weight, bias, u, factor in zip(weights, biases, us, factors, strict=True):
        y = F.linear(wide, weight.value(), None if bias is None else bias.to(wide.dtype))
        if u is not None and factor is not None:
            y.flatten(0, -2).addmm_(u.to(wide.dtype).flatten(0, -2), factor.value().t())
        ys.append(y.to(x.dtype))
    return tuple(ys)


class _Products(torch.autograd.Function):
    """Return y_i = x W_i^T + b_i + u_i V_i^T for x that enters a tensor-parallel region; sums each
    dW_i over uses in W_i's dtype, and dx over i in place. Biases, and u_i with V_i, may be None.

    The ranks sum dx while they compute each dW_i. Under sequence parallelism backward gathers x
    again, while it computes dx; if products are postponed, W gathers x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tp: TensorParallel,
        weights: Sequence[Weight],
        factors: Sequence[Weight | None],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(weights)
        biases, us, parameters = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        # The parameters are saved, not the copies: a copy may be freed and made again.
        ctx.save_for_backward(x, *us, *parameters)
        ctx.weights, ctx.factors = weights, factors
        ctx.tp, ctx.sequence = tp, tp.size > 1 and tp.sequence
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        entered = tp.gather_positions(x) if ctx.sequence else x
        return multiply_plainly(entered, weights, biases, us, factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights, n, tp = ctx.weights, len(ctx.weights), ctx.tp
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        x, *us = ctx.saved_tensors[: 1 + n]
        dtype = weights[0].product_dtype
        summed = [weight for weight, need in zip(weights, needs[2 * n :], strict=False) if need]
        late: Late | None = None
        gather: Finish | None = None
        if ctx.sequence and summed and all(weight.waits for weight in summed):
            late = Late(lambda: tp.gather_positions(x).to(dtype).flatten(0, -2), len(summed))
        elif ctx.sequence and summed:
            gather = tp.start_gather(x)
        dys = [grad.flatten(0, -2).to(dtype) for grad in grads]
        dx: Tensor | None = None
        finish: Finish | None = None
        if needs_x:
            for dy, weight in zip(dys, weights, strict=True):
                dx = dy @ weight.value() if dx is None else dx.addmm_(dy, weight.value())
            assert dx is not None
            dx = dx.view(*grads[0].shape[:-1], x.shape[-1]).to(x.dtype)
            finish = tp.start_sum(dx, ctx.sequence)
        wide = x if gather is None else gather()
        wide = wide.to(dtype).flatten(0, -2)
        dbs: list[Tensor | None] = [None] * n
        dus: list[Tensor | None] = [None] * n
        dws: list[Tensor | None] = [None] * n
        dvs: list[Tensor | None] = [None] * n
        for i, (weight, u, factor) in enumerate(zip(weights, us, ctx.factors, strict=True)):
            dy = dys[i]
            if needs[i]:
                dbs[i] = dy.sum(0, dtype=ctx.bias_dtypes[i])
            if needs[n + i]:
                dus[i] = (dy @ factor.value()).view_as(u).to(u.dtype)
            if needs[2 * n + i] and late is not None:
                weight.deferred.open.append(partial(weight.add_late, dy, late))
            elif needs[2 * n + i]:
                dws[i] = weight.gradient(dy, wide)
            if needs[3 * n + i]:
                dvs[i] = factor.gradient(dy, u.to(dtype).flatten(0, -2))
        dx = None if finish is None else finish()
        return dx, None, None, None, *dbs, *dus, *dws, *dvs


class _Joined(torch.autograd.Function):
    """Return (x [W_1; ..; W_n]^T, x): narrow matrices as one product. Returning x lets backward add
    its other gradients in place here."""

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
    """Return the compute copy, with the gradient of the parameter: dW in the parameter's dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _Entered(torch.autograd.Function):
    """Return products y_i = x W_i^T + b_i of x that enters a tensor-parallel region; the graphs'
    form of `_Products`, with the same collectives in the same places.

    Args:
        number: the region's, in `REGIONS`.
        sequence: whether x has only this rank's positions.
        dtype: of the products.
        summed: the i whose gradient `sum_gradients` adds; W_i gets none.
        biased: the i with a bias.
        tensors: W_i, then biases, then handles of the weights in `summed`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        number: int,
        sequence: bool,
        dtype: torch.dtype,
        n: int,
        summed: tuple[int, ...],
        biased: tuple[int, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        values, biases = tensors[:n], dict(zip(biased, tensors[n:], strict=False))
        ctx.save_for_backward(x, *values, *tensors[n + len(biased) :])
        ctx.number, ctx.sequence, ctx.dtype, ctx.n = number, sequence, dtype, n
        ctx.summed, ctx.biased = summed, biased
        wide = torch.ops.megarecur.gather_positions(x, number) if sequence else x
        wide = wide.to(dtype)
        return tuple(F.linear(wide, value, biases.get(i)) for i, value in enumerate(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        n, number, sequence = ctx.n, ctx.number, ctx.sequence
        x, *rest = ctx.saved_tensors
        values, handles = rest[:n], rest[n:]
        gather = torch.ops.megarecur.start_gather(x, number) if sequence else x
        dx = grads[0] @ values[0]
        for i in range(1, n):
            dx = dx + grads[i] @ values[i]
        started = torch.ops.megarecur.start_sum(dx.to(x.dtype), number, sequence)
        wide = torch.ops.megarecur.finish_gather(gather, x, number) if sequence else x
        wide = wide.to(ctx.dtype)
        zeros: list[Tensor | None] = [None] * len(handles)
        if ctx.summed:
            dys = [grads[i] for i in ctx.summed]
            zeros[0] = torch.ops.megarecur.sum_gradients(handles, dys, wide)
        dws = [
            None if i in ctx.summed else grads[i].flatten(0, -2).t() @ wide.flatten(0, -2)
            for i in range(n)
        ]
        dbs = [grads[i].flatten(0, -2).sum(0) for i in ctx.biased]
        dx = torch.ops.megarecur.finish_sum(started, number, sequence)
        return dx, *[None] * 6, *dws, *dbs, *zeros


class _Summed(torch.autograd.Function):
    """Return products y_i = x W_i^T as they are; backward lets `sum_gradients` add each dW_i. For
    graphs: a gradient of the parameter would be a tensor of its size per use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.num = num
        ctx.save_for_backward(x, *tensors[:num])
        return tuple(y.view_as(y) for y in tensors[num:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *handles = ctx.saved_tensors
        zero = torch.ops.megarecur.sum_gradients(handles, list(grads), x)
        return None, None, zero, *[None] * (ctx.num - 1), *grads


@torch.library.custom_op(
    "megarecur::sum_gradients",
    mutates_args=(),
    schema="(Tensor[] handles, Tensor[] dys, Tensor x) -> Tensor",
)
def sum_gradients(handles: list[Tensor], dys: list[Tensor], x: Tensor) -> Tensor:
    """Add dW_i = dy_i^T x to the gradient of each handle's weight, as eager backward passes do.

    Returns 0, the gradient of a handle. The gradients of weights are no arguments: the compiler
    would wait for them, and postponed products change them later.
    """
    weights = [HANDLES[int(handle)] for handle in handles]
    if any(weight.postpones for weight in weights):
        # The graph reuses the memory of these tensors once this operator has returned.
        dys, x = [dy.clone() for dy in dys], x.clone()
    for weight, dy in zip(weights, dys, strict=True):
        if weight.parameter.grad is None:
            weight.parameter.grad = torch.zeros_like(weight.parameter)
        weight.gradient(dy.flatten(0, -2), x.flatten(0, -2))
    return torch.zeros_like(handles[0])


@sum_gradients.register_fake
def _(handles: list[Tensor], dys: list[Tensor], x: Tensor) -> Tensor:
    return torch.zeros_like(handles[0])


Added = tuple[Tensor, Weight] | None
"""A pair of u [..., r] and V [out, r]; u V^T is added to a product."""


def multiply(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    added: Sequence[Added] = (),
    tp: TensorParallel = ALONE,
) -> tuple[Tensor, ...]:
    """Return x W_i^T + b_i for each weight, plus u_i V_i^T if given; x enters the region `tp`.

    Under a compiler, only the formula is used: the compiler fuses the temporaries that `_Products`
    avoids.
    """
    pairs = [(None, None) if pair is None else pair for pair in added or [None] * len(weights)]
    us, factors = [u for u, _ in pairs], [factor for _, factor in pairs]
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled() and not tp.sequence:
            return multiply_plainly(x, weights, biases, us, factors)
        parameters = [None if w is None else w.parameter for w in (*weights, *factors)]
        products: tuple[Tensor, ...] = _Products.apply(  # type: ignore[no-untyped-call]
            x, tp, weights, factors, *biases, *us, *parameters
        )
        return products
    dtype = weights[0].product_dtype
    biases = [None if bias is None else bias.to(dtype) for bias in biases]
    ys = (
        multiply_in_graph(x.to(dtype), weights, biases)
        if tp.size == 1
        else enter_in_graph(x, weights, biases, tp)
    )
    for i, (u, factor) in enumerate(zip(us, factors, strict=True)):
        if u is not None and factor is not None:
            ys[i] = ys[i] + multiply_in_graph(u.to(dtype), (factor,))[0]
    return tuple(y.to(x.dtype) for y in ys)


def multiply_joined(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, Tensor]:
    """Return x times all of these narrow weights [r_i, in], transposed: [..., sum of r_i]; and x,
    which other readers must use."""
    if not torch.compiler.is_compiling():
        u, same = _Joined.apply(  # type: ignore[no-untyped-call]
            x, weights, *(weight.parameter for weight in weights)
        )
        return u, same if x.requires_grad else x
    wide = x.to(weights[0].product_dtype)
    u = F.linear(wide, torch.cat([graph_value(weight) for weight in weights]))
    parts = u.split([len(weight.parameter) for weight in weights], -1)
    return torch.cat(sum_in_graph(wide, weights, parts), -1).to(x.dtype), x


def multiply_in_graph(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None] = ()
) -> list[Tensor]:
    """Return x W_i^T + b_i for each weight, inside a compiler's graph; x has the dtype of
    products."""
    pairs = zip(weights, biases or [None] * len(weights), strict=True)
    return sum_in_graph(x, weights, [F.linear(x, graph_value(w), bias) for w, bias in pairs])


def enter_in_graph(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], tp: TensorParallel
) -> list[Tensor]:
    """Return x W_i^T + b_i for each weight, inside a compiler's graph; x enters the region."""
    summed = tuple(i for i, weight in enumerate(weights) if weight.summed_by_graphs)
    handles = [weights[i].handle for i in summed]
    biased = tuple(i for i, bias in enumerate(biases) if bias is not None)
    ys = _Entered.apply(  # type: ignore[no-untyped-call]
        x, tp.number, tp.sequence, weights[0].product_dtype, len(weights), summed, biased,
        *(graph_value(weight) for weight in weights), *(biases[i] for i in biased), *handles,
    )  # fmt: skip
    return list(ys)


def sum_in_graph(x: Tensor, weights: Sequence[Weight], ys: Sequence[Tensor]) -> list[Tensor]:
    """Return products with x; backward sums the gradients of those weights that have a handle."""
    found = list(ys)
    summed = [i for i, weight in enumerate(weights) if weight.summed_by_graphs]
    if summed and torch.is_grad_enabled():
        handles = [weights[i].handle for i in summed]
        made = _Summed.apply(x, len(summed), *handles, *(ys[i] for i in summed))  # type: ignore[no-untyped-call]
        for i, y in zip(summed, made, strict=True):
            found[i] = y
    return found


def graph_value(weight: Weight) -> Tensor:
    """Return the weight in the dtype of products, inside a compiler's graph. Its gradient is that
    of the parameter, unless `sum_in_graph` sums it."""
    value = weight.parameter if weight.copy is None else weight.copy
    if weight.summed_by_graphs:
        return value.detach()
    if weight.copy is None:
        return value
    found: Tensor = _Value.apply(weight.parameter, weight.copy)  # type: ignore[no-untyped-call]
    return found


def product(
    x: Tensor, weight: Weight, bias: Tensor | None = None, tp: TensorParallel = ALONE
) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]; x enters
    the region `tp`."""
    return multiply(x, (weight,), (bias,), tp=tp)[0]


class LowRank(nn.Module):
    """A low-rank delta scale B A x that one loop of a block adds to a linear layer (Hu et al. 2022,
    eq. 3), and its delta of the bias.

    With tensor parallelism one factor is cut like the layer's matrix, and the other is whole on
    every rank: B with the outputs, A with the inputs.

    Args:
        name: global name prefix of its parameters.
        make: makes the parameters, cut ones as this rank's part.
        dtype: dtype of the operands and results of products.
        scale: factor of B A x.
        bias: add a delta to the layer's bias.
        factors: names of the factor applied to x and of the other one.
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
        """Return the output of A times the scale, which is usually 1."""
        return u if self.scale == 1.0 else u * self.scale


class MixedLowRank(LowRank):
    """Deltas of several loops for one sample [1, T, ...] whose rows are sorted by loop, outside of
    the graph. Each row is multiplied with the factors of its own loop alone.

    Args:
        deltas: the delta of each loop.
        counts: number of consecutive rows of each loop; the caller may change them between uses.
    """

    def __init__(self, deltas: Sequence[LowRank], counts: list[int]) -> None:
        nn.Module.__init__(self)
        self.deltas, self.counts = deltas, counts

    def add_to(
        self, y_1TO: Tensor, x_1TI: Tensor, leave: Callable[[Tensor], Tensor] = lambda u: u
    ) -> Tensor:
        """Add the deltas of x to y, in place; returns y.

        Args:
            leave: sums the inner products over the ranks that share the inputs.
        """
        parts = zip(
            self.deltas, y_1TO.split(self.counts, 1), x_1TI.split(self.counts, 1), strict=True
        )
        for delta, y, x in parts:
            u = leave(F.linear(x.to(delta.a.product_dtype), delta.a.value()))
            y += F.linear(delta.scaled(u), delta.b.value()).to(y.dtype)
            if delta.bias is not None:
                y += delta.bias.to(y.dtype)
        return y_1TO


class MaskedLowRank(MixedLowRank):
    """Deltas of several loops for one sample [1, T, ...] whose rows are in any order. Each row is
    multiplied with the factors of all loops, and those of other loops are masked, so shapes do not
    depend on the loops, and one CUDA graph serves any of them.

    Args:
        deltas: the delta of each loop.
        masks: the rows of each loop, [1, T, 1]; the caller may change the list between uses.
    """

    def __init__(self, deltas: Sequence[LowRank], masks: list[Tensor]) -> None:
        super().__init__(deltas, [])
        self.masks = masks

    def add_to(
        self, y_1TO: Tensor, x_1TI: Tensor, leave: Callable[[Tensor], Tensor] = lambda u: u
    ) -> Tensor:
        """Add the deltas of x to y, in place; see `MixedLowRank.add_to`."""
        for delta, mask in zip(self.deltas, self.masks, strict=True):
            u = leave(F.linear(x_1TI.to(delta.a.product_dtype), delta.a.value()))
            u = delta.scaled(u).masked_fill(~mask, 0.0)
            y_1TO += F.linear(u, delta.b.value()).to(y_1TO.dtype)
            if delta.bias is not None:
                y_1TO += delta.bias.to(y_1TO.dtype) * mask
        return y_1TO


class Linear(nn.Module):
    """A linear layer whose weight may be used any number of times per step.

    Args:
        name: global name prefix of its parameters.
        make: makes the parameters, cut ones as this rank's part.
        dtype: dtype of the operands and results of products.
        bias: add a bias.
        tp: the ranks that share the matrix.
        cut: cut the matrix by outputs (column parallel) or inputs (row parallel); None means that
        every rank holds all of it.
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
        """Map [..., in] to [..., out]; if the matrix is cut, one of the two is this rank's
        share."""
        if delta is None and self.cut is None and is_plain():
            return apply_plainly(self, x)
        if self.cut != "inputs":
            return apply_all((self,), x, (delta,))[0]
        y = self.tp.leave(product(x, self.weight))
        if isinstance(delta, MixedLowRank):
            y = delta.add_to(y, x, self.tp.leave)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if delta is not None:
            y = y + product(delta.scaled(self.tp.leave(product(x, delta.a))), delta.b)
        bias = self.bias_with(delta)
        return y if bias is None else y + bias.to(y.dtype)

    def bias_with(self, delta: LowRank | None) -> Tensor | None:
        """Return the bias with its delta: [out], or this rank's share."""
        if self.bias is None or delta is None or delta.bias is None:
            return self.bias
        return self.bias + delta.bias


def is_plain() -> bool:
    """Return True if no gradient can be asked for, and no compiler traces."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def apply_plainly(layer: Linear, x: Tensor) -> Tensor:
    """Return a layer's output without a delta, outside the graph. Decoding has products of few
    rows, which cost less than the steps of `multiply` around them."""
    weight, bias = layer.weight, layer.bias
    if x.dtype == weight.product_dtype and bias is None:
        return F.linear(x, weight.value())
    wide = x.to(weight.product_dtype)
    return F.linear(wide, weight.value(), None if bias is None else bias.to(wide.dtype)).to(x.dtype)


def apply_all(
    layers: Sequence[Linear],
    x: Tensor,
    deltas: Sequence[LowRank | None] = (),
    tap: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return each layer's output for the same x, whose gradient is summed without temporaries;
    deltas may read another tensor, the tap."""
    tp, cut = layers[0].tp, layers[0].cut
    inside = tp if cut == "outputs" else ALONE
    if is_plain() and not (inside.sequence or any(deltas)):
        return tuple(apply_plainly(layer, x) for layer in layers)
    if [delta for delta in deltas if isinstance(delta, MixedLowRank)]:
        ys = multiply(x, [layer.weight for layer in layers], [layer.bias for layer in layers],
                      tp=inside)  # fmt: skip
        for y, delta in zip(ys, deltas, strict=True):
            if isinstance(delta, MixedLowRank):
                delta.add_to(y, x if tap is None else tap)
        return ys
    if tap is None:
        added, x = add_deltas(deltas, x, inside)
    else:
        added, _ = add_deltas(deltas, tap, inside)
    each = zip(layers, deltas or [None] * len(layers), strict=True)
    biases = [layer.bias_with(delta) for layer, delta in each]
    return multiply(x, [layer.weight for layer in layers], biases, added, inside)


def add_deltas(
    deltas: Sequence[LowRank | None], x: Tensor, tp: TensorParallel
) -> tuple[list[Added], Tensor]:
    """Return the terms that `multiply` adds, scale A x [..., r] and B for each delta, and x, which
    other readers must use.

    The factors A are whole on every rank and read x before it enters the tensor-parallel region;
    only their output enters, r channels each instead of all of x.
    """
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return [], x
    joined, x = multiply_joined(x, [delta.a for delta in present])
    made = iter(tp.enter(joined).split([len(delta.a.parameter) for delta in present], -1))
    added = [None if d is None else (d.scaled(next(made)), d.b) for d in deltas]
    return added, x
