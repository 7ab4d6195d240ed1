"""Checkpoint files: writing, verifying and reading them.

step-00000100/             published atomically, by renaming step-00000100.tmp
  rank-00000.safetensors   chunks of tensors, keyed "name" or "name[0:96,0:64]"
  index.json               format, version, state, and the position and xxh3 of all bytes
  index.xxh3               xxh3 of index.json
"""

import json
import logging
import os
import shutil
import struct
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from megarecur import files
from megarecur.checkpoint.index import (
    DTYPES,
    VERSION,
    ChunkRecord,
    DamagedCheckpoint,
    Index,
    read_index,
    readable,
    seal,
    without_collections,
)
from megarecur.checkpoint.planning import Chunk, Part, Values, WrittenEntry, plan_reads
from megarecur.errors import CheckpointError
from megarecur.parallel.shards import TensorShard, span
from megarecur.progress import Note, note_nothing

logger = logging.getLogger(__name__)

J = TypeVar("J")
R = TypeVar("R")

BLOCK_BYTES = 1 << 19
"""Block size for reading and hashing; a block still fits into the cache when it is hashed."""
NUM_READERS = 2
"""Number of threads per rank that read and hash."""

# ---------------------------------------------------------------------------- bytes on the disk


def blocks_of(data: memoryview) -> Iterator[memoryview]:
    """Yield `data` in blocks."""
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the elements in order; contiguous CPU tensors share their memory."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _chunk_key(name: str, shape: Sequence[int], offset: Sequence[int], sizes: Sequence[int]) -> str:
    return name if list(sizes) == list(shape) else name + span(list(offset), list(sizes))


class ChunkReader:
    """Reader that verifies the chunks of one checkpoint; it reuses one buffer and open files.

    `open_file` opens a file of the checkpoint by name, for a `path` that is not a local folder.
    """

    def __init__(
        self,
        path: Path | str,
        index: Index,
        verify: bool = True,
        open_file: Callable[[str], Any] | None = None,
    ) -> None:
        self._path, self._index, self._verify = path, index, verify
        self._open_file = open_file or self._open_local
        self._files: dict[str, Any] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> "ChunkReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def _open_local(self, name: str) -> FileIO:
        return open(Path(self._path) / name, "rb", buffering=0)

    def open(self, name: str) -> Any:
        """Open a file of the checkpoint, and check its length and header."""
        if name in self._files:
            return self._files[name]
        path, record = f"{self._path}/{name}", self._index.files[name]
        with readable(path):
            file = self._files[name] = self._open_file(name)
            length = file.seek(0, os.SEEK_END)
            file.seek(0)
            header = file.read(min(record.header_bytes, length))
        if length != record.bytes:
            raise DamagedCheckpoint(f"{path}: {length} bytes long, written with {record.bytes}")
        if self._verify and xxhash.xxh3_64_hexdigest(header) != record.header_xxh3:
            raise DamagedCheckpoint(f"{path}: checksum mismatch in the header")
        return file

    def check(self, name: str, chunk: ChunkRecord) -> None:
        """Read a chunk of `name` only to verify its checksum."""
        start, stop = chunk.bytes
        block = self._room(min(stop - start, BLOCK_BYTES)).numpy().data
        self._fill(name, chunk, (block[: stop - at] for at in range(start, stop, BLOCK_BYTES)))

    def read(self, name: str, chunk: ChunkRecord, target: Tensor | None = None) -> Tensor:
        """Return the tensor of a chunk of `name`: the filled `target`, or a buffer.

        The buffer is valid until the next call. A target must be contiguous, on the CPU, and of the
        chunk's shape and dtype.
        """
        dtype, size = DTYPES[self._index.tensors[name].dtype], chunk.bytes[1] - chunk.bytes[0]
        self.open(chunk.file)  # Compares the size that the index claims before it is allocated.
        if target is None:
            target = self._room(size).view(dtype).view(chunk.shape)
        self._fill(name, chunk, blocks_of(_bytes_of(target)))
        return target

    def _room(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size]

    def _fill(self, name: str, chunk: ChunkRecord, blocks: Iterator[memoryview]) -> None:
        """Read a chunk into consecutive blocks and verify it."""
        file, path = self.open(chunk.file), f"{self._path}/{chunk.file}"
        start, stop = chunk.bytes
        hasher, fault = xxhash.xxh3_64(), ""
        with readable(path):
            file.seek(start)
            for block in blocks:
                done = 0
                while done < len(block) and (count := file.readinto(block[done:])):
                    done += count
                if done < len(block):
                    fault = "ends early"
                    break
                if self._verify:
                    hasher.update(block)
        if not fault and self._verify and hasher.hexdigest() != chunk.xxh3:
            fault = "checksum mismatch"
        if fault:
            key = _chunk_key(name, self._index.tensors[name].shape, chunk.offset, chunk.shape)
            raise DamagedCheckpoint(f"{path}: {fault} in {key}, bytes {start}:{stop}")


