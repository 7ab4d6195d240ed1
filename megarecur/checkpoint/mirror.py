"""A mirror: a second location for checkpoints, a folder or any URL that fsspec supports.

    mirror = Mirror("s3://bucket/run", root, config.checkpoint, read_scores)
    mirror.start(); mirror.wait(seconds)
    fetch_newest("s3://bucket/run", root)

A mirrored checkpoint is a folder of the same files. It is complete once it has `index.xxh3`, which
is written last, after all other files were read back and matched their checksums. No renames are
needed, since object stores have none.
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

from megarecur.checkpoint.checkpoint import STEP_FOLDER, list_checkpoints, step_of
from megarecur.checkpoint.identity import owner_in, owner_of
from megarecur.checkpoint.index import DamagedCheckpoint, Index, read_index
from megarecur.checkpoint.retention import steps_to_keep
from megarecur.checkpoint.storage import find_damage
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.errors import CheckpointError, ConfigError
from megarecur.files import aside_of, delete_folder, publish
from megarecur.progress import Note, note_nothing
from megarecur.reading import parse_object

log = logging.getLogger(__name__)

MARK = "run"
"""File in each mirrored checkpoint with the ID of its run; it is written first."""
VOLATILE = ("memory",)
"""Protocols of fsspec that keep nothing beyond the process."""
COPY_BYTES = 1 << 23
STALLED_SECONDS = 300.0
"""Timeout in seconds: at the end of a run, give the mirror up after this long without progress."""


def check_mirror(url: str, root: Path) -> None:
    """Check that a mirror is usable, without connecting to it.

    Raises:
        ConfigError: the protocol is unknown, its library is not installed, or the folder is the
            run's own.
    """
    import fsspec

    if not url.strip():
        raise ConfigError(
            f"checkpoint.mirror={url!r}: is blank, which names the current directory; name a "
            "folder, or set it to null"
        )
    protocol = fsspec.utils.get_protocol(url)
    if protocol in VOLATILE:
        raise ConfigError(
            f"checkpoint.mirror={url}: is the memory of this process and ends with it; name a "
            "folder or URL that outlives the run"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"checkpoint.mirror={url}: {error}") from None
    if protocol in ("file", "local"):
        _, place = fsspec.core.url_to_fs(url)
        there, here = Path(place).resolve(), root.resolve()
        if there.is_relative_to(here) or (
            there.exists() and here.exists() and there.samefile(here)
        ):
            raise ConfigError(
                f"checkpoint.mirror={url} is where the run itself saves; choose another folder"
            )


class Place:
    """The checkpoint folders of a mirror and their files."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        # Uses a separate connection, so that a lost one is not cached.
        self.files, folder = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        self.folder = folder.rstrip("/")

    def path(self, *names: str) -> str:
        """Return a path inside the mirror, in the form of its file system."""
        return "/".join((self.folder, *names))

    def folders(self) -> list[str]:
        """List the names of checkpoint folders, oldest first, including incomplete ones."""
        self.files.invalidate_cache()
        try:
            entries = self.files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries}
        return sorted(name for name in names if STEP_FOLDER.fullmatch(name))

    def seal(self, name: str) -> bytes | None:
        """Return the `index.xxh3` of a checkpoint; None if the checkpoint is incomplete."""
        try:
            return bytes(self.files.cat_file(self.path(name, "index.xxh3")))
        except FileNotFoundError:
            return None

    def owner(self, name: str) -> str | None:
        """Return the ID of the run that wrote a complete checkpoint; None if it carries none.

        Raises:
            CheckpointError: the index is damaged, so that this cannot be known.
        """
        try:
            index = parse_object(self.files.cat_file(self.path(name, "index.json")))
            return owner_in(index["state"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{self.url}/{name}/index.json: is damaged, so that its run is not known; delete "
                "this checkpoint, or choose another mirror"
            ) from None

    def uploader(self, name: str) -> str | None:
        """Return the ID of the run that began to upload a checkpoint; None if it left none."""
        try:
            return bytes(self.files.cat_file(self.path(name, MARK))).decode(errors="replace")
        except FileNotFoundError:
            return None

    def is_empty(self, name: str) -> bool:
        """Return True if the folder of a checkpoint holds nothing."""
        return not self.files.ls(self.path(name), detail=False)

    def open(self, name: str, file: str) -> Any:
        """Open a file of a checkpoint for reading."""
        return self.files.open(self.path(name, file), "rb")

    def upload(self, source: Path, name: str, note: Callable[[], None]) -> None:
        """Copy a local file to the mirror, and sync it if the file system supports that."""
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

    def download(self, name: str, file: str, target: Path, note: Note) -> None:
        """Copy a file of the mirror to `target`, and sync it."""
        with self.open(name, file) as far, open(target, "xb") as ours:
            for block in blocks_of(far):
                ours.write(block)
                note(f"fetching {self.url}/{name}/{file}")
            ours.flush()
            os.fsync(ours.fileno())

    def delete(self, name: str) -> None:
        """Delete a checkpoint; deletes `index.xxh3` first, which marks it incomplete."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self.path(name, "index.xxh3"))
        self.files.rm(self.path(name), recursive=True)


def blocks_of(file: Any) -> Iterator[bytes]:
    """Yield a file's content in blocks of COPY_BYTES."""
    while block := file.read(COPY_BYTES):
        yield block


# --------------------------------------------------------------------------------------- writing


class ForeignMirror(CheckpointError):
    """A mirror that holds checkpoints of another run."""


class Mirror:
    """Background thread that keeps a mirror up to date; used by one process of a run.

    Errors of the mirror are logged as warnings and do not end the run.
    """

    def __init__(
        self,
        url: str,
        root: Path,
        rule: CheckpointConfig,
        read_scores: Callable[[], Mapping[int, float]],
        note: Note = note_nothing,
        run: str | None = None,
    ) -> None:
        self.note, self.run = note, run
        """ID of the run; None: every checkpoint is its own."""
        self.owners: dict[tuple[int, bytes | None], str | None] = {}
        """The run of each mirrored checkpoint, by step and seal."""
        self.url, self.root, self.rule, self.read_scores = url, Path(root), rule, read_scores
        self.busy: Path | None = None
        """The checkpoint being copied; it must not be deleted before the copy is done."""
        self.verified: dict[int, bytes] = {}
        """The seal of each step whose copy this process has read back and verified."""
        self.moved = 0.0
        self._lock = threading.Lock()
        self._wanted = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start an update of the mirror; if one is running, another follows it."""
        with self._lock:
            self._wanted = True
            if self._thread is None:
                self._note()
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most this many seconds; returns False if no copy is running or it has stalled."""
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
        if self.busy is not None:
            self.note(f"copying {self.busy.name} to {self.url}")

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                self._wanted = False
            try:
                self.synchronise()
            except Exception as error:  # file systems raise arbitrary exceptions
                reason = str(error) or type(error).__name__
                log.warning("checkpoint.mirror=%s: %s; the next save tries again", self.url, reason)
            finally:
                self.busy = None

    def synchronise(self) -> None:
        """Copy missing checkpoints that the rule keeps, newest first; then delete the others.

        Raises:
            ForeignMirror: see `check`; nothing is copied or deleted.
            CheckpointError: a copy differs from the original when it is read back.
            Exception: any error of the file system.
        """
        place = Place(self.url)
        ours = {
            step_of(path.name): path
            for path in list_checkpoints(self.root)
            if self.run is None or owner_of(path) == self.run
        }
        theirs = {step_of(name): place.seal(name) for name in place.folders()}
        self.refuse_foreign(place, theirs)
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
                if ours[step].exists():  # else deleted meanwhile: a newer one follows
                    damaged.append(f"{error} and is not copied")
        for step in theirs.keys() - steps_to_keep(complete, self.rule, scores):
            place.delete(f"step-{step:08d}")
        if damaged:
            raise CheckpointError("; ".join(damaged))

    def check(self) -> None:
        """Check that the mirror holds checkpoints of this run alone.

        Raises:
            ForeignMirror: it holds one of another run, or one whose run is not known.
            Exception: any error of the file system.
        """
        place = Place(self.url)
        names = place.folders()
        self.refuse_foreign(place, {step_of(name): place.seal(name) for name in names})

    def refuse_foreign(self, place: Place, seals: Mapping[int, bytes | None]) -> None:
        """Raise the errors of `check`, given the seal of each step; nothing is changed before."""
        if self.run is None:
            return
        for step, seal in seals.items():
            if (step, seal) not in self.owners:
                name = f"step-{step:08d}"
                owner = place.owner(name) if seal is not None else place.uploader(name)
                if owner is None and seal is None and place.is_empty(name):
                    continue  # a crash came before the mark
                self.owners[step, seal] = owner
            if (owner := self.owners[step, seal]) != self.run:
                whose = f"run {owner}" if owner else "a run that is not recorded in it"
                raise ForeignMirror(
                    f"checkpoint.mirror={self.url}: step-{step:08d} there is of {whose}, and this "
                    f"is run {self.run}; name an empty folder or URL of this run's own, or null"
                )

    def is_intact(self, place: Place, path: Path, seal: bytes) -> bool:
        """Return True if the existing copy of a checkpoint is intact; reads it at most once."""
        if self.verified.get(step_of(path.name)) == seal:
            return True
        damage = self.read_back(place, path.name, read_index(path))
        if damage:
            log.warning("the copy is damaged and is made anew: %s", "; ".join(damage))
        return not damage

    def read_back(self, place: Place, name: str, index: Index) -> list[str]:
        """Read a copy and return its damage."""

        def open_file(file: str) -> NotedFile:
            return NotedFile(place.open(name, file), self._note)

        return find_damage(f"{place.url}/{name}", index, open_file=open_file)

    def upload(self, place: Place, path: Path) -> None:
        """Copy a checkpoint, read it back, and complete it only if it is intact.

        Raises:
            DamagedCheckpoint: the original is damaged.
            CheckpointError: the copy is damaged.
        """
        index, name = read_index(path), path.name
        if name in place.folders():
            place.delete(name)
        place.files.makedirs(place.path(name), exist_ok=True)
        if self.run is not None:
            place.files.pipe_file(place.path(name, MARK), self.run.encode())
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
    """A file that calls `note` on every `readinto`."""

    def __init__(self, file: Any, note: Callable[[], None]) -> None:
        self.file, self.note = file, note
        self.seek, self.read, self.close = file.seek, file.read, file.close

    def readinto(self, block: memoryview) -> int:
        """Read into a block; returns the number of bytes read."""
        self.note()
        return int(self.file.readinto(block))


# --------------------------------------------------------------------------------------- reading


def fetch_newest(url: str, root: Path, note: Note = note_nothing) -> tuple[Path | None, list[str]]:
    """Copy the newest undamaged checkpoint of a mirror to `root`.

    A damaged checkpoint of the same step in `root` is replaced.

    Returns:
        The path, None if the mirror has no undamaged checkpoint, and a message for each one
        skipped.

    Raises:
        CheckpointError: the mirror cannot be reached, or the local disk is full.
    """
    messages: list[str] = []
    try:
        place = Place(url)
        for name in reversed(place.folders()):
            if place.seal(name) is None:
                continue  # the upload was interrupted
            damage = fetch(place, name, Path(root), note)
            if not damage:
                return Path(root) / name, messages
            messages.append(f"{url}/{name} is damaged and was skipped: {'; '.join(damage)}")
    except CheckpointError:
        raise
    except Exception as error:  # file systems raise arbitrary exceptions
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"checkpoint.mirror={url}: {reason}; correct it, or set it to null to start without"
        ) from None
    return None, messages


def fetch(place: Place, name: str, root: Path, note: Note) -> list[str]:
    """Copy one checkpoint to `root/NAME` atomically; returns its damage, [] if it is intact."""
    final, aside = root / name, aside_of(root / name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for file in ("index.xxh3", "index.json"):
            place.download(name, file, aside / file, note)
        index = read_index(aside)
        for file in index.files:
            place.download(name, file, aside / file, note)
        damage = find_damage(aside, index, note=note)
        if not damage:
            if final.exists():
                delete_folder(final, ".damaged.tmp")
            publish(aside, final)
    except DamagedCheckpoint as error:
        damage = [str(error)]
    except FileNotFoundError as error:
        damage = [f"{error.filename or error} is missing"]
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [line.replace(str(aside), f"{place.url}/{name}") for line in damage]
