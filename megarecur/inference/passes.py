"""One pass over a group of blocks for a batch of items, whatever their loop, text or position.

The rows of all items form one sample [1, T, D], sorted by loop. Matrices multiply all rows at once;
adapters, norms, level signals, encodings of levels and injected states are those of each row's own
loop.

Shapes: T rows, S rows of an item, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from megarecur.attention.visibility import Visibility
from megarecur.config.rope import DynamicRope
from megarecur.inference.paged import FilledRows, Rows
from megarecur.inference.pages import PagePool
from megarecur.inference.visits import Visit
from megarecur.model.adapters import Adapter, MixedAdapter
from megarecur.model.block import Block
from megarecur.model.context import AttentionView, Context, DropoutKeys, Positions, Recorder
from megarecur.model.positions import alibi_slopes, decay, rotation, sinusoidal
from megarecur.model.runner import Runner
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap, Step


@dataclass(eq=False)
class Item:
    """Tokens of a text on their way through the map, in the order of their positions.

    Those of a prompt and of a verified draft follow each other; known tokens that exited after
    another loop may lie between others.
    """

    tokens: list[int]
    positions: list[int]
    table: Tensor
    """Pages of the text."""
    prompt_length: int
    """Tokens of the prompt, on which dynamic rotary scaling depends."""
    seed: int
    sample: int
    visits: Sequence[Visit]
    index: int = 0
    """The next visit."""
    x_SD: Tensor | None = None
    """The hidden state that enters it; None: the tokens are embedded first."""
    reads: dict[str, Tensor] = field(default_factory=dict)
    """Values [S, D] for later steps."""

    @property
    def visit(self) -> Visit:
        """The next visit."""
        return self.visits[self.index]

    def copy(self) -> Item:
        """Return a copy that does not hold the memory of the batch from which its states come."""
        assert self.x_SD is not None
        reads = {name: value.clone() for name, value in self.reads.items()}
        return replace(self, x_SD=self.x_SD.clone(), reads=reads)

    def select(self, rows: Sequence[int]) -> Item:
        """Return an item of some of the rows."""
        rows_s = torch.tensor(rows)
        assert self.x_SD is not None
        return replace(
            self,
            tokens=[self.tokens[i] for i in rows],
            positions=[self.positions[i] for i in rows],
            x_SD=self.x_SD[rows_s],
            reads={name: value[rows_s] for name, value in self.reads.items()},
        )


@dataclass(eq=False)
class Batch:
    """Items at visits of one group, sorted by loop."""

    items: list[Item]
    counts: list[int]
    """Rows of each item."""
    rows: Rows
    ctx: Context
    levels_1TD: Tensor | None
    """Encodings of positions and levels, if the model has them."""
    x_1TD: Tensor | None = None
    """The hidden states of the items after their last pass together."""


class Replays(Protocol):
    """Interface of passes that are captured once and replayed (`graphs.Graphs`)."""

    def accepts(self, items: Sequence[Item]) -> bool:
        """Return True if the next visit of these items can be replayed."""

    def run(self, items: Sequence[Item]) -> None:
        """Run the next visit of items, all of one group, and advance them."""


class Passes:
    """The model as the engine runs it.

    Args:
        model: the model, on one pipeline rank.
        steps: the longest map that runs.
        num_pages: pages of the pool.
        page_size: tokens of a page.
    """

    def __init__(self, model: Transformer, steps: LayerMap, num_pages: int, page_size: int) -> None:
        self.model, self.shape = model, model.config.model
        self.device = next(model.parameters()).device
        assert isinstance(model.runner, Runner)
        self.runner = model.runner
        self.blocks = {int(number): cast(Block, b) for number, b in model.runner.blocks.items()}
        attention = self.blocks[steps[0].block].attention
        heads = len(attention.key.weight.parameter) // attention.head_dim
        self.pool = PagePool(
            num_pages, page_size, len(steps), heads, attention.head_dim, model.dtype, self.device
        )
        uses = Counter(step.block for step in steps)
        step_of = torch.zeros(max(uses) + 1, max(uses.values()), dtype=torch.long)
        for number, step in enumerate(steps):
            step_of[step.block, step.loop_index] = number
        self.step_of = step_of
        """Number of the step of each (block, loop), on the CPU."""
        self.slopes_N: Tensor | None = None
        if self.shape.positions == "alibi":
            own = self.shape.num_heads // model.tp.size
            first = model.tp.rank * own
            self.slopes_N = alibi_slopes(self.shape.num_heads)[first:][:own].to(self.device)
        self.wide = torch.promote_types(model.dtype, torch.float32)
        self.is_dynamic = isinstance(self.shape.rope_scaling, DynamicRope)
        """Whether the rotation of a token depends on the length of its text."""
        self.rotations: dict[bool, tuple[Tensor, Tensor]] = {}
        """Rotations of all positions so far, by whether of blocks with a window."""
        self.last: Batch | None = None
        """The last batch."""
        self.adapters: dict[tuple[int, tuple[int, ...]], tuple[MixedAdapter, list[int]]] = {}
        self.graphs: Replays | None = None
        """Passes that are replayed, if there are any."""

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> None:
        """Run the next visit of items, all of one group, and advance them."""
        if self.graphs is not None and self.graphs.accepts(items):
            self.last = None  # The states after the last eager pass get out of date.
            self.graphs.run(items)
        else:
            self.run_eagerly(items)

    def run_eagerly(self, items: Sequence[Item]) -> None:
        """Run the next visit of items without graphs; see `run`."""
        batch = self.batch(items)
        x_1TD = self.states(batch)
        with self.model.tp.whole_sequences():
            for place, number in enumerate(batch.items[0].visit.group):
                block = self.blocks[number]
                steps = [item.visit.steps[place] for item in batch.items]
                x_1TD = self.enter(batch, block, steps, x_1TD)
                x_1TD = block.body(
                    x_1TD, batch.ctx.view(block.slides), batch.ctx.positions, None, steps[0], {},
                    self.adapter(block, steps, batch.counts), None, None, None,
                )  # fmt: skip
        batch.x_1TD = x_1TD
        own = x_1TD[0].split(batch.counts) if len(batch.items) > 1 else [x_1TD[0]]
        for item, x_SD in zip(batch.items, own, strict=True):
            item.x_SD, item.index = x_SD, item.index + 1

    def states(self, batch: Batch) -> Tensor:
        """Return the hidden states [1, T, D] that enter the next visit of a batch."""
        if batch.x_1TD is not None:
            return batch.x_1TD
        fresh = [item for item in batch.items if item.x_SD is None]
        if len(fresh) == len(batch.items):
            return self.embed(fresh, batch.ctx)
        return self.join_states(batch.items)

    def join_states(self, items: Sequence[Item]) -> Tensor:
        """Return the hidden states [1, T, D] that enter the next visit of items. Items without one
        are embedded."""
        fresh = [item for item in items if item.x_SD is None]
        if fresh:
            positions = torch.tensor([[p for item in fresh for p in item.positions]])
            ctx = self.context(positions.to(self.device), 0, 0, None)
            split = self.embed(fresh, ctx)[0].split([len(item.tokens) for item in fresh])
            for item, x_SD in zip(fresh, split, strict=True):
                item.x_SD = x_SD
        return torch.cat([cast(Tensor, item.x_SD) for item in items])[None]

    @torch.inference_mode()
    def fill_from_state(self, skipped: Mapping[Item, Sequence[int]]) -> None:
        """Write the keys and values of visits that items skip, all of one group, as if the hidden
        state were the input of each of their steps.

        Args:
            skipped: indices of the visits that each item skips.
        """
        visits = [item.visits[index] for item, own in skipped.items() for index in own]
        blocks = [self.blocks[number] for number in visits[0].group]
        differs = self.shape.level_encoding == "sinusoidal" or any(b.adapters for b in blocks)
        if differs or any(step.injected for visit in visits for step in visit.steps):
            batch = self.batch(
                [replace(item, index=index) for item, own in skipped.items() for index in own]
            )
            views = {block.slides: batch.ctx.view(block.slides) for block in blocks}
            entered = [item.visit for item in batch.items]
        else:
            # Loops make the same keys and values of the same state.
            batch = self.batch(list(skipped))
            pages = FilledRows(batch.rows, list_loops(batch, skipped))
            views = {b.slides: replace(batch.ctx.view(b.slides), pages=pages) for b in blocks}
            entered = [item.visits[skipped[item][0]] for item in batch.items]
        x_1TD = self.states(batch)
        with self.model.tp.whole_sequences():
            for place, block in enumerate(blocks):
                steps = [visit.steps[place] for visit in entered]
                u_1TD = self.inject(batch.items, batch.counts, block, steps, x_1TD)
                u_1TD = add_levels(u_1TD, batch.levels_1TD)
                adapter = self.adapter(block, steps, batch.counts)
                block.remember_entered(u_1TD, views[block.slides], steps[0], adapter)

    @torch.inference_mode()
    def fill_from_loop(self, skipped: Mapping[Item, Sequence[int]]) -> None:
        """Copy the keys and values of visits that items skip, all of one group, from the last loop
        that each block ran. Arguments: see `fill_from_state`."""
        batch = self.batch(list(skipped))
        filled = FilledRows(batch.rows, list_loops(batch, skipped))
        item, own = next(iter(skipped.items()))
        for number in item.visits[own[0]].group:
            filled.copy(number, [find_last_loop(item, number) for item in batch.items])

    @torch.inference_mode()
    def logits(self, x_TD: Tensor) -> Tensor:
        """Return logits [T, V] of hidden states that leave the map."""
        with self.model.tp.whole_sequences():
            return self.model.all_logits(x_TD[None])[0]

    def embed(self, items: Sequence[Item], ctx: Context) -> Tensor:
        """Return the embedded tokens of items, [1, T, D]."""
        tokens = torch.tensor([[t for item in items for t in item.tokens]])
        with self.model.tp.whole_sequences():
            return self.model.embed(tokens.to(self.device), ctx)

    def batch(self, items: Sequence[Item]) -> Batch:
        """Return the batch of items, sorted by loop, with all that depends on their places."""
        items = sorted(items, key=lambda item: item.visit.loop)
        loops = [item.visit.loop for item in items]
        if self.last is not None and self.last.items == items:
            # The next pass of the same items differs in the loops alone.
            self.last.rows.set_loops(loops)
            self.last.levels_1TD = self.encode_levels(self.last.rows)
            return self.last
        rows = Rows(
            self.pool, self.step_of, self.slopes_N, [item.table for item in items],
            [item.positions for item in items], loops, self.model.attention.backend == "dense",
        )  # fmt: skip
        positions_1T = rows.positions_T[None]
        lengths_1T = None
        if self.is_dynamic:
            prompts_B = torch.tensor([item.prompt_length for item in items], device=self.device)
            lengths_1T = torch.maximum(positions_1T + 1, prompts_B[rows.texts_T][None])
        ctx = self.context(positions_1T, 0, 0, rows, lengths_1T)
        counts = [len(item.positions) for item in items]
        self.last = Batch(items, counts, rows, ctx, self.encode_levels(rows))
        return self.last

    def encode_levels(self, rows: Rows) -> Tensor | None:
        """Return the encodings of positions and levels of rows, [1, T, D], if there are any."""
        if self.shape.level_encoding != "sinusoidal":
            return None
        size, layout = self.shape.hidden_size, self.shape.sinusoid_layout
        of_positions = sinusoidal(rows.positions_T[None], size, self.wide, layout)
        return of_positions + sinusoidal(rows.loop_numbers()[None], size, self.wide, layout)

    def context(
        self,
        positions_1T: Tensor,
        seed: int,
        sample: int,
        rows: Rows | None,
        lengths_1T: Tensor | None = None,
    ) -> Context:
        """Return the context of rows; `lengths_1T`: of their texts, for dynamic rotary scaling."""
        samples_1 = torch.tensor([sample], device=self.device)
        positions = Positions(samples_1, positions_1T, tp=self.model.tp)
        view, sliding = AttentionView(Visibility(), None), None
        if rows is not None:
            view, sliding = self.views(positions_1T, rows, lengths_1T)
        return Context(view, positions, DropoutKeys(seed, 0, False), Recorder(), sliding)

    def views(
        self, positions_1T: Tensor, rows: Rows, lengths_1T: Tensor | None
    ) -> tuple[AttentionView, AttentionView | None]:
        """Return the views of blocks without a sliding window, and of those with one if it differs;
        see `context`."""
        turned = self.rotate(positions_1T, rows.last, lengths_1T)
        of_keys = None
        if self.shape.positions == "xpos" and turned is not None:
            (cos, sin), base = turned, self.shape.xpos_scale_base
            scale = decay(positions_1T, self.shape.rotary_dims, base, self.wide)
            turned, of_keys = (cos * scale, sin * scale), (cos / scale, sin / scale)
        view, sliding = AttentionView(Visibility(), turned, of_keys, pages=rows.see(None)), None
        if self.shape.sliding_window is not None:
            sliding = replace(view, pages=rows.see(self.shape.sliding_window))
        if self.shape.rope_theta_local is not None:
            local = self.rotate(positions_1T, rows.last, lengths_1T, local=True)
            sliding = replace(sliding or view, rotation=local)
        return view, sliding

    def rotate(
        self, positions_1T: Tensor, last: int, lengths_1T: Tensor | None, local: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rotation of rows at positions up to `last`, [1, T, 1, dims/2] each; None:
        nothing rotates."""
        if self.shape.positions not in ("rope", "xpos"):
            return None
        if lengths_1T is not None:
            return rotation(positions_1T, self.shape, self.wide, local, lengths_1T)
        if local not in self.rotations or self.rotations[local][0].shape[1] <= last:
            every = torch.arange(2 * (last + 64), device=self.device)[None]
            self.rotations[local] = rotation(every, self.shape, self.wide, local)
        cos, sin = self.rotations[local]
        return cos[:, positions_1T[0]], sin[:, positions_1T[0]]

    def enter(self, batch: Batch, block: Block, steps: Sequence[Step], x: Tensor) -> Tensor:
        """Return the input of a block, [1, T, D]; see `Runner.forward`."""
        x = self.combine(batch.items, batch.counts, block, steps, x)
        return add_levels(x, batch.levels_1TD)

    def combine(
        self,
        items: Sequence[Item],
        counts: Sequence[int],
        block: Block,
        steps: Sequence[Step],
        x: Tensor,
    ) -> Tensor:
        """Return rows [1, T, D] after what their steps do before a block, except for encodings of
        levels: normalize them, keep them for later steps, begin a core, inject kept values.

        Args:
            counts: rows of each item.
        """
        if not any(is_marked(step) for step in steps):
            return x
        normalized = [step.normalize for step in steps]
        if any(normalized):
            norm = self.model.final_norm
            assert norm is not None
            x = apply_to(items, counts, normalized, x, lambda rows, _: norm(rows))
        for item, step, part in zip(items, steps, x[0].split(list(counts)), strict=True):
            for name in step.kept:
                item.reads[name] = part
        begins = [step.begins_core for step in steps]
        if any(begins):
            x = apply_to(items, counts, begins, x, self.begin_core)
        return self.inject(items, counts, block, steps, x)

    def begin_core(self, x_1TD: Tensor, items: Sequence[Item]) -> Tensor:
        """Return the initial state of a core for the rows of items; see `Runner.initial_state`."""
        parts = []
        for item, part in zip(
            items, x_1TD.split([len(i.positions) for i in items], 1), strict=True
        ):
            positions = torch.tensor([item.positions], device=self.device)
            ctx = self.context(positions, item.seed, item.sample, None)
            parts.append(self.runner.initial_state(part, ctx))
        return torch.cat(parts, 1)

    def inject(
        self,
        items: Sequence[Item],
        counts: Sequence[int],
        block: Block,
        steps: Sequence[Step],
        x: Tensor,
    ) -> Tensor:
        """Return rows [1, T, D] with the values that steps read."""
        injects = [step.injected is not None for step in steps]
        if not any(injects):
            return x
        names = {id(item): step.injected for item, step in zip(items, steps, strict=True)}

        def add(rows: Tensor, items: Sequence[Item]) -> Tensor:
            read = [item.reads[cast(str, names[id(item)])] for item in items]
            return block.inject(rows, torch.cat(read)[None])

        return apply_to(items, counts, injects, x, add)

    def adapter(self, block: Block, steps: Sequence[Step], counts: Sequence[int]) -> Adapter | None:
        """Return the adapters of rows sorted by loop, if loops have adapters."""
        if not block.adapters:
            return None
        rows = Counter[int]()
        for step, count in zip(steps, counts, strict=True):
            rows[step.loop_index] += count
        if len(rows) == 1:
            return block.adapter(steps[0])
        key = steps[0].block, tuple(rows)
        if key not in self.adapters:
            shared: list[int] = []
            parts = [cast(Adapter, block.adapters[loop]) for loop in rows]
            self.adapters[key] = MixedAdapter(parts, shared), shared
        mixed, shared = self.adapters[key]
        shared[:] = rows.values()
        return mixed


