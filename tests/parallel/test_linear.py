"""The owner of a weight's compute copy and of its gradient's sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.engines import aot_eager
from support.models import SCHEMES, gradients, make_batch, make_model_config, objective
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megarecur.model.compile import Compiled
from megarecur.model.transformer import Transformer
from megarecur.parallel import linear
from megarecur.parallel.linear import (
    DeferredProducts,
    Linear,
    Weight,
    apply_all,
    product,
    sum_gradients,
)
from megarecur.recurrence.schemes import layer_map

USES, MICRO_BATCHES = 64, 8


def make_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Weight:
    """A random matrix of scale 1/sqrt(columns)."""
    master = torch.promote_types(dtype, torch.float32)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Weight(nn.Parameter((values / columns**0.5).to(master)), dtype)


def gradient_error(
    uses: int,
    micro_batches: int,
    in_place: bool,
    master: torch.dtype = torch.float32,
    multiply: Callable[[Tensor, Weight], Tensor] = product,
) -> float:
    """Relative error of dW, computed in bf16, summed over uses and micro batches, against fp64.

    Inputs and upstream gradients have a mean, so that the sum grows with the uses as a real one
    does, and small terms meet a large sum.
    """
    weight = Weight(nn.Parameter(torch.zeros(24, 16, dtype=master)), torch.bfloat16)
    weight.sum_in_place = in_place
    if in_place:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    exact = torch.zeros(24, 16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        total = torch.zeros(())
        for _ in range(uses):
            x = 0.5 + torch.randn(40, 16, generator=generator)
            dy = 0.5 + torch.randn(40, 24, generator=generator)
            exact += dy.double().T @ x.double()
            y = multiply(x.to(torch.bfloat16), weight)
            total = total + (y * dy.to(torch.bfloat16)).sum(dtype=torch.float32)
        total.backward()
    assert weight.parameter.grad is not None
    assert weight.parameter.grad.dtype == master
    return ((weight.parameter.grad.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_error_does_not_grow_with_uses(
    has_bf16: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_bf16_products", lambda device: has_bf16)
    one = gradient_error(1, 1, in_place)
    assert 0.0 < one < 4e-3  # bf16's resolution
    assert gradient_error(USES, MICRO_BATCHES, in_place) <= 1.2 * one


def test_a_sum_in_bf16_is_caught() -> None:
    """The planted fault: uses are summed in bf16, which one use does not show."""
    one = gradient_error(1, 1, in_place=True, master=torch.bfloat16)
    assert one < 4e-3
    assert gradient_error(USES, MICRO_BATCHES, in_place=True, master=torch.bfloat16) > 2 * one


def test_a_compiled_sum_is_as_exact() -> None:
    """A graph adds to the gradient in fp32, and returns no gradient of the parameter."""
    compiled = Compiled(product, aot_eager)

    def multiply(x: Tensor, weight: Weight) -> Tensor:
        if weight.handle is None:
            weight.parameter.register_hook(lambda _: pytest.fail("the graph returned dW"))
            weight.open_handle()
        y: Tensor = compiled(x, weight)
        return y

    one = gradient_error(1, 1, in_place=True, multiply=multiply)
    assert 0.0 < one < 4e-3
    assert gradient_error(USES, MICRO_BATCHES, in_place=True, multiply=multiply) <= 1.2 * one
    assert compiled.graphs == 1, "for both weights"
    with mock.patch.object(Weight, "gradient"):
        lost = gradient_error(1, 1, in_place=True, multiply=multiply)
    assert lost == 1.0, "the planted fault: the operator adds nothing"


def test_postponed_products_of_a_graph_own_their_operands() -> None:
    """A graph reuses the memory of its tensors as soon as the operator has returned."""
    weight = make_weight(4, 3, torch.float32)
    weight.sum_in_place, weight.deferred = True, DeferredProducts()
    weight.open_handle()
    assert weight.handle is not None
    dy, x = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    expected = torch.einsum("bso,bsi->oi", dy, x)
    with weight.deferred.collect() as products, torch.no_grad():
        sum_gradients([weight.handle], [dy], x)
    dy.fill_(float("nan")), x.fill_(float("nan"))
    assert weight.parameter.grad is not None and not weight.parameter.grad.any()
    for postponed in products:
        postponed()
    torch.testing.assert_close(weight.parameter.grad, expected)


class Products(TorchDispatchMode):
    """Records the operators that write a result; CUDA's wide product is not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(function))
        if function is torch.ops.aten.addmm.dtype_out:
            grad, left, right, dtype = args
            assert dtype == grad.dtype == torch.float32 and kwargs["out"] is grad
            assert left.dtype == right.dtype == torch.bfloat16
            return grad
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [64, 2000])
@pytest.mark.parametrize(
    ("device", "dtype", "wide"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_cuda_adds_products_of_bf16_without_rounding(
    device: str, dtype: torch.dtype, wide: bool, rows: int
) -> None:
    with FakeTensorMode():
        weight = Weight(nn.Parameter(torch.empty(rows, 32, device=device)), dtype)
        weight.parameter.grad = torch.empty(rows, 32, device=device)
        dy, x = (torch.empty(8, width, device=device, dtype=dtype) for width in (rows, 32))
        with Products() as products, torch.no_grad():
            weight.add(dy, x)
    assert ("aten.addmm.dtype_out" in products.seen) == wide, products.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_against_fp64(dtype: torch.dtype, in_place: bool, bias: bool) -> None:
    master = torch.promote_types(dtype, torch.float32)
    made = {}

    def make(name: str) -> nn.Parameter:
        shape = (6, 5) if name.endswith("weight") else (6,)
        seed = torch.Generator().manual_seed(len(name))
        made[name] = nn.Parameter(torch.randn(shape, generator=seed).to(master))
        return made[name]

    layer = Linear("x", make, dtype, bias)
    assert list(made) == ["x.weight", *(["x.bias"] if bias else [])]
    if in_place:
        layer.weight.sum_in_place = True
        layer.weight.parameter.grad = torch.zeros_like(layer.weight.parameter)
    x = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, 6).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    wide = [layer.weight.value().double(), x.detach().double(), dy.double()]
    w, x64, dy64 = wide
    expected = x64 @ w.T
    if bias:
        expected = expected + made["x.bias"].detach().double()
    tol = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float64: 1e-14}[dtype]
    pairs = [(y, expected), (x.grad, dy64 @ w),
             (made["x.weight"].grad, torch.einsum("bso,bsi->oi", dy64, x64))]  # fmt: skip
    if bias:
        pairs.append((made["x.bias"].grad, dy64.sum((0, 1))))
    for actual, reference in pairs:
        assert actual is not None
        assert (actual.double() - reference).norm() <= tol * reference.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("tied", [True, False])
