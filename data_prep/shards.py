"""Text to token shards: in parallel, resumable, byte-identical whatever the workers and the kills.

Three phases. Everything a phase finishes is fsynced and renamed into `OUT.partial/`, so that work
that was interrupted (also by SIGKILL) goes on where it was:

    read      one task per input file, or several small ones: its documents, compressed, with their
              lengths and hashes, cut into parts of bounded size
    tokenise  one task per part. Before it, the hashes of all documents decide which are duplicates
              (the first in file order stays) and which are validation: a decision about the whole
              corpus, hence the same for any number of workers
    assemble  one stream of tokens per split, parts in file order, written as MDS shards

Peak disk use beside the result: the text, compressed by about 2.5, and the tokens once more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from data_prep.progress import ProgressReport
from data_prep.readers import Reading, find_sources, read_documents
from megarecur.data.corpus import (
    CHUNK_TOKENS,
    COLUMN,
    MANIFEST_VERSION,
    Manifest,
    hash_file,
    read_manifest,
)
from megarecur.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from megarecur.errors import DataError

SMALLEST_PART, LARGEST_PART = 1 << 18, 1 << 22
SHARD_BYTES = 1 << 26
SPLITS = ("train", "val")
DROPPED, TRAIN, VAL = 0, 1, 2


@dataclass(frozen=True)
class ReadTask:
    """Read one input file, or several small ones."""

    sources: tuple[Path, ...]
    target: Path
    """Without suffix: .zst and .npz are added."""
    reading: Reading
    part_bytes: int


@dataclass(frozen=True)
class PartTask:
    """Tokenise some consecutive documents."""

    text: Path
    offset: int
    size: int
    """Where the part lies in the compressed text."""
    lengths: bytes
    """int64, bytes of each document."""
    fates: bytes
    """uint8 per document: DROPPED, TRAIN or VAL."""
    target: Path
    tokenizer: str


def prepare_shards(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    *,
    val_fraction: float = 0.0,
    text_key: str = "text",
    text_split: Literal["file", "blank_line", "separator"] = "file",
    separator: str = "",
    errors: Literal["fail", "skip", "replace"] = "fail",
    deduplicate: bool = True,
    exclude: Sequence[str] = (),
    workers: int = 0,
    part_bytes: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Turn text files into the corpora OUT/train and, with a val_fraction, OUT/val.

    Args:
        inputs: files, globs or folders (see `readers.find_sources`).
        out: folder of the result; OUT.partial holds unfinished work.
        tokenizer: a sentencepiece model, a tokenizer.json, or `bytes`.
        val_fraction: share of the documents, chosen by their hash, that goes to OUT/val.
        text_key, text_split, separator, errors: see `readers.Reading`.
        deduplicate: keep only the first of documents with equal text.
        exclude: patterns of paths or file names to leave out.
        workers: processes; 0: as many as cores.
        part_bytes: text per task of the second phase; 0: chosen by the size of the inputs.
        progress: told how far the work is.

    Returns:
        The manifest of each split, by its name.

    Raises:
        DataError: an input cannot be read, nothing is left to write, the disk is full, or OUT
            already holds something else.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be at least 0 and below 1")
    reading = Reading(text_key, text_split, separator, errors)
    sources = find_sources(inputs, exclude)
    model = load_tokenizer(tokenizer)
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    sizes = [path.stat().st_size for path in sources]
    names = _relative_names(sources)
    recipe = {
        "version": MANIFEST_VERSION,
        "sources": list(zip(names, sizes, strict=True)),
        "tokenizer": model.fingerprint,
        "val_fraction": val_fraction,
        "deduplicate": deduplicate,
        **asdict(reading),
    }
    preparation = xxhash.xxh3_128_hexdigest(json.dumps(recipe, sort_keys=True).encode())
    splits = SPLITS if val_fraction else SPLITS[:1]
    if all(_is_prepared(out / split, preparation, sources) for split in splits):
        shutil.rmtree(partial, ignore_errors=True)
        return {split: read_manifest(out / split) for split in splits}

    with _explain_full_disk(partial), _only_one(partial):
        times = [path.stat().st_mtime_ns for path in sources]
        _resume_or_restart(
            partial, {"preparation": preparation, "times": times, "part": part_bytes}
        )
        tokenizer_file = _copy_tokenizer(tokenizer, model, partial)
        run = _Runner(workers or len(os.sched_getaffinity(0)), progress or _Silent())

        part_bytes = part_bytes or min(max(sum(sizes) // 64, SMALLEST_PART), LARGEST_PART)
        read = [
            ReadTask(tuple(group), partial / f"read-{i:06}", reading, part_bytes)
            for i, group in enumerate(_group_small(sources, sizes, part_bytes))
        ]
        size_of = dict(zip(sources, sizes, strict=True))
        read_sizes = [sum(size_of[source] for source in task.sources) for task in read]
        run("read", _read_sources, read, ".npz", read_sizes)
        indices = [np.load(task.target.with_suffix(".npz")) for task in read]
        fates, duplicates = _decide(indices, val_fraction, deduplicate)

        parts, part_sizes = _cut_into_parts(read, indices, fates, tokenizer_file)
        run("tokenise", _tokenise_part, parts, ".tokens", part_sizes)

        shared = {
            "tokenizer": model.name,
            "tokenizer_fingerprint": model.fingerprint,
            "vocab_size": model.vocab_size,
            "eos_id": model.eos_id,
            "dtype": np.dtype(model.dtype).name,
            "duplicates_removed": duplicates,
            "documents_skipped": sum(int(index["skipped"]) for index in indices),
            "preparation": preparation,
            "sources": [
                {"name": name, "documents": int(documents), "bytes": int(num_bytes)}
                for name, (documents, num_bytes) in zip(
                    names, np.concatenate([index["sources"] for index in indices]), strict=True
                )
            ],
        }
        files = [part.target.with_suffix(".tokens") for part in parts]
        # train comes last: where it is, everything is.
        for split in reversed(splits):
            if not _is_prepared(out / split, preparation, sources):
                _assemble(split, files, partial, tokenizer_file, shared, run.progress)
                out.mkdir(parents=True, exist_ok=True)
                os.rename(partial / split, out / split)
                _sync(out)
        shutil.rmtree(partial)
    return {split: read_manifest(out / split) for split in splits}


# ---------------------------------------------------------------------------------- the three tasks


def _read_sources(task: ReadTask) -> int:
    """Write the documents of some input files as compressed parts, and an index of them."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    lengths: list[int] = []
    hashes: list[bytes] = []
    part: list[bytes] = []
    part_documents, part_offsets, per_source = [0], [0], []
    skipped = held = 0
    with _publish(task.target.with_suffix(".zst")) as file:

        def flush() -> None:
            file.write(compressor.compress(b"".join(part)))
            part_documents.append(len(lengths))
            part_offsets.append(file.tell())
            part.clear()

        for source in task.sources:
            already = len(lengths)
            for document in read_documents(source, task.reading):
                if document is None:
                    skipped += 1
                    continue
                if part and held + len(document) > task.part_bytes:
                    flush()
                    held = 0
                part.append(document)
                held += len(document)
                lengths.append(len(document))
                hashes.append(xxhash.xxh3_128_digest(document))
            per_source.append((len(lengths) - already, sum(lengths[already:])))
        if part:
            flush()
    with _publish(task.target.with_suffix(".npz")) as file:
        np.savez(
            file,
            lengths=np.array(lengths, np.int64),
            hashes=np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64),
            part_documents=np.array(part_documents, np.int64),
            part_offsets=np.array(part_offsets, np.int64),
            sources=np.array(per_source, np.int64),
            skipped=np.int64(skipped),
        )
    return 0


