"""Cross-entropy with z-loss, and distillation, as sums over tokens. Shapes: N tokens, V vocabulary,
or this rank's shard of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.parallel.regions import ALONE, TensorParallel

IGNORED = -100
"""Label of a token that does not count."""


class LossKernels(NamedTuple):
    """The two passes over the logits."""

    summarize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(logits [N, V], index [N, 1]) to logsumexp and the logit of the index, both [N] and wide."""
    differentiate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """(logits, logsumexp [N], index [N, 1], scale [N, 1], d_index [N, 1]): the logits become
    softmax times scale, plus d_index at the index."""


class _CrossEntropy(torch.autograd.Function):
    """Sums of -log p(label) and of logsumexp^2 over the counted tokens.

    Keeps the logits only; backward turns them into their own gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        kernels: LossKernels,
        tp: TensorParallel,
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        counted_N = labels_N != IGNORED
        own_N = (labels_N >= first) & (labels_N < first + logits_NV.shape[-1])
        index_N1 = torch.where(own_N, labels_N - first, 0).unsqueeze(-1)
        logsumexp_N, picked_N = kernels.summarize(logits_NV, index_N1)
        if tp.size > 1:
            logsumexp_N, picked_N = _join(logsumexp_N, torch.where(own_N, picked_N, 0.0), tp)
        ctx.save_for_backward(logits_NV, logsumexp_N, counted_N, own_N, index_N1)
        ctx.kernels = kernels
        zero = logsumexp_N.new_zeros(())
        losses_N = torch.where(counted_N, logsumexp_N - picked_N, zero)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), torch.where(counted_N, logsumexp_N.square(), zero).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, logsumexp_N, counted_N, own_N, index_N1 = ctx.saved_tensors
        d_loss, d_square, _ = grads
        scale_N1 = torch.where(counted_N, d_loss + 2.0 * d_square * logsumexp_N, 0.0).unsqueeze(-1)
        d_label_N = torch.where(counted_N & own_N, -d_loss, 0.0).to(logsumexp_N.dtype)
        # The logits are not read again: their memory becomes their gradient.
        ctx.kernels.differentiate(logits_NV, logsumexp_N, index_N1, scale_N1, d_label_N[:, None])
        return logits_NV, None, None, None, None


def _join(logsumexp_N: Tensor, picked_N: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """logsumexp over all shards of the vocabulary, and the label's logit from the one that has it:
    two small reductions, whatever the size of the vocabulary."""
    largest_N = tp.max(logsumexp_N.clone())
    both_2N = tp.sum(torch.stack(((logsumexp_N - largest_N).exp(), picked_N)))
    return largest_N + both_2N[0].log(), both_2N[1]


class _Distillation(torch.autograd.Function):
    """The sums of `_CrossEntropy`, and that of KL(teacher || student) at a temperature.

    One function, as cross-entropy takes the student's logits for their gradient. The teacher's are
    only read: they have no gradient, whatever graph they come from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        teacher_NV: Tensor,
        temperature: float,
        tp: TensorParallel,
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counted_N = labels_N != IGNORED
        own_N = (labels_N >= first) & (labels_N < first + logits_NV.shape[-1])
        index_N1 = torch.where(own_N, labels_N - first, 0).unsqueeze(-1)
        logsumexp_N, picked_N = summarize(logits_NV, index_N1)
        if tp.size > 1:
            logsumexp_N, picked_N = _join(logsumexp_N, torch.where(own_N, picked_N, 0.0), tp)
        softened_N = logsumexp_N
        if temperature != 1.0:
            softened_N = _soften(logits_NV, temperature, logsumexp_N.dtype, tp)
        taught_N = _soften(teacher_NV, temperature, logsumexp_N.dtype, tp)
        # KL = sum_v p_v (t_v - s_v) / T - logsumexp(t / T) + logsumexp(s / T), p the teacher's.
        crossed_N = torch.empty_like(logsumexp_N)
        for part in slices(logits_NV):
            teacher = teacher_NV[part].to(logsumexp_N.dtype) / temperature
            student = logits_NV[part].to(logsumexp_N.dtype) / temperature
            p = (teacher - taught_N[part, None]).exp_()
            crossed_N[part] = (p * (teacher - student)).sum(-1)
        divergence_N = tp.sum(crossed_N) - taught_N + softened_N
        ctx.save_for_backward(
            logits_NV, teacher_NV, logsumexp_N, softened_N, taught_N, counted_N, own_N, index_N1
        )
        ctx.temperature = temperature
        zero = logsumexp_N.new_zeros(())
        losses_N = torch.where(counted_N, logsumexp_N - picked_N, zero)
        ctx.mark_non_differentiable(losses_N)
        square = torch.where(counted_N, logsumexp_N.square(), zero).sum()
        divergence = temperature**2 * torch.where(counted_N, divergence_N, zero).sum()
        return losses_N.sum(), square, divergence, losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (logits_NV, teacher_NV, logsumexp_N, softened_N, taught_N, counted_N, own_N, index_N1) = (
            ctx.saved_tensors
        )
        d_loss, d_square, d_divergence, _ = grads
        wide, temperature = logsumexp_N.dtype, ctx.temperature
        scale_N1 = torch.where(counted_N, d_loss + 2.0 * d_square * logsumexp_N, 0.0).unsqueeze(-1)
        d_label_N1 = torch.where(counted_N & own_N, -d_loss, 0.0).to(wide).unsqueeze(-1)
        pull_N1 = torch.where(counted_N, temperature * d_divergence, 0.0).to(wide).unsqueeze(-1)
        for part in slices(logits_NV):
            student, teacher = logits_NV[part].to(wide), teacher_NV[part].to(wide)
            d_logits = (student - logsumexp_N[part, None]).exp_().mul_(scale_N1[part])
            d_logits.scatter_add_(-1, index_N1[part], d_label_N1[part])
            p = (teacher / temperature - taught_N[part, None]).exp_()
            q = (student / temperature - softened_N[part, None]).exp_()
            d_logits.add_(q.sub_(p).mul_(pull_N1[part]))
            logits_NV[part] = d_logits
        return logits_NV, None, None, None, None, None


