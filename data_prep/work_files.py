"""Files of unfinished work, in OUT.partial: a damaged one is named, with the remedy."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from megarecur.errors import DataError, refuse_shortage

DAMAGE = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, MemoryError,
    zipfile.BadZipFile, zlib.error, zstandard.ZstdError,
)  # fmt: skip
"""Errors by which readers of JSON, numpy's files and zst find damage."""


@contextmanager
def name_damage(file: Path) -> Iterator[None]:
    """Turn the failure to use a work file into an error that names it.

    Raises:
        DataError: the file is damaged.
        ShortageError: the process lacks memory.
    """
    try:
        yield
    except DAMAGE as error:
        refuse_shortage(error, file)
        raise DataError(
            f"{file}: is damaged ({error!a:.200}); delete {file.parent} and run the same command "
            "again"
        ) from None
