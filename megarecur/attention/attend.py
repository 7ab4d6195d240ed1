"""The attention operation, by the backend of its `Visibility`.

Shapes: B samples, S queries, K keys, N query heads, M key heads, H head_dim. Query head i reads key
head i // (N / M); no backend but the oracle repeats keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.attention.dense import attend_dense
from megarecur.attention.fused import attend_fused
from megarecur.attention.operation import Kernel, attend_documents
from megarecur.attention.scores import Drop, Scores
from megarecur.attention.segments import Task
from megarecur.attention.visibility import Visibility


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], scores: Scores, seen: Visibility, drop: Drop | None
) -> Tensor:
    """Return the mixed values [B, S, N, H].

    Args:
        qkv: queries [B, S, N, H], keys and values [B, K, M, H].
        scores: how scores are computed.
        seen: which keys each query sees.
        drop: dropout of attention weights, if any.

    Raises:
        ConfigError: on CUDA, no fused kernel supports these tensors (`attend_fused`).
    """
    if seen.queries is None or seen.keys is None:
        allows_math = seen.backend == "dense"
        return attend_dense(qkv, scores, seen.mask, seen.causal, drop, allows_math)
    is_fused = drop is None and scores.softcap is None
    # A graph must not read `is_plain`, or batches of single documents would need a second one.
    if is_fused and not torch.compiler.is_compiling() and seen.is_plain:
        return attend_plain(qkv, scores, seen.causal)
    if seen.block_mask is not None:
        from megarecur.attention.flex import attend_flex

        assert drop is None, "`plan` chooses segments for dropout"
        return attend_flex(*qkv, scores, seen.slopes_N, seen.block_mask)
    assert seen.window_tensor is not None
    task = Task(
        seen.queries.cu_seqlens, seen.keys.cu_seqlens,
        seen.queries.on_device, seen.keys.on_device, seen.window_tensor, seen.slopes_N,
        None if drop is None else drop.key,
        None if drop is None else drop.samples_B1,
        None if drop is None else drop.positions_1S,
        seen.causal, scores.scale, scores.softcap,
        0.0 if drop is None else drop.rate,
        0 if drop is None else drop.first_head,
    )  # fmt: skip
    kernel: Kernel = "varlen" if seen.backend == "varlen" and drop is None else "segments"
    return attend_documents(*qkv, task, kernel)


def attend_plain(qkv: tuple[Tensor, Tensor, Tensor], scores: Scores, is_causal: bool) -> Tensor:
    """Return the mixed values of samples that are one document each, by torch's fused attention."""
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return attend_fused(q, k, v, None, is_causal, scores.scale).transpose(1, 2)