def _tokenise_part(task: PartTask) -> int:
    """Write the tokens, and the tokens and bytes of each document, of one part for each split."""
    import zstandard

    tokenizer = _load_once(task.tokenizer)
    with open(task.text, "rb") as file:
        file.seek(task.offset)
        text = zstandard.ZstdDecompressor().decompress(file.read(task.size))
    end = np.array([tokenizer.eos_id], tokenizer.dtype)
    ids: dict[int, list[np.ndarray]] = {TRAIN: [], VAL: []}
    num_bytes = {TRAIN: 0, VAL: 0}
    begin = 0
    for length, fate in zip(
        np.frombuffer(task.lengths, np.int64).tolist(), task.fates, strict=True
    ):
        if fate != DROPPED:
            document = tokenizer.encode_array(text[begin : begin + length].decode())
            ids[fate] += [document.astype(tokenizer.dtype), end]
            num_bytes[fate] += length
        begin += length
    with _publish(task.target.with_suffix(".tokens")) as file:
        for fate in (TRAIN, VAL):
            np.save(file, np.array([a.size + 1 for a in ids[fate][::2]], np.int64))
            np.save(file, np.array(num_bytes[fate], np.int64))
            np.save(file, np.concatenate([np.empty(0, tokenizer.dtype), *ids[fate]]))
    return sum(a.size for arrays in ids.values() for a in arrays)


