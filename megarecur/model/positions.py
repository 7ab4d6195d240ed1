"""Position schemes. Shapes: B samples, S positions, N heads, H head_dim, D hidden."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.config.rope import DynamicRope, Llama3Rope, RopeScaling, YarnRope
from megarecur.model.saved import is_marked, mark


def rotation(
    positions_BS: Tensor,
    model: ModelConfig,
    dtype: torch.dtype,
    local: bool = False,
    lengths_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, S, 1, dims/2] of rotary embeddings (Su et al. 2021, eq. 34).

    Args:
        positions_BS: position of every token, restarting with each document.
        model: base, number of dims that rotate, and scaling of frequencies.
        local: use the base of blocks with a sliding window, which is not scaled.
        lengths_BS: length so far of every token's document, for dynamic scaling; None: counted from
            the positions.
    """
    dims, theta, scaling = model.rotary_dims, model.rope_theta, model.rope_scaling
    factor = model.rope_scaling_factor
    if local:
        assert model.rope_theta_local is not None
        theta, factor, scaling = model.rope_theta_local, 1.0, None
    exponent = torch.arange(0, dims, 2, device=positions_BS.device).to(dtype) / dims
    positions = positions_BS[..., None, None].to(dtype)
    if isinstance(scaling, DynamicRope):
        if lengths_BS is None:
            lengths_BS = document_lengths(positions_BS)
        lengths = lengths_BS[..., None, None].to(dtype)
        base = grow_base(theta, lengths, scaling, dims)
        angle = positions * base ** (-exponent)
        return angle.cos(), angle.sin()
    frequencies, gain = scale_frequencies(theta ** (-exponent) / factor, theta, scaling)
    angle = positions * frequencies
    return angle.cos() * gain, angle.sin() * gain


def document_lengths(positions_BS: Tensor) -> Tensor:
    """Return the length so far of every token's document, [B, S]; position 0 begins a document."""
    numbers_BS = (positions_BS == 0).cumsum(1)
    lengths = positions_BS.new_zeros(len(positions_BS), 1 + positions_BS.shape[1])
    lengths = lengths.scatter_reduce(1, numbers_BS, positions_BS + 1, "amax")
    return lengths.gather(1, numbers_BS)


def grow_base(theta: float, lengths: Tensor, scaling: DynamicRope, dims: int) -> Tensor:
    """Return the base for texts of these lengths (dynamic NTK scaling as in transformers)."""
    original, factor = scaling.original_positions, scaling.factor
    stretch = factor * lengths.clamp(min=original) / original - (factor - 1.0)
    return theta * stretch ** (dims / (dims - 2))