def list_loops(batch: Batch, skipped: Mapping[Item, Sequence[int]]) -> list[list[int]]:
    """Return the loops of the visits that each item of a batch skips."""
    return [[item.visits[index].loop for index in skipped[item]] for item in batch.items]


def find_last_loop(item: Item, block: int) -> int:
    """Return the last loop of a block that an item ran."""
    return max(
        step.loop_index
        for visit in item.visits[: item.index]
        for step in visit.steps
        if step.block == block
    )


def is_marked(step: Step) -> bool:
    """Return True if a step does something before its block."""
    return bool(step.normalize or step.reads or step.writes)


def add_levels(x_1TD: Tensor, levels_1TD: Tensor | None) -> Tensor:
    """Return rows with the encodings of positions and levels, if there are any."""
    return x_1TD if levels_1TD is None else x_1TD + levels_1TD.to(x_1TD.dtype)


def apply_to(
    items: Sequence[Item],
    counts: Sequence[int],
    chosen: Sequence[bool],
    x_1TD: Tensor,
    function: Callable[[Tensor, Sequence[Item]], Tensor],
) -> Tensor:
    """Apply a function of rows and their items to the rows of chosen items; others stay as they
    are."""
    if all(chosen):
        return function(x_1TD, items)
    parts = list(x_1TD.split(list(counts), 1))
    owners = [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]
    of_chosen = [part for part, is_chosen in zip(parts, chosen, strict=True) if is_chosen]
    made = function(torch.cat(of_chosen, 1), owners)
    found = iter(made.split([part.shape[1] for part in of_chosen], 1))
    return torch.cat(
        [next(found) if is_chosen else part for part, is_chosen in zip(parts, chosen, strict=True)],
        1,
    )