def _soften(logits_NV: Tensor, temperature: float, wide: torch.dtype, tp: TensorParallel) -> Tensor:
    """logsumexp(logits / temperature) [N] over all shards of the vocabulary."""
    logsumexp_N = logits_NV.new_empty(len(logits_NV), dtype=wide)
    for part in slices(logits_NV):
        logsumexp_N[part] = (logits_NV[part].to(wide) / temperature).logsumexp(-1)
    return _join(logsumexp_N, torch.zeros_like(logsumexp_N), tp)[0] if tp.size > 1 else logsumexp_N


def summarize(logits_NV: Tensor, index_N1: Tensor) -> tuple[Tensor, Tensor]:
    """`LossKernels.summarize` by slices of tokens: temporaries stay small, on CPUs in the cache."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logsumexp_N = logits_NV.new_empty(len(logits_NV), dtype=wide)
    for part in slices(logits_NV):
        torch.logsumexp(logits_NV[part].to(wide), dim=-1, out=logsumexp_N[part])
    return logsumexp_N, logits_NV.gather(-1, index_N1).squeeze(-1).to(wide)


def differentiate(
    logits_NV: Tensor, logsumexp_N: Tensor, index_N1: Tensor, scale_N1: Tensor, d_index_N1: Tensor
) -> None:
    """`LossKernels.differentiate` by slices of tokens."""
    for part in slices(logits_NV):
        logits = logits_NV[part]
        d_logits = logits if logits.dtype == logsumexp_N.dtype else logits.to(logsumexp_N.dtype)
        d_logits.sub_(logsumexp_N[part, None]).exp_().mul_(scale_N1[part])
        d_logits.scatter_add_(-1, index_N1[part], d_index_N1[part])
        if d_logits is not logits:
            logits.copy_(d_logits)


def summarize_fused(logits_NV: Tensor, index_N1: Tensor) -> tuple[Tensor, Tensor]:
    """`LossKernels.summarize` as a formula, for a compiler."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return wide_NV.logsumexp(-1), wide_NV.gather(-1, index_N1).squeeze(-1)


def differentiate_fused(
    logits_NV: Tensor, logsumexp_N: Tensor, index_N1: Tensor, scale_N1: Tensor, d_index_N1: Tensor
) -> None:
    """`LossKernels.differentiate` as a formula, for a compiler."""
    softmax_NV = (logits_NV.to(logsumexp_N.dtype) - logsumexp_N.unsqueeze(-1)).exp()
    columns_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    d_logits_NV = softmax_NV * scale_N1 + torch.where(columns_V == index_N1, d_index_N1, 0.0)
    logits_NV.copy_(d_logits_NV)


EAGER = LossKernels(summarize, differentiate)


def slices(logits_NV: Tensor) -> list[slice]:
    """Tokens in pieces: of about a megabyte on a CPU, whole batches' worth of work on a GPU."""
    elements = 1 << 18 if logits_NV.device.type == "cpu" else 1 << 26
    length = max(1, elements // logits_NV.shape[-1])
    return [slice(i, i + length) for i in range(0, logits_NV.shape[0], length)]


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    kernels: LossKernels = EAGER,
    tp: TensorParallel = ALONE,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of cross-entropy, sum of logsumexp^2) over tokens whose label is not IGNORED, and the
    cross-entropy of each token [N], 0 where ignored, which has no gradient.

    Consumes the logits: after backward their memory holds their gradient. With tensor parallelism
    they are this rank's shard of the vocabulary, [N, V / size] from id `first` on; results are the
    same on all ranks (Shoeybi et al. 2019, section 3).
    """
    return _CrossEntropy.apply(logits_NV, labels_N, kernels, tp, first)


def distillation(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor,
    temperature: float = 1.0,
    tp: TensorParallel = ALONE,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cross_entropy`, with the sum over the same tokens of the forward KL divergence in third
    place: KL(softmax(teacher / T) || softmax(student / T)) T^2 (Hinton et al. 2015).

    Consumes the student's logits, reads the teacher's in both passes and gives them no gradient.
    Both are this rank's shard of the vocabulary.
    """
    return _Distillation.apply(logits_NV, labels_N, teacher_NV, temperature, tp, first)
