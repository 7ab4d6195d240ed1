"""Signals that ask a run to save and stop: noted when they come, obeyed at the step boundary.

Imports nothing heavy: a worker notes signals before it spends seconds on importing torch.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megarecur.errors import MegarecurError

if TYPE_CHECKING:
    from megarecur.parallel.mesh import Mesh

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STDERR = 2
FAILED = 1 << 16
"""Above every signal: this rank cannot go on, and nothing is worth saving."""


class StopFlag:
    """The last stop signal that this process received, 0 for none; or an error of this rank."""

    def __init__(self) -> None:
        self.number, self.noted = 0, 0.0
        self.error: MegarecurError | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C, a second or more later, stops at once."""
        now = time.monotonic()
        if number == self.number == signal.SIGINT and now - self.noted > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.number not in (number, FAILED):
            self.number, self.noted = number, now

    def fail(self, error: MegarecurError) -> None:
        """Let every rank end with this error at the next boundary, instead of one alone."""
        self.number, self.error = FAILED, error

    def agreed(self, mesh: Mesh) -> int:
        """The signal any rank received, the same on all ranks; collective, once per step.

        Raises:
            MegarecurError: on every rank, what a rank failed with.
        """
        number = mesh.max_over_world(self.number)
        if number == FAILED:
            raise next(error for error in mesh.gather_objects(self.error) if error is not None)
        return number


def note_signals() -> StopFlag:
    """Note stop signals from now on instead of dying of them; one held back until now comes in."""
    flag = StopFlag()
    for number in STOP_SIGNALS:
        signal.signal(number, flag.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return flag


def write_stacks_on_demand() -> None:
    """On SIGQUIT, write the Python stacks of all threads and go on: into the folder that
    MEGARECUR_STACKS names, as stacks-RANK.txt, or to stderr."""
    folder = os.environ.get("MEGARECUR_STACKS")
    if folder is None:
        faulthandler.register(signal.SIGQUIT, file=STDERR)
        return
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    path = Path(folder) / f"stacks-{rank}.txt"
    # Seen by other machines at once, also on a network's file system.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_SYNC)
    faulthandler.register(signal.SIGQUIT, file=file)


def ignore_signals() -> None:
    """From here on the process only has to end: a late signal must not change its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Note stop signals; the former handlers come back at the end."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = note_signals()
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
