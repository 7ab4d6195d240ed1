"""Faults of the system: file operations of this process that fail by choice.

    with failing("open", "metrics.jsonl", errno.EMFILE) as failed: ...
    assert failed

Python announces each operation to audit hooks before it is done, and raises what they raise. A hook
stays for the life of the process, so there is one, and it does nothing without a fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any


@dataclass
class Fault:
    """An operation that fails, and the paths with which it was called."""

    event: str
    """Name of an audit event: open, os.rename, os.mkdir, os.remove, os.rmdir, os.listdir, ..."""
    pattern: str
    """Shell pattern of the end of the path."""
    number: int
    """The errno."""
    times: float
    """How often it fails."""
    failed: list[str] = field(default_factory=list)

    def meet(self, event: str, args: tuple[Any, ...]) -> None:
        """Fail if this is the operation."""
        if event != self.event or len(self.failed) >= self.times:
            return
        if isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if fnmatch(path, f"*{self.pattern}"):
                self.failed.append(path)
                raise OSError(self.number, os.strerror(self.number), path)


faults: list[Fault] = []
installed: list[bool] = []


def hook(event: str, args: tuple[Any, ...]) -> None:
    """Let each fault look at an event."""
    for fault in faults:
        fault.meet(event, args)


@contextmanager
def failing(event: str, pattern: str, number: int, times: float = 1) -> Iterator[list[str]]:
    """Let an operation of this process fail; yield the paths for which it has."""
    if not installed:
        sys.addaudithook(hook)
        installed.append(True)
    fault = Fault(event, pattern, number, times)
    faults.append(fault)
    try:
        yield fault.failed
    finally:
        faults.remove(fault)
