"""Attention of a batch of rows to keys and values in pages.

Rows are tokens of several texts, each at its own position and loop of a block. The keys that a row
sees are gathered by its text's table of pages; masks hide later tokens and padding.

Shapes: T rows, B texts of a bucket with S rows each, P pages of a text, K keys, N query heads, M
key heads, H head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarecur.attention.dense import attend_dense
from megarecur.attention.scores import Scores
from megarecur.inference.pages import PagePool
from megarecur.model.positions import alibi_bias

LEAST_SAVED = 2**17
"""Padded elements of keys that another bucket of texts must save."""


@dataclass(eq=False)
class Bucket:
    """Texts of a batch that have equally many rows, and on a CPU not too different lengths."""

    rows_T: Tensor | None
    """Their rows, text after text; None: all rows of the batch."""
    texts_B: Tensor
    """Their numbers in the batch."""
    tables_BP: Tensor
    """Their pages, padded with any page."""
    positions_BS: Tensor
    first: int | None = None
    """The first page, if the bucket is one text whose pages follow each other in the pool."""
    length: int | None = None
    """Number of keys that its rows see, if the bucket is one row, which sees all of them."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Masks added to scores, [B, 1 or N, S, K], by window and dtype."""


class Rows:
    """The rows of a batch, and where their keys and values are.

    Args:
        pool: the pages.
        step_of: number of the step of the map of each (block, loop), [blocks, loops], on the CPU.
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
        self.last = max(own[-1] for own in positions)
        most = self.last // size + 1
        tables_BP = pad_sequence([table[:most] for table in tables], batch_first=True)
        texts_T = torch.arange(len(counts), device=device)
        if len(flat) > len(counts):
            texts_T = texts_T.repeat_interleave(torch.tensor(counts, device=device))
        pages_T = tables_BP[texts_T, self.positions_T // size]
        self.slots_T = pages_T * size + self.positions_T % size
        """The place of each row in the pages of a step."""
        self.steps: list[list[int]] = step_of.tolist()
        self.set_loops(loops)
        self.counts, self.texts_T, self.tables_BP = counts, texts_T, tables_BP
        self.buckets = self._make_buckets(positions)
        if len(counts) == 1 and device.type == "cpu":
            pages = tables_BP[0].tolist()
            if pages == list(range(pages[0], pages[0] + len(pages))):
                self.buckets[0].first = pages[0]
        self.windows: dict[int | None, WindowedRows] = {}

    def set_loops(self, loops: Sequence[int]) -> None:
        """Set the loop of each text, ascending."""
        self.loops = loops
        self.one_loop = loops[0] if loops[0] == loops[-1] else None
        """The loop of all texts, if they have the same one."""
        self.found: dict[int, Tensor] = {}
        """Places of the rows by block."""

    def loop_numbers(self) -> Tensor:
        """Return the loop of each row, [T]."""
        return torch.tensor(self.loops, device=self.positions_T.device)[self.texts_T]

    def _make_buckets(self, positions: Sequence[Sequence[int]]) -> list[Bucket]:
        device, counts = self.positions_T.device, self.counts
        pages = [own[-1] // self.pool.page_size + 1 for own in positions]
        # Another bucket costs launches, which outweigh the copies that it saves on a GPU.
        least = math.inf if device.type != "cpu" else LEAST_SAVED / self.pool.keys[0].numel()
        groups = group_texts(counts, pages, least)
        if len(groups) == 1:
            positions_BS = self.positions_T.view(len(counts), -1)
            texts_B = torch.arange(len(counts), device=device)
            length = self.last + 1 if len(counts) == counts[0] == 1 else None
            return [Bucket(None, texts_B, self.tables_BP, positions_BS, length=length)]
        starts, buckets = [0, *accumulate(counts)], []
        for texts in groups:
            rows = [starts[text] + i for text in texts for i in range(counts[text])]
            texts_B, rows_T = (torch.tensor(found, device=device) for found in (texts, rows))
            positions_BS = self.positions_T[rows_T].view(len(texts), -1)
            tables_BP = self.tables_BP[texts_B, : max(pages[text] for text in texts)]
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
            room = bucket.tables_BP.shape[1] * self.pool.page_size
            keys_K = torch.arange(bucket.length or room, device=device)
            hidden = keys_K > places_BS[:, None, :, None]
            if window is not None:
                hidden |= keys_K <= places_BS[:, None, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
            if self.slopes_N is not None:
                bias_NRK = alibi_bias(self.slopes_N, places_BS.flatten(), keys_K)[0]
                bias = bias_NRK.view(-1, *places_BS.shape, len(keys_K)).transpose(0, 1)
                mask = mask + bias.to(dtype)
            bucket.masks[key] = mask
        return bucket.masks[key]

    def write(self, block: int, k_1TMH: Tensor, v_1TMH: Tensor) -> None:
        """Write the keys and values of the rows at their loops of a block."""
        self.pool.write(self.places(block), k_1TMH[0], v_1TMH[0])

    def places(self, block: int, loops: Sequence[int] | None = None) -> Tensor:
        """Return the places of the rows at their loops of a block, or at other loops."""
        if loops is not None:
            return self.slots_T + self.starts(block, loops)[self.texts_T]
        if block not in self.found:
            if self.one_loop is not None:
                start = self.steps[block][self.one_loop] * self.pool.num_slots
                self.found[block] = self.slots_T + start
            else:
                self.found[block] = self.places(block, self.loops)
        return self.found[block]

    def starts(self, block: int, loops: Sequence[int]) -> Tensor:
        """Return the first place of the step of the map of a block at each of these loops."""
        numbers = [self.steps[block][loop] * self.pool.num_slots for loop in loops]
        return torch.tensor(numbers, device=self.slots_T.device)

    def gather(self, bucket: Bucket, block: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a bucket's texts at their loops, [B, K, M, H] each; those
        of a single row are exactly the keys that it sees."""
        pool, pages_BP = self.pool, bucket.tables_BP
        if self.one_loop is not None:
            first = self.steps[block][self.one_loop] * pool.num_pages
            if bucket.first is not None:
                # Read in place, without a copy.
                begin = (first + bucket.first) * pool.page_size
                own = slice(begin, begin + (bucket.length or pages_BP.shape[1] * pool.page_size))
                return pool.rows[0][None, own], pool.rows[1][None, own]
            pages_BP = pages_BP + first
        else:
            steps_B = self.starts(block, self.loops) // pool.page_size
            pages_BP = pages_BP + steps_B[bucket.texts_B][:, None]
        index, batch = pages_BP.flatten(), len(pages_BP)
        k, v = (
            kept.index_select(0, index).view(batch, -1, *kept.shape[2:])[:, : bucket.length]
            for kept in (pool.keys, pool.values)
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
        rows, q_TNH = self.rows, cast(q_1TNH[0], dtype)
        out_TNH: Tensor | None = None
        for bucket in rows.buckets:
            own_TNH = q_TNH if bucket.rows_T is None else q_TNH[bucket.rows_T]
            q_BSNH = own_TNH.view(*bucket.positions_BS.shape, *q_TNH.shape[1:])
            k_BKMH, v_BKMH = (cast(t, dtype) for t in rows.gather(bucket, block))
            mask = None
            if bucket.length is None or self.window is not None or rows.slopes_N is not None:
                mask = rows.mask(bucket, self.window, dtype)
            mixed = attend_rows(q_BSNH, k_BKMH, v_BKMH, scores, mask, rows.allows_math)
            mixed = mixed.reshape(own_TNH.shape)
            if bucket.rows_T is None:
                return mixed[None]
            if out_TNH is None:
                out_TNH = torch.empty_like(q_TNH)
            out_TNH[bucket.rows_T] = mixed
        assert out_TNH is not None
        return out_TNH[None]


class FilledRows(WindowedRows):
    """Rows whose keys and values are written at several loops of a block, for tokens that skip
    these loops.

    Args:
        rows: the rows.
        loops: the loops of each text.
    """

    def __init__(self, rows: Rows, loops: Sequence[Sequence[int]]) -> None:
        super().__init__(rows, None)
        starts = [sum(rows.counts[:i]) for i in range(len(loops))]
        pairs = [
            (start + i, loop)
            for start, count, own in zip(starts, rows.counts, loops, strict=True)
            for loop in own
            for i in range(count)
        ]
        self.loops = [loop for _, loop in pairs]
        self.rows_R = torch.tensor([row for row, _ in pairs], device=rows.slots_T.device)
        """The row of each copy."""
        self.slots_R = rows.slots_T[self.rows_R]

    def write(self, block: int, k_1TMH: Tensor, v_1TMH: Tensor) -> None:
        """Write the keys and values of the rows at all of their loops of a block."""
        places_R = self.slots_R + self.rows.starts(block, self.loops)
        self.rows.pool.write(places_R, k_1TMH[0, self.rows_R], v_1TMH[0, self.rows_R])

    def copy(self, block: int, source: Sequence[int]) -> None:
        """Copy the keys and values of each text at one loop of a block to all of its loops."""
        source_T = self.rows.places(block, source)
        pool = self.rows.pool
        k_TMH, v_TMH = (kept.index_select(0, source_T) for kept in pool.rows)
        self.write(block, k_TMH[None], v_TMH[None])


def group_texts(counts: Sequence[int], pages: Sequence[int], least: float) -> list[list[int]]:
    """Return the texts of each bucket: those of equal counts of rows, parted by their pages where
    that saves at least `least` pages of padding."""
    groups = []
    for count in dict.fromkeys(counts):
        texts = [text for text, own in enumerate(counts) if own == count]
        groups += part_by_length(sorted(texts, key=pages.__getitem__), pages, least)
    return groups


def part_by_length(texts: list[int], pages: Sequence[int], least: float) -> list[list[int]]:
    """Return texts, ascending by pages, in parts that are padded to their longest text. A part is
    cut where that saves most pages, if it saves at least `least`."""
    longest = pages[texts[-1]]
    saved, cut = max((i * (longest - pages[text]), i) for i, text in enumerate(texts, 1))
    if saved == 0 or saved < least:
        return [texts]
    first, second = texts[:cut], texts[cut:]
    return part_by_length(first, pages, least) + part_by_length(second, pages, least)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype. A comparison costs less than a call of `to` that changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def attend_rows(
    q_BSNH: Tensor,
    k_BKMH: Tensor,
    v_BKMH: Tensor,
    scores: Scores,
    mask: Tensor | None,
    allows_math: bool = False,
) -> Tensor:
    """Return the mixed values [B, S, N, H], of keys hidden by a mask [B, 1 or N, S, K], or of all
    keys (None)."""
    batch, queries, heads, dim = q_BSNH.shape
    groups = heads // k_BKMH.shape[2]
    if queries > 1 or groups == 1:
        return attend_dense((q_BSNH, k_BKMH, v_BKMH), scores, mask, False, None, allows_math)
    # The queries of a key head see the same keys, so they serve as its queries.
    q_BGMH = q_BSNH.view(batch, -1, groups, dim).transpose(1, 2)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.view(batch, -1, groups, mask.shape[-1])
    mixed = attend_dense((q_BGMH, k_BKMH, v_BKMH), scores, mask, False, None, allows_math)
    return mixed.transpose(1, 2).reshape(q_BSNH.shape)
