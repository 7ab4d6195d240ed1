"""The order: what every pipeline rank does, one operation after the other.

Operations name a stage of the walk and a micro batch:

    F   forward                         B   backward, whole
    I   backward, inputs only           W   backward, the weights that I left
    SEND_F, RECV_F   activations: from stage s, to stage s (from s - 1)
    SEND_B, RECV_B   gradients of activations: from stage s (to s - 1), to stage s (from s + 1)

Per pair of ranks and direction, sends and receives come in the same order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]


class Op(NamedTuple):
    """One operation of one rank."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


Order = tuple[tuple[Op, ...], ...]
"""By pipeline rank."""
