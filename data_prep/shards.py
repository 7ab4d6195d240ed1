"""Convert text to token shards: in parallel, resumable, byte-identical for any number of workers.

There are three phases. Every finished piece is fsynced and renamed into `OUT.partial/`, so that
interrupted work (also by SIGKILL) resumes:

    read      one task per input file, or several small ones: its documents, compressed, with their
              lengths and hashes, cut into parts of bounded size
    tokenise  one task per part. Before it, the hashes of all documents decide which are duplicates
              (the first in file order stays) and which are validation: a decision about the whole
              corpus, hence the same for any number of workers
    assemble  one stream of tokens per split, parts in file order, written as MDS shards

The tasks of job arrays in `data_prep/array.py` run the same phases.

Peak disk use beside the result is the text, compressed by about 2.5, and the tokens once more.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from functools import partial as partial_call
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data.corpus import (
    CHUNK_TOKENS,
    COLUMN,
    MANIFEST_VERSION,
    Manifest,
    check_files,
    read_manifest,
    write_manifest,
)
from megarecur.data.mapped_files import hash_file
from megarecur.data.shard_index import read_index
from megarecur.data.tokenizer import (
    BYTES,
    CONFIG_FILE,
    Tokenizer,
    describe_end,
    load_tokenizer,
)
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.duplicates import NUM_HASHES, find_near_duplicates, signature
from megarecur.data_prep.plan import PrepPlan, Request, make_plan
from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.data_prep.readers import (
    WHOLE_FILES,
    Notes,
    Reading,
    Source,
    hash_again,
    read_documents,
)
from megarecur.data_prep.work_files import name_damage
from megarecur.data_prep.workers import Workers
from megarecur.errors import DataError
from megarecur.files import open_replacement, publish, sync
from megarecur.reading import parse_object, read_object

SHARD_BYTES = 1 << 26
DROPPED, TRAIN, VAL = 0, 1, 2


@dataclass(frozen=True)
class ReadTask:
    """Read one input file, or several small ones."""

    sources: tuple[Source, ...]
    target: Path
    """Path without suffix; .zst and .npz are appended."""
    reading: Reading
    part_bytes: int
    signatures: bool
    """Also store the signatures that near-duplicates are found by."""
    hashes: tuple[str, ...] = ()
    """Hashes that the files must have after reading; empty if they were hashed just now."""


@dataclass(frozen=True)
class PartTask:
    """Tokenise some consecutive documents."""

    text: Path
    offset: int
    size: int
    """Bytes of the part in the compressed text."""
    lengths: bytes
    """Bytes of each document, int64."""
    fates: bytes
    """Fate of each document, uint8: DROPPED, TRAIN or VAL."""
    target: Path
    tokenizer: str


@dataclass(frozen=True)
class Decision:
    """The decision about all documents; the fate of each is in `fates.npy`."""

    removed: dict[str, int]
    """Number of removed documents, by reason."""
    documents: list[int]
    """Number of documents of each task of the first phase."""
    parts: list[list[int]]
    """Bytes of text of each part of each task of the first phase."""


def prepare_shards(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    reading: Reading = WHOLE_FILES,
    *,
    val_fraction: float = 0.0,
    deduplicate: bool = True,
    near_duplicates: float = 0.0,
    workers: int = 0,
    part_bytes: int = 0,
    eos: str | None = None,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Convert text files to the corpora OUT/train and, with a val_fraction, OUT/val.

    Args:
        inputs: files, globs, folders, or `hf:...` (see `readers.find_sources`).
        out: folder of the result; OUT.partial holds unfinished work.
        tokenizer: a sentencepiece model, a tokenizer.json, or `bytes`.
        val_fraction: share of the documents, chosen by their hash, that goes to OUT/val.
        deduplicate: keep only the first of documents with equal text.
        near_duplicates: drop documents whose estimated similarity (Jaccard, of their sets of 5
        consecutive words) to an earlier one is at least this; 0 drops none.
        workers: processes; 0 means one per core.
        part_bytes: text per task of the second phase; 0 chooses by the size of the inputs.
        eos: the token that ends documents, by its name or id; None uses that of the tokenizer, or
        of a tokenizer_config.json or generation_config.json beside it.

    Returns:
        The manifest of each split, by its name.

    Raises:
        DataError: an input cannot be read, no text is left to write, the output cannot be written
        (or the disk is full), or OUT already holds something else.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    request = Request(
        tuple(map(str, inputs)), str(tokenizer), reading, val_fraction, deduplicate,
        near_duplicates, part_bytes, eos,
    )  # fmt: skip
    if workers < 0:
        raise DataError(f"workers={workers} must be at least 1, or 0 for one per core; correct it")
    out = Path(out)
    partial = partial_of(out)
    with explain_os_errors(partial, "finished work is kept"):
        model = load_tokenizer(tokenizer, eos)
        plan = make_plan(request, model)
        if is_prepared(out, plan):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            number = workers or len(os.sched_getaffinity(0))
            with hold(partial), Workers(number, progress) as pool:
                resume_or_restart(partial, plan.stamp)
                _prepare(plan, out, partial, copy_tokenizer(tokenizer, model, partial), pool)
    return {split: read_manifest(out / split) for split in plan.splits}


def _prepare(plan: PrepPlan, out: Path, partial: Path, tokenizer_file: str, pool: Workers) -> None:
    """Run the three phases, or the remaining part of them."""
    read, read_sizes = read_tasks(plan, partial)
    pool.run("read", read_sources, read, ".npz", read_sizes)
    decision = decide_once(plan, partial, read)
    parts, part_sizes = part_tasks(partial, read, decision, tokenizer_file)
    pool.run("tokenise", tokenise_part, parts, ".tokens", part_sizes, meanwhile=_warm_up)
    assemble(plan, out, partial, read, decision, tokenizer_file, pool.progress)


def partial_of(out: Path) -> Path:
    """Return the folder of unfinished work for an output folder."""
    return out.with_name(out.name + ".partial")


def read_tasks(
    plan: PrepPlan, partial: Path, checked: bool = False
) -> tuple[list[ReadTask], list[int]]:
    """Return the tasks of the first phase, and the bytes of input of each.

    Args:
        checked: let each task compare its files with the hashes of the plan.
    """
    tasks, sizes = [], []
    for i, group in enumerate(_group_small(plan.sizes, plan.part_bytes)):
        tasks.append(
            ReadTask(
                tuple(plan.sources[group]),
                partial / f"read-{i:06}",
                plan.reading,
                plan.part_bytes,
                signatures=plan.near_duplicates > 0,
                hashes=tuple(plan.hashes[group]) if checked else (),
            )
        )
        sizes.append(sum(plan.sizes[group]))
    return tasks, sizes


def assemble(
    plan: PrepPlan,
    out: Path,
    partial: Path,
    read: Sequence[ReadTask],
    decision: Decision,
    tokenizer_file: str,
    progress: ProgressReport | None,
) -> None:
    """Write the missing splits, log skipped documents, and delete the unfinished work.

    Raises:
        DataError: a split would be empty, or was not written as intended.
    """
    shared = _describe(plan, read, decision.removed)
    files = [target.with_suffix(".tokens") for target in part_targets(read, decision)]
    notes = Notes()
    for task in read:
        with name_damage(task.target.with_suffix(".npz")):
            notes.merge(parse_object(str(_load_index(task, "notes")[0])))
    notes.tell()
    # train is last: if it exists, everything exists
    for split in reversed(plan.splits):
        if not _is_split_prepared(out / split, plan):
            _assemble(split, files, partial, tokenizer_file, shared, progress)
            out.mkdir(parents=True, exist_ok=True)
            publish(partial / split, out / split)
    shutil.rmtree(partial)


def _describe(plan: PrepPlan, read: Sequence[ReadTask], removed: dict[str, int]) -> dict[str, Any]:
    """Return the values that the manifests of all splits share."""
    indices = [_load_index(task, "sources", "skipped") for task in read]
    counts = np.concatenate([sources for sources, _ in indices]).tolist()
    return {
        "tokenizer": plan.tokenizer.name,
        "tokenizer_fingerprint": plan.tokenizer.fingerprint,
        "vocab_size": plan.tokenizer.vocab_size,
        "eos_id": plan.tokenizer.eos_id,
        "dtype": np.dtype(plan.tokenizer.dtype).name,
        **removed,
        "documents_skipped": sum(int(skipped) for _, skipped in indices),
        "preparation": plan.preparation,
        "sources": [
            {"name": name, "xxh64": digest, "documents": documents, "bytes": num_bytes}
            for name, digest, (documents, num_bytes) in zip(
                plan.names, plan.hashes, counts, strict=True
            )
        ],
    }


# ---------------------------------------------------------------------------------- the three tasks


def read_sources(task: ReadTask) -> int:
    """Write the documents of some input files as compressed parts, and an index of them.

    Raises:
        DataError: a file cannot be read, or differs from the plan.
    """
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    lengths: list[int] = []
    hashes: list[bytes] = []
    signatures: list[NDArray[Any]] = []
    part: list[bytes] = []
    part_documents, part_offsets, per_source = [0], [0], []
    skipped = held = 0
    notes = Notes()
    with open_replacement(task.target.with_suffix(".zst"), shared=True) as file, _as_planned(task):

        def flush() -> None:
            file.write(compressor.compress(b"".join(part)))
            part_documents.append(len(lengths))
            part_offsets.append(file.tell())
            part.clear()

        for source in task.sources:
            already = len(lengths)
            for document in read_documents(source, task.reading, notes):
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
                if task.signatures:
                    signatures.append(signature(document))
            per_source.append((len(lengths) - already, sum(lengths[already:])))
        if part:
            flush()
    with open_replacement(task.target.with_suffix(".npz"), shared=True) as file:
        np.savez(
            file,
            lengths=np.array(lengths, np.int64),
            hashes=np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64),
            part_documents=np.array(part_documents, np.int64),
            part_offsets=np.array(part_offsets, np.int64),
            sources=np.array(per_source, np.int64),
            skipped=np.int64(skipped),
            notes=np.array(json.dumps(notes)),
            signatures=np.array(signatures, np.uint32).reshape(-1, NUM_HASHES),
        )
    return 0


@contextmanager
def _as_planned(task: ReadTask) -> Iterator[None]:
    """Compare the read files with the hashes of the plan, if the task has them.

    The comparison comes after reading, so that it covers the bytes that were read, and errors of
    changed content are reported as such.
    """
    failed: DataError | None = None
    try:
        yield
    except DataError as error:
        failed = error
    for source, planned in zip(task.sources, task.hashes, strict=False):
        if hash_again(source) != planned:
            raise DataError(
                f"{source}: changed since this work was submitted; put the file back, or submit "
                "the same command again, which restarts the work"
            ) from failed
    if failed is not None:
        raise failed


def tokenise_part(task: PartTask) -> int:
    """Write the tokens, and the tokens and bytes of each document, of one part for each split."""
    import zstandard

    tokenizer = _load_once(task.tokenizer)
    with open(task.text, "rb") as file:
        file.seek(task.offset)
        text = zstandard.ZstdDecompressor().decompress(file.read(task.size))
    end = np.array([tokenizer.eos_id], tokenizer.dtype)
    ids: dict[int, list[NDArray[Any]]] = {TRAIN: [], VAL: []}
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
    with open_replacement(task.target.with_suffix(".tokens"), shared=True) as file:
        for fate in (TRAIN, VAL):
            np.save(file, np.array([a.size + 1 for a in ids[fate][::2]], np.int64))
            np.save(file, np.array(num_bytes[fate], np.int64))
            np.save(file, np.concatenate([np.empty(0, tokenizer.dtype), *ids[fate]]))
    return sum(a.size for arrays in ids.values() for a in arrays)


def _import_writer() -> Any:
    """Return the library's writer; its imports take seconds."""
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from streaming import MDSWriter

    return MDSWriter


