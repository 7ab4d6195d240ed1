"""Cross-entropy with z-loss as sums over tokens. Shapes: N tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that does not count."""


class _CrossEntropy(torch.autograd.Function):
    """Sums of -log p(label) and of logsumexp^2 over the counted tokens.

    Keeps the logits only; backward turns them into their own gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        logsumexp_N = torch.logsumexp(logits_NV.to(wide), dim=-1)
        counted_N = labels_N != IGNORED
        index_N1 = labels_N.clamp(min=0).unsqueeze(-1)
        picked_N = logits_NV.gather(-1, index_N1).squeeze(-1).to(wide)
        ctx.save_for_backward(logits_NV, logsumexp_N, counted_N, index_N1)
        zero = logsumexp_N.new_zeros(())
        loss = torch.where(counted_N, logsumexp_N - picked_N, zero).sum()
        return loss, torch.where(counted_N, logsumexp_N.square(), zero).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NV, logsumexp_N, counted_N, index_N1 = ctx.saved_tensors
        d_loss, d_square = grads
        wide = logsumexp_N.dtype
        # The logits are not read again: their memory becomes their gradient.
        same = logits_NV.dtype == wide
        p_NV = logits_NV if same else logits_NV.to(wide)
        p_NV.sub_(logsumexp_N.unsqueeze(-1)).exp_()
        scale_N = torch.where(counted_N, d_loss + 2.0 * d_square * logsumexp_N, 0.0)
        p_NV.mul_(scale_N.unsqueeze(-1))
        d_label_N1 = torch.where(counted_N, -d_loss, 0.0).to(wide).unsqueeze(-1)
        p_NV.scatter_add_(-1, index_N1, d_label_N1)
        return p_NV.to(logits_NV.dtype), None


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropy, sum of logsumexp^2) over tokens whose label is not IGNORED.

    Consumes the logits: after backward their memory holds their gradient.
    """
    return _CrossEntropy.apply(logits_NV, labels_N)
