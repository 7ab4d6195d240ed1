"""A remote corpus whose shards are prefetched into a bounded cache on this machine.

    PATH/
      manifest.json index.json documents.npy   fetched when the corpus is opened
      shard.00007.mds                          under this name only once it is whole and verified
      .cache/locks/shard.00007.mds             shared: a process needs it, it is not deleted
      .cache/locks/shard.00007.mds.fetch       exclusive: a process fetches it
      .cache/fetching/shard.00007.mds/         a download under way

Shards are needed in blocks (see `order.py`). Those of the current and the next block are fetched
and kept; others are deleted, least recently needed first, when room is needed. Several processes
may share the folder. They lock by flock, so a process that dies leaves no lock behind. A shard that
a process has mapped stays readable to it when another one deletes the file.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megarecur.data.corpus import CHUNK_TOKENS, Corpus, read_manifest
from megarecur.data.mapped_files import find_fault
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.errors import ConfigError, DataError
from megarecur.files import publish
from megarecur.reading import check_plain_name

log = logging.getLogger(__name__)

PAUSES = (1.0, 5.0)
"""Seconds between attempts to fetch a file."""
TIMEOUT = 60.0
"""Seconds without an answer after which the library gives up, if it supports a timeout."""
PATIENCE = 300.0
"""Seconds that a reader waits for one file; shorter than a collective waits for a process."""
STARVING = 10.0
"""Seconds after which a reader may take the room of shards that other processes need."""
NUM_THREADS = 4
FETCH = ".fetch"
POLL, POLL_AHEAD = 0.02, 0.5
"""Seconds until a shard that others hold, or without room, is retried: if needed now, or later."""


class RemoteCorpus(Corpus):
    """A corpus whose shards are read through a cache.

    Args:
        path: the folder of the cache, on this machine.
        remote: location of the corpus: a URL that mosaicml-streaming reads, or a path.
        cache_gb: limit of the folder's size in 10^9 bytes; None keeps everything.
        verify: compare files already in the cache with their hashes, not only their sizes.
        Downloads are always verified.

    Raises:
        ConfigError: the limit is too small.
        DataError: the folder is not a cache, or caches another corpus; or a file cannot be fetched.
    """

    shards: CachedShards

    def __init__(
        self,
        path: str | Path,
        remote: str,
        cache_gb: float | None = None,
        verify: bool = True,
    ) -> None:
        self.remote, self.cache_gb = remote, cache_gb
        self._files, self._verify = CachedFiles(Path(path), remote), verify
        self._files.open(verify)
        super().__init__(path, verify=False)
        self.check_room(2)
        self.shards.trim()

    def _check_files(self, hashed: set[str]) -> None:
        """Check nothing: files are checked when they are fetched."""

    def _open_shards(
        self, described: list[dict[str, Any]]
    ) -> tuple[Sequence[NDArray[Any]], list[int]]:
        names = [shard["raw_data"]["basename"] for shard in described]
        bound = None if self.cache_gb is None else round(self.cache_gb * 1e9)
        expected = {name: self.manifest.files[name] for name in names}

        def load(k: int) -> NDArray[Any]:
            return self._map(described[k])

        shards = CachedShards(self._files, expected, load, bound, self._verify)
        return shards, [shard["samples"] * CHUNK_TOKENS for shard in described]

    def _find_rewriting(self, file: Path) -> str | None:
        """Return nothing: shards of a cache are replaced whole, and touched when they are used."""
        return None

    def check_room(self, num_shards: int) -> None:
        """Reject a limit that cannot hold `num_shards` shards, whichever they are.

        Raises:
            ConfigError: the message names the least sufficient limit.
        """
        shards = self.shards
        least = shards.other_bytes + sum(sorted(shards.sizes, reverse=True)[:num_shards])
        if shards.bound is not None and shards.bound < least:
            value = f"{ceil(least / 1e3) / 1e6:.6f}".rstrip("0").rstrip(".")
            raise ConfigError(
                f"{self.path}: cache_gb={self.cache_gb:g} is too small for {self.remote}, of which "
                f"{min(num_shards, len(shards))} shards are needed at once; raise cache_gb to "
                f"{value} or more (where data.shuffle_shards is above 2, lowering it helps too)"
            )

    def follow(self, blocks: Sequence[Sequence[int]]) -> None:
        """Set the shards that will be read: blocks of those needed together, in order.

        By default, shards are expected in the order of the corpus.
        """
        self.shards.follow(blocks)

    def close(self) -> None:
        """Stop fetching and release this process's shards; waiting readers get an error."""
        self.shards.close()