def find_damage(
    path: Path | str,
    index: Index,
    part: int = 0,
    num_parts: int = 1,
    open_file: Callable[[str], Any] | None = None,
    note: Note = note_nothing,
) -> list[str]:
    """Verify every `num_parts`-th file of a checkpoint; list the damage by file and tensor.

    `open_file`: see ChunkReader.
    """
    chunks: dict[str, list[tuple[str, ChunkRecord]]] = defaultdict(list)
    for name, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            chunks[chunk.file].append((name, chunk))
    damage = []
    readable_chunks = []
    with ChunkReader(path, index, open_file=open_file) as reader:
        for file in sorted(index.files)[part::num_parts]:
            try:
                reader.open(file)
            except DamagedCheckpoint as error:
                names = sorted({name for name, _ in chunks[file]})
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                damage.append(f"{error} (holds {', '.join(names[:3])}{more})")
                continue
            readable_chunks += sorted(chunks[file], key=lambda pair: pair[1].bytes)

    def check(share: Sequence[tuple[str, ChunkRecord]]) -> list[str]:
        found = []
        with ChunkReader(path, index, open_file=open_file) as reader:
            for name, chunk in share:
                note(f"checking {path}/{chunk.file}")
                try:
                    reader.check(name, chunk)
                except DamagedCheckpoint as error:
                    found.append(str(error))
        return found

    # Other file systems may return the same file object to all callers.
    num_readers = 1 if open_file else NUM_READERS
    found = share_out(check, readable_chunks, num_readers)
    return damage + [line for lines in found for line in lines]


