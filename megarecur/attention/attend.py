"""The attention operation, by the backend of its `Visibility`.

Shapes: B samples, S queries, K keys, N query heads, M key heads, H head_dim. Query head i reads key
head i // (N / M); no backend but the oracle repeats keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megarecur.attention.dense import attend_dense
from megarecur.attention.operation import Kernel, attend_documents
from megarecur.attention.scores import Drop, Scores
from megarecur.attention.segments import Task
from megarecur.attention.visibility import Visibility
from megarecur.errors import ConfigError


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], scores: Scores, seen: Visibility, drop: Drop | None
) -> Tensor:
    """Return the mixed values [B, S, N, H].

    Args:
        qkv: queries [B, S, N, H], keys and values [B, K, M, H].
        scores: how scores are computed.
        seen: which keys each query sees.
        drop: dropout of attention weights, if any.
    """
    if seen.queries is None or seen.keys is None:
        return attend_dense(qkv, scores, seen.mask, seen.causal, drop)
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
    """Return the mixed values of samples that are one document each, by torch's fused attention.

    Raises:
        ConfigError: on CUDA, no fused kernel supports these tensors.
    """
    q, k, v = (t.transpose(1, 2) for t in qkv)
    grouped = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scores.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    if q.device.type != "cuda":
        return run()
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            return run()
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise ConfigError(
            f"train.attention: no fused kernel of torch supports {q.dtype} with {q.shape[1]} query "
            f"heads and {k.shape[1]} key heads of {q.shape[3]} on this GPU; set train.attention to "
            "flex or segments, or to dense to allow the slow MATH kernel"
        ) from error
