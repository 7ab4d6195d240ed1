"""Checkpoints: saved from any mesh, loaded on any other, and published atomically.

    save(root, step, shards, state).result()      every rank passes the shards it owns
    path, damaged = find_checkpoint(root)         the newest checkpoint whose checksums all match
    load(path, shards); state = read_state(path)

planning.py says which rank writes a replica, and which rank reads which part of which chunk;
failures.py raises an error of one rank on all ranks; storage.py has the file format. All ranks must
see the same file system.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megarecur.checkpoint.failures import VanishedCheckpoint, one_error
from megarecur.checkpoint.index import (
    DTYPES,
    DamagedCheckpoint,
    Index,
    forget_index,
    read_fingerprint,
    read_index,
    unseal,
)
from megarecur.checkpoint.planning import SavePlanner, Values
from megarecur.checkpoint.storage import FolderWriter, find_damage, read_chunks
from megarecur.errors import CheckpointError, MegarecurError, explain_os_error
from megarecur.parallel.objects import broadcast_object, gather_objects
from megarecur.parallel.shards import TensorShard, boxes
from megarecur.parallel.tree import (
    gather_bytes,
    group_rank,
    group_size,
    reduce_max,
)
from megarecur.progress import WAITING, Note, note_nothing

__all__ = [
    "SaveHandle",
    "SavePlanner",
    "TensorShard",
    "boxes",
    "find_checkpoint",
    "from_first_rank",
    "list_checkpoints",
    "load",
    "read_state",
    "save",
    "verify",
    "write",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

STEP_FOLDER = re.compile(r"step-[0-9]{8}")
TEMPORARY = re.compile(r"(step-[0-9]{8}(\.damaged)?|latest|best)\.tmp")
POINTERS = ("latest", "best")
"""Files that name a checkpoint, for people and scripts. The folders are authoritative."""


class SaveHandle:
    """Handle of a running save: `result()` returns the checkpoint's path or raises the error.

    `work` runs in the constructor or, with `in_background`, in a daemon thread. The interpreter
    does not wait for that thread at exit: call `result()`.
    """

    def __init__(self, work: Callable[[], Path], in_background: bool = False) -> None:
        self._future: Future[Path] = Future()
        self.seconds = 0.0
        """Duration of the work in seconds; 0 until it is done."""
        if in_background:
            Thread(target=self._run, args=(work,), name="save", daemon=True).start()
        else:
            self._run(work)

    def _run(self, work: Callable[[], Path]) -> None:
        began = time.perf_counter()
        path, failure = Path(), None
        try:
            path = work()
        except Exception as error:
            failure = error
        self.seconds = time.perf_counter() - began
        if failure is not None:
            self._future.set_exception(failure)
        else:
            self._future.set_result(path)

    def done(self) -> bool:
        """Return True if `result()` would return at once."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is complete and return its path.

        Raises:
            CheckpointError: the checkpoint could not be written.
            TimeoutError: it takes longer than `timeout` seconds.
        """
        return self._future.result(timeout)


def save(
    root: Path,
    step: int,
    shards: dict[str, TensorShard],
    state: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    in_background: bool = False,
    values: Values | None = None,
) -> SaveHandle:
    """Start `write` and return its handle; errors are raised by the handle's `result()`.

    In the background, shards must not change and nothing else may use `group` until it is done.
    """
    return SaveHandle(
        lambda: write(root, step, shards, state, group=group, values=values), in_background
    )


def write(
    root: Path,
    step: int,
    shards: dict[str, TensorShard],
    state: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    values: Values | None = None,
    planner: SavePlanner | None = None,
    note: Note = note_nothing,
) -> Path:
    """Write `root/step-XXXXXXXX` and point `root/latest` to it; collective over `group` (gloo).

    `state` must be JSON (keys become strings, tuples lists); only that of the group's first rank is
    written. Tensors without elements are skipped, here and in `load`. Existing checkpoints stay
    untouched, even if this fails. For tensors on `meta`, `values` is called one at a time in the
    order of `shards`, so that the written tensors need not fit into memory together. A `planner` of
    the same group keeps the plan from save to save.

    Raises:
        CheckpointError: the same on every rank, if the disk is full, a shard is wrong or an intact
            checkpoint of that step exists.
        RuntimeError: from gloo, if a rank is gone (restart then).
    """
    final = Path(root) / f"step-{step:08d}"
    if not STEP_FOLDER.fullmatch(final.name):
        raise CheckpointError(f"cannot save {final}: steps run from 0 to 99999999")
    planner = planner or SavePlanner(group)
    doing, rank = f"cannot save {final}", group_rank(group)
    for last in (False, True):
        writer = FolderWriter(final, state, note)
        try:
            items = planner.plan(shards, doing)
            with one_error(doing, group):
                if rank == 0:
                    writer.open_folder()
            record = b""
            with one_error(doing, group):
                record = writer.write_chunks(rank, items, values)
                note(WAITING)
            records = gather_bytes(record, group)
            with one_error(doing, group):
                if rank == 0:
                    writer.finish(planner.written(), records)
        except CheckpointError as error:
            # Raised on all ranks alike, hence no rank is still writing.
            if rank == 0:
                shutil.rmtree(writer.temporary, ignore_errors=True)
                with suppress(OSError):
                    (final.parent / "latest.tmp").unlink()
            if last or not isinstance(error, VanishedCheckpoint):
                raise
            logger.warning("%s; it was deleted meanwhile and is written once more", error)
            continue
        return final
    raise AssertionError("the second try returns or raises")


def load(
    path: Path,
    shards: dict[str, TensorShard],
    *,
    group: dist.ProcessGroup | None = None,
    verify: bool = True,
    partial: bool = False,
    note: Note = note_nothing,
) -> None:
    """Fill the tensors of `shards` in place from a checkpoint of any mesh; collective over `group`.

    Raises CheckpointError on every rank, before any tensor is changed, if names (over all ranks),
    shapes or dtypes differ. With `partial`, entries that no rank requests are allowed. For a
    damaged chunk, the error has DamagedCheckpoint's message, and some tensors may already be
    filled.
    """
    path = Path(path)
    shards = {name: shard for name, shard in shards.items() if 0 not in shard.global_shape}
    with one_error("", group):
        index = read_index(path)
        number = int(read_fingerprint(path)[:15], 16)
    # One number of faults, whether the ranks read the same index, and which entries some rank asks.
    wrong, missing = _mismatches(index, shards), set(shards) - set(index.tensors)
    flags = torch.tensor([len(wrong) + len(missing), number, -number])
    count, largest, smallest = reduce_max(flags, group).tolist()
    with one_error("", group):
        if largest != -smallest:
            raise CheckpointError(f"{path} was replaced while it was read; start again")
    asked = torch.tensor([name in shards for name in index.tensors], dtype=torch.uint8)
    asked_by_any = reduce_max(asked, group).tolist()
    extra = [name for name, any_rank in zip(index.tensors, asked_by_any, strict=True)
             if not any_rank]  # fmt: skip
    if count or (extra and not partial):
        seen = _gather((missing, wrong), group)
        missing = set().union(*(names for names, _ in seen))
        wrong = {name: text for _, faults in seen for name, text in faults.items()}
        lines = [f"  {name}: not in the checkpoint" for name in sorted(missing)]
        if not partial:
            lines += [f"  {name}: in the checkpoint, not in this run" for name in sorted(extra)]
        lines += [f"  {name}: {text}" for name, text in sorted(wrong.items())]
        raise CheckpointError(
            f"{path} does not fit this run in {len(lines)} tensor(s); "
            "use the config it was written with, or start a new run:\n" + "\n".join(lines)
        )
    with one_error(f"cannot load {path}", group):
        read_chunks(path, index, shards, verify, note)
    forget_index()


def read_state(path: Path) -> dict[str, Any]:
    """Return the state saved with a checkpoint. Raises CheckpointError if its index is damaged."""
    return read_index(Path(path)).state


def read_names(path: Path) -> list[str]:
    """Return the entry names of a checkpoint. Raises CheckpointError if its index is damaged."""
    return list(read_index(Path(path)).tensors)


def verify(path: Path) -> list[str]:
    """Read a whole checkpoint and list the damage by file and tensor; [] if it is intact.

    Raises CheckpointError if its format version cannot be read.
    """
    return _damage(Path(path), 0, 1, note_nothing)


def find_checkpoint(
    root: Path,
    *,
    group: dist.ProcessGroup | None = None,
    at_most: int | None = None,
    note: Note = note_nothing,
) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint under `root` (None if there is none), and messages.

    Collective over `group`: the ranks share the reading and agree on the result. There is one
    message for each damaged checkpoint that was skipped, naming files and tensors, and one for each
    damaged pointer.

    at_most: ignore checkpoints of later steps.
    """
    root = Path(root)
    paths, messages = from_first_rank(
        lambda: (list_checkpoints(root), _check_pointers(root)), group
    )
    rank, size = group_rank(group), group_size(group)
    if at_most is not None:
        paths = [path for path in paths if step_of(path.name) <= at_most]
    for path in reversed(paths):
        damage: list[str] = []
        with one_error("", group):
            damage = _damage(path, rank, size, note)
        if not reduce_max(torch.tensor([len(damage)]), group)[0]:
            return path, messages
        parts = _gather(damage, group)
        found = list(dict.fromkeys(line for damage in parts for line in damage))
        messages.append(f"{path} is damaged and was skipped: " + "; ".join(found))
    return None, messages


