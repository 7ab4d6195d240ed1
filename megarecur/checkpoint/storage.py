"""Checkpoint files, and the storage classes that torch.distributed.checkpoint calls.

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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megarecur import files
from megarecur.checkpoint.index import (
    DTYPE_NAMES,
    DTYPES,
    VERSION,
    ChunkRecord,
    DamagedCheckpoint,
    FileRecord,
    Index,
    TensorRecord,
    index_fault,
    read_index,
    readable,
    seal,
)
from megarecur.errors import CheckpointError
from megarecur.parallel.shards import span
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


def _chunk_key(name: str, shape: list[int], offset: list[int], sizes: list[int]) -> str:
    return name if sizes == shape else name + span(offset, sizes)


def _finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


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


# ------------------------------------------------------- storage of torch.distributed.checkpoint


class FolderWriter(StorageWriter):
    """Storage writer that fills a temporary folder and renames it once every rank has written."""

    def __init__(self, final: Path, state: dict[str, Any], note: Note = note_nothing) -> None:
        self.final, self.note = final, note
        self.temporary = files.aside_of(final)
        self._state = state

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: the writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `prepare_global_plan` makes the folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Create the folder and name each rank's file; runs on the coordinator before any write."""
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
        return [
            replace(plan, storage_data=f"rank-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks; each result carries the records of its chunk and file."""
        if not plan.items:
            return _finished([])
        path = self.temporary / plan.storage_data
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            offset, sizes = list(data.chunk.offsets), list(data.chunk.sizes)
            key = _chunk_key(item.index.fqn, list(data.size), offset, sizes)
            if key in header:
                raise CheckpointError(
                    f"{path}: two tensors would share the key {key!r}: rename one"
                )
            start, end = end, end + prod(sizes) * data.properties.dtype.itemsize
            header[key] = {
                "dtype": DTYPE_NAMES[data.properties.dtype],
                "shape": sizes,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that mapped tensors are aligned
        head = struct.pack("<Q", len(text)) + text
        record = FileRecord(
            bytes=len(head) + end,
            header_bytes=len(head),
            header_xxh3=xxhash.xxh3_64_hexdigest(head),
        )
        results = []
        # A second thread hashes meanwhile.
        with ThreadPoolExecutor(1) as pool, open(path, "xb", buffering=0) as file:
            files.write_all(file, head, path)
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                payload = _bytes_of(tensor)
                start = file.tell()
                digest = pool.submit(xxhash.xxh3_64_hexdigest, payload)
                files.write_all(file, payload, path)
                self.note(f"{path.name}, {file.tell()} of {record.bytes} bytes")
                chunk = ChunkRecord(
                    offset=list(data.chunk.offsets),
                    shape=list(data.chunk.sizes),
                    file=path.name,
                    bytes=(start, start + len(payload)),
                    xxh3=digest.result(),
                )
                results.append(WriteResult(item.index, len(payload), (chunk, record)))
            os.fsync(file.fileno())
        return _finished(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and publish; runs on the coordinator after every rank has written."""
        chunks: dict[str, list[ChunkRecord]] = defaultdict(list)
        records: dict[str, FileRecord] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunk, records[chunk.file] = result.storage_data
            chunks[result.index.fqn].append(chunk)
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = TensorRecord(
                dtype=DTYPE_NAMES[tensor.properties.dtype],
                shape=list(tensor.size),
                chunks=sorted(chunks[name], key=lambda chunk: chunk.offset),
            )
        index = Index(
            format="megarecur", version=VERSION, state=self._state, files=records, tensors=tensors
        )
        fault = index_fault(index)
        assert not fault, fault
        body = json.dumps(index.model_dump(), sort_keys=True).encode()
        files.create_file(self.temporary / "index.json", body)
        files.create_file(self.temporary / "index.xxh3", seal(xxhash.xxh3_128_hexdigest(body)))
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

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any path."""
        return True


class FolderReader(StorageReader):
    """Storage reader of a checkpoint whose index was already read and checked."""

    def __init__(self, path: Path, index: Index, verify: bool, note: Note = note_nothing) -> None:
        self._path, self._index, self._verify, self._note = path, index, verify, note

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: the reader serves one checkpoint."""

    # With **kwargs the loader would call this again after a failure, on that rank alone.
    def read_metadata(self) -> Metadata:
        """Return the index as torch's Metadata."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self._index.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the index is already loaded."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each needed chunk once and whole, as its checksum needs; copy the wanted parts."""
        wanted = defaultdict(list)
        for item in plan.items:
            offset = item.storage_index.offset
            assert offset is not None
            wanted[item.storage_index.fqn, tuple(offset)].append(item)
        jobs = [
            (name, chunk, wanted[name, tuple(chunk.offset)])
            for name, tensor in self._index.tensors.items()
            for chunk in tensor.chunks
            if (name, tuple(chunk.offset)) in wanted
        ]
        jobs.sort(key=lambda job: (job[1].file, job[1].bytes))

        def read(share: Sequence[tuple[str, ChunkRecord, list[ReadItem]]]) -> None:
            with ChunkReader(self._path, self._index, self._verify) as reader:
                for name, chunk, items in share:
                    self._note(f"loading {self._path}/{chunk.file}")
                    _read_into(reader, name, chunk, items, planner)

        share_out(read, jobs)
        return _finished(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any path."""
        return True


def _read_into(
    reader: ChunkReader, name: str, chunk: ChunkRecord, items: list[ReadItem], planner: LoadPlanner
) -> None:
    """Read one chunk and fill each item with its part; a single whole item is read in place."""
    targets = [planner.resolve_tensor(item).detach() for item in items]
    first = targets[0]
    if (
        len(items) == 1
        and list(first.shape) == chunk.shape
        and first.device.type == "cpu"
        and first.is_contiguous()
    ):
        reader.read(name, chunk, first)
    else:
        source = reader.read(name, chunk)
        for item, target in zip(items, targets, strict=True):
            part = source
            for dim, start in enumerate(item.storage_offsets):
                part = part.narrow(dim, start, item.lengths[dim])
            target.copy_(part)
    for item, target in zip(items, targets, strict=True):
        planner.commit_tensor(item, target)


def _is_damaged(path: Path) -> bool:
    try:
        return bool(find_damage(path, read_index(path)))
    except DamagedCheckpoint:
        return True
