"""Feed-forward layers. Shapes: [..., D] hidden, [..., F] ffn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.model import ModelConfig
from megarecur.model.adapters import Adapter, deltas_of
from megarecur.model.saved import mark
from megarecur.parallel.linear import Linear, MakeParameter, apply_all
from megarecur.parallel.regions import ALONE, TensorParallel


class _SwiGLU(torch.autograd.Function):
    """The product silu(gate) up, which saves only its two inputs for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        d_up = F.silu(gate).mul_(dy)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, d_up


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class SwiGLU(nn.Module):
    """Feed-forward layer down(silu(gate(x)) up(x)) (Shazeer 2020, eq. 6)."""

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
        """Apply the layer: [..., D] to [..., D]. The adapter adds the deltas of its loop."""
        gate, up = apply_all((self.gate, self.up), x, deltas_of(adapter, "gate", "up"))
        out: Tensor = self.down(self.combine(gate, up), *deltas_of(adapter, "down"))
        return out

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the gated activation: [..., F] each to [..., F]."""
        if torch.compiler.is_compiling():
            return F.silu(gate) * up
        if torch.is_inference_mode_enabled():
            return _swiglu(gate, up)
        product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return mark(product, _swiglu, gate, up)


class _GeGLU(torch.autograd.Function):
    """The product gelu(gate) up, which saves only its two inputs for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _geglu(gate, up, approximate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dy, how = grads[0], ctx.approximate
        d_up = F.gelu(gate, approximate=how).mul_(dy)
        d_gate = torch.ops.aten.gelu_backward(dy * up, gate, approximate=how)
        return d_gate, d_up, None


def _geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return F.gelu(gate, approximate=approximate).mul_(up)


class GeGLU(SwiGLU):
    """Feed-forward layer down(gelu(gate(x)) up(x)) (Shazeer 2020, eq. 6), with the exact gelu or
    its tanh approximation."""

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
        """Return the gated activation: [..., F] each to [..., F]."""
        if torch.compiler.is_compiling():
            return F.gelu(gate, approximate=self.approximate) * up
        product: Tensor = _GeGLU.apply(gate, up, self.approximate)  # type: ignore[no-untyped-call]
        return mark(product, _geglu, gate, up, self.approximate)


class GELU(nn.Module):
    """Feed-forward layer down(gelu(up(x))) (Hendrycks & Gimpel 2016), with the exact gelu or its
    tanh approximation."""

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
        """Apply the layer: [..., D] to [..., D]. The adapter adds the deltas of its loop."""
        mixed = self.activate(self.up(x, *deltas_of(adapter, "up")))
        out: Tensor = self.down(mixed, *deltas_of(adapter, "down"))
        return out

    def activate(self, x: Tensor) -> Tensor:
        """Return the activation: [..., F] to [..., F]."""
        return gelu(x, self.approximate)


class ReLU(GELU):
    """Feed-forward layer down(relu(up(x))) (Vaswani et al. 2017, eq. 2)."""

    def activate(self, x: Tensor) -> Tensor:
        """Return the activation: [..., F] to [..., F]."""
        y = F.relu(x)
        return y if torch.compiler.is_compiling() else mark(y, F.relu, x)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """Return gelu(x), which backward may make again (`train.recompute`)."""
    y = F.gelu(x, approximate=approximate)
    return y if torch.compiler.is_compiling() else mark(y, _gelu, x, approximate)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


class Gate(nn.Module):
    """Gate sigmoid(down(gelu(up(x)))) per channel: the share of a block's output that replaces its
    input (Ray Chowdhury & Caragea 2024, GatedTransformerBlock)."""

    def __init__(
        self, name: str, make: MakeParameter, dtype: torch.dtype, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", make, dtype, True, tp, "outputs")
        self.down = Linear(f"{name}.down", make, dtype, True, tp, "inputs")

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate, [..., D] to [..., D], between 0 and 1."""
        return torch.sigmoid(self.down(gelu(self.up(x), "none")))


def approximation(model: ModelConfig) -> str:
    """Return torch's name of the gelu approximation: "tanh" or "none"."""
    return "tanh" if model.feed_forward.endswith("_tanh") else "none"


FEED_FORWARDS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "geglu_tanh": GeGLU,
    "gelu": GELU,
    "gelu_tanh": GELU,
    "relu": ReLU,
}
