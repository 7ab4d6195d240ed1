"""Token corpora in MDS format that other programs wrote, such as llm-foundry's converters.

    my-c4/train/
      index.json              mosaicml-streaming's index of the shards
      shard.00000.mds.zstd    or .mds: samples of one integer column, `tokens` or `input_ids`

Rows of equal length form one stream, in which documents end with the tokenizer's end-of-document
id. Samples of different lengths are documents. Ids must belong to the config's tokenizer, so all
are compared with its vocabulary.

Samples are read by StreamingDataset.__getitem__. Its constructor is not run: it claims shared
memory and lock files of the whole machine, trusts the environment about the world, and waits for
all processes in barriers, where they would hang if one found damage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data.corpus import Corpus, read_manifest
from megarecur.data.mapped_files import MappedFiles
from megarecur.data.shard_index import MEND, read_index
from megarecur.data.tokenizer import Tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.errors import DataError, refuse_shortage
from megarecur.files import open_replacement
from megarecur.private import UnsafeFolder, open_lock, private_folder
from megarecur.reading import decompress

log = logging.getLogger(__name__)

COLUMNS = ("tokens", "input_ids")
ID_TYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16",
            32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}  # fmt: skip
"""MDS type numbers that ids may have."""
CACHED_SAMPLES = 64
SCANNED_TOKENS = 1 << 20


def is_foreign(path: str | Path) -> bool:
    """Return True if a folder holds MDS shards that `megarecur prep shards` did not write."""
    path = Path(path)
    own = any((path / name).exists() for name in ("manifest.json", "documents.npy"))
    return not own and (path / "index.json").is_file()


@dataclass(frozen=True)
class MdsShard:
    """One entry of index.json, and the path of its uncompressed file."""

    entry: dict[str, Any]
    file: Path
    column: str

    def locate(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the file's bytes and, for each sample, where ids begin, their number, and their
        MDS type.

        Raises:
            DataError: the file's layout differs from index.json.
        """
        try:
            return self._locate()
        except (IndexError, ValueError, KeyError, OSError, OverflowError, MemoryError) as error:
            refuse_shortage(error, self.file)
            raise DataError(f"{self.file}: damaged ({error}); {MEND}") from None

    def _locate(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        content = np.memmap(self.file, np.uint8, "r").view(np.ndarray)
        n = self.entry["samples"]
        offsets = content[4 : 4 * (n + 2)].view(np.uint32).astype(np.int64)
        if offsets.size != n + 1 or int(content[:4].view(np.uint32)[0]) != n:
            raise ValueError(f"it does not hold {n} samples")
        if (np.diff(offsets) < 0).any() or offsets[-1] > content.size:
            raise ValueError("its offsets point outside")
        # A sample holds the sizes of the columns of variable size, then the values.
        begin, sizes = offsets[:-1], []
        for size in self.entry["column_sizes"]:
            if size is None:
                sizes.append(_gather(content, begin, np.uint32))
                begin = begin + 4
            else:
                sizes.append(np.full(n, size, np.int64))
        ends = begin + sum(sizes)
        if (ends != offsets[1:]).any():
            raise ValueError("the sizes of its columns do not add up")
        k = self.entry["column_names"].index(self.column)
        begin = begin + sum(sizes[:k])
        end = begin + sizes[k]
        kind, _, shape = self.entry["column_encodings"][k].removeprefix("ndarray:").partition(":")
        if kind == "bytes":
            codes = np.full(n, 65, np.uint8)
        elif kind == "ndarray":
            codes, begin = content[begin], begin + 1
        else:
            codes = np.full(n, {name: code for code, name in ID_TYPES.items()}[kind], np.uint8)
        if kind != "bytes" and not shape:  # ndim * 4 + log2 of the bytes per dimension, dimensions
            first = content[begin].astype(np.int64)
            begin = begin + 1 + (first >> 2) * (1 << (first & 3))
        strange = sorted(set(codes.tolist()) - ID_TYPES.keys())
        if strange:
            raise ValueError(f"its column {self.column} does not hold integers")
        widths = codes.astype(np.int64) // 8
        lengths, rest = np.divmod(end - begin, widths)
        if rest.any() or (lengths < 0).any():
            raise ValueError(f"its column {self.column} is cut short, or is not of this type")
        return content, begin, lengths, codes

    def lengths(self) -> NDArray[Any]:
        """Return the number of ids of each sample, int64."""
        return self.locate()[2]

    def slabs(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (number of the first sample, ids [samples, length]) of consecutive samples."""
        content, begins, lengths, codes = self.locate()
        steps = np.diff(begins)
        regular = all((a == a[:1]).all() for a in (lengths, codes, steps)) and len(begins) > 1
        rows = max(SCANNED_TOKENS // max(int(lengths[0]), 1), 1) if regular else 1
        for i in range(0, len(begins), rows):
            kind, n = np.dtype(ID_TYPES[int(codes[i])]), int(lengths[i])
            shape = (min(rows, len(begins) - i), n)
            strides = (int(steps[0]) if regular else 0, kind.itemsize)
            if n:
                yield i, np.ndarray(shape, kind, content.data, int(begins[i]), strides)


class ForeignCorpus(Corpus):
    """A token corpus of another program, with the reading interface of `Corpus`.

    Args:
        path: folder of index.json. It is only read; compressed shards are unpacked elsewhere.
        verify: compare shards with their hashes in index.json, if any (sizes are always compared),
        and all ids with the vocabulary before training.
        part: index of the part of the shards that this process hashes; others hash the rest.

    Raises:
        DataError: a shard is missing or damaged, no column holds ids, or an id is outside the
        vocabulary; the message names the shard or sample.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        verify: bool = True,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self.path = Path(path)
        self._tokenizer = tokenizer
        if part == 0 and tokenizer.end.doubt:
            log.warning("%s", tokenizer.end.doubt)
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self.vocab_size, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self.dtype = np.dtype(tokenizer.dtype)
        entries = read_index(self.path)
        self.column = _choose_column(self.path, entries)
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(entries, sort_keys=True).encode())
        """Identity of the corpus: a hash of index.json's content."""
        hashed = set(range(len(entries))[part::num_parts]) if verify else set()
        if part == 0:
            self._say_what_is_unusual(entries, verify)
        self._shards = self._find_files(entries, hashed)
        self._mapped = MappedFiles(self._find_rewriting)
        for shard in self._shards:
            self._mapped.add(shard.file)
        with ThreadPoolExecutor() as pool:
            lengths = list(pool.map(MdsShard.lengths, self._shards))
        counts = np.concatenate(lengths)
        self.starts_of_samples = np.concatenate([[0], counts.cumsum()])
        self.num_tokens = int(self.starts_of_samples[-1])
        self._first_samples = np.cumsum([0, *(n.size for n in lengths)])
        self.starts = self.starts_of_samples[self._first_samples].tolist()
        fixed = counts.size > 0 and bool((counts == counts[0]).all())
        # Documents may end anywhere in rows of equal length, so every process must find all ends.
        scanned = range(len(entries)) if fixed else sorted(hashed)
        with ThreadPoolExecutor() as pool:
            ends = list(pool.map(lambda k: self._scan(k, fixed), scanned))
        if fixed:
            starts = np.concatenate([[0], np.concatenate(ends) + 1])
            self._documents = starts[starts < self.num_tokens]
            if self._documents.size < 2 and part == 0:
                log.warning(
                    "%s: its rows hold no end of document (id %d): they are read as one document",
                    self.path, self.eos_id,
                )  # fmt: skip
        else:
            self._documents = self.starts_of_samples[:-1][counts > 0]
        self.num_documents = self._documents.size
        self._rows = _open_rows(self._shards)
        self._sample = lru_cache(CACHED_SAMPLES)(self._decode)

    def _say_what_is_unusual(self, entries: Sequence[dict[str, Any]], verify: bool) -> None:
        bare = sum(not _hashes_of(entry) for entry in entries)
        if bare and verify:
            log.warning(
                "%s: index.json holds no hashes of %s shards: damage inside them may go unnoticed",
                self.path, "its" if bare == len(entries) else f"{bare} of {len(entries)}",
            )  # fmt: skip

    def _find_files(self, entries: Sequence[dict[str, Any]], hashed: set[int]) -> list[MdsShard]:
        """Check every shard and unpack compressed ones; one message lists all problems."""

        def check(k: int) -> MdsShard | str:
            try:
                return MdsShard(entries[k], self._find_file(entries[k], k in hashed), self.column)
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(check, range(len(entries))))
        bad = [each for each in found if isinstance(each, str)]
        if bad:
            more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
            raise DataError("; ".join(bad[:5]) + f"{more}; {MEND}")
        return [each for each in found if isinstance(each, MdsShard)]

    def _find_file(self, entry: dict[str, Any], hashed: bool) -> Path:
        """Return the uncompressed file of a shard, compared with index.json."""
        raw, packed = entry["raw_data"], entry.get("zip_data")
        file: Path = self.path / raw["basename"]
        if not file.is_file() and packed:
            source = self.path / packed["basename"]
            _compare(source, packed, hashed)
            file = _unpacked_folder(self.fingerprint, raw["basename"]) / Path(raw["basename"]).name
            _unpack(source, file, entry)
        _compare(file, raw, hashed)
        return file

    def _scan(self, k: int, find_ends: bool) -> NDArray[Any]:
        """Check the ids of a shard; return the positions in the stream where documents end in
        it."""
        ends = [np.empty(0, np.int64)]
        for i, ids in self._shards[k].slabs():
            number = int(self._first_samples[k]) + i
            self._check_ids(ids, number)
            if find_ends:
                found = np.flatnonzero(ids.reshape(-1) == self.eos_id)
                ends.append(found + self.starts_of_samples[number])
        return np.concatenate(ends)

    def _check_ids(self, ids: NDArray[Any], number: int) -> None:
        """Reject ids outside the vocabulary; `ids` belong to the samples from `number` on."""
        if not ids.size or (ids.max() < self.vocab_size and ids.min() >= 0):
            return
        rows = ids.reshape(-1, ids.shape[-1])
        row, column = np.argwhere((rows < 0) | (rows >= self.vocab_size))[0].tolist()
        shard = self._shards[self._shard_of(number + row)]
        try:  # Damage can cause this too, and another process may hash this shard.
            _compare(shard.file, shard.entry["raw_data"], hashed=True)
        except DataError as error:
            raise DataError(f"{error}; {MEND}") from None
        raise DataError(
            f"{self.path}: {self._name(number + row)} holds id {rows[row, column]}, but the "
            f"tokenizer {self._tokenizer.name} has ids 0 to {self.vocab_size - 1}; set "
            "data.tokenizer to the one that the corpus was made with"
        )

    def _name(self, number: int) -> str:
        """Return a sample's name for messages."""
        shard = self._shards[self._shard_of(number)]
        return f"sample {number} ({shard.entry['raw_data']['basename']})"

    def _shard_of(self, number: int) -> int:
        """Return the shard of a sample."""
        return int(self._first_samples.searchsorted(number, "right")) - 1

    @property
    def documents(self) -> NDArray[Any]:
        """Start of each document, int64 [num_documents]."""
        return self._documents

    def _find_rewriting(self, file: Path) -> str | None:
        """Return what is wrong with a shard whose time changed, as far as its hash tells."""
        raw = next(s.entry["raw_data"] for s in self._shards if s.file == file)
        if not raw.get("hashes"):
            log.warning("%s: its time changed while it was read; without a hash nothing tells "
                        "whether its samples did", file)  # fmt: skip
            return None
        try:
            _compare(file, raw, hashed=True)
        except DataError as error:
            return str(error)
        return None

    def _decode(self, number: int) -> NDArray[Any]:
        """Return the ids of one sample, in the corpus's type."""
        self._mapped.refuse_change(self._shards[self._shard_of(number)].file)
        try:
            value = self._rows[number][self.column]
            ids = np.frombuffer(value, np.int64) if isinstance(value, bytes) else value.reshape(-1)
        except (IndexError, ValueError, KeyError, OSError) as error:
            raise DataError(f"{self.path}: {self._name(number)}: {error}; {MEND}") from None
        if ids.size != self.starts_of_samples[number + 1] - self.starts_of_samples[number]:
            raise DataError(f"{self.path}: {self._name(number)} changed while it was read; {MEND}")
        self._check_ids(ids, number)
        return ids.astype(self.dtype)

    def read(self, start: int, n: int) -> NDArray[Any]:
        """Return tokens [start, start + n) in the corpus's own type; the last samples read are
        cached."""
        if not 0 <= start <= start + n <= self.num_tokens:
            raise DataError(
                f"{self.path}: tokens {start} to {start + n} requested, but it has "
                f"{self.num_tokens}"
            )
        if n == 0:
            return np.empty(0, self.dtype)
        first = int(self.starts_of_samples.searchsorted(start, "right")) - 1
        last = int(self.starts_of_samples.searchsorted(start + n, "left"))
        parts = [self._sample(i) for i in range(first, last)]
        skip = start - int(self.starts_of_samples[first])
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[skip : skip + n]

    @cached_property
    def num_bytes(self) -> int:  # type: ignore[override]
        """UTF-8 bytes of the text, estimated by decoding up to 65,536 tokens."""
        stretches, size = (1, self.num_tokens) if self.num_tokens <= 1 << 16 else (64, 1024)
        starts = np.linspace(0, self.num_tokens - size, stretches).astype(np.int64)
        texts = (self._tokenizer.decode(self.read(int(s), size).tolist()) for s in starts)
        found = sum(len(text.encode(errors="replace")) for text in texts)
        return round(found * self.num_tokens / max(stretches * size, 1))


