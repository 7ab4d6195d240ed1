"""The index of a checkpoint, index.json; validated before any of it is used.

The index is data: nothing in it is executed, and no path in it can point outside the checkpoint's
folder.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from megarecur.errors import CheckpointError, refuse_shortage
from megarecur.parallel.shards import tiling_fault
from megarecur.reading import parse_json, read_bytes

VERSION = 1
# Functions that convert an index of version N to version N + 1, by N.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

DtypeName = Literal["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}
MAX_INDEX_BYTES = 1 << 30
_LAST_READ: "dict[str, Index]" = {}
"""The last index by its digest: a start finds a checkpoint, checks its state, and loads it."""


class DamagedCheckpoint(CheckpointError):
    """Raised if a checkpoint's bytes differ from those written; an older one may be intact."""


Natural = Annotated[StrictInt, Field(ge=0, lt=1 << 63)]
Id = Annotated[StrictInt, Field(ge=-1, lt=1 << 31)]
"""Id of a token; -1 stands for none in some folders of Hugging Face."""
Step = Annotated[StrictInt, Field(ge=0, le=99_999_999)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
FileName = Annotated[
    str, Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")
]  # cannot point outside the folder


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChunkRecord(_Record):
    """A rectangle of a tensor, and the bytes [start, stop) of the file that hold it."""

    offset: list[Natural]
    shape: list[Natural]
    file: FileName
    bytes: tuple[Natural, Natural]
    xxh3: Digest


class TensorRecord(_Record):
    """A tensor under its global name."""

    dtype: DtypeName
    shape: list[Natural]
    chunks: list[ChunkRecord]


class FileRecord(_Record):
    """Sizes in bytes of a file and its safetensors header, and the header's checksum."""

    bytes: Natural
    header_bytes: Natural
    header_xxh3: Digest


class ConfigRecord(BaseModel):
    """The parts of a saved config that are read before it is validated."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}


class OriginRecord(BaseModel):
    """The record of the Hugging Face folder that a model was converted from."""

    model_config = ConfigDict(extra="allow", frozen=True)

    bos_token_id: Id | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | None = None
    dtypes: dict[str, Literal["float32", "bfloat16", "float16"]] = {}


class StateRecord(BaseModel):
    """Types of the state's entries, each of which only some checkpoints have."""

    model_config = ConfigDict(extra="allow", frozen=True)

    step: Step = 0
    tokens: Natural = 0
    skipped: Step = 0
    roll_backs: Step = 0
    rolled_back_at: Step = 0
    interval: dict[str, Any] = {}
    data: dict[str, Any] = {}
    config: ConfigRecord | None = None
    layer_map: list[Natural] | dict[str, Any] = []
    mesh: dict[str, Natural] = {}
    order_hash: StrictStr | None = None
    tokenizer: StrictStr | None = None
    hugging_face: OriginRecord = OriginRecord()
    versions: dict[str, Any] = {}


class Index(_Record):
    """Contents of index.json: format, state, files and tensors."""

    format: Literal["megarecur"]
    version: StrictInt
    state: dict[str, Any]
    files: dict[FileName, FileRecord]
    tensors: dict[str, TensorRecord]


def read_fingerprint(path: Path) -> str:
    """Return the checksum of a checkpoint's index, which identifies the checkpoint.

    The index contains the checksums of all other bytes. Raises DamagedCheckpoint if it cannot be
    read.
    """
    return unseal(path / "index.xxh3")


def read_index(path: Path) -> Index:
    """Read and check the index of a checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing, unreadable or altered, or the index is inconsistent.
        CheckpointError: the format version is not supported.
    """
    digest = unseal(path / "index.xxh3")
    with readable(path / "index.json"):
        body = read_bytes(path / "index.json", MAX_INDEX_BYTES)
    if xxhash.xxh3_128_hexdigest(body) != digest:
        raise DamagedCheckpoint(f"{path / 'index.json'}: checksum mismatch with index.xxh3")
    if digest not in _LAST_READ:
        with without_collections():
            index = _parse_body(path, body)
        _LAST_READ.clear()
        _LAST_READ[digest] = index
    return _LAST_READ[digest]


def forget_index() -> None:
    """Free the last index, which may be large."""
    _LAST_READ.clear()


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause the garbage collector, which would look at large tables again and again.

    Each look stops all threads.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse_body(path: Path, body: bytes) -> Index:
    try:
        raw = parse_json(body)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / 'index.json'} is not JSON: {error}") from None
    index = _parse(path, raw)
    fault = index_fault(index)
    if fault:
        raise DamagedCheckpoint(f"{path / 'index.json'}: {fault}")
    return index


def _parse(path: Path, raw: Any) -> Index:
    version = raw.get("version") if isinstance(raw, dict) else None
    if type(version) is not int or raw.get("format") != "megarecur":
        raise DamagedCheckpoint(f"{path / 'index.json'} is not the index of a megarecur checkpoint")
    if version > VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this megarecur reads up to {VERSION}: upgrade it"
        )
    while version < VERSION:
        if version not in MIGRATIONS:
            raise CheckpointError(
                f"{path} has format version {version}, which is no longer read: "
                f"resume it with the megarecur that wrote it (this one reads {VERSION})"
            )
        raw = MIGRATIONS[version](raw)
        version += 1
    try:
        StateRecord.model_validate(raw.get("state"))
        return Index.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpoint(
            f"{path / 'index.json'}: {where}: {first['msg']} (got {first['input']!r:.80})"
        ) from None


def index_fault(index: Index) -> str:
    """Describe the first inconsistency of the index; "" if there is none."""
    used: dict[str, list[tuple[int, int]]] = {name: [] for name in index.files}
    for name, tensor in index.tensors.items():
        boxes = [(tuple(chunk.offset), tuple(chunk.shape)) for chunk in tensor.chunks]
        fault = tiling_fault(tuple(tensor.shape), boxes)
        if fault:
            return f"{name}: {fault}"
        for chunk in tensor.chunks:
            start, stop = chunk.bytes
            size = prod(chunk.shape) * DTYPES[tensor.dtype].itemsize
            if stop - start != size:
                return f"{name}: bytes {start}:{stop} cannot hold {size} bytes"
            if chunk.file not in used:
                return f"{name}: {chunk.file} is not among the files"
            used[chunk.file].append((start, stop))
    for file, spans in used.items():
        end = index.files[file].header_bytes
        for start, stop in sorted(spans):
            if start != end:  # every byte belongs to exactly one checksum
                return f"{file}: bytes {end}:{start} belong to no chunk or to two"
            end = stop
        if end != index.files[file].bytes:
            return f"{file}: chunks end at byte {end} of {index.files[file].bytes}"
    return ""


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn a failure to read `path` into DamagedCheckpoint."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except OSError as error:
        refuse_shortage(error, path)
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} {error}") from None


def seal(text: str) -> bytes:
    """Return a line with its own checksum, for the files that the index does not cover."""
    return f"{text} {xxhash.xxh3_64_hexdigest(text)}\n".encode()


def unseal(path: Path) -> str:
    """Read a line written by `seal`. Raises DamagedCheckpoint if it is missing or altered."""
    with readable(path):
        line = read_bytes(path, 4096)
    text = line.rpartition(b" ")[0].decode("ascii", "replace")
    if seal(text) != line:
        raise DamagedCheckpoint(f"{path}: checksum mismatch")
    return text
