"""Is the run still getting on? Asked from outside: a hung process cannot say that it hangs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.folder import OVER, Beat
from launch.profile import Profile
from launch.slurm import SlurmError, ask

if TYPE_CHECKING:
    from launch.supervise import Attempt

STACK_SECONDS = 15.0
"""What a rank may take to write its stacks, and a network's file system to show them."""
LEAVING_SECONDS = 60.0
"""What processes may take to end, once the run is over."""


class Watchdog:
    """Compares what the run says of itself with what it said before.

    Args:
        profile: how long what may take.
        read: the run's last word.
        clock: seconds; only differences count, so that nodes' clocks may differ.
    """

    def __init__(
        self,
        profile: Profile,
        read: Callable[[], Beat | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.profile, self.read, self.clock = profile, read, clock
        self.last, self.changed = read(), clock()
        self.started = False
        self.paces: deque[float] = deque(maxlen=50)
        """Seconds per step."""

    def stalled(self) -> str:
        """What is wrong; empty if nothing is."""
        now, beat = self.clock(), self.read()
        if beat is not None and beat != self.last:
            steps = beat.step - self.last.step if self.started and self.last else 0
            if steps > 0 and beat.phase == "train":
                self.paces.append((now - self.changed) / steps)
            self.last, self.changed, self.started = beat, now, True
        waited = now - self.changed
        if waited <= self.limit():
            return ""
        where = f"at step {self.last.step} ({self.last.phase})" if self.last else "at the start"
        return f"no sign of life for {waited:.0f} s {where if self.started else 'at the start'}"

    @property
    def over(self) -> bool:
        """Whether the run has said its last word."""
        return self.started and self.last is not None and self.last.phase in OVER

    def limit(self) -> float:
        """Seconds that the present phase may be silent for."""
        if self.over:
            return LEAVING_SECONDS
        training = self.started and self.last is not None and self.last.phase == "train"
        if not training or len(self.paces) < 3:
            return self.profile.start_seconds
        median = statistics.median(self.paces)
        return max(self.profile.stall_seconds, self.profile.stall_factor * median)


def ask_for_stacks(attempt: Attempt, num_tasks: int) -> list[int]:
    """Have every rank write its Python stacks into the attempt's logs; the ranks that did not."""
    from launch.supervise import step_of

    try:
        ask("scancel", "--signal=QUIT", step_of(attempt.job))
    except SlurmError:
        return list(range(num_tasks))
    until = time.monotonic() + STACK_SECONDS
    while (silent := without_stacks(attempt.logs, num_tasks)) and time.monotonic() < until:
        time.sleep(0.1)
    return silent


def without_stacks(logs: Path, num_tasks: int) -> list[int]:
    """Ranks that have written no stacks."""
    written = {  # Read, not asked for their sizes: those may be old on a network's file system.
        int(path.stem.removeprefix("stacks-"))
        for path in logs.glob("stacks-*.txt")
        if path.read_bytes()
    }
    return [rank for rank in range(num_tasks) if rank not in written]
