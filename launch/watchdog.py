"""Watch the progress of a run from outside, because a hung process cannot report that it hangs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megarecur.launch.folder import OVER, Beat
from megarecur.launch.profile import ClusterProfile
from megarecur.launch.slurm import SlurmError, ask, step_of
from megarecur.train.signals import RECORD

STACK_SECONDS = 15.0
"""Seconds that a rank may take to write its stacks, and a network file system to show them."""
LEAVING_SECONDS = 60.0
"""Seconds that processes may take to end after the run."""


class Watchdog:
    """A comparison of the run's heartbeat with earlier ones.

    Args:
        read: returns the run's last heartbeat.
        clock: returns seconds; only differences count, so nodes' clocks may differ.
    """

    def __init__(
        self,
        profile: ClusterProfile,
        read: Callable[[], Beat | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.profile, self.read, self.clock = profile, read, clock
        self.last, self.changed = read(), clock()
        self.started = False
        self.paces: deque[float] = deque(maxlen=50)
        """Seconds per optimizer step."""

    def stalled(self) -> str:
        """Return why the run stalls; empty if it does not."""
        now, beat = self.clock(), self.read()
        if beat is not None and beat != self.last:
            steps = beat.step - self.last.step if self.started and self.last else 0
            if steps > 0 and beat.phase == "train":
                self.paces.append((now - self.changed) / steps)
            self.last, self.changed, self.started = beat, now, True
        waited, (key, limit) = now - self.changed, self.limit()
        if waited <= limit:
            return ""
        doing = self.last.doing if self.started and self.last else "the start"
        return f"{doing} sent no heartbeat for {waited:.0f} s ({key}: {limit:.0f} s)"

    @property
    def over(self) -> bool:
        """Return True if the run has sent its last heartbeat."""
        return self.started and self.last is not None and self.last.phase in OVER

    def limit(self) -> tuple[str, float]:
        """Return the setting that limits the silence of the current phase, and its seconds."""
        if self.over:
            return "the end of its processes", LEAVING_SECONDS
        phase = self.last.phase if self.started and self.last is not None else "start"
        pace = statistics.median(self.paces) if len(self.paces) >= 3 else None
        return self.profile.stall_limit(phase, pace)


def ask_for_stacks(job: str, logs: Path, num_tasks: int) -> list[int]:
    """Have every rank of a Slurm job write its Python stacks into `logs`; return the ranks that
    did not."""
    try:
        ask("scancel", "--signal=QUIT", step_of(job))
    except SlurmError:
        return list(range(num_tasks))
    return wait_for_stacks(logs, num_tasks)


def wait_for_stacks(logs: Path, num_tasks: int) -> list[int]:
    """Wait until every rank has written its stacks, and its record of collectives if it keeps one;
    return the ranks that have written no stacks."""
    until = time.monotonic() + STACK_SECONDS
    while time.monotonic() < until:
        records = logs.glob(RECORD.format("*"))
        if not without_stacks(logs, num_tasks) and all(path.read_bytes() for path in records):
            break
        time.sleep(0.1)
    return without_stacks(logs, num_tasks)


def without_stacks(logs: Path, num_tasks: int) -> list[int]:
    """Return the ranks that have written no stacks."""
    written = {  # Sizes may be stale on a network file system, so files are read.
        int(path.stem.removeprefix("stacks-"))
        for path in logs.glob("stacks-*.txt")
        if path.read_bytes()
    }
    return [rank for rank in range(num_tasks) if rank not in written]
