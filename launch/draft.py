"""Files written for a job before Slurm accepts it; a rejected job's files are removed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megarecur.files import create_folder, replace_file


class Draft:
    """A record of created files, which can remove them again."""

    def __init__(self) -> None:
        self.made: list[Path] = []
        """Paths in the order of creation."""
        self.times: dict[Path, tuple[int, int]] = {}
        """Access and modification times, in ns, of the folders in which paths were created."""

    def keep(self) -> None:
        """Keep all files."""
        self.made, self.times = [], {}

    def undo(self) -> None:
        """Remove everything that is not kept."""
        for path in reversed(self.made):
            with suppress(OSError):  # A folder into which another process has put files stays.
                path.rmdir() if path.is_dir() else path.unlink()
        for folder, times in self.times.items():
            with suppress(OSError):
                os.utime(folder, ns=times)
        self.keep()

    def note(self, path: Path) -> None:
        """Record a path that is about to be created."""
        if path.parent.is_dir() and path.parent not in {*self.made, *self.times}:
            found = path.parent.stat()
            self.times[path.parent] = (found.st_atime_ns, found.st_mtime_ns)
        self.made.append(path)

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents if missing."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self.note(folder)
            folder.mkdir(exist_ok=True)

    def write(self, path: Path, text: str) -> None:
        """Write a file; an existing one gets new content and stays."""
        if not path.exists():
            self.note(path)
        elif path.read_text(encoding="utf-8") == text:
            return
        replace_file(path, text)

    @contextmanager
    def made_whole(self, path: Path) -> Iterator[Path]:
        """Yield a folder to fill, which gets its name when it is complete."""
        self.note(path)
        with create_folder(path, shared=True) as aside:
            yield aside
        self.made += sorted(path.rglob("*"))


@contextmanager
def drafting(folder: Path) -> Iterator[Draft]:
    """Lock a run's `launch` folder, created if missing, against other launches.

    Everything created through the draft is removed at the end, unless `keep` was called.
    """
    path, draft = folder / "lock", Draft()
    with ExitStack() as stack:
        stack.callback(draft.undo)
        while True:
            draft.make_folder(folder)
            if not path.exists():
                draft.note(path)
            with suppress(FileNotFoundError):  # A rejected launch removes the folder.
                file = stack.enter_context(path.open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        stack.callback(draft.undo)  # before the lock is released
        yield draft
