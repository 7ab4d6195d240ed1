"""The scores of attention: their scale, softcap and dropout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The scores of a layer: constants of the model."""

    scale: float
    """Factor of the products of queries and keys."""
    softcap: float | None = None
    """c of c tanh(score / c); None: no softcap."""


@dataclass(frozen=True)
class Drop:
    """Dropout of attention weights, as a function of (key, sample, head, query, key position)."""

    rate: float
    """Probability of dropout."""
    key: Tensor
    """Random key (`parallel.random.key_words`)."""
    samples_B1: Tensor
    """Global sample ids."""
    positions_1S: Tensor
    """Positions of the queries in their samples."""
    first_head: int
    """Number of query heads on earlier tensor-parallel ranks."""
