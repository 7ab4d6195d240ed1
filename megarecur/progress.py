"""Progress reporting of long operations."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]
"""Callback that receives the progress within a phase, such as `batch 3 of 80`."""

WAITING = "waiting for the other ranks"
"""Progress of a rank that has done its part of a phase."""

REPORTS = "logs/waiting"
"""Folder of a run with the reports of its ranks in phases that take long."""


def note_nothing(detail: str) -> None:
    """Ignore progress; the default `Note`."""
