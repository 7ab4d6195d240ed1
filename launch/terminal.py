"""Tables for a terminal, and the same in full for files and pipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console, RenderableType

from megarecur.data_prep.console import EscapingConsole
from megarecur.launch.output import say
from megarecur.progress import Note

PAGE = 100
"""Columns of a page where there is no terminal; what is wider gets the room it needs."""
UNBOUNDED = 100_000


def make_console() -> Console:
    """Return the terminal; elsewhere a page of 100 columns."""
    console = EscapingConsole()
    return console if console.is_terminal else EscapingConsole(width=PAGE)


def show(draw: Callable[[int], RenderableType]) -> None:
    """Print to the terminal's width; to a file or pipe in full, so that no cell is cut short.

    Args:
        draw: makes what is printed, given the columns that a picture may take.
    """
    console = make_console()
    content = draw(max(console.width, 60))
    if console.is_terminal:
        console.print(content)
        return
    options = console.options.update(width=UNBOUNDED)
    console.width = max(PAGE, console.measure(content, options=options).maximum)
    with console.capture() as captured:
        console.print(content)
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def note_progress(phase: str, seconds: float = 5.0) -> Note:
    """Return a callback that prints progress on stderr, at most once in some seconds."""
    stream, last = sys.stderr, time.monotonic()

    def note(detail: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(f"{phase}: {detail}", file=stream, flush=True)

    return note
