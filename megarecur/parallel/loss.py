"""Cross-entropy with z-loss as sums over tokens. Shapes: N tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that does not count."""


class _CrossEntropy(torch.autograd.Function):
    """Sums of -log p(label) and of logsumexp^2 over the counted tokens.

    Keeps the logits only; backward turns them into their own gradient in place. Both go by slices
    of tokens, so that temporaries stay small (and on CPUs in the cache).
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        logsumexp_N = logits_NV.new_empty(len(labels_N), dtype=wide)
        for part in slices(logits_NV):
            torch.logsumexp(logits_NV[part].to(wide), dim=-1, out=logsumexp_N[part])
        counted_N = labels_N != IGNORED
        index_N1 = labels_N.clamp(min=0).unsqueeze(-1)
        picked_N = logits_NV.gather(-1, index_N1).squeeze(-1).to(wide)
        ctx.save_for_backward(logits_NV, logsumexp_N, counted_N, index_N1)
        zero = logsumexp_N.new_zeros(())
        losses_N = torch.where(counted_N, logsumexp_N - picked_N, zero)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), torch.where(counted_N, logsumexp_N.square(), zero).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NV, logsumexp_N, counted_N, index_N1 = ctx.saved_tensors
        d_loss, d_square, _ = grads
        scale_N1 = torch.where(counted_N, d_loss + 2.0 * d_square * logsumexp_N, 0.0).unsqueeze(-1)
        d_label_N1 = torch.where(counted_N, -d_loss, 0.0).to(logsumexp_N.dtype).unsqueeze(-1)
        for part in slices(logits_NV):
            # The logits are not read again: their memory becomes their gradient.
            logits = logits_NV[part]
            d_logits = logits if logits.dtype == logsumexp_N.dtype else logits.to(logsumexp_N.dtype)
            d_logits.sub_(logsumexp_N[part, None]).exp_().mul_(scale_N1[part])
            d_logits.scatter_add_(-1, index_N1[part], d_label_N1[part])
            if d_logits is not logits:
                logits.copy_(d_logits)
        return logits_NV, None


def slices(logits_NV: Tensor) -> list[slice]:
    """Tokens in pieces: of about a megabyte on a CPU, whole batches' worth of work on a GPU."""
    elements = 1 << 18 if logits_NV.device.type == "cpu" else 1 << 26
    length = max(1, elements // logits_NV.shape[-1])
    return [slice(i, i + length) for i in range(0, logits_NV.shape[0], length)]


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of cross-entropy, sum of logsumexp^2) over tokens whose label is not IGNORED, and the
    cross-entropy of each token [N], 0 where ignored, which has no gradient.

    Consumes the logits: after backward their memory holds their gradient.
    """
    return _CrossEntropy.apply(logits_NV, labels_N)