def missing_files(path: Path) -> list[str]:
    """Return the missing files of a local corpus of any kind. Reads only the list of files, so
    thousands of shards are as quick as a few.

    Raises:
        DataError: the corpus does not exist, or its list of files is damaged.
        OSError: a folder cannot be listed.
    """
    if is_foreign(path):  # A shard, or its compressed file.
        entries = [(entry["raw_data"], entry.get("zip_data")) for entry in read_index(path)]
        wanted = [[part["basename"] for part in parts if part] for parts in entries]
    else:
        wanted = [[name] for name in read_manifest(path).files]
    folders = {(path / name).parent for either in wanted for name in either}
    there = {f / name for f in folders if f.is_dir() for name in os.listdir(f)}
    return [either[-1] for either in wanted if not any(path / name in there for name in either)]


def _choose_column(path: Path, entries: Sequence[dict[str, Any]]) -> str:
    """Return the column that holds ids, the same in all shards."""
    columns = dict(zip(entries[0]["column_names"], entries[0]["column_encodings"], strict=True))
    integers = [f"ndarray:{name}" for name in ID_TYPES.values()]
    named = [name for name in COLUMNS if name in columns]
    arrays = [name for name in columns if columns[name].rpartition(":")[0] in integers
              or columns[name] in integers]  # fmt: skip
    chosen = named[:1] or (arrays if len(arrays) == 1 else [])
    shown = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    if not chosen:
        text = "str" in columns.values()
        remedy = (
            f"it holds text: make shards of it with `megarecur prep shards {path}`"
            if text
            else f"name the column of ids {' or '.join(COLUMNS)}"
        )
        raise DataError(f"{path}: has no column of ids, but {shown}; {remedy}")
    kind = columns[chosen[0]]
    if kind not in ("bytes", "ndarray", *integers) and kind.rpartition(":")[0] not in integers:
        raise DataError(
            f"{path}: column {chosen[0]} is of type {kind}; ids are read from bytes (int64) or "
            "ndarray of integers"
        )
    for entry in entries:
        if columns != dict(zip(entry["column_names"], entry["column_encodings"], strict=True)):
            name = entry["raw_data"]["basename"]
            raise DataError(f"{path}: {name} has other columns than the first shard, {shown}")
    return chosen[0]


