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
        compiling = torch.compiler.is_compiling()
        mixed = F.silu(gate) * up if compiling else _SwiGLU.apply(gate, up)
        return self.down(mixed, *deltas_of(adapter, "down"))


class GELU(nn.Module):
    """down(gelu(up(x))), exact GELU (Hendrycks & Gimpel 2016)."""

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
        self.up = Linear(f"{name}.up", make, dtype, bias, tp, "outputs")
        self.down = Linear(f"{name}.down", make, dtype, bias, tp, "inputs")

    def forward(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        """[..., D] to [..., D]."""
        mixed = F.gelu(self.up(x, *deltas_of(adapter, "up")))
        return self.down(mixed, *deltas_of(adapter, "down"))
