"""Folders below a shared temporary folder that no other user can prepare, read or change.

    folder = private_folder("unpacked", fingerprint)      TMPDIR/megarecur-UID/unpacked/FINGERPRINT
    with open_lock(folder / "shard.lock") as lock: ...
    read_inside(downloaded / "tokenizer.json")            a file of a folder that others made

All processes of a user on one machine find one folder, so its name can be guessed. It is therefore
checked, component by component and through open descriptors, before every use: a folder, no link,
owned by this user, and accessible to no other. The shared folder above must not let other users
rename it: that takes the sticky bit of /tmp.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from megarecur.errors import DataError, MegarecurError
from megarecur.reading import check_links, read_bytes

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


SECRET_VARIABLE = "MEGARECUR_SECRET"
"""Environment variable with the secret by which the ranks of a job know each other's messages."""


def make_secret() -> dict[str, str]:
    """Return the variable with a new secret; one that is set already is kept.

    Other users cannot read the environment of a process.
    """
    return {SECRET_VARIABLE: os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32)}


class UnsafeFolder(MegarecurError):
    """A temporary folder that another user can change."""


def private_folder(*names: str) -> Path:
    """Return TMPDIR/megarecur-UID/NAMES; create what is missing with mode 0700.

    Args:
        names: components below, one each.

    Raises:
        UnsafeFolder: a component is a link, is no folder, belongs to another user or is writable by
            others; or others can rename entries of TMPDIR.
        OSError: it cannot be created or opened.
    """
    base = Path(tempfile.gettempdir()).resolve()
    return make_private(base, f"megarecur-{os.geteuid()}", *names)


def make_private(base: Path, *names: str) -> Path:
    """Return a folder below `base`; the rest as `private_folder`, with `base` instead of TMPDIR."""
    folder = base
    parent = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_base(base, os.fstat(parent))
        for name in names:
            folder /= name
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            try:
                child = os.open(name, OPEN_FOLDER, dir_fd=parent)
            except OSError as error:
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                    raise OSError(error.errno, error.strerror, str(folder)) from None
                raise _refuse(folder, _fault_of(found)) from None
            os.close(parent)
            parent = child
            found = os.fstat(child)
            if fault := _fault_of(found):
                raise _refuse(folder, fault)
            if found.st_mode & 0o077:
                os.fchmod(child, 0o700)
    finally:
        os.close(parent)
    return folder


def place_compile_cache() -> None:
    """Point torch.compile at a private folder, unless TORCHINDUCTOR_CACHE_DIR names one.

    Torch runs the code that it finds in its cache. By default that is TMPDIR/torchinductor_USER,
    even if another user made that folder. Compilers that this process starts inherit the variable.

    Raises:
        UnsafeFolder: see `private_folder`.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder("inductor"))


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock file for flock; create it, readable by this user alone. Follows no link.

    Raises:
        OSError: it is a link, or cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)


def read_inside(path: Path) -> bytes:
    """Return the content of a file of a folder that others made; a link out of it is refused.

    Copies of what a link names would carry a private file into a folder that is passed on. Links
    into the blobs of Hugging Face's own cache are followed.

    Raises:
        DataError: the file is a link that leads out of its folder, or no regular file.
        OSError: it cannot be read.
    """
    try:
        check_links(path.parent, path)
        return read_bytes(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}; put the file itself there, or remove it") from None


def _check_base(base: Path, found: os.stat_result) -> None:
    """Reject a folder whose entries other users may rename.

    Raises:
        UnsafeFolder: others may write it and it has no sticky bit, or it is another user's.
    """
    if found.st_uid not in (0, os.geteuid()):
        raise _refuse(base, f"belongs to user {found.st_uid}")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise _refuse(base, f"is writable by other users without the sticky bit ({_mode(found)})")


def _fault_of(found: os.stat_result) -> str:
    """Return why a folder is not private; "" if it is."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"is writable by other users ({_mode(found)})"
    return ""


def _mode(found: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(found.st_mode):04o}"


def _refuse(folder: Path, fault: str) -> UnsafeFolder:
    return UnsafeFolder(
        f"{folder}: {fault}, so another user could replace the files that are read from it; set "
        "TMPDIR to a folder that only you can write"
    )