class CachedFiles:
    """The folder of a cache, and the remote that fills it."""

    def __init__(self, path: Path, remote: str) -> None:
        self.path, self.remote = path, remote.rstrip("/")
        self.locks, self.fetching = path / ".cache" / "locks", path / ".cache" / "fetching"
        self.closed = threading.Event()
        self._own = threading.local()

    def open(self, verify: bool) -> None:
        """Fetch the files that describe the corpus; see `RemoteCorpus` for the errors."""
        manifest = self.path / "manifest.json"
        if manifest.exists() and not self.locks.is_dir():
            raise DataError(
                f"{self.path}: holds a corpus of its own, it cannot be the cache of {self.remote}; "
                "set path to an empty folder, or remove remote"
            )
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            self.fetching.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be a cache ({error.strerror}); set path to a folder that "
                "can be "
                "written"
            ) from None
        with self.hold(manifest.name + FETCH):
            found = self._download(manifest.name, _find_manifest_fault)
            here = read_manifest(self.path) if manifest.exists() else None
            there = read_manifest(found.parent)
            if here is not None and here.fingerprint != there.fingerprint:
                shutil.rmtree(self.fetching / manifest.name)
                raise DataError(
                    f"{self.path}: caches another corpus ({here.fingerprint[:12]}) than the one "
                    f"at {self.remote} ({there.fingerprint[:12]}); empty the folder, or set "
                    "path to another folder"
                )
            self._publish(found)
        for name in ("index.json", "documents.npy"):
            with self.hold(name + FETCH):
                if find_fault(self.path / name, there.files[name], hashed=verify):
                    (self.path / name).unlink(missing_ok=True)
                    self.fetch(name, there.files[name])
        for folder in self.fetching.iterdir():
            self.is_stale(folder)

    def fetch(self, name: str, expected: Mapping[str, Any]) -> None:
        """Download a file and publish it; the caller holds its lock exclusively.

        Raises:
            DataError: the download failed; the message names the reason.
        """
        self._publish(self._download(name, lambda file: find_fault(file, expected, hashed=True)))

    def _download(self, name: str, find: Callable[[Path], str | None]) -> Path:
        """Download a file into its own folder, verify and sync it."""
        check_plain_name(name)  # Folders of this name are deleted below.
        downloader, url = self._downloader(), f"{self.remote}/{name}"
        attempts = len(PAUSES) + 1
        for attempt, pause in enumerate((*PAUSES, None), 1):
            # Each attempt has its own folder, because downloaders leave temporary files.
            file = self.fetching / name / str(attempt) / name
            shutil.rmtree(file.parent, ignore_errors=True)
            file.parent.mkdir(parents=True)
            try:
                downloader.download(url, str(file), TIMEOUT)
                fault = find(file)
            except FileNotFoundError:
                fault = "is missing"
            except Exception as error:  # Every library raises its own.
                text = str(error).strip() or "no reason given"
                fault = f"cannot be fetched ({type(error).__name__}: {text.splitlines()[0]})"
            if fault is None:
                return file
            shutil.rmtree(file.parent, ignore_errors=True)
            if pause is not None:
                log.warning("%s %s; attempt %d of %d in %g s", url, fault, attempt + 1, attempts,
                            pause)  # fmt: skip
                if self.closed.wait(pause):
                    break
        shutil.rmtree(self.fetching / name, ignore_errors=True)
        hint = (
            "; a corpus of another program has none: copy it here and give it as path, without "
            "remote, or prepare it with `megarecur prep shards`"
            if name == "manifest.json"
            else ""
        )
        raise DataError(
            f"{url} {fault}, after {attempt} attempt(s); check that it can be read from this "
            "machine "
            f"and is whole (if not, copy it there again), then run the same command{hint}"
        )

    def _publish(self, file: Path) -> None:
        """Move a downloaded file to its place."""
        publish(file, self.path / file.name)
        shutil.rmtree(self.fetching / file.name, ignore_errors=True)

    def _downloader(self) -> Any:
        """Return the library's downloader for this remote, one per thread."""
        if not hasattr(self._own, "downloader"):
            make_torchvision_importable()
            from streaming.base.storage import CloudDownloader

            try:
                self._own.downloader = CloudDownloader.get(self.remote)
            except (ValueError, ImportError) as error:
                raise DataError(
                    f"{self.remote}: cannot be read ({error}); set it to a path or URL that "
                    "mosaicml-streaming reads, and install what it needs for that"
                ) from None
        return self._own.downloader

    def is_stale(self, folder: Path) -> bool:
        """Return True, and clean up, if a download is no longer under way."""
        lock = self.lock(folder.name + FETCH, fcntl.LOCK_EX)
        if lock is None:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        return True

    def lock(self, name: str, mode: int) -> int | None:
        """Return a descriptor that holds the lock of a file until it is closed; None if others hold
        it."""
        lock = os.open(self.locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of a file exclusively, once others have released it."""
        deadline = time.monotonic() + PATIENCE
        while (lock := self.lock(name, fcntl.LOCK_EX)) is None:
            if time.monotonic() > deadline or self.closed.is_set():
                raise DataError(
                    f"{self.locks / name}: another process has held it for {PATIENCE:g} s; end the "
                    "one that hangs, or set path to another folder"
                )
            time.sleep(POLL)
        try:
            yield
        finally:
            os.close(lock)


class CachedShards(Sequence[NDArray[Any]]):
    """The mapped shards of a remote corpus; indexing waits until the shard has arrived.

    Args:
        expected: bytes and xxh64 of each shard by name, in their order.
        load: maps an existing shard.
        bound: limit of the bytes of the whole folder, or None.
        verify: compare existing shards with their hashes.
    """

    def __init__(
        self,
        files: CachedFiles,
        expected: Mapping[str, Mapping[str, Any]],
        load: Callable[[int], NDArray[Any]],
        bound: int | None,
        verify: bool,
    ) -> None:
        self._files, self._expected, self._load = files, expected, load
        self.bound, self._verify = bound, verify
        self.names = list(expected)
        self.sizes = [int(values["bytes"]) for values in expected.values()]
        others = [e for e in files.path.iterdir() if e.is_file() and e.name not in expected]
        # Opening the corpus downloads the manifest once more for comparison.
        others.append(files.path / "manifest.json")
        self.other_bytes = sum(file.stat().st_size for file in others)
        self._changed = threading.Condition()
        self._blocks: Sequence[Sequence[int]] = [[k] for k in (*range(len(self.names)), 0)]
        self._place = 0
        self._current: Sequence[int] = ()
        self._now: list[int] = []
        """Shards to map and hold: those that readers wait for, and the current block."""
        self._ahead: list[int] = []
        """Shards to fetch after these: the next block."""
        self._there: set[int] = set()
        """Shards of the next and then the current block that were found or fetched."""
        self._asked: dict[int, tuple[int, float]] = {}
        """How many readers wait for a shard, and since when."""
        self._arrays: dict[int, NDArray[Any]] = {}
        self._held: dict[int, int | None] = {}
        """Shared locks of mapped shards."""
        self._busy: set[int] = set()
        self._resting: dict[int, float] = {}
        self._failed: dict[int, DataError] = {}
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, k: Any) -> Any:
        """Return the tokens of a shard.

        Raises:
            DataError: the shard cannot be fetched.
        """
        array = self._arrays.get(k)
        if array is not None and k in self._current:
            return array
        with self._changed:
            self._move_to(k)
            since = time.monotonic()
            readers, first = self._asked.get(k, (0, since))
            self._asked[k] = readers + 1, first
            if k not in self._busy:
                self._failed.pop(k, None)  # A prefetch failed earlier; retry.
            self._refresh()
            try:
                while k not in self._arrays:
                    self._check_waiting(k, since)
                    self._changed.wait(1.0)
                return self._arrays[k]
            finally:
                readers, first = self._asked.pop(k)
                if readers > 1:
                    self._asked[k] = readers - 1, first
                self._refresh()

    def _check_waiting(self, k: int, since: float) -> None:
        """Raise an error if a shard will not arrive."""
        url = f"{self._files.remote}/{self.names[k]}"
        if k in self._failed:
            raise self._failed[k]
        if self._files.closed.is_set():
            raise DataError(f"{url} was not fetched before the run ended")
        if time.monotonic() > since + PATIENCE:
            raise DataError(
                f"{url} did not arrive in {PATIENCE:g} s; check that it can be read fast enough "
                f"and that no other process fills {self._files.path}, then run the same command"
            )

    def follow(self, blocks: Sequence[Sequence[int]]) -> None:
        """Set the shards that will be read; see `RemoteCorpus.follow`."""
        with self._changed:
            self._blocks, self._place = blocks, 0
            self._refresh()

    def close(self) -> None:
        """Stop fetching; see `RemoteCorpus.close`."""
        self._files.closed.set()
        with self._changed:
            self._blocks, self._place = (), 0
            self._refresh()
        for thread in self._threads:
            thread.join(5.0)  # a hanging download ends with the process

    # The following methods run under the condition.

    def _move_to(self, k: int) -> None:
        """Advance to the next block that has a shard."""
        places = [*range(self._place, len(self._blocks)), *range(self._place)]
        self._place = next((i for i in places if k in self._blocks[i]), self._place)

    def _refresh(self) -> None:
        """Determine the needed shards, and release the others."""
        blocks = self._blocks[self._place : self._place + 2]
        self._current = blocks[0] if blocks else ()
        self._now = list(dict.fromkeys((*self._asked, *self._current)))
        now = set(self._now)
        self._ahead = [k for k in (blocks[1] if blocks[1:] else ()) if k not in now]
        self._there &= now.union(self._ahead)
        for k in [k for k in self._arrays if k not in now]:
            self._release(k)
        self._resting.clear()
        if self._now and not self._threads and not self._files.closed.is_set():
            for _ in range(NUM_THREADS):
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        self._changed.notify_all()

    def _release(self, k: int) -> None:
        """Unmap a shard, which becomes the most recent of those not needed."""
        _touch(self._files.path / self.names[k])
        del self._arrays[k]
        lock = self._held.pop(k)
        if lock is not None:
            os.close(lock)

    def _choose(self) -> int | None:
        """Choose the next fetch: the next block takes no room before the current one is
        complete."""
        time_now = time.monotonic()
        missing = [k for k in self._now if k not in self._arrays]
        for k in missing or self._ahead:
            if k in self._busy or k in self._failed or (k in self._there and not missing):
                continue
            if self._resting.get(k, time_now) <= time_now:
                return k
        return None

    # The following methods run in a thread.

    def _work(self) -> None:
        """Fetch and map needed shards, until the cache is closed."""
        while True:
            with self._changed:
                while (k := self._choose()) is None and not self._files.closed.is_set():
                    self._changed.wait(POLL if self._resting else None)
                if k is None or self._files.closed.is_set():
                    return
                self._resting.pop(k, None)
                self._busy.add(k)
                is_now, is_checked = k in self._now, k in self._there
            found, error = None, None
            try:
                found = self._obtain(k, is_now, is_checked)
            except DataError as failure:
                error = failure
            except Exception as failure:  # The reader receives every error.
                error = DataError(
                    f"{self._files.path / self.names[k]}: cannot be cached "
                    f"({type(failure).__name__}: {failure}); check that the folder can be written"
                )
            with self._changed:
                self._busy.discard(k)
                if error is not None:
                    self._failed[k] = error
                elif found is None:
                    pause = POLL if k in self._now else POLL_AHEAD
                    self._resting[k] = time.monotonic() + pause
                else:
                    self._there.add(k)
                    if found:
                        self._arrays[k], self._held[k] = found
                        if k not in self._now:
                            self._release(k)
                self._changed.notify_all()

    def _obtain(
        self, k: int, is_now: bool, is_checked: bool
    ) -> tuple[NDArray[Any], int | None] | tuple[()] | None:
        """Put a shard into the cache and, if it is needed now, map it and hold its lock.

        Returns None if another process fetches or deletes it, or others must release room first.
        """
        name = self.names[k]
        file, hashed = self._files.path / name, self._verify and not is_checked
        lock = self._files.lock(name, fcntl.LOCK_SH)
        if lock is None:
            return None
        held = None
        try:
            if find_fault(file, self._expected[name], hashed) and not self._fetch(k):
                return None
            _touch(file)
            if not is_now:
                return ()
            array = self._load(k)
            if self.bound is not None:  # Otherwise nothing is deleted, nor are files kept open.
                held = lock
            return array, held
        finally:
            if held is None:
                os.close(lock)

    def _fetch(self, k: int) -> bool:
        """Fetch a shard, unless another process does or there is no room."""
        files, name = self._files, self.names[k]
        file, expected = files.path / name, self._expected[name]
        lock = files.lock(name + FETCH, fcntl.LOCK_EX)
        if lock is None:
            return False
        try:
            fault = find_fault(file, expected, self._verify)
            if fault is None:
                return True  # another process has just fetched it
            if file.exists():
                log.warning("%s %s; it is fetched again", file, fault)
                file.unlink()
            if not self._make_room(k):
                return False
            files.fetch(name, expected)
            return True
        finally:
            os.close(lock)

    def trim(self) -> None:
        """Delete unneeded shards if the folder exceeds a limit that was lowered."""
        self._make_room(None)

    def _make_room(self, k: int | None) -> bool:
        """Delete unneeded shards until a shard fits under the limit, and reserve its place."""
        files, name = self._files, None if k is None else self.names[k]
        if self.bound is None:
            return True
        with self._changed:
            # The current block precedes the next one, which never displaces itself.
            mine = {self.names[i] for i in (*self._now, *(() if k in self._now else self._ahead))}
            since = self._asked[k][1] if k in self._asked else None
        starving = since is not None and time.monotonic() > since + STARVING
        with files.hold("room"):
            # Downloads come first, so one that ends meanwhile is seen in both places, not in none.
            running = {
                folder.name
                for folder in files.fetching.iterdir()
                if folder.name != name and not files.is_stale(folder)
            }
            times = {}
            with os.scandir(files.path) as entries:
                for entry in entries:
                    if entry.name in self._expected:
                        times[entry.name] = entry.stat().st_mtime_ns
            names = running | set(times) | ({name} if name is not None else set())
            sizes = [self._expected[other]["bytes"] for other in names if other in self._expected]
            used = self.other_bytes + sum(sizes)
            for other in sorted(times.keys() - mine, key=times.__getitem__):
                if used <= self.bound:
                    break
                lock = files.lock(other, fcntl.LOCK_EX)
                if lock is None and not (starving and other not in running):
                    continue
                if lock is None:
                    log.warning("%s: no room for %s in %g s; %s is deleted, which another process "
                                "needs; a higher cache_gb avoids this", files.path, name, STARVING,
                                other)  # fmt: skip
                (files.path / other).unlink(missing_ok=True)
                used -= self._expected[other]["bytes"]
                if lock is not None:
                    os.close(lock)
            if used > self.bound:
                return False
            if name is not None:
                (files.fetching / name).mkdir(exist_ok=True)
        return True


def _find_manifest_fault(file: Path) -> str | None:
    """Return what is wrong with a manifest; None if nothing is."""
    try:
        read_manifest(file.parent)
    except DataError as error:
        return f"is not a manifest ({error})" if file.exists() else "is missing"
    return None


def _touch(file: Path) -> None:
    """Record that a file is needed now; it may be gone."""
    with suppress(FileNotFoundError):
        os.utime(file)
