"""The interface of a teacher of the next token's distribution."""

from __future__ import annotations

from typing import Protocol

from megarecur.batch import Batch
from megarecur.parallel.head_loss import Target


class Teacher(Protocol):
    """The source of a teacher's logits."""

    def target(self, batch: Batch) -> Target:
        """Return a function that gives the logits of a slice of a micro batch's tokens, [n, V] or
        this rank's shard of V."""
