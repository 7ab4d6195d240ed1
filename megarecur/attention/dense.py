"""Attention with scores of all pairs: the oracle of the other backends, and generation.

Shapes: B samples, S queries, K keys, N query heads, M key heads, H head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarecur.attention.fused import attend_fused
from megarecur.attention.scores import Drop, Scores
from megarecur.parallel.random import dropout


def attend_dense(
    qkv: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    mask: Tensor | None,
    is_causal: bool,
    drop: Drop | None,
    allows_math: bool = False,
) -> Tensor:
    """Return the mixed values [B, S, N, H].

    Args:
        qkv: queries [B, S, N, H], keys and values [B, K, M, H].
        scores: how scores are computed. Slopes are part of the mask.
        mask: added to scores; broadcasts to [B, N, S, K].
        is_causal: if True and there is no mask, a query sees keys up to its own position.
        drop: dropout of attention weights, if any.
        allows_math: let torch use its slow MATH kernel on CUDA.

    Raises:
        ConfigError: on CUDA, no fused kernel supports these tensors, and `allows_math` is False.
    """
    q, k, v = (t.transpose(1, 2) for t in qkv)
    groups = q.shape[1] // k.shape[1]
    mask = None if mask is None else mask.to(q.dtype)
    if drop is None and scores.softcap is None:
        if not allows_math:
            return attend_fused(q, k, v, mask, is_causal, scores.scale).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scores.scale, enable_gqa=groups > 1
        )
        return out.transpose(1, 2)
    # The fused kernel supports neither a softcap nor dropout as a function of coordinates.
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    products = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    products = products * scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    if mask is not None:
        products = products + mask
    elif is_causal:
        length = products.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=products.device).triu(1)
        products = products.masked_fill(future, float("-inf"))
    weights = products.softmax(-1)
    if drop is not None:
        heads = torch.arange(weights.shape[1], device=weights.device)[None, :, None]
        places = (
            drop.samples_B1[:, :, None],
            heads + drop.first_head,
            drop.positions_1S[:, None, :],
        )
        weights = dropout(weights, drop.rate, drop.key, places)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
