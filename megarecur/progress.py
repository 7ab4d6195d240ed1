"""Progress reporting of long operations."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]
"""Callback that receives the progress within a phase, such as `batch 3 of 80`."""


def note_nothing(detail: str) -> None:
    """Ignore progress; the default `Note`."""
