"""Saving during training: checkpoints are written in the background, pruned and mirrored.

    with Saver(run_dir, config, mesh) as saver:
        saver.prepare(engine.shards())
        saver.save(step, engine.shards(), state)     # training continues meanwhile
        saver.poll(stop.fail)                        # at every step boundary: report a failed save
        saver.finish()

The training thread only copies into reusable buffers. Planning, writing and deleting run in a
separate thread with a separate process group, since collectives of two threads would mix on one
group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.checkpoint import SaveHandle, SavePlanner
from megarecur.checkpoint.mirror import ForeignMirror, Mirror, check_mirror
from megarecur.checkpoint.retention import read_scores, remove_old
from megarecur.config.run import Config
from megarecur.errors import CheckpointError, ConfigError, MegarecurError, explain_os_error
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.parallel.shards import TensorShard
from megarecur.progress import Note, note_nothing

log = logging.getLogger(__name__)

GRACE_SECONDS = 120.0
"""Seconds that a failing run waits for a running save."""
ANSWER_SECONDS = 30.0
"""Seconds that a starting run waits for its mirror."""
LOST_GRACE_SECONDS = 1.0
"""The wait if another rank is probably gone: the remaining ranks may wait for this one to exit."""


class Staging:
    """Copies of the chunks that this rank writes.

    Buffers are reused by every save, since touching fresh memory costs several times the copy. For
    GPU tensors they are pinned; the copies are queued on the GPU's stream and not waited for.
    """

    def __init__(self, shards: dict[str, TensorShard], mesh: Mesh, planner: SavePlanner) -> None:
        """Allocate the buffers; collective.

        Raises:
            CheckpointError: on every rank, if one has too little memory.
        """
        items = planner.plan(shards, "cannot prepare background saves")
        mine = {(chunk.name, chunk.offset) for chunk, _ in items}
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._on_gpu = mesh.device.type == "cuda"
        self._copied: torch.cuda.Event | None = None
        with same_error(mesh):
            for key, tensor in ((key, t) for key, t in chunks_of(shards) if key in mine):
                self._buffers[key] = make_buffer(tensor)

    def copy(self, shards: dict[str, TensorShard]) -> dict[str, TensorShard]:
        """Copy the chunks that this rank writes. Returns the shards, the other chunks on `meta`."""
        copies = {name: replace(shard, chunks=[]) for name, shard in shards.items()}
        for name, shard in shards.items():
            for offset, sizes, tensor in shard.chunks:
                buffer = self._buffers.get((name, tuple(offset)))
                if buffer is not None and tensor.numel():
                    buffer.copy_(tensor.detach(), non_blocking=True)
                else:  # The layout stays the planned one.
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                copies[name].chunks.append((offset, sizes, buffer))
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def settle(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()


def chunks_of(shards: dict[str, TensorShard]) -> list[tuple[tuple[str, tuple[int, ...]], Tensor]]:
    """Return ((name, offset), tensor) of every non-empty chunk."""
    return [
        ((name, tuple(offset)), tensor)
        for name, shard in shards.items()
        for offset, _, tensor in shard.chunks
        if tensor.numel()
    ]


def find_non_finite(shards: dict[str, TensorShard], mesh: Mesh) -> str:
    """Return the first entry of any rank with an infinity or NaN, "" if none; collective."""
    # All checks are queued before the first result is waited for.
    sound = [
        (name, torch.isfinite(tensor).all())
        for (name, _), tensor in chunks_of(shards)
        if tensor.is_floating_point()
    ]
    own = next((name for name, finite in sound if not finite), None)
    return mesh.first_over_world(own) or ""


def make_buffer(tensor: Tensor) -> Tensor:
    """Return a zeroed host buffer for a copy of `tensor`, pinned for a GPU tensor.

    Raises:
        CheckpointError: too little memory.
    """
    try:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"no memory for the copies that saving in the background needs ({error}); "
            "set checkpoint.asynchronous to false"
        ) from None


class Saver:
    """Saver of a run's checkpoints; every method but `poll` and `timings` is collective."""

    def __init__(
        self, run_dir: Path, config: Config, mesh: Mesh, note: Note = note_nothing
    ) -> None:
        self.note = note
        self.run_dir, self.root = run_dir, run_dir / "checkpoints"
        self.rule, self.mesh = config.checkpoint, mesh
        self.handle: SaveHandle | None = None
        self.planner = SavePlanner(mesh.save_group)
        self.staging: Staging | None = None
        self.mirror: Mirror | None = None
        self.newest: Path | None = None
        """The newest checkpoint: that which was resumed from, or saved since."""
        self.run: str | None = None
        """ID of the run, on rank 0; see `identify`."""
        self.blocked_seconds = self.write_seconds = 0.0
        with same_error(mesh):
            if self.rule.mirror is not None:
                check_mirror(self.rule.mirror, self.root)
                if mesh.rank == 0:
                    self.mirror = Mirror(self.rule.mirror, self.root, self.rule, self.scores, note)

    def identify(self, run: str) -> None:
        """Set the ID of the run before the first save, and check that the mirror is its own.

        Called on rank 0. A mirror that does not answer is not waited for: it is checked again
        before anything is written to it.

        Raises:
            ConfigError: the mirror holds checkpoints of another run.
        """
        self.run = run
        if (mirror := self.mirror) is None:
            return
        mirror.run = run
        found: list[Exception] = []

        def check() -> None:
            try:
                mirror.check()
            except Exception as error:  # file systems raise arbitrary exceptions
                found.append(error)

        thread = Thread(target=check, name="mirror-check", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        for error in found:
            if isinstance(error, ForeignMirror):
                raise ConfigError(str(error)) from None

    def prepare(self, shards: dict[str, TensorShard]) -> None:
        """Allocate the buffers of background saves before training, not at the first save."""
        if self.rule.asynchronous and self.rule.every and self.staging is None:
            self.staging = Staging(shards, self.mesh, self.planner)

    def save(
        self, step: int, shards: dict[str, TensorShard], state: dict[str, Any], last: bool = False
    ) -> None:
        """Start a save, or write synchronously; waits for the previous save first.

        Args:
            last: no optimizer step follows, so that the shards need not be copied.

        Raises:
            CheckpointError: on every rank, the error of the previous save, or of this one.
        """
        began = time.perf_counter()
        self.wait()
        state = state if self.run is None else state | {"run": self.run}
        if self.rule.asynchronous and not last:
            if self.staging is None:
                self.staging = Staging(shards, self.mesh, self.planner)
            shards = self.staging.copy(shards)
        elif self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        self.handle = SaveHandle(lambda: self._write(step, shards, state), self.rule.asynchronous)
        if not self.rule.asynchronous:
            self.wait()
        self.blocked_seconds += time.perf_counter() - began

    def _write(self, step: int, shards: dict[str, TensorShard], state: dict[str, Any]) -> Path:
        if self.staging is not None:
            self.staging.settle()
        path = checkpoint.write(
            self.root,
            step,
            shards,
            state,
            group=self.mesh.save_group,
            planner=self.planner,
            note=self.note,
        )
        self.newest = path
        self.note(f"{path.name} is complete")
        if self.mesh.rank == 0:
            self._remove_old()
        return path

    def _remove_old(self) -> None:
        """Delete checkpoints that the rule does not keep; one process calls it between saves."""
        busy = self.mirror.busy if self.mirror else None
        try:
            remove_old(
                self.root, self.rule, self.scores(), good=self.newest, busy=busy, run=self.run
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot delete old checkpoints: {explain_os_error(error, self.root)}; new ones "
                "are untouched"
            ) from None
        if self.mirror is not None:
            self.mirror.start()

    def is_lost(self) -> bool:
        """Return True if the newest checkpoint of this process was deleted, and none is being
        written; for rank 0."""
        if self.newest is None or self.handle is not None:
            return False
        try:
            self.newest.stat()
        except FileNotFoundError:
            return True
        except OSError:  # A file server that does not answer says nothing.
            return False
        return False

    def scores(self) -> dict[int, float]:
        """Return the validation loss by step; empty if the rule does not use it."""
        return read_scores(self.run_dir / "metrics.jsonl") if self.rule.keep_best else {}

    def poll(self, fail: Callable[[MegarecurError], None]) -> None:
        """Call `fail` with the error of a failed save; does not wait."""
        if self.handle is None or not self.handle.done():
            return
        handle, self.handle = self.handle, None
        try:
            self._collect(handle)
        except MegarecurError as error:
            fail(error)

    def wait(self) -> None:
        """Wait for the running save.

        Raises:
            CheckpointError: on every rank, the error of any rank.
        """
        handle, self.handle = self.handle, None
        with same_error(self.mesh):
            if handle is not None:
                self._collect(handle)

    def _collect(self, handle: SaveHandle) -> None:
        handle.result()
        self.write_seconds = handle.seconds

    def scored(self) -> None:
        """Delete checkpoints that are no longer among the best; call it after each evaluation.

        Waits for the running save first.
        """
        self.wait()
        if self.rule.keep_best:
            with same_error(self.mesh):
                if self.mesh.rank == 0:
                    self._remove_old()

    def finish(self) -> None:
        """Wait for the running save and for its copy to the mirror."""
        self.wait()
        if self.rule.mirror is None:
            return
        # The ranks wait in short turns: one long upload must not time out the others' collective.
        while self.mesh.max_over_world(int(self.mirror is not None and self.mirror.wait(1.0))):
            pass

    def timings(self) -> dict[str, float]:
        """Return seconds that saves blocked training since the last call, and of the last write."""
        if not self.blocked_seconds:
            return {}
        values = {
            "speed/save_seconds": self.blocked_seconds,
            "speed/write_seconds": self.write_seconds,
        }
        self.blocked_seconds = 0.0
        return values

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for a running save if the run fails; no collectives, since ranks may be gone."""
        if self.handle is None:
            return
        lost = isinstance(error, RuntimeError) and self.mesh.world > 1
        try:
            self.handle.result(LOST_GRACE_SECONDS if lost else GRACE_SECONDS)
        except Exception as failure:
            log.warning("the save under way failed too: %s", failure or type(failure).__name__)
