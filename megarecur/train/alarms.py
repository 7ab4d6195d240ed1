"""Divergence: noticed from the numbers of a log step, which are the same on every rank.

What is noticed goes into events.jsonl of the run folder, beside metrics.jsonl, and is acted on as
config.alarms says. Rolling back loads the parameters and moments of the last checkpoint from before
the trouble, while step, tokens and the data's order go on from where they are: the samples in
between are not read again, no step has two rows of metrics, and the rest of the schedule is as it
was. The state is saved at once, so that a run that dies then does not read them again either.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megarecur.config.schema import AlarmConfig

LEAST_HISTORY = 10
"""Log steps without alarm before a value can be out of the ordinary."""
LEAST_SPREAD = 0.01
"""Standard deviations of the loss count as at least this share of its mean."""
RESIDUAL = "recurrence/residual_norm/"


class Alarms:
    """The recent past of a run, as far as it was healthy.

    Args:
        config: what counts as out of the ordinary.
        rows: of metrics.jsonl so far; the last ones are the history.
        rolled_back_at: the step of the last roll-back, whose parameters are good.
    """

    def __init__(
        self,
        config: AlarmConfig,
        rows: Iterable[Mapping[str, Any]] = (),
        rolled_back_at: int = 0,
    ) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.residuals: deque[float] = deque(maxlen=config.window)
        self.skipped = 0
        self.healthy_step = 0
        """The last log step without an alarm, or with a roll-back."""
        for row in rows:
            if "optim/skipped" in row:
                self.check(row["step"], row)
        self.healthy_step = max(self.healthy_step, rolled_back_at)

    def check(self, step: int, values: Mapping[str, float | None]) -> list[str]:
        """What is out of the ordinary at a log step; where nothing is, its metrics are history."""
        config, reasons = self.config, []
        loss, residual = values.get("train/loss"), largest_residual(values)
        skipped = int(values["optim/skipped"] or 0)
        new = skipped - self.skipped
        self.skipped = skipped
        if config.non_finite is not None and new >= config.non_finite:
            reasons.append(f"{new} gradients were not finite since the last log step")
        if config.loss_spike is not None and loss is not None and spikes(loss, self.losses, config):
            mean = statistics.fmean(self.losses)
            reasons.append(f"train/loss is {loss:.4g}, after a mean of {mean:.4g}")
        if config.residual_growth is not None and len(self.residuals) >= LEAST_HISTORY:
            usual = statistics.median(self.residuals)
            if not residual <= config.residual_growth * usual:
                reasons.append(f"the residual norm is {residual:.4g}, usually {usual:.4g}")
        if not reasons:
            self.healthy_step = step
            if loss is not None and math.isfinite(loss):
                self.losses.append(loss)
            if residual > 0 and math.isfinite(residual):
                self.residuals.append(residual)
        return reasons


def spikes(loss: float, losses: deque[float], config: AlarmConfig) -> bool:
    """Whether a loss is far above those before it."""
    if not math.isfinite(loss):
        return True
    if len(losses) < LEAST_HISTORY:
        return False
    assert config.loss_spike is not None
    mean = statistics.fmean(losses)
    spread = max(statistics.pstdev(losses), LEAST_SPREAD * abs(mean))
    return loss > mean + config.loss_spike * spread


def largest_residual(values: Mapping[str, float | None]) -> float:
    """Over the steps of the map; 0 where nothing was measured, nan where something is not finite.

    Metrics that were read back have null for what was not finite.
    """
    found = [value for tag, value in values.items() if tag.startswith(RESIDUAL)]
    if any(value is None or math.isnan(value) for value in found):
        return math.nan
    return max((value for value in found if value is not None), default=0.0)


def record_event(run_dir: Path, **event: Any) -> None:
    """Append one line to events.jsonl, durably."""
    with (run_dir / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())
