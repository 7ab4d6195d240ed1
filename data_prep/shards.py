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

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.duplicates import NUM_HASHES, check_library, find_near_duplicates, signature
from data_prep.files import explain_os_errors, publish, sync
from data_prep.hub import HubShard
from data_prep.progress import ProgressReport, report_phase
from data_prep.readers import (
    WHOLE_FILES,
    Reading,
    Source,
    find_sources,
    hash_of,
    read_documents,
    size_of,
)
from data_prep.workers import Workers
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
class Plan:
    """What is made of what."""

    sources: Sequence[Source]
    names: Sequence[str]
    """Of the sources, whatever folder they lie in."""
    sizes: Sequence[int]
    hashes: Sequence[str]
    """xxh64 of each source as it lies on disk, or what stands for it."""
    reading: Reading
    tokenizer: Tokenizer
    val_fraction: float
    deduplicate: bool
    near_duplicates: float
    part_bytes: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The corpora to make."""
        return SPLITS if self.val_fraction else SPLITS[:1]

    @property
    def preparation(self) -> str:
        """The identity of the result: a hash of all that it depends on."""
        recipe = {
            "version": MANIFEST_VERSION,
            "sources": list(zip(self.names, self.hashes, strict=True)),
            "tokenizer": self.tokenizer.fingerprint,
            "val_fraction": self.val_fraction,
            "deduplicate": self.deduplicate,
            **asdict(replace(self.reading, exclude=())),
        }
        # Later options count where they are used: without them, what is there stays as it was.
        if not recipe["template"]:
            del recipe["template"]
        if self.near_duplicates:
            recipe["near_duplicates"] = self.near_duplicates
        return xxhash.xxh3_128_hexdigest(json.dumps(recipe, sort_keys=True).encode())


@dataclass(frozen=True)
class ReadTask:
    """Read one input file, or several small ones."""

    sources: tuple[Source, ...]
    target: Path
    """Without suffix: .zst and .npz are added."""
    reading: Reading
    part_bytes: int
    signatures: bool
    """Also keep what near-duplicates are found by."""


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
    reading: Reading = WHOLE_FILES,
    *,
    val_fraction: float = 0.0,
    deduplicate: bool = True,
    near_duplicates: float = 0.0,
    workers: int = 0,
    part_bytes: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Turn text files into the corpora OUT/train and, with a val_fraction, OUT/val.

    Args:
        inputs: files, globs, folders, or `hf:...` (see `readers.find_sources`).
        out: folder of the result; OUT.partial holds unfinished work.
        tokenizer: a sentencepiece model, a tokenizer.json, or `bytes`.
        reading: how files become documents.
        val_fraction: share of the documents, chosen by their hash, that goes to OUT/val.
        deduplicate: keep only the first of documents with equal text.
        near_duplicates: drop documents whose similarity (Jaccard, of their sets of 5 words in a
            row) to an earlier one is estimated to be at least this; 0: none.
        workers: processes; 0: as many as cores.
        part_bytes: text per task of the second phase; 0: chosen by the size of the inputs.
        progress: told how far the work is.

    Returns:
        The manifest of each split, by its name.

    Raises:
        DataError: an input cannot be read, nothing is left to write, the output cannot be written
            (or the disk is full), or OUT already holds something else.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be at least 0 and below 1")
    if not 0 <= near_duplicates < 1:
        raise DataError(f"near_duplicates={near_duplicates} must be at least 0 and below 1")
    if near_duplicates:
        check_library()
    if workers < 0:
        raise DataError(f"workers={workers} must be at least 1, or 0 for one per core")
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    with explain_os_errors(partial, "what is finished is kept"):
        model = load_tokenizer(tokenizer)
        plan = _plan(inputs, reading, model, val_fraction, deduplicate, near_duplicates, part_bytes)
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is a file; choose another output folder")
        if all(_is_prepared(out / split, plan) for split in plan.splits):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            number = workers or len(os.sched_getaffinity(0))
            with _only_one(partial), Workers(number, progress) as pool:
                _resume_or_restart(partial, plan)
                _prepare(plan, out, partial, _copy_tokenizer(tokenizer, model, partial), pool)
    return {split: read_manifest(out / split) for split in plan.splits}


def _plan(
    inputs: Sequence[str | Path],
    reading: Reading,
    tokenizer: Tokenizer,
    val_fraction: float,
    deduplicate: bool,
    near_duplicates: float,
    part_bytes: int,
) -> Plan:
    """Look at the inputs.

    They are read once more than needed, to be sure that finished work is of these very bytes:
    names, sizes and times can all be those of other bytes. It costs a hundredth of tokenising them.
    """
    sources = find_sources(inputs, reading.exclude)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_of, sources))
    sizes = [size_of(source) for source in sources]
    part_bytes = part_bytes or min(max(sum(sizes) // 64, SMALLEST_PART), LARGEST_PART)
    return Plan(
        sources, _names(sources), sizes, hashes, reading, tokenizer, val_fraction,
        deduplicate, near_duplicates, part_bytes,
    )  # fmt: skip


def _prepare(plan: Plan, out: Path, partial: Path, tokenizer_file: str, pool: Workers) -> None:
    """Do the three phases, or what is left of them."""
    groups = list(_group_small(plan.sources, plan.sizes, plan.part_bytes))
    read = [
        ReadTask(
            tuple(group),
            partial / f"read-{i:06}",
            plan.reading,
            plan.part_bytes,
            signatures=plan.near_duplicates > 0,
        )
        for i, group in enumerate(groups)
    ]
    sizes = dict(zip(plan.sources, plan.sizes, strict=True))
    read_sizes = [sum(sizes[source] for source in group) for group in groups]
    pool.run("read", _read_sources, read, ".npz", read_sizes)

    indices = [np.load(task.target.with_suffix(".npz")) for task in read]
    fates, removed = _decide(indices, plan)
    parts, part_sizes = _cut_into_parts(read, indices, fates, tokenizer_file)
    pool.run("tokenise", _tokenise_part, parts, ".tokens", part_sizes, meanwhile=_warm_up)

    shared = _describe(plan, indices, removed)
    files = [part.target.with_suffix(".tokens") for part in parts]
    # train comes last: where it is, everything is.
    for split in reversed(plan.splits):
        if not _is_prepared(out / split, plan):
            _assemble(split, files, partial, tokenizer_file, shared, pool.progress)
            out.mkdir(parents=True, exist_ok=True)
            os.rename(partial / split, out / split)
            sync(out)
    shutil.rmtree(partial)


def _describe(plan: Plan, indices: Sequence[Any], removed: dict[str, int]) -> dict[str, Any]:
    """What the manifests of all splits have in common."""
    read = np.concatenate([index["sources"] for index in indices]).tolist()
    return {
        "tokenizer": plan.tokenizer.name,
        "tokenizer_fingerprint": plan.tokenizer.fingerprint,
        "vocab_size": plan.tokenizer.vocab_size,
        "eos_id": plan.tokenizer.eos_id,
        "dtype": np.dtype(plan.tokenizer.dtype).name,
        **removed,
        "documents_skipped": sum(int(index["skipped"]) for index in indices),
        "preparation": plan.preparation,
        "sources": [
            {"name": name, "xxh64": digest, "documents": documents, "bytes": num_bytes}
            for name, digest, (documents, num_bytes) in zip(
                plan.names, plan.hashes, read, strict=True
            )
        ],
    }


# ---------------------------------------------------------------------------------- the three tasks


def _read_sources(task: ReadTask) -> int:
    """Write the documents of some input files as compressed parts, and an index of them."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    lengths: list[int] = []
    hashes: list[bytes] = []
    signatures: list[np.ndarray] = []
    part: list[bytes] = []
    part_documents, part_offsets, per_source = [0], [0], []
    skipped = held = 0
    with publish(task.target.with_suffix(".zst")) as file:

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
                if task.signatures:
                    signatures.append(signature(document))
            per_source.append((len(lengths) - already, sum(lengths[already:])))
        if part:
            flush()
    with publish(task.target.with_suffix(".npz")) as file:
        np.savez(
            file,
            lengths=np.array(lengths, np.int64),
            hashes=np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64),
            part_documents=np.array(part_documents, np.int64),
            part_offsets=np.array(part_offsets, np.int64),
            sources=np.array(per_source, np.int64),
            skipped=np.int64(skipped),
            signatures=np.array(signatures, np.uint32).reshape(-1, NUM_HASHES),
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
    with publish(task.target.with_suffix(".tokens")) as file:
        for fate in (TRAIN, VAL):
            np.save(file, np.array([a.size + 1 for a in ids[fate][::2]], np.int64))
            np.save(file, np.array(num_bytes[fate], np.int64))
            np.save(file, np.concatenate([np.empty(0, tokenizer.dtype), *ids[fate]]))
    return sum(a.size for arrays in ids.values() for a in arrays)


