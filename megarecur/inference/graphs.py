"""Decode passes that are captured once and replayed, as CUDA graphs: one launch in place of
hundreds.

A pass in which each item has one row is padded to the next of a bounded set of sizes: powers of two
of rows, and of pages of the longest text. It reads its inputs from static buffers. The first pass
of a group of blocks at a size is captured, and later ones copy their inputs into the buffers and
replay it, whatever their loops. Padded rows write to a page that no text has, and their results are
dropped. What items do before the first block of a group (embed, inject, normalize) runs eagerly,
and so does every other pass: chunks of prompts, verified drafts, and more rows than the largest
size.

Shapes: T rows of a size, P pages of a size, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarecur.inference.paged import Bucket, Rows, WindowedRows
from megarecur.inference.pages import PagePool
from megarecur.inference.passes import Item, Passes, add_levels, is_marked
from megarecur.inference.visits import Group
from megarecur.model.adapters import Adapter, MaskedAdapter
from megarecur.model.context import Positions
from megarecur.recurrence.layer_map import LayerMap, Step

LEAST_PAGES = 8
"""The smallest number of pages of a size."""
MOST_ROWS = 256
"""The largest number of rows of a size; passes of more rows run eagerly."""


@dataclass(frozen=True)
class Captured:
    """A captured function without arguments."""

    replay: Callable[[], None]
    """Run it again; it reads the same buffers, and overwrites its output."""
    output: Tensor


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Function that captures another one. It may run that one any number of times."""


class CudaCapture:
    """Capture into CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        """Capture a function, after one run of it that warms up kernels."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a server, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = run()
        return Captured(graph.replay, output)


