"""Attention by `torch.nn.attention.flex_attention`: documents, windows, ALiBi and softcaps in one
generated kernel. It trains on CUDA only.

Every query sees a contiguous range of keys, so that a mask is two tables of integers. Shapes: B
samples, S queries, K keys, N query heads, M key heads, H head_dim, Q and J blocks of queries and of
keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megarecur.attention.documents import Boundaries
from megarecur.attention.scores import Scores
from megarecur.parallel.transfer import send
from megarecur.private import place_compile_cache

BLOCK = 128
"""Queries and keys of a block of the mask."""


def key_ranges(
    queries: Boundaries, keys: Boundaries, causal: bool, window: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the first and the last key that each query sees, int32 [B, S] each; the last lies
    before the first if it sees none."""
    edges_q, edges_k = queries.edges, keys.edges
    edges_k = np.pad(edges_k, (0, max(len(edges_q) - len(edges_k), 0)), "edge")[: len(edges_q)]
    counts = np.diff(edges_q)
    sample = np.minimum(edges_q[:-1] // queries.length, queries.batch - 1)
    low = (edges_k[:-1] - sample * keys.length).repeat(counts)
    high = (edges_k[1:] - 1 - sample * keys.length).repeat(counts)
    place = np.arange(queries.batch * queries.length) % queries.length
    if causal:
        high = place
        if window:
            low = np.maximum(low, place - window + 1)
    shape = (queries.batch, queries.length)
    return low.reshape(shape).astype(np.int32), high.reshape(shape).astype(np.int32)


def build_block_mask(
    queries: Boundaries, keys: Boundaries, causal: bool, window: int, device: torch.device
) -> BlockMask:
    """Return the mask of documents, causality and a window (0: none) by blocks, without a tensor of
    all pairs."""
    low_BS, high_BS = key_ranges(queries, keys, causal, window)
    S, K = queries.length, keys.length
    over = -S % BLOCK

    def of_blocks(x_BS: NDArray[np.int32], reduce: Callable[..., Any], mode: str) -> Any:
        padded = np.pad(x_BS, ((0, 0), (0, over)), mode)  # type: ignore[call-overload]
        return reduce(padded.reshape(len(x_BS), -1, BLOCK), -1)[:, :, None]

    first = np.arange(0, K, BLOCK)
    last = np.minimum(first + BLOCK, K) - 1
    some = (of_blocks(low_BS, np.min, "edge") <= last) & (
        first <= of_blocks(high_BS, np.max, "edge")
    )
    full = (of_blocks(low_BS, np.max, "edge") <= first) & (
        first + BLOCK - 1 <= of_blocks(high_BS, np.min, "edge")
    )
    if over:
        full[:, -1] = False
    some &= ~full

    def table(chosen_BQJ: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Return the number of chosen blocks, and all blocks with the chosen ones first."""
        count = chosen_BQJ.sum(-1, dtype=np.int32)[:, None]
        order = (~chosen_BQJ).argsort(-1, kind="stable").astype(np.int32)[:, None]
        return send(torch.from_numpy(count), device), send(torch.from_numpy(order), device)

    low, high = (send(torch.from_numpy(x), device) for x in (low_BS, high_BS))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= low[b, q]) & (k <= high[b, q])

    mask: BlockMask = BlockMask.from_kv_blocks(
        *table(some), *table(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(S, K)
    )
    return mask


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    """Return the compiled operation: uncompiled, it makes scores of all pairs."""
    place_compile_cache()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, slopes_N: Tensor | None, mask: BlockMask
) -> Tensor:
    """Return the mixed values [B, S, N, H]; queries are [B, S, N, H], keys and values [B, K, M, H].

    Args:
        q: queries.
        k: keys.
        v: values.
        scores: how scores are computed.
        slopes_N: ALiBi slopes; None: no ALiBi.
        mask: see `build_block_mask`.
    """
    softcap = scores.softcap

    def modify(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes_N is None else score - slopes_N[h] * (row - column).abs()

    plain = softcap is None and slopes_N is None
    run: Callable[..., Any] = flex_attention
    if not torch.compiler.is_compiling():
        run = compiled_flex()
    out: Tensor = run(
        *(t.transpose(1, 2) for t in (q, k, v)),
        score_mod=None if plain else modify,
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
