"""Norms, computed in promote(dtype, fp32). Shapes: [..., D]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.parallel.linear import MakeParameter


class _RMSNorm(torch.autograd.Function):
    """y = g x / sqrt(mean(x^2) + eps); keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # A norm reads a row once, where the mean of squares would write the squares.
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        dy, normed = grads[0].to(scale.dtype), x.to(scale.dtype) * scale
        shares = dy * normed
        d_gain = shares.flatten(0, -2).sum(0)
        mean = (shares @ gain.to(scale.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        dx = torch.mul(dy, gain, out=shares).addcmul_(normed, mean, value=-1.0).mul_(scale)
        return dx.to(x.dtype), d_gain.to(gain.dtype), None


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, eq. 4, eps inside the root."""

    def __init__(self, name: str, make: MakeParameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = make(name + ".weight"), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        if not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """Ba et al. 2016, with gain and bias."""

    def __init__(self, name: str, make: MakeParameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = make(name + ".weight"), make(name + ".bias"), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        wide = x.to(self.weight.dtype)
        return F.layer_norm(wide, x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)


def build_norm(kind: str, name: str, make: MakeParameter, eps: float) -> nn.Module:
    """The norm that `model.norm` names."""
    return {"rms": RMSNorm, "layer": LayerNorm}[kind](name, make, eps)
