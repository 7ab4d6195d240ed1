"""The layer map: the tuple from unrolled depth to parameter block that everything else reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the map: which block runs, and what else it touches.

    (block, loop_index) names a step uniquely within a map, at any depth.
    """

    block: int
    loop_index: int
    """Earlier uses of the block in this map, forward-only ones included."""
    stack: str = "decoder"
    grad: bool = True
    """False: forward only (truncated backward)."""
    reads: tuple[str, ...] = ()
    """Values other than the hidden state that the step needs."""
    exit: bool = False
    """Final norm and head are applied after this step too."""
    writes: tuple[str, ...] = ()
    """Names under which the hidden state that enters this step is kept for later reads. Naming the
    source here lets placement see where a read value comes from."""
    normalize: bool = False
    """The hidden state passes the final norm before it enters this step (Huginn's core to coda)."""

    @property
    def exit_name(self) -> str:
        """Of the exit after this step: `exit_1` comes after the first loop."""
        return f"exit_{self.loop_index + 1}"


LayerMap = tuple[Step, ...]


def from_order(order: Iterable[int]) -> LayerMap:
    """The plain map that runs blocks in this order, loop indices counted."""
    uses: Counter[int] = Counter()
    steps = []
    for block in order:
        steps.append(Step(block, uses[block]))
        uses[block] += 1
    return tuple(steps)


def mark(layer_map: LayerMap, position: int, **fields: object) -> LayerMap:
    """The same map with fields of one step replaced."""
    step = replace(layer_map[position], **fields)  # type: ignore[arg-type]
    return (*layer_map[:position], step, *layer_map[position + 1 :])


def count_uses(layer_map: LayerMap) -> dict[int, int]:
    """Uses of each block, in block order."""
    return dict(sorted(Counter(step.block for step in layer_map).items()))
