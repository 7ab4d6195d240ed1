"""Position schemes. Shapes: B samples, S positions, N heads, H head_dim, D hidden."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rotation(
    positions_BS: Tensor, dims: int, theta: float, dtype: torch.dtype, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, dims/2] of rotary embeddings (Su et al. 2021, eq. 34), positions
    divided by a factor (Chen et al. 2023)."""
    exponent = torch.arange(0, dims, 2, device=positions_BS.device).to(dtype) / dims
    angle = positions_BS[..., None, None].to(dtype) * (theta ** (-exponent) / factor)
    return angle.cos(), angle.sin()


def decay(positions_BS: Tensor, dims: int, base: float, dtype: torch.dtype) -> Tensor:
    """What xPos multiplies rotated queries with, and divides rotated keys by: [B, S, 1, dims/2]
    (Sun et al. 2023, section 3.2, with gamma 0.4)."""
    first = torch.arange(0, dims, 2, device=positions_BS.device).to(dtype)
    return ((first + 0.4 * dims) / (1.4 * dims)) ** (positions_BS[..., None, None].to(dtype) / base)


class _Rotate(torch.autograd.Function):
    """Rotation of pairs, scaled or not; its gradient is the same by the other way round, so that
    nothing but angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin, ctx.interleaved), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    if interleaved:
        a, b, out_a, out_b = x[..., 0::2], x[..., 1::2], out[..., 0::2], out[..., 1::2]
    else:
        a, b, out_a, out_b = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    if x.dtype == cos.dtype:
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1.0)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    else:
        a, b = a.to(cos.dtype), b.to(cos.dtype)
        out_a.copy_((a * cos).addcmul_(b, sin, value=-1.0))
        out_b.copy_((b * cos).addcmul_(a, sin))
    return out


def rotate(x_BSNH: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate queries or keys; pairs are (i, i + H/2), or (2i, 2i + 1) where interleaved.

    Where there are angles for fewer dims than a head has, those are its first.
    """
    dims = 2 * angles[0].shape[-1]
    if dims < x_BSNH.shape[-1]:
        first = rotate(x_BSNH[..., :dims], angles, interleaved)
        return torch.cat((first, x_BSNH[..., dims:]), -1)
    if not torch.compiler.is_compiling():
        return _Rotate.apply(x_BSNH, *angles, interleaved)
    cos, sin = angles
    if interleaved:
        a, b = x_BSNH.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x_BSNH.dtype)
    a, b = x_BSNH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BSNH.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """2^(-8k/N) (Press et al. 2022); head counts that are no power of two as in MPT."""
    count = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / count * torch.arange(1, count + 1))
    if count != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def alibi_bias(slopes_N: Tensor, queries_S: Tensor, keys_K: Tensor) -> Tensor:
    """Score bias [1, N, S, K]: -slope times the distance."""
    distance = (queries_S[:, None] - keys_K[None, :]).abs().to(torch.float32)
    return -slopes_N.to(distance.device)[None, :, None, None] * distance


def sinusoidal(positions_BS: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Fixed embedding [B, S, D]: sines, then cosines (Vaswani et al. 2017, as tensor2tensor)."""
    half = (hidden_size + 1) // 2
    exponent = torch.arange(half, device=positions_BS.device).to(dtype) / max(half - 1, 1)
    angle = positions_BS[..., None].to(dtype) * 10000.0 ** (-exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :hidden_size]
