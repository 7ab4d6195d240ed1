"""Durable, atomic writes of files and folders; the only module that renames.

replace_file(run_dir / "config.yaml", text)            write to a temporary file, sync, rename
with open_replacement(path) as file: file.write(...)   the same, in several writes
with create_folder(path) as aside: ...                 the same for a whole folder
publish(aside, path)                                   only sync and rename
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from platform import node
from typing import Any, BinaryIO

UNCERTAIN = {errno.EBUSY, errno.EIO, errno.ENOENT, errno.ESTALE}
"""Errors of a rename on a network file system that may have succeeded, or may succeed later."""
RENAME_PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further attempt to rename."""


def aside_of(path: Path, shared: bool = False) -> Path:
    """Return the temporary path for `path`, in the same folder so that a rename is atomic.

    Args:
        shared: whether several processes may write `path` at once; the temporary name then includes
            the host and process id.
    """
    own = f".{node()}.{os.getpid()}" if shared else ""
    return path.with_name(f"{path.name}{own}.tmp")


def raise_file_limit(wanted: int = 65_536) -> int:
    """Raise this process's limit of open files to `wanted`, or as far as it may; return it.

    Children inherit the limit. A higher limit is kept.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Rename a complete file or folder to its final path; durable on return.

    An existing file is replaced. Files inside a folder must be synced by their writers.
    """
    sync(aside)
    rename(aside, path)
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder as `os.rename`, in spite of a network file system.

    A client that repeats a request after a lost reply reports a rename that succeeded as ENOENT;
    restarted or busy servers fail with ESTALE, EIO or EBUSY for a while.

    Raises:
        OSError: the rename failed, after further attempts if they may help.
    """
    moved = os.lstat(source)
    for pause in (*RENAME_PAUSES, None):
        try:
            os.rename(source, target)
            return
        except OSError as error:
            if error.errno not in UNCERTAIN:
                raise
            if not os.path.lexists(source):
                with suppress(OSError):
                    if os.path.samestat(os.lstat(target), moved):
                        return
                raise
            if pause is None:
                raise
            time.sleep(pause)


def create_anew(path: Path) -> BinaryIO:
    """Create a file for writing. Whatever has its name is removed, and never written through: it
    may be a link that another user has made, or a hard link to a file of this user.

    Raises:
        OSError: it cannot be created, or another process creates it again and again.
    """
    for last in (False, True):
        with suppress(FileNotFoundError):
            path.unlink()
        try:
            return open(path, "xb")
        except FileExistsError:
            if last:
                raise
    raise AssertionError("the second try returns or raises")


@contextmanager
def open_replacement(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it to `path` on exit, or remove it on an error.

    Args:
        shared: see `aside_of`.
    """
    aside = aside_of(path, shared)
    try:
        with create_anew(aside) as file:
            yield file
        publish(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def replace_file(path: Path, data: bytes | str, durable: bool = True) -> None:
    """Write a whole file atomically, text as UTF-8; readers see either the old or the new content.

    Args:
        durable: whether the content must survive a power failure right after this returns.
    """
    data = data.encode() if isinstance(data, str) else data
    if durable:
        with open_replacement(path) as file:
            file.write(data)
    else:
        with create_anew(aside_of(path)) as file:
            file.write(data)
        os.rename(aside_of(path), path)  # not `rename`: the next write comes soon


def create_file(path: Path, data: bytes | str) -> None:
    """Create, write and sync a file inside a folder that is not yet published."""
    with open(path, "xb", buffering=0) as file:
        write_all(file, data.encode() if isinstance(data, str) else data, path)
        os.fsync(file.fileno())


def write_all(file: FileIO, data: memoryview | bytes, path: Path) -> None:
    """Write all of `data`. An OSError names `path`."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON, durable on return. Terminates a truncated last line first."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        cut = False
        if size:
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if not size:
        sync(path.parent)


@contextmanager
def create_folder(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `path` on exit, or remove it on an error.

    Args:
        path: the final path; it must not exist, or be an empty folder.
        shared: see `aside_of`.
    """
    aside = aside_of(path, shared)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        for inside in aside.rglob("*"):
            if not inside.is_symlink():
                sync(inside)
        publish(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def delete_folder(path: Path, suffix: str = ".tmp") -> None:
    """Rename a folder and delete it, so that a crash leaves a `.tmp`, never a partial folder.

    Does nothing if it is gone already.
    """
    doomed = path.with_name(path.name + suffix)
    with suppress(FileNotFoundError):
        if doomed.exists():
            shutil.rmtree(doomed)
        rename(path, doomed)
        shutil.rmtree(doomed)
