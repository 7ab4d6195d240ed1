"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megarecur.config.optimizer import Constant, Cosine, InverseSqrt, OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the rate of step 0, 1, ..., num_steps - 1: linear warm-up, then the schedule."""
    schedule = optimizer.schedule
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    if isinstance(schedule, Constant):
        return optimizer.lr
    if isinstance(schedule, InverseSqrt):
        return optimizer.lr * math.sqrt(schedule.warmup_steps / (step + 1))
    lowest = schedule.min_lr_ratio
    if isinstance(schedule, Cosine):
        progress = (step - schedule.warmup_steps) / max(num_steps - schedule.warmup_steps, 1)
        share = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    else:
        left = num_steps - step
        share = min(left / schedule.decay_steps, 1.0)
    return optimizer.lr * (lowest + (1.0 - lowest) * share)