def _warm_up() -> None:
    """Import the writer early; errors are raised when it is needed."""
    with suppress(Exception):
        _import_writer()


def _assemble(
    split: str,
    files: Sequence[Path],
    partial: Path,
    tokenizer_file: str,
    shared: dict[str, Any],
    progress: ProgressReport | None,
) -> None:
    """Write one split into `partial/split`: shards, index, document starts, manifest."""
    folder = partial / split
    shutil.rmtree(folder, ignore_errors=True)
    writer = open_writer(folder, shared["dtype"])
    load = partial_call(_load_tokens, split=split)
    lengths, num_bytes = write_chunks(writer, split, files, load, shared, progress)
    if not lengths.size:
        shutil.rmtree(folder, ignore_errors=True)
        remedy = (
            "raise --val-fraction or omit it"
            if split == "val"
            else "name files with text, or lower --val-fraction"
        )
        raise DataError(
            f"{partial.with_suffix('') / split}: the corpus would be empty, no document of "
            f"{len(shared['sources'])} input file(s) is left for it; {remedy}"
        )
    finish_split(writer, folder, tokenizer_file, lengths, {**shared, "num_bytes": num_bytes})


def open_writer(folder: Path, dtype: str) -> Any:
    """Return the library's writer of chunks of tokens.

    Do not use it as a context: after an exception, it would write a valid-looking partial index.
    """
    return open_columns(folder, {COLUMN: f"ndarray:{dtype}:{CHUNK_TOKENS}"})