def share_out(
    work: Callable[[Sequence[J]], R], jobs: Sequence[J], num_threads: int = NUM_READERS
) -> list[R]:
    """Split jobs evenly over threads; returns the results of `work` in order."""
    size = max(-(-len(jobs) // num_threads), 1)
    shares = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="reader") as pool:
        return list(pool.map(work, shares))


# -------------------------------------------------------------------------------------- writing


class FolderWriter:
    """Writer that fills a temporary folder and renames it once every rank has written."""

    def __init__(self, final: Path, state: dict[str, Any], note: Note = note_nothing) -> None:
        self.final, self.note = final, note
        self.temporary = files.aside_of(final)
        self._state = state

    def open_folder(self) -> None:
        """Create the temporary folder; one rank calls it before any writes.

        Raises:
            CheckpointError: the state is not JSON, or an intact checkpoint of that step exists.
        """
        try:
            json.dumps(self._state)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the state of {self.final} is not JSON: {error}") from None
        if self.final.exists() and not _is_damaged(self.final):
            raise CheckpointError(
                f"{self.final} exists and is intact: resume from it, or move it away"
            )
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        self.temporary.mkdir(parents=True)

    def write_chunks(
        self, rank: int, items: Sequence[tuple[Chunk, Tensor]], values: Values | None = None
    ) -> bytes:
        """Write a rank's chunks to its file; returns its record for `finish`, b"" without chunks.

        Args:
            values: see `checkpoint.write`.
        """
        if not items:
            return b""
        path = self.temporary / _file_of(rank)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for chunk, _ in items:
            key = _chunk_key(chunk.name, chunk.shape, chunk.offset, chunk.sizes)
            if key in header:
                raise CheckpointError(
                    f"{path}: two tensors would share the key {key!r}: rename one"
                )
            start, end = end, end + chunk.nbytes
            header[key] = {
                "dtype": chunk.dtype,
                "shape": chunk.sizes,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that mapped tensors are aligned
        head = struct.pack("<Q", len(text)) + text
        record = array("Q", [len(head), xxhash.xxh3_64_intdigest(head)])
        # A second thread hashes meanwhile.
        with ThreadPoolExecutor(1) as pool, open(path, "xb", buffering=0) as file:
            files.write_all(file, head, path)
            for chunk, tensor in items:
                payload = _bytes_of(_values_of(chunk, tensor, values))
                digest = pool.submit(xxhash.xxh3_64_intdigest, payload)
                files.write_all(file, payload, path)
                self.note(f"{path.name}, {file.tell()} of {len(head) + end} bytes")
                record.append(digest.result())
            os.fsync(file.fileno())
        return record.tobytes()

    def finish(
        self, written: Iterable[tuple[int, Sequence[WrittenEntry]]], records: Sequence[bytes]
    ) -> None:
        """Write the index and publish; one rank calls it after every rank has written.

        Args:
            written: the ranks that have written, with their entries (`SavePlanner.written`).
            records: of `write_chunks`, by rank.
        """
        hasher = xxhash.xxh3_128()
        path = self.temporary / "index.json"
        with without_collections(), open(path, "xb", buffering=0) as file:
            for data in _joined(_index_pieces(self._state, written, records)):
                hasher.update(data)
                files.write_all(file, data, path)
            os.fsync(file.fileno())
        files.create_file(self.temporary / "index.xxh3", seal(hasher.hexdigest()))
        root = self.final.parent
        latest = files.aside_of(root / "latest")
        # Written before anything is published, so that a full disk fails here.
        latest.unlink(missing_ok=True)
        files.create_file(latest, seal(self.final.name))
        if self.final.exists():
            logger.warning("%s is damaged and is replaced", self.final)
            files.delete_folder(self.final, ".damaged.tmp")
        files.publish(self.temporary, self.final)
        files.publish(latest, root / "latest")


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _values_of(chunk: Chunk, tensor: Tensor, values: Values | None) -> Tensor:
    if not tensor.is_meta:
        return tensor
    assert values is not None, chunk.name
    made = values(chunk.name)
    if made.shape != tensor.shape or made.dtype != tensor.dtype:
        raise CheckpointError(
            f"{chunk.name}: planned as {tensor.dtype} {list(tensor.shape)}, "
            f"made as {made.dtype} {list(made.shape)}"
        )
    return made


def _joined(pieces: Iterable[str]) -> Iterator[bytes]:
    """Join pieces of text into blocks."""
    held = bytearray()
    for piece in pieces:
        held += piece.encode()
        if len(held) >= BLOCK_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _index_pieces(
    state: dict[str, Any],
    written: Iterable[tuple[int, Sequence[WrittenEntry]]],
    records: Sequence[bytes],
) -> Iterator[str]:
    """Yield the JSON of an `Index` with sorted keys, in pieces that are short to make."""
    lines: dict[str, str] = {}
    # Strings and numbers only: the garbage collector would stop all threads for many containers.
    tensors: dict[str, tuple[str, dict[tuple[int, ...], str]]] = {}
    for rank, entries in written:
        name = _file_of(rank)
        end, header, *digests = array("Q", records[rank])
        lines[name] = f'"header_bytes": {end}, "header_xxh3": "{header:016x}"'
        of_file = iter(digests)
        for entry, dtype, shape, boxes in entries:
            if entry not in tensors:
                tensors[entry] = f'"dtype": "{dtype}", "shape": {shape}', {}
            of_tensor, itemsize = tensors[entry][1], DTYPES[dtype].itemsize
            for offset, sizes in boxes:
                start, end = end, end + prod(sizes) * itemsize
                of_tensor[tuple(offset)] = (
                    f'{{"bytes": [{start}, {end}], "file": "{name}", "offset": {offset}, '
                    f'"shape": {sizes}, "xxh3": "{next(of_file):016x}"}}'
                )
        lines[name] = f'{json.dumps(name)}: {{"bytes": {end}, {lines[name]}}}'
    yield '{"files": {' + ", ".join(lines.values()) + '}, "format": "megarecur", '
    yield f'"state": {json.dumps(state, sort_keys=True)}, "tensors": {{'
    for k, name in enumerate(sorted(tensors)):
        kind, of_tensor = tensors.pop(name)
        listed = ", ".join(of_tensor[offset] for offset in sorted(of_tensor))
        yield f'{", " if k else ""}{json.dumps(name)}: {{"chunks": [{listed}], {kind}}}'
    yield f'}}, "version": {VERSION}}}'


# -------------------------------------------------------------------------------------- reading


def read_chunks(
    path: Path,
    index: Index,
    shards: dict[str, TensorShard],
    verify: bool = True,
    note: Note = note_nothing,
) -> None:
    """Fill the tensors of `shards` in place; each needed chunk is read once and whole, as its
    checksum needs.

    Raises:
        DamagedCheckpoint: a chunk differs from what was written.
    """
    jobs = [
        (name, chunk, parts)
        for name, shard in shards.items()
        for chunk, parts in plan_reads(index.tensors[name].chunks, shard)
    ]
    jobs.sort(key=lambda job: (job[1].file, job[1].bytes))

    def read(share: Sequence[tuple[str, ChunkRecord, list[Part]]]) -> None:
        with ChunkReader(path, index, verify) as reader:
            for name, chunk, parts in share:
                note(f"loading {path}/{chunk.file}")
                _read_into(reader, name, chunk, parts)

    share_out(read, jobs)


def _read_into(reader: ChunkReader, name: str, chunk: ChunkRecord, parts: list[Part]) -> None:
    """Read one chunk and fill each part; a single whole part is read in place."""
    first = parts[0].target
    if (
        len(parts) == 1
        and list(first.shape) == chunk.shape
        and first.device.type == "cpu"
        and first.is_contiguous()
    ):
        reader.read(name, chunk, first)
        return
    source = reader.read(name, chunk)
    for part in parts:
        saved = source
        for dim, (start, length) in enumerate(zip(part.start, part.target.shape, strict=True)):
            saved = saved.narrow(dim, start, length)
        part.target.copy_(saved)


def _is_damaged(path: Path) -> bool:
    try:
        return bool(find_damage(path, read_index(path)))
    except DamagedCheckpoint:
        return True