def _assemble(
    split: str,
    files: Sequence[Path],
    partial: Path,
    tokenizer_file: str,
    shared: dict[str, Any],
    progress: ProgressReport | _Silent,
) -> None:
    """Write one split into `partial/split`: shards, index, document starts, manifest."""
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from streaming import MDSWriter

    folder = partial / split
    shutil.rmtree(folder, ignore_errors=True)
    # Not as a context: after an exception, leaving it would write a valid-looking partial index.
    writer = MDSWriter(
        out=str(folder),
        columns={COLUMN: f"ndarray:{shared['dtype']}:{CHUNK_TOKENS}"},
        hashes=["xxh64"],
        size_limit=SHARD_BYTES,
    )
    rest = np.empty(0, shared["dtype"])
    lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
    num_tokens = num_bytes = 0
    with progress.phase(split, sum(f.stat().st_size for f in files)):
        for path in files:
            document_lengths, part_bytes, tokens = _load_tokens(path, split)
            lengths.append(document_lengths)
            num_bytes += part_bytes
            num_tokens += tokens.size
            rest = np.concatenate([rest, tokens]) if rest.size else tokens
            whole = rest.size // CHUNK_TOKENS * CHUNK_TOKENS
            for chunk in rest[:whole].reshape(-1, CHUNK_TOKENS):
                writer.write({COLUMN: chunk})
            rest = rest[whole:]
            progress.advance(path.stat().st_size)
    if rest.size:
        padding = np.full(CHUNK_TOKENS - rest.size, shared["eos_id"], rest.dtype)
        writer.write({COLUMN: np.concatenate([rest, padding])})
    documents = np.cumsum(np.concatenate(lengths))[:-1]
    if not documents.size:
        shutil.rmtree(folder, ignore_errors=True)
        remedy = (
            "raise --val-fraction or leave it out"
            if split == "val"
            else "give files that hold text, or lower --val-fraction"
        )
        raise DataError(
            f"{partial.with_suffix('') / split}: would be empty, no document of "
            f"{len(shared['sources'])} input file(s) is left for it; {remedy}"
        )
    writer.finish()

    np.save(folder / "documents.npy", documents)
    if tokenizer_file != BYTES:
        shutil.copyfile(tokenizer_file, folder / Path(tokenizer_file).name)
    contents = {
        file.name: {"bytes": file.stat().st_size, "xxh64": hash_file(file)}
        for file in sorted(folder.iterdir())
    }
    # A disk that filled up, or failed, between the writer's buffer and the file shows here.
    for shard in json.loads((folder / "index.json").read_bytes())["shards"]:
        name, expected = shard["raw_data"]["basename"], shard["raw_data"]["hashes"]["xxh64"]
        if contents[name]["xxh64"] != expected:
            raise DataError(f"{folder / name}: was not written as intended; check the disk")
    manifest = Manifest(
        version=MANIFEST_VERSION,
        split=split,
        num_tokens=num_tokens,
        num_documents=documents.size,
        num_bytes=num_bytes,
        files=contents,
        **shared,
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True))
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


# ------------------------------------------------------------------------------------ what is where


def _decide(
    indices: Sequence[Any], val_fraction: float, deduplicate: bool
) -> tuple[list[np.ndarray], int]:
    """The fate (uint8) of each document of each task, and the number of duplicates."""
    hashes = np.concatenate([index["hashes"] for index in indices])
    fates = np.full(len(hashes), TRAIN, np.uint8)
    fates[hashes[:, 0] < np.uint64(int(val_fraction * 2**64))] = VAL
    duplicates = 0
    if deduplicate and len(hashes):
        # A stable sort: among equal hashes, the first document comes first.
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
        fates[order[1:][repeated]] = DROPPED
        duplicates = int(repeated.sum())
    counts = [index["lengths"].size for index in indices]
    return np.split(fates, np.cumsum(counts)[:-1]), duplicates


def _cut_into_parts(
    read: Sequence[ReadTask], indices: Sequence[Any], fates: Sequence[np.ndarray], tokenizer: str
) -> tuple[list[PartTask], list[int]]:
    """All parts in order, and the bytes of text of each."""
    parts, sizes = [], []
    for task, index, fate in zip(read, indices, fates, strict=True):
        lengths, documents, offsets = (
            index[k] for k in ("lengths", "part_documents", "part_offsets")
        )
        for k in range(len(documents) - 1):
            inside = slice(documents[k], documents[k + 1])
            parts.append(
                PartTask(
                    text=task.target.with_suffix(".zst"),
                    offset=int(offsets[k]),
                    size=int(offsets[k + 1] - offsets[k]),
                    lengths=lengths[inside].tobytes(),
                    fates=fate[inside].tobytes(),
                    target=task.target.with_name(f"{task.target.name}-{k:06}"),
                    tokenizer=tokenizer,
                )
            )
            sizes.append(int(lengths[inside].sum()))
    return parts, sizes


