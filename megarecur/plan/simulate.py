"""What an order takes: time, bubbles and memory, from the costs of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megarecur.plan.order import Op


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage and one micro batch; times in any one unit, sizes in bytes."""

    forward: float
    inputs: float
    """Backward pass of the inputs (I), recompute included."""
    weights: float
    """Of the weights (W). A whole backward (B) takes both."""
    hop: float = 0.0
    """For the activations to reach the next stage, or their gradient to come back."""
    activation: int = 0
    """Kept from F until B or I has run."""
    deferred: int = 0
    """Kept from I until W has run."""


class Timed(NamedTuple):
    """An operation and when it ran."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step, by pipeline rank."""

    ranks: tuple[tuple[Timed, ...], ...]
    makespan: float
    busy: tuple[float, ...]
    """Time spent in F, B, I and W."""
    peak_bytes: tuple[int, ...]
    """Most that is kept at once."""
    peak_live: tuple[int, ...]
    """Most (stage, micro batch) pairs between their F and the end of their backward at once."""

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)