class StaticRows(Rows):
    """Rows of a size, one of each text, as views of static buffers; see `Rows`.

    Args:
        pool: the pages.
        first_pages_GL: the first page of the step of the map of each (block, loop); that of the
            last loop, at which padded rows are, is the page that no text has.
        slopes_N: ALiBi slopes of this rank's heads, if the model has them.
        positions_T: positions.
        loops_T: loops.
        tables_TP: pages of the texts.
        allows_math: let torch use its slow MATH kernel on CUDA.
    """

    def __init__(
        self,
        pool: PagePool,
        first_pages_GL: Tensor,
        slopes_N: Tensor | None,
        positions_T: Tensor,
        loops_T: Tensor,
        tables_TP: Tensor,
        allows_math: bool,
    ) -> None:
        self.pool, self.slopes_N, self.allows_math = pool, slopes_N, allows_math
        self.first_pages_GL, self.loops_T, self.positions_T = first_pages_GL, loops_T, positions_T
        own_T1 = (positions_T // pool.page_size)[:, None]
        pages_T = tables_TP.gather(1, own_T1)[:, 0]
        self.slots_T = pages_T * pool.page_size + positions_T % pool.page_size
        self.texts_T, self.last = torch.arange(len(positions_T), device=positions_T.device), 0
        self.buckets = [Bucket(None, self.texts_T, tables_TP, positions_T[:, None])]
        self.windows: dict[int | None, WindowedRows] = {}

    def loop_numbers(self) -> Tensor:
        """Return the loop of each row, [T]."""
        return self.loops_T

    def places(self, block: int, loops: Sequence[int] | None = None) -> Tensor:
        """Return the places of the rows at their loops of a block."""
        assert loops is None, "static rows are at their own loops"
        first_T = self.first_pages_GL[block].index_select(0, self.loops_T)
        return self.slots_T + first_T * self.pool.page_size

    def gather(self, bucket: Bucket, block: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the texts at their loops, [T, K, M, H] each."""
        first_T = self.first_pages_GL[block].index_select(0, self.loops_T)
        index = (bucket.tables_BP + first_T[:, None]).flatten()
        k, v = (
            kept.index_select(0, index).view(len(first_T), -1, *kept.shape[2:])
            for kept in (self.pool.keys, self.pool.values)
        )
        return k, v


class Graphs:
    """Captured passes, and the static buffers that they read.

    Args:
        passes: the model as the engine runs it.
        steps: the longest map that runs.
        max_rows: maximum rows of a pass that is captured.
        capture: function that captures a pass.
    """

    def __init__(self, passes: Passes, steps: LayerMap, max_rows: int, capture: Capture) -> None:
        self.passes, self.capture, pool = passes, capture, passes.pool
        self.rows = list_sizes(1, min(max_rows, MOST_ROWS))
        self.pages = list_sizes(LEAST_PAGES, pool.num_pages)
        most, device = self.rows[-1], passes.device
        hidden = passes.shape.hidden_size
        self.x_TD = torch.zeros(most, hidden, dtype=passes.model.dtype, device=device)
        self.integers_3T = torch.zeros(3, most, dtype=torch.long, device=device)
        """Positions, loops, and lengths of prompts."""
        self.tables_TP = torch.zeros(most, self.pages[-1], dtype=torch.long, device=device)
        self.captured: dict[tuple[Group, int, int], Captured] = {}
        """Captured passes by group, rows and pages."""
        self.marked = frozenset(step.block for step in steps if is_marked(step))
        """Blocks before which items do something else; eager unless they begin a group."""
        self.idle_loop = passes.step_of.shape[1]
        """The loop of padded rows."""
        padding = torch.full((len(passes.step_of), 1), len(steps))
        first_pages_GL = torch.cat([passes.step_of, padding], 1) * pool.num_pages
        self.first_pages_GL = first_pages_GL.to(device)
        self.samples_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.adapters = dict[int, tuple[MaskedAdapter, list[Tensor]]]()
        """The adapters of all loops by block, and the masks that they read."""
        self.last: tuple[list[Item], int, int] | None = None
        """The items of the last pass, and its size: their tables are in the buffer."""

    def accepts(self, items: Sequence[Item]) -> bool:
        """Return True if the next visit of these items can be replayed."""
        if len(items) > self.rows[-1] or any(len(item.positions) > 1 for item in items):
            return False
        return self.marked.isdisjoint(items[0].visit.group[1:])

    def run(self, items: Sequence[Item]) -> None:
        """Run the next visit of items, all of one group, and advance them."""
        passes, group, count = self.passes, items[0].visit.group, len(items)
        steps = [item.visit.steps[0] for item in items]
        x_1TD = passes.join_states(items)
        with passes.model.tp.whole_sequences():
            x_1TD = passes.combine(items, [1] * count, passes.blocks[group[0]], steps, x_1TD)
        longest = max(item.positions[0] for item in items) // passes.pool.page_size + 1
        rows, pages = find_size(self.rows, count), find_size(self.pages, longest)
        self.fill_buffers(items, x_1TD, rows, pages)
        captured = self.captured.get((group, rows, pages))
        if captured is None:
            try:
                captured = self.capture(partial(self.compute, group, rows, pages))
            except RuntimeError as error:
                warnings.warn(
                    f"CUDA graphs are off, because a pass cannot be captured: {error}; set "
                    "cuda_graphs=False to omit this warning",
                    stacklevel=2,
                )
                passes.graphs = None
                passes.run_eagerly(items)
                return
            self.captured[group, rows, pages] = captured
        captured.replay()
        # The next replay overwrites the output.
        own = captured.output[:count].clone().split(1)
        for item, x_SD in zip(items, own, strict=True):
            item.x_SD, item.index = x_SD, item.index + 1

    def fill_buffers(self, items: Sequence[Item], x_1TD: Tensor, rows: int, pages: int) -> None:
        """Write the inputs of a pass into the buffers, padded to a size."""
        count = len(items)
        padding = [0] * (rows - count)
        integers = [
            [item.positions[0] for item in items] + padding,
            [item.visit.loop for item in items] + [self.idle_loop] * (rows - count),
            [item.prompt_length for item in items] + padding,
        ]
        self.integers_3T[:, :rows].copy_(torch.tensor(integers))
        self.x_TD[:count].copy_(x_1TD[0])
        if self.last is None or self.last != (list(items), rows, pages):
            tables_TP = self.tables_TP[:rows, :pages].zero_()
            found = pad_sequence([item.table[:pages] for item in items], batch_first=True)
            tables_TP[:count, : found.shape[1]].copy_(found)
            self.last = list(items), rows, pages

    def compute(self, group: Group, rows: int, pages: int) -> Tensor:
        """Return the hidden states [T, D] after a pass over a group at a size. It reads tensors of
        this object alone, and never waits for the device."""
        passes, model = self.passes, self.passes.model
        positions_T, loops_T, prompts_T = self.integers_3T[:, :rows]
        found = StaticRows(
            passes.pool, self.first_pages_GL, passes.slopes_N, positions_T, loops_T,
            self.tables_TP[:rows, :pages], model.attention.backend == "dense",
        )  # fmt: skip
        positions_1T = positions_T[None]
        # Only dynamic scaling uses lengths; with them no table of rotations is read.
        lengths_1T = torch.maximum(positions_1T + 1, prompts_T[None])
        view, sliding = passes.views(positions_1T, found, lengths_1T)
        positions = Positions(self.samples_1, positions_1T, tp=model.tp)
        levels_1TD, x_1TD = passes.encode_levels(found), self.x_TD[None, :rows]
        with model.tp.whole_sequences():
            for number in group:
                block = passes.blocks[number]
                seen = sliding if block.slides and sliding is not None else view
                x_1TD = block.body(
                    add_levels(x_1TD, levels_1TD), seen, positions, None, Step(number, 0), {},
                    self.adapter(number, loops_T), None, None, None,
                )  # fmt: skip
        return x_1TD[0]

    def adapter(self, number: int, loops_T: Tensor) -> Adapter | None:
        """Return the adapters of a block for rows at these loops, if loops have adapters."""
        own = self.passes.blocks[number].adapters
        if not own:
            return None
        if number not in self.adapters:
            masks = list[Tensor]()
            parts = [cast(Adapter, part) for part in own]
            self.adapters[number] = MaskedAdapter(parts, masks), masks
        mixed, masks = self.adapters[number]
        masks[:] = [(loops_T == loop)[None, :, None] for loop in range(len(own))]
        return mixed


def list_sizes(least: int, most: int) -> list[int]:
    """Return powers of two times `least` below `most`, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def find_size(sizes: Sequence[int], count: int) -> int:
    """Return the least of ascending sizes that is at least a count."""
    return next(size for size in sizes if size >= count)