def open_columns(folder: Path, columns: dict[str, str]) -> Any:
    """Return the library's writer of samples with these columns; see `open_writer`."""
    return _import_writer()(
        out=str(folder), columns=columns, hashes=["xxh64"], size_limit=SHARD_BYTES
    )


def finish_split(
    writer: Any, folder: Path, tokenizer_file: str, lengths: NDArray[Any], shared: dict[str, Any]
) -> None:
    """Finish a split whose chunks are written: index, document starts, tokenizer, manifest; synced.

    Args:
        folder: folder of the split, with any further files of it.
        tokenizer_file: file to copy into the folder, unless it is `bytes`.
    """
    writer.finish()
    np.save(folder / "documents.npy", lengths.cumsum() - lengths)
    if tokenizer_file != BYTES:
        shutil.copyfile(tokenizer_file, folder / Path(tokenizer_file).name)
        described = Path(tokenizer_file).with_name(CONFIG_FILE)
        if described.exists():
            shutil.copyfile(described, folder / CONFIG_FILE)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        split=folder.name,
        num_tokens=int(lengths.sum()),
        num_documents=lengths.size,
        files=_hash_written(folder),
        **shared,
    )
    manifest = replace(manifest, identity=manifest.fingerprint)
    (folder / "manifest.json").write_bytes(write_manifest(asdict(manifest)))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def write_chunks(
    writer: Any,
    split: str,
    files: Sequence[Path],
    load: Callable[[Path], tuple[NDArray[Any], int, NDArray[Any]]],
    shared: Mapping[str, Any],
    progress: ProgressReport | None,
) -> tuple[NDArray[Any], int]:
    """Write the tokens of a split; return the tokens of each document, and the total bytes of
    text.

    Args:
        load: returns the tokens of each document, the bytes of text and the tokens of a file.
    """
    rest = np.empty(0, shared["dtype"])
    lengths: list[NDArray[Any]] = [np.empty(0, np.int64)]
    num_bytes = 0
    with report_phase(progress, split, sum(f.stat().st_size for f in files)) as advance:
        for path in files:
            document_lengths, part_bytes, tokens = load(path)
            lengths.append(document_lengths)
            num_bytes += part_bytes
            rest = np.concatenate([rest, tokens]) if rest.size else tokens
            whole = rest.size // CHUNK_TOKENS * CHUNK_TOKENS
            for chunk in rest[:whole].reshape(-1, CHUNK_TOKENS):
                writer.write({COLUMN: chunk})
            rest = rest[whole:]
            advance(path.stat().st_size)
    if rest.size:
        padding = np.full(CHUNK_TOKENS - rest.size, shared["eos_id"], rest.dtype)
        writer.write({COLUMN: np.concatenate([rest, padding])})
    return np.concatenate(lengths), num_bytes


