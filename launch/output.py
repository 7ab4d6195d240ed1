"""The lines that commands print, which hold names and texts from elsewhere."""

from __future__ import annotations

import sys
from typing import IO

from megarecur.reading import escape


def say(*values: object, end: str = "\n", file: IO[str] | None = None, flush: bool = False) -> None:
    """Print values as `print` does; a terminal gets no control characters, which it would obey.

    Messages (on stderr) never hold them. Other output is data where it goes to a file or pipe, and
    stays as it is.
    """
    stream = sys.stdout if file is None else file
    text = " ".join(map(str, values))
    if stream is sys.stderr or stream.isatty():
        text = escape(text)
    print(text, end=end, file=stream, flush=flush)
