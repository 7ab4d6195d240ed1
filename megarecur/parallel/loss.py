"""Cross-entropy with label smoothing and z-loss, and distillation, as sums over tokens.

Shapes: N tokens; V vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.plan.cost import LOGIT_SLICE

IGNORED = -100
"""Label of tokens excluded from the loss."""


class LossTerm(NamedTuple):
    """A term of the objective: weight x total / (global count of the named denominator)."""

    total: Tensor
    denominator: str
    weight: float = 1.0
    per_token: Tensor | None = None
    """Contribution of each token to the total, [B S], without gradient."""


class LossKernels(NamedTuple):
    """The two passes over the logits."""

    summarize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Maps (logits [N, V], index [N, 1]) to logsumexp and the logit at the index, both [N] in the
    wide dtype."""
    differentiate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """Given (logits, logsumexp [N], index [N, 1], scale [N, 1], d_index [N, 1]), overwrites the
    logits by softmax times scale, plus d_index at the index."""


class Reading(NamedTuple):
    """Results of reading logits, which their gradient needs; [N] each."""

    losses_N: Tensor
    """Cross-entropy with the label, 0 at ignored tokens."""
    smoothed_N: Tensor
    """Cross-entropy with the smoothed label, 0 at ignored tokens; `losses_N` without smoothing."""
    squares_N: Tensor
    """logsumexp^2, 0 at ignored tokens."""
    divergences_N: Tensor
    """KL(teacher || student), 0 at ignored tokens and without a teacher."""
    logsumexp_N: Tensor
    softened_N: Tensor
    """logsumexp at the temperature of distillation."""
    taught_N: Tensor
    """logsumexp of the teacher's logits at that temperature."""
    counted_N: Tensor
    own_N: Tensor
    """Whether the label is in this rank's shard of the vocabulary."""
    index_N: Tensor
    """The label's column in it, or 0."""


class Shares(NamedTuple):
    """Options of reading logits: kernels, the ranks that share the vocabulary, distillation, label
    smoothing."""

    kernels: LossKernels
    tp: TensorParallel = ALONE
    first: int = 0
    """The first id of this rank's shard of the vocabulary."""
    temperature: float = 1.0
    smoothing: float = 0.0
    """Share of the label's probability that is spread over the whole vocabulary."""
    vocab_size: int = 0
    """Size of the whole vocabulary; required with `smoothing`."""


def read_logits(
    logits_NV: Tensor, labels_N: Tensor, shares: Shares, teacher_NV: Tensor | None = None
) -> Reading:
    """Return what the losses of some tokens and their gradient need of the logits."""
    tp, first, temperature = shares.tp, shares.first, shares.temperature
    counted_N = labels_N != IGNORED
    own_N = (labels_N >= first) & (labels_N < first + logits_NV.shape[-1])
    index_N = torch.where(own_N, labels_N - first, 0)
    logsumexp_N, picked_N = shares.kernels.summarize(logits_NV, index_N[:, None])
    sums_RN = torch.where(own_N, picked_N, 0.0)[None]
    if shares.smoothing > 0.0:
        sums_RN = torch.stack((sums_RN[0], _sum_logits(logits_NV, logsumexp_N.dtype)))
    if tp.size > 1:
        logsumexp_N, sums_RN = _join(logsumexp_N, sums_RN, tp)
    zero = logsumexp_N.new_zeros(())
    softened_N = taught_N = logsumexp_N
    divergences_N = zero.expand(len(logsumexp_N))
    if teacher_NV is not None:
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
        divergences_N = torch.where(counted_N, divergence_N, zero)
    losses_N = smoothed_N = torch.where(counted_N, logsumexp_N - sums_RN[0], zero)
    if shares.smoothing > 0.0:
        uniform_N = logsumexp_N - sums_RN[1] / shares.vocab_size
        smoothed_N = (1.0 - shares.smoothing) * losses_N
        smoothed_N += torch.where(counted_N, shares.smoothing * uniform_N, zero)
    squares_N = torch.where(counted_N, logsumexp_N.square(), zero)
    return Reading(
        losses_N, smoothed_N, squares_N, divergences_N, logsumexp_N, softened_N, taught_N,
        counted_N, own_N, index_N,
    )  # fmt: skip


