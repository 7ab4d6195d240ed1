"""User errors. The command line prints them without a traceback and exits with 2.

Every message names the path (of a key or file), the value found and the remedy.
"""

import errno
import os
import re


class MegarecurError(Exception):
    """Base of all errors that the user can fix."""


class ConfigError(MegarecurError):
    """Invalid config, option or combination of them."""


class MeshError(MegarecurError):
    """World size that does not factor into the requested mesh."""


class PlacementError(MegarecurError):
    """Blocks that cannot be placed on the pipeline ranks."""


class CheckpointError(MegarecurError):
    """Missing or damaged checkpoint, or one of another run."""


class DataError(MegarecurError):
    """Unusable corpus, shard or tokenizer."""


def refuse_undecodable(name: str, text: str) -> None:
    """Reject text that is not valid Unicode, such as command-line words that are not UTF-8.

    Raises:
        ConfigError: the message names the byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        offset, character = len(text[: error.start].encode()), ord(text[error.start])
        what = f"byte {offset} (0x{character & 0xFF:02x}) is not UTF-8; give it in UTF-8"
        if not 0xDC80 <= character <= 0xDCFF:
            what = (
                f"character {error.start} (\\u{character:04x}) is half a surrogate pair; remove it"
            )
        raise ConfigError(f"{name} {text[:80]!a}: {what}") from None


def explain_os_error(error: OSError, path: object) -> str:
    """Return a message with the path (`path` if the error has none), the reason and the remedy."""
    remedies = SHORTAGES | {
        errno.ENOSPC: "free some space, or inodes if only `df -i` shows none, and start again",
        errno.EDQUOT: "free some of the quota and start again",
        errno.EROFS: "mount it for writing, or choose another run_dir",
        errno.EACCES: "allow access to it, or choose another path",
        errno.EPERM: "allow access to it, or choose another path",
        errno.EIO: "check the disk or file server, then start again",
        errno.ESTALE: "check the file server, then start again",
    }
    remedy = remedies.get(error.errno or 0, "fix the cause and start again")
    return f"{error.filename or path}: {error.strerror or error}; {remedy}"


class ShortageError(MegarecurError):
    """The process lacks descriptors or memory; the file that it was opening is not at fault."""


SHORTAGES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or open fewer corpora at once",
    errno.ENFILE: "the machine has no more descriptors; end what holds them",
    errno.ENOMEM: "free memory, or raise the limits of memory and address space (ulimit -v)",
}
"""Remedies by the errno of a process that lacks something, whatever it was doing."""


def refuse_shortage(error: BaseException, path: object) -> None:
    """Raise ShortageError if an error says that this process lacks descriptors or memory.

    Raises:
        ShortageError: the message names the path, the reason and the remedy.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    if number in SHORTAGES:
        raise ShortageError(
            f"{path}: cannot be opened ({os.strerror(number)}); {SHORTAGES[number]}"
        ) from None


NO_MEMORY = re.compile(r"out of memory|(cannot|can't) allocate memory", re.IGNORECASE)
"""Words of torch and of the system for an allocation that failed."""


def explain_memory_error(error: BaseException) -> str:
    """Return a message about an allocation that failed, with where it did and the remedy; "" for
    any other error."""
    if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
        return ""
    reason = " ".join(str(error).split()) or "an allocation failed"
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    return (
        f"out of memory: {reason}{where}; lower train.micro_batch_size, set train.recompute, or "
        "raise the limits of memory and address space (ulimit -v, --mem of a job)"
    )