def _import_writer() -> Any:
    """The library's writer; with all that it imports, it takes seconds to load."""
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from streaming import MDSWriter

    return MDSWriter


def _warm_up() -> None:
    """Import the writer early; what goes wrong shows when it is needed."""
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
    # Not as a context: after an exception, leaving it would write a valid-looking partial index.
    writer = _import_writer()(
        out=str(folder),
        columns={COLUMN: f"ndarray:{shared['dtype']}:{CHUNK_TOKENS}"},
        hashes=["xxh64"],
        size_limit=SHARD_BYTES,
    )
    lengths, num_bytes = _write_chunks(writer, split, files, shared, progress)
    if not lengths.size:
        shutil.rmtree(folder, ignore_errors=True)
        remedy = (
            "raise --val-fraction or leave it out"
            if split == "val"
            else "give files that hold text, or lower --val-fraction"
        )
        raise DataError(
            f"{partial.with_suffix('') / split}: the corpus would be empty, no document of "
            f"{len(shared['sources'])} input file(s) is left for it; {remedy}"
        )
    writer.finish()
    np.save(folder / "documents.npy", lengths.cumsum() - lengths)
    if tokenizer_file != BYTES:
        shutil.copyfile(tokenizer_file, folder / Path(tokenizer_file).name)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        split=split,
        num_tokens=int(lengths.sum()),
        num_documents=lengths.size,
        num_bytes=num_bytes,
        files=_hash_written(folder),
        **shared,
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True))
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _write_chunks(
    writer: Any,
    split: str,
    files: Sequence[Path],
    shared: dict[str, Any],
    progress: ProgressReport | None,
) -> tuple[np.ndarray, int]:
    """Write the tokens of a split; the tokens of each document, and the bytes of text of all."""
    rest = np.empty(0, shared["dtype"])
    lengths: list[np.ndarray] = [np.empty(0, np.int64)]
    num_bytes = 0
    with report_phase(progress, split, sum(f.stat().st_size for f in files)) as advance:
        for path in files:
            document_lengths, part_bytes, tokens = _load_tokens(path, split)
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
    """Bytes and hash of every file, as it can be read back."""
    contents = {
        file.name: {"bytes": file.stat().st_size, "xxh64": hash_file(file)}
        for file in sorted(folder.iterdir())
    }
    # A disk that filled up, or failed, between the writer's buffer and the file shows here.
    for shard in json.loads((folder / "index.json").read_bytes())["shards"]:
        name, expected = shard["raw_data"]["basename"], shard["raw_data"]["hashes"]["xxh64"]
        if contents[name]["xxh64"] != expected:
            raise DataError(f"{folder / name}: was not written as intended; check the disk")
    return contents


