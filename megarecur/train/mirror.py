"""A second location for checkpoints: a folder, or whatever fsspec reaches by URL.

    mirror = Mirror("s3://bucket/run", root, config.checkpoint, read_scores)
    mirror.start(); mirror.wait()
    fetch_newest("s3://bucket/run", root)

A checkpoint there is a folder of the same files, complete once it has `index.xxh3`: that one is
written last, after all others were read back and agree with their checksums. No renames are needed,
which object stores do not have.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megarecur.config.schema import CheckpointConfig
from megarecur.errors import CheckpointError, ConfigError
from megarecur.train.checkpoint import STEP_FOLDER, list_checkpoints, step_of
from megarecur.train.checkpoint_index import DamagedCheckpoint, Index, read_index
from megarecur.train.checkpoint_storage import delete_folder, find_damage, sync_folder
from megarecur.train.retention import steps_to_keep

log = logging.getLogger(__name__)

COPY_BYTES = 1 << 23
STALLED_SECONDS = 300.0
"""Without a block copied for so long, the end of a run no longer waits for its mirror."""


def check_mirror(url: str, root: Path) -> None:
    """Refuse a mirror that cannot work, without connecting to it.

    Raises:
        ConfigError: an unknown protocol, one whose library is not installed, or a folder that is
            the run's own.
    """
    import fsspec

    protocol = fsspec.utils.get_protocol(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"checkpoint.mirror={url}: {error}") from None
    if protocol in ("file", "local"):
        _, place = fsspec.core.url_to_fs(url)
        if Path(place).resolve() == root.resolve():
            raise ConfigError(
                f"checkpoint.mirror={url} is where the run itself saves; choose another folder"
            )


class Place:
    """A mirror's folder: which checkpoints are there, and their files."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        # A connection of its own: one that was lost is not kept.
        self.files, folder = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        self.folder = folder.rstrip("/")

    def path(self, *names: str) -> str:
        """A path inside the mirror, as its file system wants it."""
        return "/".join((self.folder, *names))

    def folders(self) -> list[str]:
        """Names of checkpoint folders, oldest first, incomplete ones included."""
        self.files.invalidate_cache()
        try:
            entries = self.files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries}
        return sorted(name for name in names if STEP_FOLDER.fullmatch(name))

    def seal(self, name: str) -> bytes | None:
        """The `index.xxh3` of a checkpoint; None: it is not complete."""
        try:
            return bytes(self.files.cat_file(self.path(name, "index.xxh3")))
        except FileNotFoundError:
            return None

    def open(self, name: str, file: str) -> Any:
        """A file of a checkpoint, for reading."""
        return self.files.open(self.path(name, file), "rb")

    def upload(self, source: Path, name: str, note: Callable[[], None]) -> None:
        """Copy one file and force it to the disk where there is one."""
        with open(source, "rb") as ours, self.files.open(self.path(name, source.name), "wb") as far:
            for block in blocks_of(ours):
                far.write(block)
                note()
            far.flush()
            descriptor = None
            with suppress(AttributeError, OSError):  # most file systems have none
                descriptor = far.fileno()
            if descriptor is not None:
                os.fsync(descriptor)

    def download(self, name: str, file: str, target: Path) -> None:
        """Copy one file here."""
        with self.open(name, file) as far, open(target, "xb") as ours:
            for block in blocks_of(far):
                ours.write(block)
            ours.flush()
            os.fsync(ours.fileno())

    def delete(self, name: str) -> None:
        """Delete a checkpoint; first the file that makes it one."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self.path(name, "index.xxh3"))
        self.files.rm(self.path(name), recursive=True)


def blocks_of(file: Any) -> Iterator[bytes]:
    """A file's content."""
    while block := file.read(COPY_BYTES):
        yield block


# --------------------------------------------------------------------------------------- writing


