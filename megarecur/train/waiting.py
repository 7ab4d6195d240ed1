"""RUN/logs/waiting: what each rank does in a phase that takes long, for `megarecur status`.

The heartbeat is of rank 0, which may wait for another rank. A rank whose phase (start, evaluation,
saving) lasts longer than LONG_SECONDS writes one small file, ever more rarely, and deletes it after
the phase. Nothing is communicated, and quick phases write nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megarecur.files import replace_file
from megarecur.parallel.mesh import Mesh, node_name
from megarecur.progress import REPORTS
from megarecur.train.heartbeat import Heartbeat

PHASES = ("start", "evaluate", "save")
LONG_SECONDS = 30.0
"""Age of a phase at the first report; the next one comes at twice the age, and so on."""
MOST_SECONDS = 300.0
"""Seconds between two reports at most."""
TICK_SECONDS = 5.0


class RankReport:
    """The report of one rank, written while its phase takes long."""

    def __init__(self, beat: Heartbeat, run_dir: Path, mesh: Mesh) -> None:
        self.beat, self.place = beat, {"rank": mesh.rank, "world": mesh.world, "host": node_name()}
        self.path = run_dir / REPORTS / f"rank-{mesh.rank:05d}.json"
        self.since, self.due = 0.0, LONG_SECONDS
        """Beginning of the phase that is being watched, and its age at the next report."""

    def look(self, now: float) -> None:
        """Write a report if it is due; delete that of a phase that is over.

        Args:
            now: monotonic seconds.
        """
        beat = self.beat
        if beat.since != self.since:
            if self.due > LONG_SECONDS:
                self.path.unlink(missing_ok=True)
            self.since, self.due = beat.since, LONG_SECONDS
        age = now - self.since
        if beat.phase not in PHASES or age < self.due:
            return
        self.due = age + min(age, MOST_SECONDS)
        report = self.place | {
            "time": time.time(), "seconds": age, "phase": beat.phase, "step": beat.step,
            "detail": beat.detail, "count": beat.count,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(report), durable=False)


@contextmanager
def reporting_long_phases(beat: Heartbeat, run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Report this rank's long phases from a thread; does nothing in a world of one process."""
    if mesh.world == 1:
        yield
        return
    report, over = RankReport(beat, run_dir, mesh), threading.Event()

    def watch() -> None:
        while not over.wait(TICK_SECONDS):
            with suppress(OSError):  # Losing a report is harmless.
                report.look(time.monotonic())

    thread = threading.Thread(target=watch, name="long phases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            report.path.unlink(missing_ok=True)