def scale_frequencies(
    frequencies: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, float]:
    """Return scaled frequencies [dims/2] and the factor of cos and sin."""
    if isinstance(scaling, Llama3Rope):
        # `turns` counts rotations over the original context; frequencies in between are mixed.
        turns = frequencies * (scaling.original_positions / (2 * math.pi))
        span = scaling.high_freq_factor - scaling.low_freq_factor
        share = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
        return frequencies * (share + (1.0 - share) / scaling.factor), 1.0
    if isinstance(scaling, YarnRope):
        dims = 2 * len(frequencies)

        def find_dim(turns: float) -> float:
            """Return the dim that makes this number of turns over the original context."""
            wavelength = scaling.original_positions / (2 * math.pi * turns)
            return dims * math.log(wavelength) / (2 * math.log(theta))

        low, high = find_dim(scaling.beta_fast), find_dim(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        place = torch.arange(dims // 2, device=frequencies.device).to(frequencies.dtype)
        slow = ((place - low) / (high - low)).clamp(0.0, 1.0)
        gain = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
        return frequencies * (slow / scaling.factor + (1.0 - slow)), gain
    return frequencies, 1.0


def decay(positions_BS: Tensor, dims: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return the xPos scale [B, S, 1, dims/2], which multiplies rotated queries and divides rotated
    keys (Sun et al. 2023, section 3.2, with gamma 0.4)."""
    first = torch.arange(0, dims, 2, device=positions_BS.device).to(dtype)
    return ((first + 0.4 * dims) / (1.4 * dims)) ** (positions_BS[..., None, None].to(dtype) / base)


class _Rotate(torch.autograd.Function):
    """Rotation of pairs, optionally scaled. Its gradient is the rotation by the opposite angle, so
    only angles are saved for backward."""

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
    """Rotate queries or keys; pairs are (i, i + dims/2), or (2i, 2i + 1) if interleaved.

    If there are angles for fewer dims than a head has, only the first dims rotate.
    """
    rotated = _rotate_dims(x_BSNH, angles, interleaved)
    # Without a norm before it, x is not kept, so the rotated heads are.
    if torch.compiler.is_compiling() or not is_marked(x_BSNH):
        return rotated
    return mark(rotated, _rotate_dims, x_BSNH, angles, interleaved)


def _rotate_dims(x_BSNH: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the first dims of each head, for which there are angles."""
    dims = 2 * angles[0].shape[-1]
    if dims < x_BSNH.shape[-1]:
        first = _rotate_dims(x_BSNH[..., :dims], angles, interleaved)
        return torch.cat((first, x_BSNH[..., dims:]), -1)
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled():
            return _rotate(x_BSNH, *angles, interleaved)
        rotated: Tensor = _Rotate.apply(x_BSNH, *angles, interleaved)  # type: ignore[no-untyped-call]
        return rotated
    # Elementwise alone: a compiler keeps what comes out of `cat` or `unbind` for backward.
    dim, pairs, first = -2, (2, -1), (torch.arange(2, device=x_BSNH.device) == 0)[:, None]
    if interleaved:
        dim, pairs, first = -1, (-1, 2), first[:, 0]
    x = x_BSNH.unflatten(-1, pairs)
    a, b, cos, sin = (t.unsqueeze(dim) for t in (x.select(dim, 0), x.select(dim, 1), *angles))
    rotated = a * torch.where(first, cos, sin) + b * torch.where(first, -sin, cos)
    return rotated.flatten(-2).to(x_BSNH.dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return ALiBi slopes 2^(-8k/N) (Press et al. 2022). Head counts that are not a power of two
    follow MPT."""
    count = 2 ** math.ceil(math.log2(num_heads))
    slopes: Tensor = 2.0 ** (-8.0 / count * torch.arange(1, count + 1))
    if count != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes


def alibi_bias(slopes_N: Tensor, queries_S: Tensor, keys_K: Tensor) -> Tensor:
    """Return the bias of attention scores [1, N, S, K]: -slope times the distance."""
    distance = (queries_S[:, None] - keys_K[None, :]).abs().to(torch.float32)
    return -slopes_N.to(distance.device)[None, :, None, None] * distance


SinusoidLayout = Literal["split", "interleaved"]


def sinusoidal(
    positions_BS: Tensor, hidden_size: int, dtype: torch.dtype, layout: SinusoidLayout = "split"
) -> Tensor:
    """Return the fixed embedding [B, S, D] of Vaswani et al. 2017; layout: see
    `model.sinusoid_layout`."""
    half = (hidden_size + 1) // 2
    last = max(half - 1, 1) if layout == "split" else hidden_size / 2
    exponent = torch.arange(half, device=positions_BS.device).to(dtype) / last
    angle = positions_BS[..., None].to(dtype) * 10000.0 ** (-exponent)
    waves = angle.sin(), angle.cos()
    both = torch.cat(waves, -1) if layout == "split" else torch.stack(waves, -1).flatten(-2)
    return both[..., :hidden_size]


def sinusoidal_2d(
    grid_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the fixed embedding [N, D] of a square of patches, row after row: sines and cosines of
    the column, then of the row (Beyer et al. 2022, as in big_vision)."""
    quarter = hidden_size // 4
    exponent = torch.arange(quarter, device=device).to(dtype) / (quarter - 1)
    places = torch.arange(grid_size, device=device).to(dtype)
    angle = places[:, None] * 10000.0 ** (-exponent)
    waves = torch.cat((angle.sin(), angle.cos()), -1)
    rows, columns = waves[:, None], waves[None]
    return torch.cat(torch.broadcast_tensors(columns, rows), -1).flatten(0, 1)
