"""A run's checkpoints, one after the other: written in the background, old ones let go, mirrored.

    with Saver(run_dir, config, mesh) as saver:
        saver.prepare(engine.shards())
        saver.save(step, engine.shards(), state)     # training goes on meanwhile
        saver.poll(stop)                             # at every step boundary: has it failed?
        saver.finish()

The training thread only copies, into buffers that are kept. Planning, writing and deleting run in a
thread of their own, over a process group of their own: collectives of two threads on one group
would mix.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.errors import CheckpointError, MegarecurError
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.parallel.shards import Shard
from megarecur.train import checkpoint
from megarecur.train.checkpoint import SaveHandle, chunks_to_write
from megarecur.train.mirror import Mirror, check_mirror
from megarecur.train.retention import read_scores, remove_old
from megarecur.train.signals import StopFlag

log = logging.getLogger(__name__)

GRACE_SECONDS = 120.0
"""How long a run that fails waits for a save under way."""
LOST_GRACE_SECONDS = 1.0
"""The same where another rank is probably gone: those left may be waiting for this one to go."""


class Staging:
    """Copies of the chunks that this rank is to write.

    Buffers are kept from save to save: touching fresh memory costs several times the copy. Those of
    a GPU's tensors are pinned, and copied in the order of its work, not waited for.
    """

    def __init__(self, shards: dict[str, Shard], mesh: Mesh) -> None:
        """Collective.

        Raises:
            CheckpointError: on every rank, where memory is short.
        """
        mine = chunks_to_write(shards, mesh.save_group)
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._on_gpu = mesh.device.type == "cuda"
        self._copied: torch.cuda.Event | None = None
        with same_error(mesh):
            for key, tensor in ((key, t) for key, t in chunks_of(shards) if key in mine):
                self._buffers[key] = make_buffer(tensor)

    def copy(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        """The chunks of this rank as they are now."""
        copies = {name: Shard(shard.global_shape, []) for name, shard in shards.items()}
        for name, shard in shards.items():
            for offset, sizes, tensor in shard.chunks:
                buffer = self._buffers.get((name, tuple(offset)))
                if buffer is not None and tensor.numel():
                    buffer.copy_(tensor.detach(), non_blocking=True)
                    copies[name].chunks.append((offset, sizes, buffer))
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def settle(self) -> None:
        """Wait until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()


def chunks_of(shards: dict[str, Shard]) -> list[tuple[tuple[str, tuple[int, ...]], Tensor]]:
    """((name, offset), tensor) of every chunk that holds something."""
    return [
        ((name, tuple(offset)), tensor)
        for name, shard in shards.items()
        for offset, _, tensor in shard.chunks
        if tensor.numel()
    ]


def make_buffer(tensor: Tensor) -> Tensor:
    """Memory of the host for a copy of `tensor`, touched once."""
    try:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"no memory for the copies that saving in the background needs ({error}); "
            "set checkpoint.asynchronous to false"
        ) from None


class Saver:
    """Saves the checkpoints of a run; every method but `poll` and `timings` is collective."""

    def __init__(self, run_dir: Path, config: Config, mesh: Mesh) -> None:
        self.run_dir, self.root = run_dir, run_dir / "checkpoints"
        self.rule, self.mesh = config.checkpoint, mesh
        self.handle: SaveHandle | None = None
        self.staging: Staging | None = None
        self.mirror: Mirror | None = None
        self.newest: Path | None = None
        self.blocked_seconds = self.write_seconds = 0.0
        with same_error(mesh):
            if self.rule.mirror is not None:
                check_mirror(self.rule.mirror, self.root)
                if mesh.rank == 0:
                    self.mirror = Mirror(self.rule.mirror, self.root, self.rule, self.scores)

    def prepare(self, shards: dict[str, Shard]) -> None:
        """Take the memory that saving in the background needs before training, not at a save."""
        if self.rule.asynchronous and self.rule.every and self.staging is None:
            self.staging = Staging(shards, self.mesh)

    def save(
        self, step: int, shards: dict[str, Shard], state: dict[str, Any], last: bool = False
    ) -> None:
        """Begin to save, or save where that is not asynchronous; first waits for the save before.

        Args:
            step: of the checkpoint.
            shards: what this rank holds.
            state: what a checkpoint keeps beside tensors.
            last: no optimizer step follows, so that nothing needs to be copied.

        Raises:
            CheckpointError: on every rank, what that earlier save (or this one) failed with.
        """
        began = time.perf_counter()
        self.wait()
        if self.rule.asynchronous and not last:
            if self.staging is None:
                self.staging = Staging(shards, self.mesh)
            shards = self.staging.copy(shards)
        elif self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        self.handle = SaveHandle(lambda: self._write(step, shards, state), self.rule.asynchronous)
        if not self.rule.asynchronous:
            self.wait()
        self.blocked_seconds += time.perf_counter() - began

    def _write(self, step: int, shards: dict[str, Shard], state: dict[str, Any]) -> Path:
        if self.staging is not None:
            self.staging.settle()
        path = checkpoint.write(self.root, step, shards, state, group=self.mesh.save_group)
        self.newest = path
        if self.mesh.rank == 0:
            self._let_go()
        return path

    def _let_go(self) -> None:
        """Delete what the rule does not keep; for one process, with no save under way."""
        busy = self.mirror.busy if self.mirror else None
        try:
            remove_old(self.root, self.rule, self.scores(), good=self.newest, busy=busy)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.root}: cannot be deleted or written while old "
                f"checkpoints are let go ({error.strerror})"
            ) from None
        if self.mirror is not None:
            self.mirror.start()

    def scores(self) -> dict[int, float]:
        """Validation loss by step, as far as the rule asks for it."""
        return read_scores(self.run_dir / "metrics.jsonl") if self.rule.keep_best else {}

    def poll(self, stop: StopFlag) -> None:
        """Let every rank end at the next boundary where a save has failed; does not wait."""
        if self.handle is None or not self.handle.done():
            return
        handle, self.handle = self.handle, None
        try:
            self._collect(handle)
        except MegarecurError as error:
            stop.fail(error)

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: on every rank, what it failed with on any.
        """
        handle, self.handle = self.handle, None
        with same_error(self.mesh):
            if handle is not None:
                self._collect(handle)

    def _collect(self, handle: SaveHandle) -> None:
        handle.result()
        self.write_seconds = handle.seconds

    def scored(self) -> None:
        """After an evaluation: wait, and let go of what is no longer among the best."""
        self.wait()
        if self.rule.keep_best:
            with same_error(self.mesh):
                if self.mesh.rank == 0:
                    self._let_go()

    def finish(self) -> None:
        """Wait for the save under way, and for its copy to the mirror."""
        self.wait()
        if self.rule.mirror is None:
            return
        # Turn by turn: one rank's long upload must not outlast the others' patience.
        while self.mesh.max_over_world(int(self.mirror is not None and self.mirror.wait(1.0))):
            pass

    def timings(self) -> dict[str, float]:
        """Seconds that saves since the last call blocked training, and that the last one took."""
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
        """Let a save under way end where the run fails; ranks may be gone: no collectives."""
        if self.handle is None:
            return
        lost = isinstance(error, RuntimeError) and self.mesh.world > 1
        try:
            self.handle.result(LOST_GRACE_SECONDS if lost else GRACE_SECONDS)
        except Exception as failure:
            log.warning("the save under way failed too: %s", failure or type(failure).__name__)