def overwrite_logits(
    logits_NV: Tensor,
    reading: Reading,
    shares: Shares,
    gradients: tuple[Tensor, Tensor, Tensor],
    teacher_NV: Tensor | None = None,
) -> None:
    """Overwrite logits by their gradient, given those of the three sums that `add_up` returns."""
    d_loss, d_square, d_divergence = gradients
    logsumexp_N, counted_N, own_N = reading.logsumexp_N, reading.counted_N, reading.own_N
    index_N1 = reading.index_N[:, None]
    wide, temperature, smoothing = logsumexp_N.dtype, shares.temperature, shares.smoothing
    scale_N1 = torch.where(counted_N, d_loss + 2.0 * d_square * logsumexp_N, 0.0).unsqueeze(-1)
    d_label_N1 = torch.where(counted_N & own_N, (smoothing - 1.0) * d_loss, 0.0)
    d_label_N1 = d_label_N1.to(wide).unsqueeze(-1)
    if teacher_NV is None and smoothing == 0.0:
        shares.kernels.differentiate(logits_NV, logsumexp_N, index_N1, scale_N1, d_label_N1)
        return
    pull_N1 = torch.where(counted_N, temperature * d_divergence, 0.0).to(wide).unsqueeze(-1)
    for part in slices(logits_NV):
        student = logits_NV[part].to(wide)
        d_logits = (student - logsumexp_N[part, None]).exp_().mul_(scale_N1[part])
        d_logits.scatter_add_(-1, index_N1[part], d_label_N1[part])
        if smoothing > 0.0:
            d_each = torch.where(counted_N[part], d_loss * (smoothing / shares.vocab_size), 0.0)
            d_logits.sub_(d_each[:, None])
        if teacher_NV is not None:
            p = (teacher_NV[part].to(wide) / temperature - reading.taught_N[part, None]).exp_()
            q = (student / temperature - reading.softened_N[part, None]).exp_()
            d_logits.add_(q.sub_(p).mul_(pull_N1[part]))
        logits_NV[part] = d_logits


def add_up(reading: Reading, shares: Shares) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of cross-entropy with the smoothed label, of logsumexp^2, and of the
    divergence times T^2."""
    divergence = shares.temperature**2 * reading.divergences_N.sum()
    return reading.smoothed_N.sum(), reading.squares_N.sum(), divergence


class _Loss(torch.autograd.Function):
    """Compute the sums of `add_up` from whole logits.

    Keeps only the logits; backward overwrites them by their gradient. The teacher's logits are only
    read and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, shares: Shares, teacher_NV: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        reading = read_logits(logits_NV, labels_N, shares, teacher_NV)
        ctx.save_for_backward(logits_NV, teacher_NV, *reading)
        ctx.shares = shares
        ctx.mark_non_differentiable(reading.losses_N)
        return *add_up(reading, shares), reading.losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, teacher_NV, *reading = ctx.saved_tensors
        # The logits are not read again, so their memory is reused for their gradient.
        overwrite_logits(logits_NV, Reading(*reading), ctx.shares, grads[:3], teacher_NV)  # type: ignore[arg-type]
        return logits_NV, None, None, None


