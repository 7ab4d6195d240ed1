"""Alarms: detect divergence from the values of a log step, which are the same on every rank.

Alarms are appended to events.jsonl in the run folder, beside metrics.jsonl, and handled as
config.alarms says. A roll-back loads the parameters and moments of the last checkpoint from before
the alarm. Step, tokens and sample order continue from where they are: the samples in between are
not read again, no step gets two rows of metrics, and the rest of the schedule is unchanged. The
state is saved at once, so that a run that dies afterwards does not read those samples again either.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megarecur.config.train import AlarmConfig
from megarecur.files import append_row

LEAST_HISTORY = 10
"""Number of log steps without an alarm before spikes and growth are checked."""
LEAST_SPREAD = 0.01
"""Lower bound of the loss's standard deviation, as a share of its mean."""
RESIDUAL = "recurrence/residual_norm/"


class Alarms:
    """Alarm checks, with the values of recent healthy log steps as history.

    Args:
        config: thresholds and the action.
        rows: rows of metrics.jsonl so far; the last ones form the history.
        rolled_back_at: the step of the last roll-back, whose parameters are healthy.
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
        self.streak = 0
        """Number of consecutive non-finite gradients up to now."""
        self.healthy_step = 0
        """The last log step without an alarm, or the step of a later roll-back."""
        for row in rows:
            if "optim/skipped" in row:
                self.check(row["step"], row)
        self.healthy_step = max(self.healthy_step, rolled_back_at)

    def note_gradient(self, finite: bool) -> None:
        """Count consecutive non-finite gradients; call it every step, not only at log steps."""
        self.streak = 0 if finite else self.streak + 1

    @property
    def lost(self) -> bool:
        """Whether the parameters are unfit to be saved.

        True if as many consecutive gradients as raise the alarm were not finite.
        """
        return self.config.non_finite is not None and self.streak >= self.config.non_finite

    @property
    def streak_in_words(self) -> str:
        """The streak of non-finite gradients as the reason of an alarm."""
        return f"the last {self.streak} gradients were not finite"

    def check(self, step: int, values: Mapping[str, float | None]) -> list[str]:
        """Return the reasons for alarms at a log step; if there are none, add it to the history."""
        config, reasons = self.config, []
        loss, residual = values.get("train/loss"), largest_residual(values)
        skipped = int(values["optim/skipped"] or 0)
        new = skipped - self.skipped
        self.skipped = skipped
        if config.non_finite is not None and new >= config.non_finite:
            reasons.append(f"{new} gradients were not finite since the last log step")
        elif self.lost:
            reasons.append(self.streak_in_words)
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
    """Return True if a loss is far above the recent ones, or not finite."""
    if not math.isfinite(loss):
        return True
    if len(losses) < LEAST_HISTORY:
        return False
    assert config.loss_spike is not None
    mean = statistics.fmean(losses)
    spread = max(statistics.pstdev(losses), LEAST_SPREAD * abs(mean))
    return loss > mean + config.loss_spike * spread


def largest_residual(values: Mapping[str, float | None]) -> float:
    """Return the largest residual norm over the steps of the map.

    It is 0 if none was measured, NaN if one is not finite. Rows read from metrics.jsonl have None
    for a value that was not finite.
    """
    found = [value for tag, value in values.items() if tag.startswith(RESIDUAL)]
    if any(value is None or math.isnan(value) for value in found):
        return math.nan
    return max((value for value in found if value is not None), default=0.0)


def record_event(run_dir: Path, **event: Any) -> None:
    """Append one line to events.jsonl; durable on return."""
    append_row(run_dir / "events.jsonl", event)
