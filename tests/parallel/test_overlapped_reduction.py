"""Products cut by output: the ranks sum dx while they compute dW, and gather inputs again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.meshes import aot_eager, later
from torch import Tensor, nn

from megarecur.parallel import regions
from megarecur.parallel.linear import DeferredProducts, Linear, LowRank, Weight, apply_all
from megarecur.parallel.regions import ALONE, TensorParallel

SAMPLES, POSITIONS, INPUTS, OUTPUTS, RANK = 2, 6, 5, 8, 3
NAMES = ("gate", "up")


def draw(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def part(whole: Tensor, tp: TensorParallel, dim: int = 0) -> Tensor:
    """This rank's share."""
    return whole.chunk(tp.size, dim)[tp.rank].clone()


def differentiate(
    tp: TensorParallel, adapted: bool, in_place: bool, deferred: bool, compiled: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of two layers with biases, this rank's shares, and what backward did in turn."""
    parameters: dict[str, nn.Parameter] = {}

    def make(name: str) -> nn.Parameter:
        shapes = {"weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,), "lora_a": (RANK, INPUTS),
                  "lora_b": (OUTPUTS, RANK)}  # fmt: skip
        kind = name.split(".")[-1]
        whole = draw(name, *shapes[kind])
        parameters[name] = nn.Parameter(whole if kind == "lora_a" else part(whole, tp))
        return parameters[name]

    layers = [Linear(name, make, torch.float64, True, tp, "outputs") for name in NAMES]
    deltas = [LowRank(NAMES[0], make, torch.float64), None] if adapted else []
    queue = DeferredProducts()
    weights = [layer.weight for layer in layers]
    weights += [deltas[0].a, deltas[0].b] if adapted else []
    for weight in weights:
        weight.sum_in_place, weight.deferred = in_place, queue
        if in_place:
            weight.parameter.grad = torch.zeros_like(weight.parameter)
        if in_place and compiled:
            weight.open_handle()
    whole_x = draw("x", SAMPLES, POSITIONS, INPUTS)
    x = tp.own(whole_x).clone().requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return apply_all(layers, x, deltas)

    call = torch.compile(run, backend=aot_eager) if compiled else run
    log: list[str] = []

    def logged(owner: Any, name: str, what: str) -> Any:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            log.append(what)
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, wrapped)

    ys = call(x)
    dys = [part(draw(f"{name}.dy", SAMPLES, POSITIONS, OUTPUTS), tp, -1) for name in NAMES]
    with (
        logged(regions, "_wait", "sum ends"),
        logged(regions, "_join", "gather ends"),
        logged(TensorParallel, "start_sum", "sum starts"),
        logged(TensorParallel, "start_gather", "gather starts"),
        logged(Weight, "add", "dW"),
    ):
        if deferred:
            with queue.collect() as products:
                torch.autograd.backward(ys, dys)
            log.append("W")
            for product in products:
                product()
        else:
            torch.autograd.backward(ys, dys)
    assert x.grad is not None
    found = {"x": x.grad} | {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert set(found) == {"x", *parameters}
    return found, log


def differentiate_on_two(sequence: bool, *options: bool) -> tuple[dict[str, Tensor], list[str]]:
    tp = TensorParallel(dist.group.WORLD, dist.get_rank(), 2, sequence)
    return differentiate(tp, *options)


CASES = [
    # sequence, adapted, in place, deferred, compiled
    (False, True, True, False, False),
    (True, True, True, False, False),
    (True, False, True, True, False),
    (True, True, False, False, False),
    (False, True, True, True, True),
    (True, True, True, False, True),
    later(False, False, False, False, True),
    later(True, False, False, False, True),
    later(False, True, True, True, False),
]


@pytest.mark.parametrize(("sequence", "adapted", "in_place", "deferred", "compiled"), CASES)
def test_dx_is_summed_while_dw_is_computed(
    world, sequence: bool, adapted: bool, in_place: bool, deferred: bool, compiled: bool
) -> None:
    options = adapted, in_place, deferred, compiled
    whole, _ = differentiate(ALONE, adapted, False, False, False)
    ranks = world(2).run(differentiate_on_two, sequence, *options)
    for name, expected in whole.items():
        shares = [gradients[name] for gradients, _ in ranks]
        if name == "x":
            found = torch.cat(shares, 1) if sequence else shares[0]
        elif name.endswith("lora_a"):  # Under sequence parallelism the engine sums it.
            found = shares[0] + shares[1] if sequence else shares[0]
        else:
            found = torch.cat(shares)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if not in_place:
        return
    for _, log in ranks:
        first = log.index("sum starts")  # LoRA's input gradient is summed later.
        end = log.index("sum ends", first)
        if deferred:
            late = log[log.index("W") :]
            assert "dW" not in log[: log.index("W")] and late.count("dW") >= 2
            assert not sequence or late.count("gather starts") == 1
        else:
            assert "dW" in log[first:end], log
            # In a graph LoRA's B is a product of its own.
            assert log[:first].count("dW") == (adapted and compiled)
        if sequence and not deferred:
            assert log.index("gather starts") < first < log.index("gather ends") < end


def test_inputs_are_kept_uncut_nowhere(world) -> None:
    """What autograd keeps of the inputs under sequence parallelism: this rank's positions."""
    for kept in world(2).run(keep_inputs):
        assert kept == [SAMPLES * POSITIONS * INPUTS // 2]


def keep_inputs() -> list[int]:
    """Elements of the tensors that one layer saves, parameters excluded."""
    tp = TensorParallel(dist.group.WORLD, dist.get_rank(), 2, True)

    def make(name: str) -> nn.Parameter:
        return nn.Parameter(draw(name, OUTPUTS // 2, INPUTS))

    layer = Linear("gate", make, torch.float64, False, tp, "outputs")
    x = tp.own(draw("x", SAMPLES, POSITIONS, INPUTS)).clone().requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend([tensor.numel()] if not isinstance(tensor, nn.Parameter) else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return kept