def step_of(name: str) -> int:
    """Return the optimizer step in the name of a checkpoint folder."""
    return int(name.removeprefix("step-"))


def list_checkpoints(root: Path) -> list[Path]:
    """List the complete checkpoints under `root`, oldest first, including damaged ones."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir())


def _damage(path: Path, part: int, num_parts: int, note: Note) -> list[str]:
    try:
        index = read_index(path)
    except DamagedCheckpoint as error:
        return [str(error)]
    return find_damage(path, index, part, num_parts, note=note)


def _check_pointers(root: Path) -> list[str]:
    """Return the faults of the pointer files of `root`."""
    messages = []
    for path in (root / pointer for pointer in POINTERS if (root / pointer).exists()):
        try:
            name = unseal(path)
        except DamagedCheckpoint as error:
            messages.append(f"{error}; it is ignored")
            continue
        if not (root / name).is_dir():
            messages.append(f"{path} names {name}, which is missing")
    return messages


def _mismatches(index: Index, shards: dict[str, TensorShard]) -> dict[str, str]:
    """Return the tensors of this rank whose shape, dtype or chunks do not fit the checkpoint."""
    wrong = {}
    for name, shard in shards.items():
        saved = index.tensors.get(name)
        if saved is None:
            continue
        if tuple(saved.shape) != tuple(shard.global_shape):
            wrong[name] = f"shape {saved.shape} in the checkpoint, {list(shard.global_shape)} here"
            continue
        for offset, sizes, tensor in shard.chunks:
            if tensor.dtype != DTYPES[saved.dtype]:
                wrong[name] = f"{DTYPES[saved.dtype]} in the checkpoint, {tensor.dtype} here"
            ends = [o + s for o, s in zip(offset, sizes, strict=True)]
            if tuple(tensor.shape) != tuple(sizes) or any(
                end > size for end, size in zip(ends, saved.shape, strict=True)
            ):
                wrong[name] = f"chunk at {offset} of sizes {sizes} is given as {tensor.shape}"
    return wrong


# -------------------------------------------------------------------------- collective operations


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the values of all ranks, ordered by rank, on every rank; for errors only."""
    return gather_objects(value, group)


def from_first_rank(compute: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return the result of `compute` on the group's first rank; raise its errors on every rank."""
    own: Any = None
    if group_rank(group) == 0:
        try:
            own = compute()
        except (MegarecurError, OSError) as error:
            own = error
    found = broadcast_object(own, group=group)
    if isinstance(found, OSError):
        raise CheckpointError(f"cannot be read: {explain_os_error(found, 'a checkpoint')}")
    if isinstance(found, MegarecurError):
        raise found
    return cast(T, found)
