"""Norms, computed in promote(dtype, fp32). Shapes: [..., D]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.model import ModelConfig
from megarecur.model.saved import mark
from megarecur.parallel.linear import MakeParameter
from megarecur.parallel.regions import ALONE, TensorParallel


class _RMSNorm(torch.autograd.Function):
    """The norm y = g x / sqrt(mean(x^2) + eps), with the mean over all ranks' parts of a row.

    Saves x and one number per row for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, tp: TensorParallel) -> Tensor:
        out, scale = _rms_norm(x, gain, eps, tp)
        ctx.tp, ctx.length = tp, x.shape[-1] * tp.size
        ctx.save_for_backward(x, gain, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gain, scale = ctx.saved_tensors
        dy, normed = grads[0].to(scale.dtype), x.to(scale.dtype) * scale
        shares = dy * normed
        d_gain = shares.flatten(0, -2).sum(0)
        mean = ctx.tp.sum(shares @ gain.to(scale.dtype)).div_(ctx.length).unsqueeze(-1)
        dx = torch.mul(dy, gain, out=shares).addcmul_(normed, mean, value=-1.0).mul_(scale)
        return dx.to(x.dtype), d_gain.to(gain.dtype), None, None


def _rms_norm(x: Tensor, gain: Tensor, eps: float, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return the norm of x and the scale of each row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # `vector_norm` reads a row once; a mean of squares would write the squares to memory.
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    # A part that several ranks hold counts as often in the sum as in the length.
    scale = tp.sum(square).div_(x.shape[-1] * tp.size).add_(eps).rsqrt_()
    return (wide * scale).mul_(gain).to(x.dtype), scale


def _rms_norm_again(x: Tensor, gain: Tensor, eps: float, tp: TensorParallel) -> Tensor:
    return _rms_norm(x, gain, eps, tp)[0]


class RMSNorm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019, eq. 4) with eps inside the root."""

    def __init__(
        self, name: str, make: MakeParameter, eps: float, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.tp = make(name + ".weight"), eps, tp

    def forward(self, x: Tensor) -> Tensor:
        """Normalize rows: [..., D] to [..., D]."""
        if not torch.compiler.is_compiling():
            if torch.is_inference_mode_enabled() and self.tp.size == 1:
                if x.dtype == self.weight.dtype:
                    return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)
                wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
                return F.rms_norm(wide, x.shape[-1:], self.weight, self.eps).to(x.dtype)
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.tp)  # type: ignore[no-untyped-call]
            return mark(normed, _rms_norm_again, x, self.weight, self.eps, self.tp)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square()
        if self.tp.size == 1:
            mean = square.mean(-1, keepdim=True)
        else:
            mean = self.tp.total(square.sum(-1, keepdim=True)) / (x.shape[-1] * self.tp.size)
        scale = (mean + self.eps).rsqrt()
        return (wide * scale * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) with gain and bias."""

    def __init__(self, name: str, make: MakeParameter, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = make(name + ".weight"), make(name + ".bias"), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize rows: [..., D] to [..., D]."""
        normed = _layer_norm(x, self.weight, self.bias, self.eps)
        if torch.compiler.is_compiling():
            return normed
        return mark(normed, _layer_norm, x, self.weight, self.bias, self.eps)


def _layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.to(gain.dtype), x.shape[-1:], gain, bias, eps).to(x.dtype)


class HeadsNorm(RMSNorm):
    """RMS norm over all heads of a query or key together; this rank holds some of the heads."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize heads: [B, S, N, H] to [B, S, N, H], for the N heads of this rank."""
        return super().forward(x.flatten(2)).view_as(x)


def build_head_norm(
    model: ModelConfig, name: str, make: MakeParameter, tp: TensorParallel
) -> nn.Module:
    """Return the norm of queries or keys that `model.qk_norm_over` selects."""
    if model.qk_norm_over == "all":
        return HeadsNorm(name, make, model.norm_eps, tp)
    return build_norm("rms", name, make, model.norm_eps)


def build_norm(kind: str, name: str, make: MakeParameter, eps: float) -> nn.Module:
    """Return the norm of a kind of `model.norm`: "rms" or "layer"."""
    return RMSNorm(name, make, eps) if kind == "rms" else LayerNorm(name, make, eps)