def _join(logsumexp_N: Tensor, sums_RN: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """Return logsumexp over all shards of the vocabulary and the totals of each shard's sums, by
    two small reductions of a size independent of the vocabulary."""
    largest_N = tp.max(logsumexp_N.clone())
    both_N = tp.sum(torch.cat(((logsumexp_N - largest_N).exp()[None], sums_RN)))
    return largest_N + both_N[0].log(), both_N[1:]


def _sum_logits(logits_NV: Tensor, wide: torch.dtype) -> Tensor:
    """Return the sum [N] of each token's logits in the wide dtype."""
    sums_N = logits_NV.new_empty(len(logits_NV), dtype=wide)
    for part in slices(logits_NV):
        torch.sum(logits_NV[part], -1, dtype=wide, out=sums_N[part])
    return sums_N


def _soften(logits_NV: Tensor, temperature: float, wide: torch.dtype, tp: TensorParallel) -> Tensor:
    """Return logsumexp(logits / temperature) [N] over all shards of the vocabulary."""
    logsumexp_N = logits_NV.new_empty(len(logits_NV), dtype=wide)
    for part in slices(logits_NV):
        logsumexp_N[part] = (logits_NV[part].to(wide) / temperature).logsumexp(-1)
    return (
        _join(logsumexp_N, logsumexp_N.new_empty(0, len(logsumexp_N)), tp)[0]
        if tp.size > 1
        else logsumexp_N
    )


def summarize(logits_NV: Tensor, index_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `LossKernels.summarize` by slices of tokens, so that temporaries fit a CPU's
    cache."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logsumexp_N = logits_NV.new_empty(len(logits_NV), dtype=wide)
    for part in slices(logits_NV):
        torch.logsumexp(logits_NV[part].to(wide), dim=-1, out=logsumexp_N[part])
    return logsumexp_N, logits_NV.gather(-1, index_N1).squeeze(-1).to(wide)


def differentiate(
    logits_NV: Tensor, logsumexp_N: Tensor, index_N1: Tensor, scale_N1: Tensor, d_index_N1: Tensor
) -> None:
    """Compute `LossKernels.differentiate` by slices of tokens."""
    for part in slices(logits_NV):
        logits = logits_NV[part]
        d_logits = logits if logits.dtype == logsumexp_N.dtype else logits.to(logsumexp_N.dtype)
        d_logits.sub_(logsumexp_N[part, None]).exp_().mul_(scale_N1[part])
        d_logits.scatter_add_(-1, index_N1[part], d_index_N1[part])
        if d_logits is not logits:
            logits.copy_(d_logits)


def summarize_fused(logits_NV: Tensor, index_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `LossKernels.summarize` as a formula, for a compiler."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return wide_NV.logsumexp(-1), wide_NV.gather(-1, index_N1).squeeze(-1)


def differentiate_fused(
    logits_NV: Tensor, logsumexp_N: Tensor, index_N1: Tensor, scale_N1: Tensor, d_index_N1: Tensor
) -> None:
    """Compute `LossKernels.differentiate` as a formula, for a compiler."""
    softmax_NV = (logits_NV.to(logsumexp_N.dtype) - logsumexp_N.unsqueeze(-1)).exp()
    columns_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
    d_logits_NV = softmax_NV * scale_N1 + torch.where(columns_V == index_N1, d_index_N1, 0.0)
    logits_NV.copy_(d_logits_NV)


EAGER = LossKernels(summarize, differentiate)


def slices(logits_NV: Tensor) -> list[slice]:
    """Split the tokens into slices: about a megabyte on a CPU, much larger on a GPU."""
    elements = 1 << 18 if logits_NV.device.type == "cpu" else LOGIT_SLICE
    length = max(1, elements // logits_NV.shape[-1])
    return [slice(i, i + length) for i in range(0, logits_NV.shape[0], length)]


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    kernels: LossKernels = EAGER,
    tp: TensorParallel = ALONE,
    first: int = 0,
    smoothing: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of cross-entropy, sum of logsumexp^2) over tokens whose label is not IGNORED, and
    the cross-entropy of each token [N], 0 if ignored, which has no gradient.

    With `smoothing` e, the first sum is that of the cross-entropy with the smoothed label, whose
    distribution is (1 - e) at the label plus e / V everywhere (Szegedy et al. 2016; torch's
    `cross_entropy(label_smoothing=e)`). Each token's cross-entropy stays that with the label.
    `vocab_size` is V; default: the columns of the logits.

    Consumes the logits: after backward their memory holds their gradient. With tensor parallelism
    the logits are this rank's shard of the vocabulary, [N, V / size] from id `first` on; results
    are equal on all ranks (Shoeybi et al. 2019, section 3).
    """
    total, square, _, losses_N = _Loss.apply(  # type: ignore[no-untyped-call]
        logits_NV,
        labels_N,
        Shares(
            kernels, tp, first, smoothing=smoothing, vocab_size=vocab_size or logits_NV.shape[-1]
        ),
        None,
    )
    return total, square, losses_N


def distillation(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor,
    temperature: float = 1.0,
    tp: TensorParallel = ALONE,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `cross_entropy`, with the sum over the same tokens of the forward KL
    divergence in third place: KL(softmax(teacher / T) || softmax(student / T)) T^2 (Hinton et
    al. 2015).

    Consumes the student's logits. Reads the teacher's logits in both passes without giving them a
    gradient. Both are this rank's shard of the vocabulary.
    """
    sums: tuple[Tensor, Tensor, Tensor, Tensor] = _Loss.apply(  # type: ignore[no-untyped-call]
        logits_NV, labels_N, Shares(EAGER, tp, first, temperature), teacher_NV
    )
    return sums
