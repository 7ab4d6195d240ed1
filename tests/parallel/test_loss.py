"""Cross-entropy as sums over tokens, against torch in fp64. Shapes: N tokens, V vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarecur.parallel.loss import IGNORED, cross_entropy


def reference(
    logits_NV: Tensor, labels_N: Tensor, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sum of squares, gradient of loss + z_weight x squares) in fp64, by autograd."""
    wide = logits_NV.detach().double().requires_grad_()
    loss = F.cross_entropy(wide, labels_N, reduction="sum", ignore_index=IGNORED)
    square = wide.logsumexp(-1).square()[labels_N != IGNORED].sum()
    (loss + z_weight * square).backward()
    assert wide.grad is not None
    return loss.detach(), square.detach(), wide.grad


def make(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a confident model and labels, one in three ignored."""
    generator = torch.Generator().manual_seed(num_tokens + vocab_size)
    logits_NV = 4.0 * torch.randn(num_tokens, vocab_size, generator=generator)
    labels_N = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_N[torch.rand(num_tokens, generator=generator) < 0.3] = IGNORED
    labels_N[0] = vocab_size - 1
    return logits_NV.to(dtype).requires_grad_(), labels_N


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("dtype, forward_tol, gradient_tol", [
    (torch.float64, 1e-13, 1e-13),
    (torch.float32, 1e-6, 1e-6),
    # The logits are given in bf16, so the sums are exact to fp32; the gradient is rounded once.
    (torch.bfloat16, 1e-6, 2.0**-8),
])  # fmt: skip
@pytest.mark.parametrize("num_tokens, vocab_size", [(1, 2), (37, 11), (300, 129), (70, 5000)])
def test_against_torch_in_fp64(
    num_tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    forward_tol: float,
    gradient_tol: float,
    z_weight: float,
) -> None:
    logits_NV, labels_N = make(num_tokens, vocab_size, dtype)
    expected = reference(logits_NV, labels_N, z_weight)
    loss, square, losses_N = cross_entropy(logits_NV * 1.0, labels_N)
    assert loss.dtype == square.dtype == torch.promote_types(dtype, torch.float32)
    assert losses_N.shape == labels_N.shape and not losses_N.requires_grad
    torch.testing.assert_close(loss.double(), expected[0], rtol=forward_tol, atol=0)
    torch.testing.assert_close(square.double(), expected[1], rtol=forward_tol, atol=0)
    (loss + z_weight * square).backward()
    gradient = logits_NV.grad
    assert gradient is not None and gradient.dtype == dtype
    error = (gradient.double() - expected[2]).abs()
    # Element by element: relative to the element, or to fp32's resolution of the largest.
    floor = 1e-6 * expected[2].abs().max() if dtype != torch.float64 else 1e-15
    assert (error <= gradient_tol * expected[2].abs() + floor).all()


def fairseq_loss(logits_NV: Tensor, labels_N: Tensor, epsilon: float) -> Tensor:
    """The sum that fairseq's label_smoothed_nll_loss returns, of counted tokens."""
    log_p = logits_NV.log_softmax(-1)[labels_N != IGNORED]
    label_loss = -log_p.gather(-1, labels_N[labels_N != IGNORED][:, None]).sum()
    each = epsilon / (log_p.shape[-1] - 1)
    return (1.0 - epsilon - each) * label_loss - each * log_p.sum()


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8),
])  # fmt: skip
@pytest.mark.parametrize("num_tokens, vocab_size", [(1, 2), (300, 129), (70, 5000)])
def test_label_smoothing_is_that_of_torch_and_of_fairseq(
    num_tokens: int, vocab_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    """In fp64, with a z-loss beside it; each token's loss stays that of its label."""
    logits_NV, labels_N = make(num_tokens, vocab_size, dtype)
    wide_NV = logits_NV.detach().double().requires_grad_()
    smooth = F.cross_entropy(
        wide_NV, labels_N, reduction="sum", ignore_index=IGNORED, label_smoothing=0.3
    )
    square = wide_NV.logsumexp(-1).square()[labels_N != IGNORED].sum()
    (0.5 * smooth + 0.1 * square).backward()
    loss, found_square, losses_N = cross_entropy(logits_NV * 1.0, labels_N, smoothing=0.3)
    forward = min(tolerance, 1e-6)  # The logits are given in bf16: sums are exact to fp32.
    torch.testing.assert_close(loss.double(), smooth.detach(), rtol=forward, atol=0)
    theirs = fairseq_loss(wide_NV.detach(), labels_N, 0.3 * (vocab_size - 1) / vocab_size)
    torch.testing.assert_close(loss.double(), theirs, rtol=forward, atol=0)
    label_loss = F.cross_entropy(wide_NV, labels_N, reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(losses_N.double().sum(), label_loss.detach(), rtol=forward, atol=0)
    (0.5 * loss + 0.1 * found_square).backward()
    assert logits_NV.grad is not None and wide_NV.grad is not None
    error = (logits_NV.grad.double() - wide_NV.grad).abs()
    floor = 1e-6 * wide_NV.grad.abs().max() if dtype != torch.float64 else 1e-15
    assert (error <= tolerance * wide_NV.grad.abs() + floor).all()


def test_ignored_tokens_do_not_count() -> None:
    logits_NV, labels_N = make(40, 7, torch.float64)
    counted = labels_N != IGNORED
    whole = cross_entropy(logits_NV * 1.0, labels_N)
    part = cross_entropy(logits_NV[counted] * 1.0, labels_N[counted])
    torch.testing.assert_close(whole[:2], part[:2], rtol=1e-14, atol=0)
    assert torch.equal(whole[2][counted], part[2]) and not whole[2][~counted].any()
    sum(whole[:2]).backward()
    assert logits_NV.grad is not None
    assert not logits_NV.grad[~counted].any()
    assert logits_NV.grad[counted].any()


def test_no_counted_token_is_zero() -> None:
    logits_NV = torch.randn(5, 4, requires_grad=True)
    loss, square, _ = cross_entropy(logits_NV * 1.0, torch.full((5,), IGNORED))
    assert (loss.item(), square.item()) == (0.0, 0.0)
    (loss + square).backward()
    assert logits_NV.grad is not None and not logits_NV.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    logits_NV = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], dtype=dtype)
    logits_NV.requires_grad_()
    loss, _, _ = cross_entropy(logits_NV * 1.0, torch.tensor([1, 2]))
    loss.backward()
    expected = reference(logits_NV, torch.tensor([1, 2]), 0.0)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    assert logits_NV.grad is not None
    torch.testing.assert_close(logits_NV.grad.double(), expected[2], rtol=2.0**-8, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-4, 0.25])
def test_gradient_follows_the_weight_of_the_sum(scale: float) -> None:
    """The upstream gradient of either sum scales its share."""
    logits_NV, labels_N = make(20, 9, torch.float64)
    expected = reference(logits_NV, labels_N, 0.5)[2] * scale
    loss, square, _ = cross_entropy(logits_NV * 1.0, labels_N)
    (scale * loss + scale * 0.5 * square).backward()
    torch.testing.assert_close(logits_NV.grad, expected, rtol=1e-12, atol=1e-16)
