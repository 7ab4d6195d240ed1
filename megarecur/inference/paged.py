"""Attention of a batch of rows to keys and values in pages.

Rows are tokens of several texts, each at its own position and loop of a block. The keys that a row
sees are gathered by its text's table of pages; masks hide later tokens and padding.

Shapes: T rows, B texts of a bucket with S rows each, P pages of a text, K keys, N query heads, M
key heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarecur.attention.dense import attend_dense
from megarecur.attention.scores import Scores
from megarecur.inference.pages import PagePool
from megarecur.model.positions import alibi_bias


@dataclass(eq=False)
class Bucket:
    """The texts of a batch that have equally many rows."""

    rows_T: Tensor | None
    """Their rows, text after text; None: all rows of the batch."""
    texts_B: Tensor
    """Their numbers in the batch."""
    tables_BP: Tensor
    """Their pages, padded with any page."""
    positions_BS: Tensor
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Masks added to scores, [B, 1 or N, S, K], by window and dtype."""


class Rows:
    """The rows of a batch, and where their keys and values are.

    Args:
        pool: the pages.
        step_of: number of the step of the map of each (block, loop), [blocks, loops].
        slopes_N: ALiBi slopes of this rank's heads, if the model has them.
        tables: the pages of each text, at least up to its last row.
        positions: the positions of the rows of each text, ascending.
        loops: the loop of each text, ascending.
        allows_math: let torch use its slow MATH kernel on CUDA.
    """

    def __init__(
        self,
        pool: PagePool,
        step_of: Tensor,
        slopes_N: Tensor | None,
        tables: Sequence[Tensor],
        positions: Sequence[Sequence[int]],
        loops: Sequence[int],
        allows_math: bool = False,
    ) -> None:
        device, size = pool.keys.device, pool.page_size
        self.pool, self.slopes_N, self.allows_math = pool, slopes_N, allows_math
        counts = [len(own) for own in positions]
        flat = [position for own in positions for position in own]
        self.positions_T = torch.tensor(flat, device=device)
        most = max(own[-1] for own in positions) // size + 1
        tables_BP = pad_sequence([table[:most] for table in tables], batch_first=True)
        texts_T = torch.arange(len(counts), device=device)
        if len(flat) > len(counts):
            texts_T = texts_T.repeat_interleave(torch.tensor(counts, device=device))
        pages_T = tables_BP[texts_T, self.positions_T // size]
        self.slots_T = pages_T * size + self.positions_T % size
        """The place of each row in the pages of a step."""
        self.step_of = step_of
        self.set_loops(loops)
        self.texts_T, self.tables_BP = texts_T, tables_BP
        self.buckets = self._make_buckets(counts)
        self.windows: dict[int | None, WindowedRows] = {}

    def set_loops(self, loops: Sequence[int]) -> None:
        """Set the loop of each text, ascending."""
        self.loops_B = torch.tensor(loops, device=self.pool.keys.device)
        self.one_loop = loops[0] if loops[0] == loops[-1] else None
        """The loop of all texts, if they have the same one."""

    def _make_buckets(self, counts: Sequence[int]) -> list[Bucket]:
        sizes = dict.fromkeys(counts)
        if len(sizes) == 1:
            positions_BS = self.positions_T.view(len(counts), -1)
            texts_B = torch.arange(len(counts), device=self.positions_T.device)
            return [Bucket(None, texts_B, self.tables_BP, positions_BS)]
        counts_B = torch.tensor(counts, device=self.positions_T.device)
        buckets = []
        for size in sizes:
            texts_B = (counts_B == size).nonzero()[:, 0]
            rows_T = (counts_B[self.texts_T] == size).nonzero()[:, 0]
            positions_BS = self.positions_T[rows_T].view(len(texts_B), size)
            most = int(positions_BS.max()) // self.pool.page_size + 1
            tables_BP = self.tables_BP[texts_B, :most]
            buckets.append(Bucket(rows_T, texts_B, tables_BP, positions_BS))
        return buckets

    def see(self, window: int | None) -> WindowedRows:
        """Return these rows for blocks with a sliding window, or without one (None)."""
        if window not in self.windows:
            self.windows[window] = WindowedRows(self, window)
        return self.windows[window]

    def mask(self, bucket: Bucket, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the mask of a bucket, [B, 1 or N, S, K]."""
        key = window, dtype
        if key not in bucket.masks:
            device, places_BS = self.positions_T.device, bucket.positions_BS
            keys_K = torch.arange(bucket.tables_BP.shape[1] * self.pool.page_size, device=device)
            hidden = keys_K > places_BS[:, None, :, None]
            if window is not None:
                hidden |= keys_K <= places_BS[:, None, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
            if self.slopes_N is not None:
                bias = [alibi_bias(self.slopes_N, places_S, keys_K) for places_S in places_BS]
                mask = mask + torch.cat(bias).to(dtype)
            bucket.masks[key] = mask
        return bucket.masks[key]

    def write(self, block: int, k_1TMH: Tensor, v_1TMH: Tensor) -> None:
        """Write the keys and values of the rows at their loops of a block."""
        places_T = self.places(block)
        pool = self.pool
        pool.keys.flatten(0, 1).index_copy_(0, places_T, k_1TMH[0])
        pool.values.flatten(0, 1).index_copy_(0, places_T, v_1TMH[0])

    def places(self, block: int, loops_B: Tensor | None = None) -> Tensor:
        """Return the places of the rows at their loops of a block, or at other loops."""
        stride = self.pool.num_pages * self.pool.page_size
        if loops_B is None and self.one_loop is not None:
            return self.slots_T + int(self.step_of[block, self.one_loop]) * stride
        steps_B = self.step_of[block, self.loops_B if loops_B is None else loops_B]
        return self.slots_T + steps_B[self.texts_T] * stride

    def copy(self, block: int, source_B: Tensor) -> None:
        """Copy to the rows' loops of a block the keys and values of other loops of the block."""
        source_T, target_T = self.places(block, source_B), self.places(block)
        for kept in (self.pool.keys.flatten(0, 1), self.pool.values.flatten(0, 1)):
            kept.index_copy_(0, target_T, kept.index_select(0, source_T))

    def gather(self, bucket: Bucket, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a bucket's texts at their loops, [B, K, M, H] each."""
        if self.one_loop is not None:
            pages_BP = bucket.tables_BP + int(self.step_of[block, self.one_loop]) * (
                self.pool.num_pages
            )
        else:
            steps_B = self.step_of[block, self.loops_B[bucket.texts_B]]
            pages_BP = bucket.tables_BP + steps_B[:, None] * self.pool.num_pages
        index, batch = pages_BP.flatten(), len(pages_BP)
        k, v = (
            kept.index_select(0, index).view(batch, -1, *kept.shape[2:]).to(dtype)
            for kept in (self.pool.keys, self.pool.values)
        )
        return k, v


class WindowedRows:
    """The rows of a batch as blocks with one sliding window see them (`context.PagedKeys`)."""

    def __init__(self, rows: Rows, window: int | None) -> None:
        self.rows, self.window = rows, window

    def write(self, block: int, k_1TMH: Tensor, v_1TMH: Tensor) -> None:
        """Write the keys and values of the rows at their loops of a block."""
        self.rows.write(block, k_1TMH, v_1TMH)

    def attend(self, block: int, q_1TNH: Tensor, scores: Scores, dtype: torch.dtype) -> Tensor:
        """Attend from each row to the tokens of its text so far; see `context.PagedKeys`."""
        rows, q_TNH = self.rows, q_1TNH[0].to(dtype)
        out_TNH = torch.empty_like(q_TNH)
        for bucket in rows.buckets:
            own_TNH = q_TNH if bucket.rows_T is None else q_TNH[bucket.rows_T]
            q_BSNH = own_TNH.view(*bucket.positions_BS.shape, *q_TNH.shape[1:])
            k_BKMH, v_BKMH = rows.gather(bucket, block, dtype)
            mask = rows.mask(bucket, self.window, dtype)
            mixed = attend_rows(q_BSNH, k_BKMH, v_BKMH, scores, mask, rows.allows_math)
            mixed = mixed.reshape(own_TNH.shape)
            if bucket.rows_T is None:
                return mixed[None]
            out_TNH[bucket.rows_T] = mixed
        return out_TNH[None]


def attend_rows(
    q_BSNH: Tensor,
    k_BKMH: Tensor,
    v_BKMH: Tensor,
    scores: Scores,
    mask: Tensor,
    allows_math: bool = False,
) -> Tensor:
    """Return the mixed values [B, S, N, H], of keys hidden by a mask [B, 1 or N, S, K]."""
    batch, queries, heads, dim = q_BSNH.shape
    groups = heads // k_BKMH.shape[2]
    if queries > 1 or groups == 1:
        return attend_dense((q_BSNH, k_BKMH, v_BKMH), scores, mask, False, None, allows_math)
    # The queries of a key head see the same keys, so they serve as its queries.
    q_BGMH = q_BSNH.view(batch, -1, groups, dim).transpose(1, 2)
    if mask.shape[1] > 1:
        mask = mask.view(batch, -1, groups, mask.shape[-1])
    mixed = attend_dense((q_BGMH, k_BKMH, v_BKMH), scores, mask, False, None, allows_math)
    return mixed.transpose(1, 2).reshape(q_BSNH.shape)
