"""Signals that ask a run to save and stop: noted when they come, obeyed at the step boundary."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megarecur.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """The last stop signal that this process received; 0: none."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.number = number

    def agreed(self, mesh: Mesh) -> int:
        """The signal any rank received, the same on all ranks; collective, once per step."""
        return mesh.max_over_world(self.number)


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Note stop signals instead of dying of them; the former handlers come back at the end."""
    flag = StopFlag()
    former = {number: signal.signal(number, flag.note) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
