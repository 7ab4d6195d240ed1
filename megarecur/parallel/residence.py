"""The seam between a model and an engine that shards its weights: which block is used when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


class Residence:
    """The presence of weights while they are used. This one serves weights that are always here.

    A model tells its residence what it is about to use, and an engine that shards weights, or
    reduces gradients early, attaches a residence of its own (`optim.uses`).
    """

    def begin(self, blocks: Sequence[int]) -> None:
        """Begin a forward pass.

        Args:
            blocks: the blocks of the pass in the order of their uses, known from the layer map.
        """

    def enter(self, block: int) -> None:
        """Make the weights of a block present, for a use that begins now."""

    def leave(self, block: int, y: Tensor) -> Tensor:
        """End a use of a block.

        Args:
            y: the output of the block, [B, S, D].

        Returns:
            y, watched for the beginning of the use's backward pass.
        """
        return y

    def enter_ends(self) -> None:
        """Make all weights present that belong to no block, such as embedding and head, for a use
        that begins now."""

    def leave_head(self, totals: Iterable[Tensor]) -> None:
        """End the use of the head by a loss.

        Args:
            totals: the loss's sums, watched for the beginning of the head's backward pass.
        """

    def end(self) -> None:
        """End the uses of blocks of a forward pass."""