def _group_small(sources: Sequence[Path], sizes: Sequence[int], most: int) -> Iterator[list[Path]]:
    """Consecutive files of up to `most` bytes together; a larger file is alone."""
    group: list[Path] = []
    held = 0
    for source, size in zip(sources, sizes, strict=True):
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(source)
        held += size
    yield group


def _load_tokens(path: Path, split: str) -> tuple[np.ndarray, int, np.ndarray]:
    """Tokens of each document, bytes of text and tokens of a part, of one split."""
    with open(path, "rb") as file:
        arrays = [np.load(file) for _ in range(6)]
    lengths, num_bytes, tokens = arrays[:3] if split == "train" else arrays[3:]
    return lengths, int(num_bytes), tokens


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Names that do not depend on where the inputs lie."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, root)).as_posix() for path in absolute]


def _is_prepared(path: Path, preparation: str, sources: Sequence[Path]) -> bool:
    """Whether a split is there already; refuses to replace another one."""
    if not path.exists():
        return False
    manifest = read_manifest(path)
    written = (path / "manifest.json").stat().st_mtime
    if manifest.preparation != preparation:
        reason = "was prepared from other files, with another tokenizer or with other options"
    elif newer := [p for p in sources if p.stat().st_mtime > written]:
        reason = f"is older than {newer[0]}"
    else:
        return True
    raise DataError(f"{path}: exists and {reason}; delete it, or choose another output folder")


def _resume_or_restart(partial: Path, plan: dict[str, Any]) -> None:
    """Keep the finished parts of an interrupted run of the same plan; start anew otherwise."""
    file = partial / "plan.json"
    text = json.dumps(plan, sort_keys=True)
    if file.exists() and file.read_text() == text:
        return
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    with _publish(file) as handle:
        handle.write(text.encode())


def _copy_tokenizer(path: str | Path, tokenizer: Tokenizer, partial: Path) -> str:
    """A copy that stays as it is while the work goes on, and ends up in the corpus."""
    if str(path) == BYTES:
        return BYTES
    copy = partial / f"tokenizer{Path(path).suffix or '.model'}"
    with _publish(copy) as file:
        file.write(Path(path).read_bytes())
    if load_tokenizer(copy).fingerprint != tokenizer.fingerprint:
        raise DataError(f"{path}: changed while it was read; run again")
    return str(copy)


@contextmanager
def _publish(path: Path) -> Iterator[Any]:
    """Write a file aside; give it its name when it is complete and on disk."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _only_one(partial: Path) -> Iterator[None]:
    """Hold the partial folder; a second process that prepares the same output is refused."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{partial}: another process is preparing this corpus; wait for it, or choose "
                "another output folder"
            ) from None
        yield


@contextmanager
def _explain_full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{error.filename or partial}: the disk is full; free some space and run again, what "
            f"is finished in {partial} is kept"
        ) from None


# ---------------------------------------------------------------------------------------- processes


class _Silent:
    """No report."""

    @contextmanager
    def phase(self, name: str, total_bytes: int) -> Iterator[None]:
        yield

    def advance(self, num_bytes: int, tokens: int = 0, resumed: bool = False) -> None:
        pass


class _Runner:
    """Runs the tasks of a phase that are not done yet, over processes."""

    def __init__(self, workers: int, progress: ProgressReport | _Silent) -> None:
        self.workers, self.progress = workers, progress

    def __call__(
        self,
        name: str,
        do: Callable[[Any], int],
        tasks: Sequence[Any],
        suffix: str,
        sizes: Sequence[int],
    ) -> None:
        with self.progress.phase(name, sum(sizes)):
            todo = []
            for task, size in zip(tasks, sizes, strict=True):
                if task.target.with_suffix(suffix).exists():
                    self.progress.advance(size, resumed=True)
                else:
                    todo.append((task, size))
            for size, tokens in self._run(do, todo):
                self.progress.advance(size, tokens)

    def _run(
        self, do: Callable[[Any], int], todo: Sequence[tuple[Any, int]]
    ) -> Iterable[tuple[int, int]]:
        """Yield (size, result) of each task as it ends."""
        if self.workers == 1 or len(todo) == 1:
            for task, size in todo:
                yield size, do(task)
            return
        import multiprocessing

        if not todo:
            return
        pool = ProcessPoolExecutor(
            min(self.workers, len(todo)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_end_with_parent,
        )
        try:
            waiting = iter(todo)
            running: dict[Future[int], int] = {}
            while True:
                for task, size in waiting:
                    running[pool.submit(do, task)] = size
                    if len(running) >= 4 * self.workers:
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; run again with fewer "
                "--workers, what is finished is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when its parent is gone; it would wait for tasks for ever."""
    import multiprocessing
    from multiprocessing.connection import wait as wait_for

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _load_once(path: str) -> Tokenizer:
    """A worker's tokenizer."""
    return load_tokenizer(path)
