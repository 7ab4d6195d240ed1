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
        # One pass: the dot product of a row with itself, without a squared copy.
        square = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        scale = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        dy = grads[0].to(scale.dtype)
        normed = x.to(scale.dtype) * scale
        d_gain = torch.einsum("nd,nd->d", dy.reshape(-1, x.shape[-1]), normed.view(-1, x.shape[-1]))
        dy = dy * gain
        mean = torch.linalg.vecdot(dy, normed).unsqueeze(-1) / x.shape[-1]
        dx = dy.sub_(normed.mul_(mean)).mul_(scale)
        return dx.to(x.dtype), d_gain.to(gain.dtype), None


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, eq. 4, eps inside the root."""

    def __init__(self, name: str, make: MakeParameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = make(name + ".weight"), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return _RMSNorm.apply(x, self.weight, self.eps)


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
