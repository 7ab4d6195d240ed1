"""Signals that make a run save and stop; recorded on arrival, handled at the step boundary.

This module imports nothing heavy, since a worker installs its handlers before it spends seconds on
importing torch.
"""

from __future__ import annotations

import ctypes
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
STACKS_VARIABLE = "MEGARECUR_STACKS"
"""Environment variable with the folder for every process's stacks; set by the monitor."""
LAUNCHER_VARIABLE = "MEGARECUR_LAUNCHER_PID"
"""Environment variable with the process id of a rank's launcher."""
PR_SET_PDEATHSIG = 1
"""Number in the kernel's prctl.h."""
RECORD = "nccl-{}.pickle"
"""Name of a rank's flight record in that folder; empty until it is written."""
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
"""Defaults of torch's variables that keep the last collectives of a process."""
STDERR = 2
FAILED = 1 << 16
"""Value above every signal number: this rank has failed, and the run ends without saving."""


class StopFlag:
    """The last stop signal that this process received, 0 for none, or an error of this rank."""

    def __init__(self) -> None:
        self.number, self.noted = 0, 0.0
        self.error: MegarecurError | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; a second Ctrl-C, over a second after the first, ends the process."""
        now = time.monotonic()
        if number == self.number == signal.SIGINT and now - self.noted > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.number not in (number, FAILED):
            self.number, self.noted = number, now

    def fail(self, error: MegarecurError) -> None:
        """Record an error, which every rank raises at the next step boundary."""
        self.number, self.error = FAILED, error

    def agreed(self, mesh: Mesh) -> int:
        """Return the signal that any rank received, the same on all; collective, once per step and
        before each save.

        Raises:
            MegarecurError: on every rank, the error of the first rank that failed.
        """
        number = mesh.max_over_world(self.number)
        if number == FAILED:
            error = mesh.first_over_world(self.error)
            assert error is not None, "the rank that failed holds its error"
            raise error
        return number


def note_signals() -> StopFlag:
    """Install handlers that record stop signals, and unblock these signals."""
    flag = StopFlag()
    for number in STOP_SIGNALS:
        signal.signal(number, flag.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return flag


def die_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when the one that launched it ends.

    A rank then saves and ends, instead of training on with no process to stop it.
    """
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(launcher):  # it has ended before
        os.kill(os.getpid(), signal.SIGTERM)


def rank_of_process() -> str:
    """Return this process's rank, as torchrun or Slurm gives it."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")


def write_stacks_on_demand() -> None:
    """On SIGQUIT, write the Python stacks of all threads and continue.

    They go to stacks-RANK.txt in the folder that STACKS_VARIABLE names, or to stderr. Where there
    is a folder, NCCL keeps its last collectives (`train.flight_recorder`), and writes them there
    when one of them times out.
    """
    folder = os.environ.get(STACKS_VARIABLE)
    if folder is None:
        faulthandler.register(signal.SIGQUIT, file=STDERR)
        return
    dumped = {"TORCH_FR_DUMP_TEMP_FILE": str(Path(folder) / "nccl-timeout-")}
    for name, value in (FLIGHT_RECORDER | dumped).items():
        os.environ.setdefault(name, value)
    path = Path(folder) / f"stacks-{rank_of_process()}.txt"
    # O_SYNC makes the file visible on other machines at once, on network file systems too.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_SYNC)
    faulthandler.register(signal.SIGQUIT, file=file)


def ignore_signals() -> None:
    """Ignore stop signals: a signal during shutdown must not change the exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Record stop signals; restore the former handlers at the end."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = note_signals()
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
