"""Where parameters live: a partition of blocks over pipeline ranks. One owner per block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """The pipeline rank of every block, of the embedding, and of the final norm with the head."""

    ranks: int
    owners: tuple[int, ...]
    """By block."""
    embedding: int
    head: int

    def blocks(self, rank: int) -> tuple[int, ...]:
        """The blocks that live on a rank."""
        return tuple(block for block, owner in enumerate(self.owners) if owner == rank)


def place(config):
    p = config.parallel.pipeline
    from megarecur.recurrence.schemes import layer_map

    steps = layer_map(config.recurrence)
    n = max(s.block for s in steps) + 1
    owners = getattr(config.parallel, "placement", None) or tuple(b * p // n for b in range(n))
    return Placement(p, owners, owners[steps[0].block], owners[steps[-1].block])
