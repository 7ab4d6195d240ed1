"""The layer map: a tuple that maps unrolled depth to parameter blocks, read by all other
packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the map: the block that runs, and the values it reads and writes.

    (block, loop_index) names a step uniquely within a map, at any depth.
    """

    block: int
    loop_index: int
    """Number of earlier uses of the block in this map, forward-only ones included."""
    stack: str = "decoder"
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


def count_uses(layer_map: LayerMap) -> dict[int, int]:
    """Return the number of uses of each block, in block order."""
    return dict(sorted(Counter(step.block for step in layer_map).items()))
