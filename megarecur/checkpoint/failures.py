"""Errors of saving and loading: one error, the same on every rank."""

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megarecur.errors import CheckpointError, MegarecurError, explain_os_error
from megarecur.parallel.tree import gather_bytes, group_rank, group_size, reduce_max, scatter_bytes
from megarecur.reading import parse_json

logger = logging.getLogger(__name__)


class VanishedCheckpoint(CheckpointError):
    """Raised if a checkpoint's folder was deleted while it was written."""


@contextmanager
def one_error(doing: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Merge the errors of all ranks into one CheckpointError, the same on every rank; collective.

    Costs one reduction of a number; errors are sent only if there are some. The body must not leave
    a collective half done.

    Args:
        doing: opening of the message.
        group: the ranks, over gloo; None: all.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not reduce_max(torch.tensor([int(failure is not None)]), group)[0]:
        return
    own = b""
    if failure is not None:
        if not isinstance(failure, MegarecurError | OSError):
            logger.error("%s", doing, exc_info=failure)  # our bug: keep the traceback
        vanished = isinstance(failure, FileNotFoundError)
        own = json.dumps([explain(group_rank(group), failure), vanished]).encode()
    found = [parse_json(part) for part in gather_bytes(own, group) if part]
    merged = json.dumps(["; ".join(sorted({text for text, _ in found})), any(v for _, v in found)])
    text, vanished = parse_json(scatter_bytes([merged.encode()] * group_size(group), group))
    kind = VanishedCheckpoint if vanished else CheckpointError
    raise kind(f"{doing}: {text}" if doing else text) from None


def explain(rank: int, error: Exception) -> str:
    """Return one rank's error in words, with its remedy."""
    if isinstance(error, MegarecurError):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename or f"rank {rank}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"no space left on the disk of {where}: free some, or inodes if only `df -i` shows "
                "none, or lower checkpoint.keep_last"
            )
        return explain_os_error(error, where)
    return f"rank {rank}: {type(error).__name__}: {error}"
