"""Leases of folders: one process at a time holds a folder.

    lease = Lease(run_dir / "lease", run_dir)
    if holder := lease.take("host 17"): ...         the text of the process that holds it
    lease.release()

A lease is a lock of the operating system on a file, which names its holder, and on a folder:
deleting the file lets no other process in. Some network file systems lock no folders; there the
file alone counts, and its holder should check now and then whether it was deleted (`is_lost`).
Locks end with their process, even if that is killed. Nothing depends on a clock.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

ATTEMPTS = 10
"""Times that a file is opened, if it is deleted before it is locked."""


class Lease:
    """A lease of a folder, not taken yet.

    Args:
        path: file that names the holder.
        folder: existing folder that is locked too; no other kind of lease may lock it.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self._file: TextIO | None = None
        self._folder: int | None = None
        """Descriptor of the folder, locked; None where folders cannot be locked."""

    def take(self, holder: str) -> str:
        """Take the lease, also again after its file or folder was deleted.

        Args:
            holder: text for other processes about this one.

        Returns:
            "" on success; else what is known of the process that holds it, never "".

        Raises:
            OSError: the file or folder cannot be opened.
        """
        if not self._lock_folder():
            text = ""
            with suppress(FileNotFoundError):
                text = self.path.read_text("utf-8", errors="replace")
            return text.strip() or "another process"
        for _ in range(ATTEMPTS):
            self._close_file()
            self._file = self.path.open("a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                return self._file.read().strip() or "another process"
            if not self.is_lost():  # else it was deleted between the two calls
                break
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(holder)
        self._file.flush()
        return ""

    def is_lost(self) -> bool:
        """Return True if the file of a lease that was taken is deleted or replaced."""
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def moved_to(self) -> str:
        """Return where the folder lies since it was renamed; "" if it was not, or is not known."""
        place = ""
        if self._folder is not None and not self._is_in_place():
            with suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{self._folder}")
        return "" if place.endswith(" (deleted)") else place

    def release(self) -> None:
        """Release the lease."""
        self._close_file()
        if self._folder is not None:
            folder, self._folder = self._folder, None
            os.close(folder)

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _lock_folder(self) -> bool:
        """Lock the folder, or the one that was made in its place; False if another process has."""
        if self._folder is not None:
            if self._is_in_place():
                return True
            former, self._folder = self._folder, None
            os.close(former)
        self._folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            os.close(self._folder)
            self._folder = None
            return not isinstance(error, BlockingIOError)

    def _is_in_place(self) -> bool:
        """Return True if the locked folder still has its path."""
        assert self._folder is not None
        try:
            return os.path.samestat(os.fstat(self._folder), os.stat(self.folder))
        except OSError:
            return False
