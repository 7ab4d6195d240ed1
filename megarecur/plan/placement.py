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
