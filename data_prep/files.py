"""Files that are either whole and on disk, or not there; and plain words where that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from typing import Any

from megarecur.errors import DataError


@contextmanager
def publish(path: Path) -> Iterator[Any]:
    """Write a file aside; give it its name when it is complete and on disk."""
    aside = path.with_name(f"{path.name}.{node()}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explain_os_errors(place: Path, kept: str = "") -> Iterator[None]:
    """Turn what the system refuses into one clear error.

    Args:
        place: named where the system names no file.
        kept: what becomes of the work when the disk is full.

    Raises:
        DataError: the disk is full, or a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        file = error.filename or place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            again = "; ".join(["free some space and run again", *([kept] if kept else [])])
            raise DataError(f"{file}: the disk is full; {again}") from None
        raise DataError(
            f"{file}: cannot be read or written ({error.strerror or error}); mend that, or choose "
            "another --out"
        ) from None
