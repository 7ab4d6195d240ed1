"""Which keys each query of a micro batch sees, in the form that a backend reads.

Shapes: B samples, S queries, K keys, N heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megarecur.attention.documents import Boundaries, whole_samples
from megarecur.config.rules_attention import Backend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees.

    Either by documents: a query of document u sees keys of document u, up to its own position if
    `causal`, and of these only the last `window`. Or by a mask.
    """

    causal: bool = False
    """Whether a query sees only keys up to its own position."""
    mask: Tensor | None = None
    """Added to scores; broadcasts to [B, N, S, K]. None: only `causal` hides keys."""
    queries: Boundaries | None = None
    """Documents of the queries; None: visibility is by `mask`."""
    keys: Boundaries | None = None
    """Documents of the keys."""
    window: int = 0
    """Keys that a query sees, itself included; 0: all. Needs `causal`."""
    window_tensor: Tensor | None = None
    """The window as int32 [] on the CPU, which compiled graphs read (`segments.Task.window`)."""
    slopes_N: Tensor | None = None
    """ALiBi slopes of this rank's heads."""
    is_plain: bool = False
    """Whether torch's fused attention needs neither mask nor documents."""
    backend: Backend = "segments"
    """The code that attends by documents. dense: a mask may let torch use its MATH kernel on CUDA;
    otherwise generation, which always has masks, raises an error instead."""
    block_mask: BlockMask | None = None
    """Blocks of visible pairs, for the backend flex."""

    def select(self, rows_b: Tensor, size: int) -> Visibility:
        """Return the visibility of the samples `rows_b`, out of `size`, in this order."""
        if self.queries is None or self.keys is None:
            return replace(self, mask=select_rows(self.mask, rows_b, size))
        queries = self.queries.select(rows_b)
        keys = queries if self.keys is self.queries else self.keys.select(rows_b)
        device = self.queries.on_device.device
        return see_documents(
            queries, keys, self.backend, device, causal=self.causal, window=self.window,
            slopes_N=self.slopes_N, is_plain=self.is_plain,
        )  # fmt: skip


@lru_cache(maxsize=64)
def make_window(window: int) -> Tensor:
    """Return a window as a tensor, made once."""
    return torch.tensor(window, dtype=torch.int32)


def see_documents(
    queries: Boundaries,
    keys: Boundaries,
    backend: Backend,
    device: torch.device,
    *,
    causal: bool = False,
    window: int = 0,
    slopes_N: Tensor | None = None,
    is_plain: bool = False,
) -> Visibility:
    """Return visibility by documents; see `Visibility`."""
    mask = None
    if backend == "flex":
        from megarecur.attention.flex import build_block_mask

        mask = build_block_mask(queries, keys, causal, window, device)
    return Visibility(
        causal, None, queries, keys, window, make_window(window), slopes_N, is_plain, backend, mask
    )


def see_whole(
    batch: int, queries: int, keys: int, backend: Backend, device: torch.device
) -> Visibility:
    """Return the visibility in which every query of a sample sees all keys of the sample."""
    if backend == "dense":
        return Visibility(backend=backend)
    of_queries, of_keys = (whole_samples(batch, length, device) for length in (queries, keys))
    is_plain = has_plain_kernel(backend, device)
    return see_documents(of_queries, of_keys, backend, device, is_plain=is_plain)


def has_plain_kernel(backend: Backend, device: torch.device) -> bool:
    """Return True if torch's fused attention replaces a backend where nothing is hidden, or only
    later keys."""
    return backend == ("segments" if device.type == "cpu" else "varlen")


def select_rows(table: Tensor | None, rows_b: Tensor, size: int) -> Tensor | None:
    """Return rows of a table with a row per sample; return a table with one row for all as is."""
    if table is None or table.ndim < 3 or len(table) != size:
        return table
    return table.index_select(0, rows_b)
