"""Plain words where the disk or the system refuses something."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarecur.errors import DataError, refuse_shortage


@contextmanager
def explain_os_errors(place: Path, kept: str = "") -> Iterator[None]:
    """Turn what the system refuses into one clear error.

    Args:
        place: named where the system names no file.
        kept: what becomes of the work when the disk is full.

    Raises:
        DataError: the disk is full, or a file cannot be read or written.
        ShortageError: the process lacks descriptors or memory.
    """
    try:
        yield
    except OSError as error:
        file = error.filename or place
        refuse_shortage(error, file)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            again = "; ".join(["free some space and run again", *([kept] if kept else [])])
            raise DataError(f"{file}: the disk is full; {again}") from None
        raise DataError(
            f"{file}: cannot be read or written ({error.strerror or error}); fix that, or choose "
            "another --out"
        ) from None
