"""Files of corpora that are mapped into memory, and must not change while they are read.

Reading beyond the end of a mapped file that was cut kills the process (SIGBUS), and a file that is
rewritten in place changes the data under a run. A file that was deleted or replaced is still there
for those who have mapped it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megarecur.errors import DataError, refuse_shortage

REMEDY = (
    "copy it again from its source, or prepare it again, then run the same command, which resumes "
    "from the last checkpoint"
)


class MappedFiles:
    """The state of files at the time when they were mapped.

    Args:
        find_fault: returns what is wrong with the content of a file whose time changed, or None if
            it is what it was.
    """

    def __init__(self, find_fault: Callable[[Path], str | None]) -> None:
        self._find_fault = find_fault
        self._states: dict[Path, os.stat_result] = {}

    def add(self, file: Path) -> Path:
        """Remember the state of a file, which is mapped next, and return it."""
        self._states[file] = os.stat(file)
        return file

    def refuse_change(self, file: Path) -> None:
        """Reject a file that was cut or rewritten in place since it was added.

        Raises:
            DataError: the message names the file.
        """
        former = self._states[file]
        try:
            found = os.stat(file)
        except OSError:
            return
        if not os.path.samestat(found, former):
            return
        if found.st_size != former.st_size:
            what = f"has {found.st_size} bytes instead of {former.st_size}"
        elif found.st_mtime_ns == former.st_mtime_ns:
            return
        elif self._find_fault(file) is None:
            self._states[file] = found  # It was only touched, or copied over itself.
            return
        else:
            what = "was rewritten"
        raise DataError(f"{file}: {what} while it was read; {REMEDY}")


def find_fault(file: Path, expected: Mapping[str, Any], hashed: bool) -> str | None:
    """Return what is wrong with a file's size and, if `hashed`, its hash; None if nothing is."""
    try:
        if file.stat().st_size != expected["bytes"]:
            return f"has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if hashed and hash_file(file) != expected["xxh64"]:
            return "does not match its hash: it is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        refuse_shortage(error, file)
        return f"cannot be read ({error.strerror})"
    return None


def hash_file(path: Path) -> str:
    """Return the xxh64 of a file, as MDS writes it."""
    digest = xxhash.xxh64()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
