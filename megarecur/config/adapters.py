"""The section `adapters`: layer-wise LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Factor, Section, Size, show

AdapterTarget = Literal["query", "key", "value", "output", "gate", "up", "down"]


class AdaptersConfig(Section):
    """Layer-wise LoRA: every loop of a block adds scale B A x to the block's linear layers
    (Bae et al. 2025, Relaxed Recursive Transformers, section 3)."""

    rank: Size
    """Rank of A [rank, in] and B [out, rank]; clipped to the full rank of each matrix."""
    scale: Factor = 1.0
    """Factor on the adapter's output."""
    targets: Annotated[tuple[AdapterTarget, ...], Field(min_length=1)] | None = None
    """Linear layers that have an adapter. Default: all of the block."""
    norms: bool = False
    """Give every loop norms of its own, in place of the block's."""
    biases: bool = False
    """Let every loop also add to the biases of these layers, where they have one."""

    def find_problems(self) -> Iterator[str]:
        """Yield targets that are listed twice."""
        if self.targets is not None and len(set(self.targets)) < len(self.targets):
            yield f"targets={show(self.targets)} names a layer twice; name each once"