def decode_shard(path: Path, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard, compressed or not, with all columns decoded.

    Raises:
        DataError: the shard is damaged.
    """
    packed = entry.get("zip_data")
    packed = packed if packed and path.name == Path(packed["basename"]).name else None
    _compare(path, packed or entry["raw_data"], hashed=True)
    make_torchvision_importable()
    from streaming.base.format import reader_from_json

    try:
        reader = reader_from_json("", "", entry)
        content: Any = np.memmap(path, np.uint8, "r").data
        if packed:
            with open(path, "rb") as file:
                pieces = decompress(entry["compression"], file, entry["raw_data"]["bytes"])
                content = b"".join(pieces)
        offsets = np.frombuffer(content, np.uint32, entry["samples"] + 1, 4).tolist()
        for begin, end in pairwise(offsets):
            yield reader.decode_sample(bytes(content[begin:end]))
    except Exception as error:  # each compression and encoding raises its own
        raise DataError(f"{path}: damaged ({error}); {MEND}") from None


# ------------------------------------------------------------------------------- shards as they lie


def _gather(content: NDArray[Any], places: NDArray[Any], kind: Any) -> NDArray[Any]:
    """Return the numbers at some positions among bytes, as int64."""
    width = np.dtype(kind).itemsize
    values = content[places[:, None] + np.arange(width)].view(kind)[:, 0]
    return np.asarray(values, np.int64)


def _hashes_of(entry: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of a shard's file as published."""
    return dict((entry.get("zip_data") or entry["raw_data"]).get("hashes") or {})


def _compare(file: Path, info: dict[str, Any], hashed: bool) -> None:
    """Compare a file with its size and, if given, its hash.

    Raises:
        DataError: the file is missing or differs.
    """
    try:
        size = file.stat().st_size
        if size != info["bytes"]:
            raise DataError(f"{file} has {size} bytes instead of {info['bytes']}")
        if hashed and not _matches(np.memmap(file, np.uint8, "r").data, info):
            raise DataError(f"{file} does not match its hash: it is damaged")
    except FileNotFoundError:
        raise DataError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        refuse_shortage(error, file)
        raise DataError(f"{file} cannot be read ({error})") from None


def _matches(content: Any, info: dict[str, Any]) -> bool:
    """Return True if bytes match the fastest of the hashes that index.json has."""
    hashes = info.get("hashes") or {}
    for name, expected in sorted(hashes.items(), key=lambda each: not each[0].startswith("xxh")):
        if name in xxhash.algorithms_available:
            return bool(getattr(xxhash, name)(content).hexdigest() == expected)
        if name in hashlib.algorithms_available and not name.startswith("shake"):
            return bool(hashlib.new(name, content).hexdigest() == expected)
    return True


def _unpacked_folder(fingerprint: str, basename: str) -> Path:
    """Return the private folder of an unpacked shard; the corpus's own folder may be read-only.

    Raises:
        DataError: the disk is full, or another user can change the folder.
    """
    try:
        return private_folder("unpacked", fingerprint, *Path(basename).parent.parts)
    except UnsafeFolder as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(
            f"{basename} cannot be unpacked below {tempfile.gettempdir()} ({error.strerror}): set "
            "TMPDIR to a folder with room for the whole corpus"
        ) from None


def _unpack(source: Path, file: Path, entry: dict[str, Any]) -> None:
    """Unpack a compressed shard once per machine, whatever the number of processes.

    An existing file is compared with its hash: an earlier process may have written it long ago.

    Raises:
        DataError: the shard is damaged, or the disk is full.
    """
    raw = entry["raw_data"]
    try:
        with open_lock(file.with_name(file.name + ".lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_unpacked(file, raw):
                return
            try:
                # In pieces, so that a shard takes no memory, and no more of the disk than it says.
                with open_replacement(file) as target, open(source, "rb") as packed:
                    for piece in decompress(entry["compression"], packed, raw["bytes"]):
                        target.write(piece)
                    target.flush()
                    if not _matches(np.memmap(target.name, np.uint8, "r").data, raw):
                        raise ValueError("it does not unpack to what index.json says")
            except ValueError as error:
                raise DataError(f"{source} is damaged ({error})") from None
    except OSError as error:
        raise DataError(
            f"{source} cannot be unpacked to {file.parent} ({error.strerror}): set TMPDIR to a "
            "folder with room for the whole corpus"
        ) from None


def _is_unpacked(file: Path, raw: dict[str, Any]) -> bool:
    """Return True if a file of this size and hash is there, and is no link."""
    if file.is_symlink() or not file.is_file() or file.stat().st_size != raw["bytes"]:
        return False
    return not raw["bytes"] or _matches(np.memmap(file, np.uint8, "r").data, raw)


def _open_rows(shards: Sequence[MdsShard]) -> Any:
    """Return a StreamingDataset of existing shards, for its __getitem__ alone."""
    make_torchvision_importable()
    from streaming import StreamingDataset
    from streaming.base.format import reader_from_json
    from streaming.base.spanner import Spanner

    class Rows(StreamingDataset):
        def __init__(self) -> None:
            self.shards = [_reader(shard) for shard in shards]
            sizes = np.array([shard.samples for shard in self.shards], np.int64)
            self.num_samples = int(sizes.sum())
            self.spanner = Spanner(sizes)
            self._shard_access_times: Any = np.zeros(len(sizes), np.int64)

        def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
            """Raise if a file is gone, because there is no place to fetch it from."""
            raise DataError(f"{shards[shard_id].file} is missing; {MEND}")

    def _reader(shard: MdsShard) -> Any:
        basename = shard.entry["raw_data"]["basename"]
        folder = shard.file.parents[len(Path(basename).parts) - 1]
        try:
            return reader_from_json(str(folder), "", shard.entry)
        except Exception as error:  # each encoding raises its own
            raise DataError(f"{shard.file}: cannot be read ({error!r}); {MEND}") from None

    return Rows()