# ------------------------------------------------------------------------------------ what is where


def _decide(indices: Sequence[Any], plan: Plan) -> tuple[list[np.ndarray], dict[str, int]]:
    """The fate (uint8) of each document of each task, and how many were removed, by reason."""
    hashes = np.concatenate([index["hashes"] for index in indices])
    fates = np.full(len(hashes), TRAIN, np.uint8)
    fates[hashes[:, 0] < np.uint64(int(plan.val_fraction * 2**64))] = VAL
    exact = near = 0
    if plan.deduplicate and len(hashes):
        # A stable sort: among equal hashes, the first document comes first.
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
        fates[order[1:][repeated]] = DROPPED
        exact = int(repeated.sum())
    if plan.near_duplicates:
        found = [s for index in indices for s in index["signatures"]]
        kept = (i for i in range(len(found)) if fates[i] != DROPPED)
        similar = find_near_duplicates(found, kept, plan.near_duplicates)
        fates[similar] = DROPPED
        near = len(similar)
    counts = [index["lengths"].size for index in indices]
    removed = {"duplicates_removed": exact, "near_duplicates_removed": near}
    return np.split(fates, np.cumsum(counts)[:-1]), removed


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


def _group_small(
    sources: Sequence[Source], sizes: Sequence[int], most: int
) -> Iterator[list[Source]]:
    """Consecutive files of up to `most` bytes together; a larger file is alone."""
    group: list[Source] = []
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


def _names(sources: Sequence[Source]) -> list[str]:
    """What manifests call the sources, wherever they lie."""
    files = [source for source in sources if isinstance(source, Path)]
    shards = [source.name for source in sources if isinstance(source, HubShard)]
    return [*(_relative_names(files) if files else []), *shards]


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Names that do not depend on where the inputs lie."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, root)).as_posix() for path in absolute]


def _is_prepared(path: Path, plan: Plan) -> bool:
    """Whether a split is there already; refuses to replace another one."""
    if not path.exists():
        return False
    manifest = read_manifest(path)
    if manifest.preparation == plan.preparation:
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


def _resume_or_restart(partial: Path, plan: Plan) -> None:
    """Keep the finished parts of an interrupted run of the same plan; start anew otherwise."""
    file = partial / "plan.json"
    text = json.dumps({"preparation": plan.preparation, "part": plan.part_bytes})
    if file.exists() and file.read_text() == text:
        return
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    with publish(file) as handle:
        handle.write(text.encode())


def _copy_tokenizer(path: str | Path, tokenizer: Tokenizer, partial: Path) -> str:
    """A copy that stays as it is while the work goes on, and ends up in the corpus."""
    if str(path) == BYTES:
        return BYTES
    copy = partial / f"tokenizer{Path(path).suffix or '.model'}"
    with publish(copy) as file:
        file.write(Path(path).read_bytes())
    if load_tokenizer(copy).fingerprint != tokenizer.fingerprint:
        raise DataError(f"{path}: changed while it was read; run again")
    return str(copy)


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


@cache
def _load_once(path: str) -> Tokenizer:
    """A worker's tokenizer."""
    return load_tokenizer(path)
