"""Attention by torch's fused kernels, on CUDA without its MATH kernel: that one keeps the scores of
all pairs, and takes several times as long.

Shapes: B samples, S queries, K keys, N query heads, M key heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megarecur.errors import ConfigError

KERNELS = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
]  # fmt: skip


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Return the mixed values [B, N, S, H].

    Args:
        q: queries [B, N, S, H].
        k: keys [B, M, K, H].
        v: values [B, M, K, H].
        mask: added to scores; broadcasts to [B, N, S, K].
        is_causal: if True and there is no mask, a query sees keys up to its own position.
        scale: factor of scores.

    Raises:
        ConfigError: on CUDA, no fused kernel supports these tensors.
    """
    if not needs_kernel(q):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    try:
        with sdpa_kernel(KERNELS):
            return attend_on_cuda(q, k, v, mask, is_causal, scale)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        masked = "" if mask is None else " and a mask"
        raise ConfigError(
            f"train.attention: no fused kernel of torch supports {q.dtype} with {q.shape[1]} query "
            f"heads and {k.shape[1]} key heads of {q.shape[3]}{masked} on this GPU; set "
            "train.attention to dense to allow the slow MATH kernel, or, for training alone, to "
            "flex or segments"
        ) from error


def needs_kernel(q: Tensor) -> bool:
    """Return True on a device where torch falls back to its MATH kernel without a word."""
    return q.device.type == "cuda"


def attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Return the mixed values [B, N, S, H]; see `attend_fused`.

    The flash kernel reads a key head for several query heads, but takes neither a mask nor fp32.
    The kernel that takes both reads a key head for each query head.
    """
    (batch, heads, queries, width), shared = q.shape, k.shape[1]
    grouped = heads != shared
    if grouped and (mask is not None or q.dtype not in (torch.bfloat16, torch.float16)):
        if queries == 1 and not is_causal:
            # The query heads of a key head see the same keys, so they serve as its queries.
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(len(mask), shared, -1, mask.shape[-1])
            q = q.reshape(batch, shared, -1, width)
        else:
            k, v = (t.repeat_interleave(heads // shared, dim=1) for t in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.reshape(batch, heads, queries, width)
