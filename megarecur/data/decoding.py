"""Processes that decode and augment pictures ahead of the model, and the memory they share.

    decoders = Decoders(folders, shards, recipe, seed=1, workers=4)
    first, second = decoders.request(rows), decoders.request(more_rows)
    pixels_RCHW = decoders.finish(first)      float32, normalised; the second is being decoded

Workers write bytes into slots of a few pictures; the caller of `finish` normalises them into the
result, which costs less than a thousandth of decoding a picture of 224 x 224 pixels. The result
is the same with any number of workers. Shapes: R pictures of a request, C channels, H, W pixels.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from threading import RLock
from typing import IO

import numpy as np
from numpy.typing import NDArray

import megarecur
from megarecur.data.picture_worker import Decoder, Start, slot_array
from megarecur.data.pictures import PictureShards, Recipe
from megarecur.errors import DataError

SLOT_BYTES = 1 << 20
MOST_ROWS = 64
"""Pictures of a slot: about SLOT_BYTES, at most MOST_ROWS."""
IN_FLIGHT = 3
"""Slots per worker: one that it decodes, one that waits, one that is copied."""
SECONDS_TO_END = 5.0
WORKER = "from megarecur.data.picture_worker import main; main()"


class Request:
    """Pictures that are being decoded.

    Args:
        rows_R3: source, number and epoch of each picture, int64.
    """

    def __init__(self, rows_R3: NDArray[np.int64], recipe: Recipe) -> None:
        self.rows_R3 = rows_R3
        shape = (len(rows_R3), recipe.channels, recipe.size, recipe.size)
        self.pixels_RCHW = np.empty(shape, np.float32)
        self.missing = len(rows_R3)
        self.dropped = False
        self.problem = ""


@dataclass
class Chunk:
    """Some rows of a request that go into one slot."""

    request: Request
    first: int
    count: int


class Worker:
    """One process, and the slots that it is filling."""

    def __init__(self, start: Start) -> None:
        root = str(Path(megarecur.__file__).resolve().parents[1])
        known = os.environ.get("PYTHONPATH", "")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, known)))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER],
            bufsize=0,  # A reply in a buffer would not wake the selector.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(start.memory,),
            env=environment,
            start_new_session=True,  # An interrupt from the terminal is the trainer's to handle.
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests: IO[bytes] = self.process.stdin
        self.replies: IO[bytes] = self.process.stdout
        self.slots = 0
        """Number of slots that it is filling."""
        self.send(start.encode())

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            DataError: the process has ended.
        """
        view = memoryview(message)
        try:
            while view:
                view = view[self.requests.write(view) :]
        except OSError:
            raise self.explain_end() from None

    def receive(self, size: int) -> bytes:
        """Return the next bytes of its replies.

        Raises:
            DataError: the process has ended.
        """
        content = b""
        while len(content) < size:
            more = self.replies.read(size - len(content))
            if not more:
                raise self.explain_end()
            content += more
        return content

    def explain_end(self) -> DataError:
        """Return an error that says how the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        code = self.process.poll()
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}, perhaps for lack of memory"
        else:
            how = f"ended with exit code {code} (its own message is above)"
        return DataError(
            f"data.images.workers: process {self.process.pid}, which decodes pictures, {how}; "
            "start again, with fewer workers if memory is short"
        )

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self.requests.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.replies.close()


class Decoders:
    """Pictures of corpora as normalised pixels, decoded by worker processes or by the caller.

    Args:
        folders: the corpora, by their place in the mixture.
        mean: mean of each channel, of values in [0, 1].
        std: standard deviation of each channel.
        seed: seed of the augmentation.
        workers: processes, which start with the first request; 0: `finish` decodes.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        shards: Sequence[PictureShards],
        recipe: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        seed: int,
        workers: int,
    ) -> None:
        self.recipe, self.seed, self.num_workers = recipe, seed, workers
        self.folders = [str(folder.resolve()) for folder in folders]
        self.files = [own.facts for own in shards]
        self.decoder = Decoder([str(folder) for folder in folders], shards, recipe, seed)
        scale = 1.0 / (255.0 * np.array(std))
        self._scale_C11 = scale.astype(np.float32)[:, None, None]
        self._shift_C11 = (-np.array(mean) / np.array(std)).astype(np.float32)[:, None, None]
        self.rows_per_slot = min(max(SLOT_BYTES // recipe.bytes_per_picture, 1), MOST_ROWS)
        self._workers: list[Worker] = []
        self._waiting: deque[Chunk] = deque()
        self._filling: dict[int, Chunk] = {}
        self._free: list[int] = []
        self._slots: list[NDArray[np.uint8]] = []
        self._memory: mmap.mmap | None = None
        self._selector: DefaultSelector | None = None
        self._lock = RLock()

    def request(self, rows_R3: NDArray[np.int64]) -> Request:
        """Begin to decode pictures, after those requested earlier.

        Args:
            rows_R3: source, number and epoch of each picture, int64; a source of -1 gives black.

        Raises:
            DataError: a worker has ended.
        """
        request = Request(np.ascontiguousarray(rows_R3, np.int64), self.recipe)
        if not self.num_workers:
            return request
        with self._lock:
            self._start()
            # Small requests are divided among all workers.
            rows = min(self.rows_per_slot, -(-len(rows_R3) // (2 * self.num_workers)))
            for first in range(0, len(rows_R3), rows):
                count = min(rows, len(rows_R3) - first)
                self._waiting.append(Chunk(request, first, count))
            self._distribute()
        return request

    def finish(self, request: Request) -> NDArray[np.float32]:
        """Return the pixels of a request, float32 [R, C, H, W], once they are complete.

        Raises:
            DataError: a picture cannot be read, or a worker has ended.
        """
        if not self.num_workers:
            with self._lock:
                pixels = np.empty(request.pixels_RCHW.shape[1:], np.uint8)[None]
                for row in range(len(request.rows_R3)):
                    self.decoder.write(request.rows_R3[row : row + 1], pixels)
                    self._normalise(pixels, request.pixels_RCHW[row : row + 1])
            return request.pixels_RCHW
        while True:
            with self._lock:  # Released between replies: another thread may wait for its own.
                if request.problem:
                    raise DataError(request.problem)
                if not request.missing:
                    return request.pixels_RCHW
                self._collect()

    def drop(self, request: Request) -> None:
        """Stop decoding a request, whose result is not wanted any more."""
        with self._lock:
            request.dropped = True
            self._waiting = deque(chunk for chunk in self._waiting if not chunk.request.dropped)

    def close(self) -> None:
        """End the workers; a later request starts them again."""
        with self._lock:
            if self._selector is not None:
                self._selector.close()
                self._selector = None
            for worker in self._workers:
                worker.close()
            self._workers, self._slots, self._free = [], [], []
            self._waiting.clear()
            self._filling.clear()
            self._memory = None  # Unmapped with its last array.

    def _start(self) -> None:
        """Start the workers, and make the memory that they share."""
        if self._workers:
            return
        slots = IN_FLIGHT * self.num_workers
        size = slots * self.rows_per_slot * self.recipe.bytes_per_picture
        # Without a name: it is freed with its last process, however that ends.
        with open_nameless() as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
            start = Start(
                self.folders, self.files, self.recipe, self.seed, file.fileno(), slots,
                self.rows_per_slot,
            )  # fmt: skip
            self._workers = [Worker(start) for _ in range(self.num_workers)]
        rows = self.rows_per_slot
        self._slots = [slot_array(self._memory, s, self.recipe, rows) for s in range(slots)]
        self._free = list(range(slots))
        self._selector = DefaultSelector()
        for worker in self._workers:
            self._selector.register(worker.replies, EVENT_READ, worker)

    def _distribute(self) -> None:
        """Give waiting chunks to the workers with the fewest."""
        while self._waiting and self._free:
            worker = min(self._workers, key=lambda each: each.slots)
            chunk, slot = self._waiting.popleft(), self._free.pop()
            self._filling[slot] = chunk
            worker.slots += 1
            rows_R3 = chunk.request.rows_R3[chunk.first : chunk.first + chunk.count]
            worker.send(np.array([slot, chunk.count], np.int64).tobytes() + rows_R3.tobytes())

    def _collect(self) -> None:
        """Wait for replies, and give those workers further chunks."""
        if self._selector is None:
            raise DataError("the loader of pictures is closed; open it again")
        for key, _ in self._selector.select():
            worker: Worker = key.data
            slot, problem = np.frombuffer(worker.receive(16), np.int64).tolist()
            chunk = self._filling.pop(slot)
            worker.slots -= 1
            request, end = chunk.request, chunk.first + chunk.count
            if problem:
                request.problem = worker.receive(problem).decode()
            elif not request.dropped:
                result = request.pixels_RCHW[chunk.first : end]
                self._normalise(self._slots[slot][: chunk.count], result)
            request.missing -= chunk.count
            self._free.append(slot)
            self._distribute()

    def _normalise(self, pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Write (value / 255 - mean) / std, one rounding for each of two operations, so that a
        value does not depend on its place."""
        np.multiply(pixels, self._scale_C11, out=out)
        np.add(out, self._shift_C11, out=out)


def open_nameless() -> IO[bytes]:
    """Open a file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("megarecur-pictures"), "r+b")
    return tempfile.TemporaryFile()