class Mirror:
    """Keeps a second location up to date, in a thread of its own; for one process of a run.

    Whatever goes wrong there is a warning: a run does not end because its mirror is down.
    """

    def __init__(
        self,
        url: str,
        root: Path,
        rule: CheckpointConfig,
        read_scores: Callable[[], Mapping[int, float]],
    ) -> None:
        self.url, self.root, self.rule, self.read_scores = url, Path(root), rule, read_scores
        self.busy: Path | None = None
        """The checkpoint being copied: it must stay until that is done."""
        self.verified: dict[int, bytes] = {}
        """Of each step, the seal of what was read back from the mirror in this process."""
        self.moved = 0.0
        self._lock = threading.Lock()
        self._wanted = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bring the mirror up to date, now or after what it is doing."""
        with self._lock:
            self._wanted = True
            if self._thread is None:
                self._note()
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; whether it is worth waiting on."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return False
        thread.join(seconds)
        if time.monotonic() - self.moved > STALLED_SECONDS:
            log.warning("checkpoint.mirror=%s: does not answer; given up", self.url)
            return False
        return True

    def _note(self) -> None:
        self.moved = time.monotonic()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                self._wanted = False
            try:
                self.synchronise()
            except Exception as error:  # file systems raise what they like
                reason = str(error) or type(error).__name__
                log.warning("checkpoint.mirror=%s: %s; the next save tries again", self.url, reason)
            finally:
                self.busy = None

    def synchronise(self) -> None:
        """Copy what the rule keeps and the mirror lacks, the newest first; then delete the rest.

        Raises:
            CheckpointError: a copy that does not read back as it was written.
            Exception: what the file system raises.
        """
        place = Place(self.url)
        ours = {step_of(path.name): path for path in list_checkpoints(self.root)}
        theirs = {step_of(name): place.seal(name) for name in place.folders()}
        complete = {step for step, seal in theirs.items() if seal is not None}
        scores, damaged = self.read_scores(), []
        wanted = steps_to_keep({*ours, *complete}, self.rule, scores)
        for step in sorted(wanted & ours.keys(), reverse=True):
            self.busy = ours[step]
            try:
                seal = (ours[step] / "index.xxh3").read_bytes()
                if theirs.get(step) != seal or not self.is_intact(place, ours[step], seal):
                    complete.discard(step)
                    self.upload(place, ours[step])
                    complete.add(step)
                self.verified[step] = seal
            except (FileNotFoundError, DamagedCheckpoint) as error:
                if ours[step].exists():  # else deleted meanwhile: a newer one is on its way
                    damaged.append(f"{error} and is not copied")
        for step in theirs.keys() - steps_to_keep(complete, self.rule, scores):
            place.delete(f"step-{step:08d}")
        if damaged:
            raise CheckpointError("; ".join(damaged))

    def is_intact(self, place: Place, path: Path, seal: bytes) -> bool:
        """Whether the copy of a checkpoint that an earlier job made reads back as written."""
        if self.verified.get(step_of(path.name)) == seal:
            return True
        damage = self.read_back(place, path.name, read_index(path))
        if damage:
            log.warning("the copy is damaged and is made anew: %s", "; ".join(damage))
        return not damage

    def read_back(self, place: Place, name: str, index: Index) -> list[str]:
        """What is damaged in a copy."""

        def open_file(file: str) -> NotedFile:
            return NotedFile(place.open(name, file), self._note)

        return find_damage(f"{place.url}/{name}", index, open_file=open_file)

    def upload(self, place: Place, path: Path) -> None:
        """Copy a checkpoint, read it back, and only then complete it.

        Raises:
            DamagedCheckpoint: it is the original that is damaged.
            CheckpointError: the copy is.
        """
        index, name = read_index(path), path.name
        if name in place.folders():
            place.delete(name)
        place.files.makedirs(place.path(name), exist_ok=True)
        for file in sorted(index.files):
            place.upload(path / file, name, self._note)
        damage = self.read_back(place, name, index)
        if damage:
            faults = find_damage(path, index)
            if faults:
                raise DamagedCheckpoint(f"{path} is damaged: {'; '.join(faults)}")
            raise CheckpointError(f"the copy is damaged: {'; '.join(damage)}")
        for file in ("index.json", "index.xxh3"):
            place.upload(path / file, name, self._note)
            with place.open(name, file) as copy:
                same = copy.read() == (path / file).read_bytes()
            if not same:
                place.delete(name)
                raise CheckpointError(f"{place.url}/{name}/{file} is not read back as written")


class NotedFile:
    """A file that tells whenever it is read from."""

    def __init__(self, file: Any, note: Callable[[], None]) -> None:
        self.file, self.note = file, note
        self.seek, self.read, self.close = file.seek, file.read, file.close

    def readinto(self, block: memoryview) -> int:
        """Fill a block, or a part of it."""
        self.note()
        return int(self.file.readinto(block))


# --------------------------------------------------------------------------------------- reading


def fetch_newest(url: str, root: Path) -> tuple[Path | None, list[str]]:
    """Copy the newest undamaged checkpoint of a mirror to `root`; and what was skipped, by name.

    A damaged checkpoint of the same step in `root` is replaced. None: the mirror has none.

    Raises:
        CheckpointError: the mirror cannot be reached, or the disk here is full.
    """
    messages: list[str] = []
    try:
        place = Place(url)
        for name in reversed(place.folders()):
            if place.seal(name) is None:
                continue  # its copying was interrupted
            damage = fetch(place, name, Path(root))
            if not damage:
                return Path(root) / name, messages
            messages.append(f"{url}/{name} is damaged and was skipped: {'; '.join(damage)}")
    except CheckpointError:
        raise
    except Exception as error:  # file systems raise what they like
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"checkpoint.mirror={url}: {reason}; mend it, or set it to null to start without"
        ) from None
    return None, messages


def fetch(place: Place, name: str, root: Path) -> list[str]:
    """Copy one checkpoint to `root/NAME`, whole or not at all; returns what is damaged in it."""
    final, aside = root / name, root / (name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for file in ("index.xxh3", "index.json"):
            place.download(name, file, aside / file)
        index = read_index(aside)
        for file in index.files:
            place.download(name, file, aside / file)
        damage = find_damage(aside, index)
        if not damage:
            sync_folder(aside)
            if final.exists():
                delete_folder(final, aside=".damaged.tmp")
            os.rename(aside, final)
            sync_folder(root)
    except DamagedCheckpoint as error:
        damage = [str(error)]
    except FileNotFoundError as error:
        damage = [f"{error.filename or error} is missing"]
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [line.replace(str(aside), f"{place.url}/{name}") for line in damage]
