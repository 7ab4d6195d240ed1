"""Writer of MDS shards, the format of mosaicml-streaming, byte for byte as its MDSWriter.

Importing the library takes 5 s, most of them for torch and transformers, which it does not need to
write. A shard holds the number of its samples, their offsets, its description as JSON, and the
samples: the sizes of columns of variable size, then the columns in the order of their names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

VERSION = 2


class ShardWriter:
    """Writes samples to FOLDER/shard.00000.mds and so on, and their index.

    Do not use it as a context: after an exception, it would write a valid-looking partial index.

    Args:
        folder: is made unless it exists.
        columns: name -> encoding: `bytes`, a number such as `int32`, or `ndarray:DTYPE:LENGTH`.
        size_limit: most bytes of a shard.
    """

    def __init__(self, folder: Path, columns: dict[str, str], size_limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size_limit = folder, size_limit
        self.columns = dict(sorted(columns.items()))
        self.types = {name: encoded_type(kind) for name, kind in self.columns.items()}
        self.description = {
            "version": VERSION,
            "format": "mds",
            "compression": None,
            "hashes": ["xxh64"],
            "size_limit": size_limit,
            "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()),
            "column_sizes": [None if t is None else t.itemsize for t in self.types.values()],
        }
        self.head = json.dumps(self.description, sort_keys=True).encode()
        self.shards: list[dict[str, Any]] = []
        self.samples: list[bytes] = []
        self.size = self.empty_size = 8 + len(self.head)

    def write(self, sample: dict[str, Any]) -> None:
        """Add a sample; writes a shard first if it would exceed the limit."""
        data = self.encode(sample)
        if self.size + len(data) + 4 > self.size_limit:
            self.flush()
        self.samples.append(data)
        self.size += len(data) + 4

    def encode(self, sample: dict[str, Any]) -> bytes:
        """Return the bytes of a sample."""
        sizes, parts = [], []
        for name, kind in self.types.items():
            value = sample[name]
            if kind is None:
                sizes.append(len(value))
                parts.append(value)
            else:
                array = np.asarray(value)
                if (array.dtype, array.shape) != (kind.base, kind.shape):
                    raise ValueError(f"{name} is {array.dtype}{array.shape}, not {kind}")
                parts.append(array.tobytes())
        return np.array(sizes, np.uint32).tobytes() + b"".join(parts)

    def flush(self) -> None:
        """Write the samples so far as a shard."""
        count = len(self.samples)
        start = 4 * (count + 2) + len(self.head)
        offsets = np.cumsum([start, *map(len, self.samples)]).astype(np.uint32)
        parts = [np.uint32(count).tobytes(), offsets.tobytes(), self.head, *self.samples]
        name, data = f"shard.{len(self.shards):05}.mds", b"".join(parts)
        (self.folder / name).write_bytes(data)
        hashes = {"xxh64": xxhash.xxh64(data).hexdigest()}
        raw = {"basename": name, "bytes": len(data), "hashes": hashes}
        self.shards.append({"samples": count, "raw_data": raw, "zip_data": None} | self.description)
        self.samples, self.size = [], self.empty_size

    def finish(self) -> None:
        """Write the remaining samples and the index."""
        if self.samples:
            self.flush()
        index = {"version": VERSION, "shards": self.shards}
        (self.folder / "index.json").write_text(json.dumps(index, sort_keys=True), encoding="utf-8")


def encoded_type(encoding: str) -> np.dtype[Any] | None:
    """Return the type of a column of fixed size, or None for `bytes`."""
    if encoding == "bytes":
        return None
    kind, _, shape = encoding.rpartition(":")
    if not kind:
        return np.dtype(encoding)
    return np.dtype((kind.removeprefix("ndarray:"), (int(shape),)))
