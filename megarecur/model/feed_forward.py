"""Feed-forward layers. Shapes: [..., D] hidden, [..., F] ffn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.schema import ModelConfig
from megarecur.model.adapters import Adapter, deltas_of
from megarecur.parallel.linear import Linear, MakeParameter, apply_all
from megarecur.parallel.regions import ALONE, TensorParallel


class _SwiGLU(torch.autograd.Function):
    """silu(gate) up; keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        d_up = F.silu(gate).mul_(dy)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, d_up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        bias = model.feed_forward_bias
        self.gate = Linear(f"{name}.gate", make, dtype, bias, tp, "outputs")
        self.up = Linear(f"{name}.up", make, dtype, bias, tp, "outputs")
        self.down = Linear(f"{name}.down", make, dtype, bias, tp, "inputs")

    def forward(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        """[..., D] to [..., D]."""
        gate, up = apply_all((self.gate, self.up), x, deltas_of(adapter, "gate", "up"))
        return self.down(self.combine(gate, up), *deltas_of(adapter, "down"))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., F] each to [..., F]."""
        if torch.compiler.is_compiling():
            return F.silu(gate) * up
        return _SwiGLU.apply(gate, up)


class _GeGLU(torch.autograd.Function):
    """gelu(gate) up; keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return F.gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dy, how = grads[0], ctx.approximate
        d_up = F.gelu(gate, approximate=how).mul_(dy)
        d_gate = torch.ops.aten.gelu_backward(dy * up, gate, approximate=how)
        return d_gate, d_up, None


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) up(x)) (Shazeer 2020, eq. 6), exact or by tanh."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__(name, make, model, dtype, tp)
        self.approximate = approximation(model)

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., F] each to [..., F]."""
        if torch.compiler.is_compiling():
            return F.gelu(gate, approximate=self.approximate) * up
        return _GeGLU.apply(gate, up, self.approximate)


class GELU(nn.Module):
    """down(gelu(up(x))), exact or by tanh (Hendrycks & Gimpel 2016)."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        bias = model.feed_forward_bias
        self.approximate = approximation(model)
        self.up = Linear(f"{name}.up", make, dtype, bias, tp, "outputs")
        self.down = Linear(f"{name}.down", make, dtype, bias, tp, "inputs")

    def forward(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        """[..., D] to [..., D]."""
        mixed = F.gelu(self.up(x, *deltas_of(adapter, "up")), approximate=self.approximate)
        return self.down(mixed, *deltas_of(adapter, "down"))


class Gate(nn.Module):
    """sigmoid(down(gelu(up(x)))) per channel (Ray Chowdhury & Caragea 2024, GatedTransformerBlock):
    how much of a block's output replaces its input."""

    def __init__(
        self, name: str, make: MakeParameter, dtype: torch.dtype, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", make, dtype, True, tp, "outputs")
        self.down = Linear(f"{name}.down", make, dtype, True, tp, "inputs")

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D], from 0 to 1."""
        return torch.sigmoid(self.down(F.gelu(self.up(x))))


def approximation(model: ModelConfig) -> str:
    """As torch names it."""
    return "tanh" if model.feed_forward.endswith("_tanh") else "none"


FEED_FORWARDS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": GeGLU,
    "gelu": GELU,
    "gelu_tanh": GELU,
}
