"""Backends on a GPU against the dense oracle in fp64; skipped, saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from megarecur.attention.attend import attend
from megarecur.attention.documents import count_boundaries
from megarecur.attention.scores import Scores
from megarecur.attention.visibility import Visibility, see_documents

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    ("backend", "dtype", "softcap", "slopes"),
    [("varlen", torch.bfloat16, None, False), ("flex", torch.bfloat16, 20.0, True),
     ("flex", torch.float32, None, False), ("flex", torch.float32, 20.0, True),
     ("segments", torch.float64, 20.0, True)],
    ids=str,
)  # fmt: skip
def test_backends_equal_dense(backend, dtype, softcap, slopes, key_heads, window) -> None:
    device, (B, S, N, H) = torch.device("cuda"), (2, 512, 4, 64)
    documents = torch.tensor([[0] * 130 + [1] * 300 + [2] * 82, [0] * 400 + [-1] * 112])
    boundaries = count_boundaries(documents.to(device))
    slopes_N = torch.linspace(0.01, 0.1, N, device=device) if slopes else None
    seen = see_documents(
        boundaries, boundaries, backend, device, causal=True, window=window, slopes_N=slopes_N
    )
    place = torch.arange(S)
    distance = place[:, None] - place[None]
    shown = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    if window:
        shown &= distance < window
    mask = torch.zeros(B, 1, S, S, dtype=torch.float64).masked_fill(~shown[:, None], -torch.inf)
    mask = mask.to(device)
    if slopes_N is not None:
        mask = mask - slopes_N[:, None, None] * distance.abs().to(device)
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(B, S, heads, H, device=device).to(dtype)
        for heads in (N, key_heads, key_heads, N)
    )
    found, oracle = [], Visibility(mask=mask, backend="dense")
    for view, own in ((seen, dtype), (oracle, torch.float64)):
        leaves = [t.to(own).requires_grad_() for t in (q, k, v)]
        out = attend(tuple(leaves), Scores(0.125, softcap), view, None)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(own))))
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
