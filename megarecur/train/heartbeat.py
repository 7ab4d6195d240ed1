"""RUN/heartbeat.json: the current activity of a run, for processes that monitor it.

A new heartbeat means that something was finished since the last one: a batch, a block of a file. A
monitor may therefore treat silence as a hang, with a timeout for each phase.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock

from megarecur.files import replace_file
from megarecur.progress import Note

EVERY_STEP = "MEGARECUR_EVERY_HEARTBEAT"
"""Environment variable: write every heartbeat, so that the step of a repeated failure is known."""
MOST_SECONDS = 5.0
"""Maximum seconds between two heartbeats, if a phase progresses faster."""


class Heartbeat:
    """Writer of a run's heartbeat; rank 0 writes for all ranks."""

    def __init__(self, run_dir: Path, speaks: bool) -> None:
        self.path, self.speaks = run_dir / "heartbeat.json", speaks
        self.every = EVERY_STEP in os.environ
        self.phase, self.step, self.detail = "start", 0, ""
        self.count = 0
        """Signs of progress within the phase."""
        self.since = time.monotonic()
        """Beginning of the phase."""
        self._elsewhere: dict[str, str] = {}
        """Last progress in phases of the background, by phase."""
        self._next = 0.0
        self._lock = Lock()

    def enter(self, phase: str, step: int, detail: str = "") -> None:
        """Enter a phase, which is always written, or an optimizer step.

        Args:
            phase: start, train, evaluate, save, done, stopped or diverged.
        """
        with self._lock:
            changed = (phase, detail) != (self.phase, "")
            if phase != self.phase or step != self.step:
                self.since, self.count = time.monotonic(), 0
            self.phase, self.step = phase, step
            self.detail = detail or self._elsewhere.pop(phase, "")
            self._write(detail, changed or self.every)

    def advance(self, phase: str, detail: str) -> None:
        """Report progress within a phase; any thread may call this.

        Ignored in another phase: progress of a background save is no progress of training.
        """
        with self._lock:
            if phase == self.phase:
                self.detail, self.count = detail, self.count + 1
                self._write(detail, False)
            else:
                self._elsewhere[phase] = detail

    def note(self, phase: str, what: str = "") -> Note:
        """Return a function that reports a phase's progress, with details prefixed by `what`."""
        return lambda detail: self.advance(phase, f"{what}{detail}")

    def _write(self, detail: str, at_once: bool) -> None:
        """Write the heartbeat, with at most 1% of the time spent on writing."""
        now = time.monotonic()
        if not self.speaks or (now < self._next and not at_once):
            return
        beat = {"time": time.time(), "step": self.step, "phase": self.phase, "detail": detail}
        with suppress(OSError):  # Losing a heartbeat is harmless.
            # Training must not wait for the disk, which may be busy with a checkpoint.
            replace_file(self.path, json.dumps(beat), durable=False)
        done = time.monotonic()
        self._next = done + min(100 * (done - now), MOST_SECONDS)
