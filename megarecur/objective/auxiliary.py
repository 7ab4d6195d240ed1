"""Auxiliary loss terms of every objective: z-loss and the cost of halting."""

from __future__ import annotations

from torch import Tensor

from megarecur.config.recurrence import HaltingConfig
from megarecur.parallel.loss import LossTerm


def z_terms(
    square: Tensor, coefficient: float, weight: float = 1.0, prefix: str = ""
) -> dict[str, LossTerm]:
    """Return the z-loss of logits; empty if its coefficient is 0.

    Args:
        square: logsumexp^2 of the logits, summed over tokens.
        weight: weight of the logits' loss in the objective.
        prefix: prefix of the term's name, for logits of an exit.
    """
    if coefficient <= 0.0:
        return {}
    return {f"{prefix}z_loss": LossTerm(square, "tokens", weight * coefficient)}


def halting_terms(cost: Tensor, config: HaltingConfig) -> dict[str, LossTerm]:
    """Return the cost of halting, which is the expected depth, summed over documents."""
    return {"halting": LossTerm(cost, "documents", config.coefficient)}