def test_sum_in_place_equals_autograd(precision: str, tied: bool) -> None:
    config = make_model_config(SCHEMES["cycle"], precision, tie_embeddings=tied)
    steps, found = layer_map(config.recurrence), []
    for in_place in (False, True):
        model = Transformer(config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        buffers = {n: p.grad for n, p in model.parameters_by_name.items()}
        for weight in model.weights():
            weight.sum_in_place = in_place
        for seed in range(2):
            objective(model, steps, make_batch(seed=seed))[0].backward()
        if in_place:  # an engine's flat buffer stays the gradient
            assert all(p.grad is buffers[n] for n, p in model.parameters_by_name.items())
        found.append(gradients(model))
    # The order of additions may differ, nothing else.
    tol = 1e-14 if precision == "fp64" else 1e-6
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= tol * expected.norm(), name


def test_sum_in_place_spares_frozen_weights() -> None:
    weight = make_weight(4, 3, torch.float32)
    weight.parameter.requires_grad_(False)
    weight.sum_in_place = True
    x = torch.randn(2, 3, requires_grad=True)
    product(x, weight).sum().backward()
    assert weight.parameter.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_makes_the_copy_anew(dtype: torch.dtype) -> None:
    weight = make_weight(4, 3, dtype)
    x = torch.randn(2, 3).to(dtype)
    before = product(x, weight)
    with torch.no_grad():
        weight.parameter.mul_(3.0)
    stale = product(x, weight)
    weight.refresh()
    fresh = product(x, weight)
    assert torch.equal(stale, before) == (dtype == torch.bfloat16)
    torch.testing.assert_close(fresh, x @ weight.parameter.to(dtype).T, rtol=1e-2, atol=1e-2)
    assert not torch.equal(fresh, before)
    assert torch.equal(weight.value().to(dtype), weight.parameter.to(dtype))


def test_saved_for_backward_is_the_parameter_not_its_copy() -> None:
    weight, saved = make_weight(4, 3, torch.bfloat16), []
    x = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product(x, weight)
    assert weight.parameter.data_ptr() in saved
    assert weight.value().data_ptr() not in saved


def test_model_refreshes_every_weight_once() -> None:
    config = make_model_config(SCHEMES["cycle"], "bf16")
    model = Transformer(config)
    weights = model.weights()
    assert len({id(w.parameter) for w in weights}) == len(weights)
    matrices = {n for n, p in model.parameters_by_name.items() if p.ndim == 2}
    owned = {id(w.parameter) for w in weights}
    assert {n for n, p in model.parameters_by_name.items() if id(p) in owned} == matrices
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.refresh()
    for weight in weights:
        assert torch.equal(weight.value().to(torch.bfloat16), weight.parameter.to(torch.bfloat16))


# ------------------------------------------------------------------------- embedding and head


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("precision, tol", [("fp32", 1e-6), ("bf16", 1e-2), ("fp64", 1e-14)])
def test_tied_embedding_and_head_sum_wide(precision: str, tol: float, in_place: bool) -> None:
    model, batch = (
        Transformer(make_model_config(SCHEMES["dense"], precision)),
        make_batch(length=30),
    )
    weight = model.head
    assert weight is not None and weight is model.embedding
    weight.sum_in_place = in_place
    if in_place:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    ctx = model.context(batch, step=0, training=False)
    y = product(model.embed(batch.tokens_BS, ctx), weight)
    dy = torch.randn(y.shape).to(y.dtype)
    (y * dy).sum(dtype=weight.parameter.dtype).backward()
    table = weight.parameter.detach().double().requires_grad_()
    ((F.embedding(batch.tokens_BS, table) @ table.T) * dy.double()).sum().backward()
    grad = weight.parameter.grad
    assert grad is not None and grad.dtype == weight.parameter.dtype
    assert table.grad is not None
    assert (grad.double() - table.grad).norm() <= tol * table.grad.norm()


def test_a_frequent_token_sums_wide() -> None:
    """No term of its embedding's gradient is lost beside a large sum."""
    model, batch = Transformer(make_model_config(SCHEMES["dense"], "bf16")), make_batch(1, 5000)
    batch.tokens_BS = torch.ones_like(batch.tokens_BS)
    x = model.embed(batch.tokens_BS, model.context(batch, step=0, training=False))
    assert x.dtype == torch.bfloat16
    x.sum(dtype=torch.float32).backward()
    gradient = model.parameters_by_name["embedding.weight"].grad
    assert gradient is not None
    assert torch.equal(gradient[1], torch.full_like(gradient[1], 5000.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_together_are_layers_alone(dtype: torch.dtype, in_place: bool) -> None:
    def make(name: str) -> nn.Parameter:
        seed = torch.Generator().manual_seed(sum(map(ord, name)))
        shape = (rows, 5) if name.endswith("weight") else (rows,)
        return nn.Parameter(
            torch.randn(shape, generator=seed).to(torch.promote_types(dtype, torch.float32))
        )

    layers = []
    for rows, bias in ((6, True), (2, False), (4, True)):
        layers.append(Linear(f"x{rows}", make, dtype, bias))
    torch.manual_seed(0)
    x = torch.randn(2, 300, 5).to(dtype)
    dys = [torch.randn(2, 300, rows).to(dtype) for rows in (6, 2, 4)]
    found = []
    for together in (False, True):
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = torch.zeros_like(parameter)
            layer.weight.sum_in_place = in_place
        given = x.clone().requires_grad_()
        ys = apply_all(layers, given) if together else [layer(given) for layer in layers]
        torch.autograd.backward(ys, dys)
        grads = [p.grad.clone() for layer in layers for p in layer.parameters()]
        found.append(([*ys, *grads], given.grad))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    # dx is summed over the layers before it is rounded, hence no worse.
    exact = sum(dy.double() @ layer.weight.value().double()
                for dy, layer in zip(dys, layers, strict=True))  # fmt: skip
    alone, together = (((f[1].double() - exact).norm() / exact.norm()).item() for f in found)
    assert together <= max(1.01 * alone, {torch.float64: 1e-15}.get(dtype, 2e-7))


# ------------------------------------------------------------------------- CPUs without bf16


def test_products_of_bf16_in_fp32_are_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a bf16 product round once, at the end."""
    x = torch.randn(64, 96).to(torch.bfloat16)
    dy = torch.randn(64, 48).to(torch.bfloat16)
    errors: dict[bool, list[Any]] = {}
    for wide in (False, True):
        monkeypatch.setattr(linear, "has_bf16_products", lambda device, wide=wide: not wide)
        weight = make_weight(48, 96, torch.bfloat16)
        given = x.clone().requires_grad_()
        y = product(given, weight)
        y.backward(dy)
        exact = weight.parameter.to(torch.bfloat16).double()
        parts = ((y, x.double() @ exact.T), (given.grad, dy.double() @ exact),
                 (weight.parameter.grad, dy.double().T @ x.double()))  # fmt: skip
        assert y.dtype == given.grad.dtype == torch.bfloat16
        errors[wide] = [((a.double() - e).norm() / e.norm()).item() for a, e in parts]
    for wide, narrow in zip(errors[True], errors[False], strict=True):
        assert wide <= 1.01 * narrow
