"""The order in which passes use units of parameters, followed forward and backward.

A unit is what an engine gathers, or reduces, at once: usually a block. The layer map says before a
pass which blocks it will use. An engine can therefore gather weights ahead of their use, free them
after the last one, and reduce gradients as soon as the first use of a block has been
differentiated, at any depth. Every replica follows the same map, so all launch their collectives in
the same order, even if halting or the number of chunks differs between them: only the first and
last use of a unit matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from megarecur.parallel.residence import Residence
from megarecur.recurrence.inventory import ParameterSpec
from megarecur.recurrence.layer_map import Step

ENDS = "ends"
"""The unit of the embedding, and of all other parameters that belong neither to a block nor to the
head: they stay present through whole passes."""
HEAD = "head"
"""The unit of the head, if it shares no table with an embedding. Backward is done with it before
the first block."""


@dataclass
class Pass:
    """A forward pass over steps of the map, and its backward pass."""

    blocks: list[int] = field(default_factory=list)
    """Blocks with a gradient in the order of their uses; repetitions in a row count once."""
    seen: set[str] = field(default_factory=set)
    """Units with such a use."""


class Uses(Residence):
    """Follows uses; an engine overrides what happens at them.

    Args:
        needed: the units of each block of this rank.
        holds: whether uses are not known in advance, because the map runs on each chunk of a text.
            Units then stay until the end of a pass.
    """

    def __init__(self, needed: Mapping[int, tuple[str, ...]], holds: bool = False) -> None:
        self.needed, self.holds = needed, holds
        self.now = Pass()
        self.ahead: list[int] = []
        """Blocks that the pass has not entered yet."""
        self.current: int | None = None
        """The block in use, or the last one used."""
        self.differentiating = False
        """Whether a backward pass is running."""
        self.closing: list[str] = []
        """Units whose last use in backward has begun."""
        self.finished: Counter[str] = Counter()
        """Backward passes that a unit has ended in this optimizer step."""
        self.expected: Counter[str] = Counter()
        """Backward passes in which a unit will take part in this optimizer step, if known."""

    # ------------------------------------------------------------------------ for the engine

    def present(self, block: int, ahead: Sequence[int]) -> None:
        """Make the units of a block present, and begin to gather those of the blocks ahead."""

    def receive(self, units: Iterable[str]) -> None:
        """Prepare for gradients of units."""

    def free(self, unit: str) -> None:
        """Free the weights of a unit that the pass uses no more."""

    def complete(self, unit: str) -> None:
        """Note that a backward pass has computed all it adds to the gradient of a unit."""

    # ------------------------------------------------------------------------ from the model

    def begin(self, blocks: Sequence[int]) -> None:
        """Begin a forward pass."""
        self.ahead = [block for block, _ in groupby(blocks)]
        self.current, self.now = None, Pass()

    def enter(self, block: int) -> None:
        """Make a block present. In a backward pass, which computes it again, it is already."""
        if self.differentiating or block == self.current:
            return
        self.leave_current()
        self.current = block
        if block in self.ahead:
            del self.ahead[: self.ahead.index(block) + 1]
        self.present(block, self.ahead)

    def leave(self, block: int, y: Tensor) -> Tensor:
        """End a use, and watch for the beginning of its backward pass."""
        if self.differentiating or not (torch.is_grad_enabled() and y.requires_grad):
            return y
        now = self.now
        if not now.blocks or now.blocks[-1] != block:
            now.blocks.append(block)
        first = [unit for unit in self.needed[block] if unit not in now.seen]
        now.seen.update(first)
        y.register_hook(partial(self.enter_backward, now, len(now.blocks) - 1, first))
        return y

    def end(self) -> None:
        """End a forward pass; what it used last, backward uses first."""
        if not torch.is_grad_enabled():
            self.leave_current()
            self.current = None

    def leave_current(self) -> None:
        """Free what the block used last does not share with blocks ahead."""
        if self.current is None or self.holds:
            return
        later = {unit for block in self.ahead for unit in self.needed[block]}
        for unit in self.needed[self.current]:
            if unit not in later:
                self.free(unit)

    def leave_head(self, totals: Iterable[Tensor]) -> None:
        """Watch for the beginning of the head's backward pass."""
        for total in totals:
            if total.requires_grad:
                total.register_hook(self.enter_head_backward)

    # ----------------------------------------------------------------------- from backward passes

    def begin_backward(self) -> None:
        """Begin a backward pass."""
        self.differentiating, self.current = True, None
        self.enter_ends()
        self.receive([ENDS])

    def enter_backward(self, now: Pass, index: int, first: list[str], _: Tensor) -> None:
        """Begin the backward pass of a use; a hook of its output's gradient.

        Autograd runs what was recorded last first, so uses that come later in the map are done.

        Args:
            index: place of the use in `now.blocks`.
            first: units that the pass used here for the first time.
        """
        block = now.blocks[index]
        if block != self.current:
            self.close()
            self.current = block
            self.present(block, now.blocks[:index][::-1])
            self.receive(self.needed[block])
        self.closing += first

    def enter_head_backward(self, _: Tensor) -> None:
        """Begin the backward pass of the head; a hook of the gradient of every sum of a loss.

        Autograd runs all products of the head before those of blocks, which were recorded earlier.
        """
        if HEAD not in self.closing:
            self.receive([HEAD])
            self.closing.append(HEAD)

    def end_backward(self) -> None:
        """End a backward pass."""
        self.close()
        self.complete(ENDS)
        self.differentiating, self.current = False, None

    def close(self) -> None:
        """End the backward passes of units that the pass used here for the first time."""
        for unit in self.closing:
            self.complete(unit)
            self.free(unit)
        self.closing.clear()

    # --------------------------------------------------------------------------- optimizer steps

    def expect(self, stages: Iterable[Sequence[Step]], num_microbatches: int) -> None:
        """Announce the backward passes of an optimizer step.

        Args:
            stages: the steps of the map in each stage of this rank that has a backward pass.
            num_microbatches: the number of micro batches that pass through each.
        """
        self.expected.clear()
        self.expected[HEAD] = num_microbatches  # Each has one loss, on the rank of the head.
        for steps in stages:
            units = {unit for step in steps if step.grad for unit in self.needed[step.block]}
            self.expected.update(dict.fromkeys(units | {ENDS}, num_microbatches))

    def is_last(self, unit: str) -> bool:
        """Count a backward pass of a unit; return True if no other follows in this step."""
        self.finished[unit] += 1
        return self.finished[unit] == self.expected[unit]

    def forget(self) -> None:
        """Forget the passes of an optimizer step that is over."""
        self.finished.clear()
        self.expected.clear()


def unit_of(spec: ParameterSpec, shares_feed_forward: bool) -> str:
    """Return the unit of a parameter.

    Args:
        spec: the parameter.
        shares_feed_forward: whether all blocks use one feed-forward layer, which is then a unit of
            its own.
    """
    if spec.name.startswith("head."):
        return HEAD
    if spec.block is None or ".halting." in spec.name:
        return ENDS  # Halting heads are used between the uses of blocks.
    if shares_feed_forward and f"blocks.{spec.block}.feed_forward." in spec.name:
        return f"feed-forward of block {spec.block}"
    return f"block {spec.block}"
