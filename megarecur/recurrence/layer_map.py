"""The layer map: a tuple that maps unrolled depth to parameter blocks, read by all other
packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

StackName = Literal["encoder", "decoder"]
ENCODER, TARGET = "encoder", "target"
"""Values of an encoder-decoder: the output of the encoder, which every step of the decoder attends
to, and the embedded target, with which the decoder's first step begins."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the map: the block that runs, and the values it reads and writes.

    (block, loop_index) names a step uniquely within a map, at any depth.
    """

    block: int
    loop_index: int
    """Number of earlier uses of the block in this map, forward-only ones included."""
    stack: StackName = "decoder"
    grad: bool = True
    """False if the step runs forward only (truncated backward)."""
    reads: tuple[str, ...] = ()
    """Values other than the hidden state that the step needs."""
    exit: bool = False
    """True if the final norm and head are applied after this step too."""
    writes: tuple[str, ...] = ()
    """Names under which the hidden state entering this step is kept for later reads. Naming the
    source here tells placement where a value comes from."""
    normalize: bool = False
    """True if the hidden state passes the final norm before this step (Huginn's core to coda)."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Names under which a runner keeps the hidden state that enters this step."""
        return tuple(name for name in self.writes if name not in (ENCODER, TARGET))

    @property
    def begins_core(self) -> bool:
        """True if a core starts here, from its own initial state."""
        return any(name.rpartition(".")[2] == "prelude" for name in self.writes)

    @property
    def injected(self) -> str | None:
        """Name of the value that is combined with the hidden state before the step, if any."""
        names = [name for name in self.reads if name not in (ENCODER, TARGET)]
        assert len(names) <= 1, "one value is injected per step"
        return names[0] if names else None

    @property
    def exit_name(self) -> str:
        """Name of the exit after this step; `exit_1` comes after the first loop."""
        return f"exit_{self.loop_index + 1}"


LayerMap = tuple[Step, ...]


def from_order(order: Iterable[int]) -> LayerMap:
    """Return the map that runs blocks in this order, with loop indices counted."""
    uses: Counter[int] = Counter()
    steps = []
    for block in order:
        steps.append(Step(block, uses[block]))
        uses[block] += 1
    return tuple(steps)


def mark(layer_map: LayerMap, position: int, **fields: object) -> LayerMap:
    """Return the map with some fields of one step replaced."""
    step = replace(layer_map[position], **fields)  # type: ignore[arg-type]
    return (*layer_map[:position], step, *layer_map[position + 1 :])


def join_stacks(encoder: LayerMap, decoder: LayerMap) -> LayerMap:
    """Return the map of an encoder-decoder.

    Blocks of the decoder are numbered after those of the encoder. The embedded target enters the
    map with its first step. The decoder's first step keeps what enters it as the output of the
    encoder, and begins with the embedded target; all its steps read that output.
    """
    first = 1 + max(step.block for step in encoder)
    below = [
        replace(
            step,
            stack="encoder",
            reads=tuple(f"{ENCODER}.{name}" for name in step.reads),
            writes=tuple(f"{ENCODER}.{name}" for name in step.writes),
        )
        for step in encoder
    ]
    above = [
        replace(step, block=first + step.block, reads=(*step.reads, ENCODER)) for step in decoder
    ]
    below[0] = replace(below[0], writes=(*below[0].writes, TARGET))
    above[0] = replace(
        above[0], reads=(TARGET, *above[0].reads), writes=(ENCODER, *above[0].writes)
    )
    return (*below, *above)


def stack_of_value(name: str) -> StackName:
    """Return the stack over whose positions a value extends."""
    return "encoder" if name.partition(".")[0] == ENCODER else "decoder"


def count_uses(layer_map: LayerMap) -> dict[int, int]:
    """Return the number of uses of each block, in block order."""
    return dict(sorted(Counter(step.block for step in layer_map).items()))