def _hash_written(folder: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and hash of every file, read back from disk."""
    contents = {
        file.name: {"bytes": file.stat().st_size, "xxh64": hash_file(file)}
        for file in sorted(folder.iterdir())
    }
    # This finds a disk that filled up, or failed, between the writer's buffer and the file.
    for shard in read_index(folder):
        name, expected = shard["raw_data"]["basename"], shard["raw_data"]["hashes"]["xxh64"]
        if contents[name]["xxh64"] != expected:
            raise DataError(f"{folder / name}: was not written as intended; check the disk")
    return contents


# ------------------------------------------------------------------------------------ what is where


def decide_once(plan: PrepPlan, partial: Path, read: Sequence[ReadTask]) -> Decision:
    """Return the decision about all documents, made by one process while others wait, then
    recorded.

    Raises:
        DataError: a task of the first phase is not done.
    """
    file = partial / "decision.json"
    with open(partial / "decide.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            refuse_missing([task.target.with_suffix(".npz") for task in read], "read")
            fates, removed = _decide(read, plan)
            with open_replacement(partial / "fates.npy", shared=True) as handle:
                np.save(handle, fates)
            indices = [_load_index(task, "lengths", "part_documents") for task in read]
            decision = Decision(
                removed,
                [lengths.size for lengths, _ in indices],
                [
                    [int(lengths[i:j].sum()) for i, j in pairwise(documents.tolist())]
                    for lengths, documents in indices
                ],
            )
            with open_replacement(file, shared=True) as handle:
                handle.write(json.dumps(asdict(decision)).encode())
    return read_decision(partial)


def read_decision(partial: Path) -> Decision:
    """Return the recorded decision."""
    file = partial / "decision.json"
    with name_damage(file):
        return Decision(**read_object(file))


def refuse_missing(files: Sequence[Path], phase: str) -> None:
    """Raise an error if a phase is not done."""
    if missing := [file for file in files if not file.exists()]:
        raise DataError(
            f"{missing[0].parent}: {len(missing)} of {len(files)} pieces of the phase {phase} are "
            f"not finished, such as {missing[0].name}; submit the same command again"
        )


def _load_index(task: ReadTask, *keys: str) -> tuple[Any, ...]:
    """Return some arrays from the index of a task of the first phase."""
    file = task.target.with_suffix(".npz")
    with name_damage(file), np.load(file) as index:
        return tuple(index[key] for key in keys)


def _decide(read: Sequence[ReadTask], plan: PrepPlan) -> tuple[NDArray[Any], dict[str, int]]:
    """Return the fate (uint8) of each document of all tasks, and how many were removed, by
    reason."""
    hashes = np.concatenate([_load_index(task, "hashes")[0] for task in read])
    fates = np.full(len(hashes), TRAIN, np.uint8)
    fates[hashes[:, 0] < np.uint64(int(plan.val_fraction * 2**64))] = VAL
    exact = near = 0
    if plan.deduplicate and len(hashes):
        # A stable sort puts the first document first among equal hashes.
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
        fates[order[1:][repeated]] = DROPPED
        exact = int(repeated.sum())
    if plan.near_duplicates:
        found = [s for task in read for s in _load_index(task, "signatures")[0]]
        kept = (i for i in range(len(found)) if fates[i] != DROPPED)
        similar = find_near_duplicates(found, kept, plan.near_duplicates)
        fates[similar] = DROPPED
        near = len(similar)
    return fates, {"duplicates_removed": exact, "near_duplicates_removed": near}


def part_targets(read: Sequence[ReadTask], decision: Decision) -> list[Path]:
    """Return the targets of all parts, in order."""
    return [
        task.target.with_name(f"{task.target.name}-{k:06}")
        for task, sizes in zip(read, decision.parts, strict=True)
        for k in range(len(sizes))
    ]


def part_tasks(
    partial: Path,
    read: Sequence[ReadTask],
    decision: Decision,
    tokenizer: str,
    chosen: Sequence[int] | None = None,
) -> tuple[list[PartTask], list[int]]:
    """Return the tasks of the second phase in order, and the bytes of text of each.

    Args:
        chosen: numbers of the parts to return; None means all.
    """
    wanted = None if chosen is None else set(chosen)
    targets = iter(enumerate(part_targets(read, decision)))
    with name_damage(partial / "fates.npy"):
        fates = np.load(partial / "fates.npy", mmap_mode="r")
    tasks, sizes = [], []
    begin = 0
    for task, num_documents, part_sizes in zip(
        read, decision.documents, decision.parts, strict=True
    ):
        # (part, target) of the wanted parts of this task
        mine = [
            (k, target)
            for k, (number, target) in enumerate(islice(targets, len(part_sizes)))
            if wanted is None or number in wanted
        ]
        if mine:
            lengths, documents, offsets = _load_index(
                task, "lengths", "part_documents", "part_offsets"
            )
        for k, target in mine:
            first, last = int(documents[k]), int(documents[k + 1])
            tasks.append(
                PartTask(
                    text=task.target.with_suffix(".zst"),
                    offset=int(offsets[k]),
                    size=int(offsets[k + 1] - offsets[k]),
                    lengths=lengths[first:last].tobytes(),
                    fates=fates[begin + first : begin + last].tobytes(),
                    target=target,
                    tokenizer=tokenizer,
                )
            )
            sizes.append(part_sizes[k])
        begin += num_documents
    return tasks, sizes


def _group_small(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Yield consecutive files of up to `most` bytes together; a larger file is alone."""
    begin = held = 0
    for i, size in enumerate(sizes):
        if i > begin and held + size > most:
            yield slice(begin, i)
            begin, held = i, 0
        held += size
    yield slice(begin, len(sizes))


def _load_tokens(path: Path, split: str) -> tuple[NDArray[Any], int, NDArray[Any]]:
    """Return tokens of each document, bytes of text and tokens of a part, of one split."""
    with name_damage(path), open(path, "rb") as file:
        arrays = [np.load(file) for _ in range(6)]
    lengths, num_bytes, tokens = arrays[:3] if split == "train" else arrays[3:]
    return lengths, int(num_bytes), tokens


def is_prepared(out: Path, plan: PrepPlan) -> bool:
    """Return True if the corpora already exist.

    Raises:
        DataError: other corpora exist there, or the path is not a folder.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another output folder")
    return all(_is_split_prepared(out / split, plan) for split in plan.splits)


def _is_split_prepared(path: Path, plan: PrepPlan) -> bool:
    """Return True if a split already exists; raise an error instead of replacing another one."""
    if not path.exists():
        return False
    manifest = read_manifest(path)
    if manifest.preparation == plan.preparation:
        refuse_damage(path, manifest)
        return True
    reason = "other files, with another tokenizer or with other options"
    if [source["name"] for source in manifest.sources] == list(plan.names):
        made_of = [source.get("xxh64") for source in manifest.sources]
        changed = [p for p, a, b in zip(plan.sources, made_of, plan.hashes, strict=True) if a != b]
        same = "the same files with another tokenizer or other options"
        reason = f"other content of {changed[0]}" if changed else same
    raise DataError(
        f"{path}: exists and was prepared from {reason}; delete it, or choose another output folder"
    )


def refuse_damage(path: Path, manifest: Manifest) -> None:
    """Reject an existing corpus whose files are damaged.

    Raises:
        DataError: the message names them.
    """
    try:
        check_files(path, manifest, manifest.files)
    except DataError as error:
        raise DataError(f"{error}; to prepare it again, delete {path} first") from None


def resume_or_restart(partial: Path, stamp: str) -> None:
    """Keep the finished parts of an interrupted run of the same plan, which its stamp identifies;
    otherwise restart."""
    if is_begun(partial, stamp):
        return
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    with open_replacement(partial / "plan.json", shared=True) as handle:
        handle.write(stamp.encode())


def is_begun(partial: Path, stamp: str) -> bool:
    """Return True if there is unfinished work of the plan with this stamp."""
    file = partial / "plan.json"
    return file.exists() and file.read_text() == stamp


def copy_tokenizer(path: str | Path, tokenizer: Tokenizer, partial: Path) -> str:
    """Return a copy that stays unchanged during the work, and ends up in the corpus."""
    if str(path) == BYTES:
        return BYTES
    copy = partial / f"tokenizer{Path(path).suffix or '.model'}"
    with open_replacement(copy, shared=True) as file:
        file.write(Path(path).read_bytes())
    for name, content in describe_end(tokenizer).items():
        with open_replacement(partial / name, shared=True) as file:
            file.write(content)
    if load_tokenizer(copy).fingerprint != tokenizer.fingerprint:
        raise DataError(f"{path}: changed while it was read; run again")
    return str(copy)


@contextmanager
def hold(partial: Path, shared: bool = False, patience: float = 0.0) -> Iterator[IO[str]]:
    """Hold the lock of the partial folder, exclusively or shared; yields the lock.

    Args:
        partial: the folder; created if missing.
        shared: allow other processes to hold it shared too.
        patience: seconds to wait for other holders.

    Raises:
        DataError: another process holds it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with open(partial / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise DataError(
                        f"{partial}: another process is preparing this corpus; wait for it, or "
                        "choose another output folder"
                    ) from None
                time.sleep(0.2)
        yield lock


@cache
def _load_once(path: str) -> Tokenizer:
    """Return a worker's tokenizer, loaded once."""
    return load_tokenizer(path)
