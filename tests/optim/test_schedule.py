"""The learning rate by step: where each schedule begins, turns and ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from megarecur.config.optimizer import OptimizerConfig
from megarecur.optim.schedule import learning_rate


def rates(schedule: dict[str, Any], num_steps: int = 100) -> list[float]:
    """Of every step, at an lr of 2."""
    optimizer = OptimizerConfig.model_validate({"lr": 2.0, "schedule": schedule})
    return [learning_rate(optimizer, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("schedule", "known"),
    [
        ({"kind": "constant"}, {20: 2.0, 99: 2.0}),
        ({"kind": "cosine", "min_lr_ratio": 0.1}, {20: 2.0, 60: 1.1, 99: 0.2 + 0.9 * (
            1 + math.cos(math.pi * 79 / 80))}),
        ({"kind": "wsd", "decay_steps": 10}, {20: 2.0, 90: 2.0, 95: 1.0, 99: 0.2}),
        ({"kind": "inverse_sqrt"}, {20: 2.0 * math.sqrt(20 / 21), 79: 1.0}),
    ],
)  # fmt: skip
def test_rates_of_steps(schedule: dict[str, Any], known: dict[int, float]) -> None:
    found = rates({**schedule, "warmup_steps": 20})
    assert found[:20] == pytest.approx([0.1 * (step + 1) for step in range(20)])
    assert {step: found[step] for step in known} == pytest.approx(known)
    after = found[20:]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_the_inverse_square_root_is_that_of_fairseq() -> None:
    """Its peak is lr after the warm-up; then lr sqrt(warmup) / sqrt(update)."""
    found = rates({"kind": "inverse_sqrt", "warmup_steps": 40}, 1000)
    updates = np.arange(1, 1001)
    theirs = np.where(updates <= 40, 2.0 * updates / 40, 2.0 * 40**0.5 * updates**-0.5)
    np.testing.assert_allclose(found, theirs, rtol=1e-12)
