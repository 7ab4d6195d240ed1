"""A corpus on disk: token shards (MDS), document starts, and a manifest that identifies it.

    data/quickstart/train/
      manifest.json      counts, tokenizer, hashes of every other file; its own hash is the identity
      index.json         mosaicml-streaming's index of the shards
      shard.00000.mds    chunks of 16,384 tokens, one static column: the tokens lie side by side
      documents.npy      int64, where each document starts in the stream of tokens
      tokenizer.model    a copy of the tokenizer (or tokenizer.json; none for `bytes`)

The chunks of all shards are one stream of tokens, so that a sequence of any length is a slice of
it. Every document ends with the end-of-document id; the last chunk is filled up with it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megarecur.errors import DataError

MANIFEST_VERSION = 1
CHUNK_TOKENS = 16384
COLUMN = "tokens"
MEND = "copy it again from where it came, or prepare it again with `megarecur prep shards`"


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    version: int
    split: str
    tokenizer: str
    """The name of the tokenizer's file, or `bytes`."""
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    dtype: str
    num_tokens: int
    """Ends of documents included, padding of the last chunk excluded."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text."""
    duplicates_removed: int
    documents_skipped: int
    preparation: str
    """Hash of what it was made from and how."""
    sources: list[dict[str, Any]]
    """Name, documents and bytes of text read of each input file."""
    files: dict[str, dict[str, Any]]
    """Bytes and xxh64 of every other file of the corpus."""
    near_duplicates_removed: int = 0
    task: dict[str, Any] | None = None
    """Of a corpus of labelled samples: see `data/samples.py`."""

    @property
    def fingerprint(self) -> str:
        """The identity of the corpus: xxh3-128 of the manifest's content."""
        content = asdict(self)
        for younger in ("near_duplicates_removed", "task"):  # Than the first corpora.
            if not content[younger]:
                del content[younger]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a corpus: quick, and all that most questions need.

    Raises:
        DataError: there is no corpus, or its manifest is damaged or of another version.
    """
    path = Path(path)
    file = path / "manifest.json"
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        splits = {f.parent for name in ("manifest", "index") for f in path.glob(f"*/{name}.json")}
        hint = (
            f"it holds corpora: give {' or '.join(map(str, sorted(splits)))}"
            if splits
            else "prepare one with `megarecur prep shards`"
        )
        raise DataError(f"{path}: there is no corpus (no manifest.json); {hint}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: damaged ({error}); {MEND}") from None
    if not isinstance(values, dict) or values.get("version") != MANIFEST_VERSION:
        found = values.get("version") if isinstance(values, dict) else type(values).__name__
        raise DataError(
            f"{file}: version {found!r}, this version of megarecur reads {MANIFEST_VERSION}; "
            "prepare the corpus again with `megarecur prep shards`"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise DataError(f"{file}: damaged ({error}); {MEND}") from None


def check_tokenizer(path: str | Path, manifest: Manifest, tokenizer: str, fingerprint: str) -> None:
    """Refuse a tokenizer that is not the one that made the corpus.

    Raises:
        DataError: the fingerprints differ.
    """
    if manifest.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{path}: was made with another tokenizer ({manifest.tokenizer}, fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}) than data.tokenizer={tokenizer} "
            f"({fingerprint[:12]}); give the tokenizer it was made with, or prepare it again"
        )


class Corpus:
    """An open corpus: its shards, mapped into memory.

    Args:
        path: the folder of the corpus.
        verify: read files once and compare them with their hashes (sizes are always compared).
        part: which part of the files this process reads for that; others read the rest.
        num_parts: how many parts there are.

    Raises:
        DataError: a file is missing, damaged or of another size; the message names it.
    """

    def __init__(
        self, path: str | Path, verify: bool = True, part: int = 0, num_parts: int = 1
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.fingerprint = self.manifest.fingerprint
        self.num_tokens = self.manifest.num_tokens
        self.num_documents = self.manifest.num_documents
        self.num_bytes = self.manifest.num_bytes
        self.vocab_size = self.manifest.vocab_size
        self.eos_id = self.manifest.eos_id
        self.tokenizer_fingerprint = self.manifest.tokenizer_fingerprint
        self.dtype = np.dtype(self.manifest.dtype)
        names = sorted(self.manifest.files)
        self._check_files(set(names[part::num_parts]) if verify else set())
        try:
            index = json.loads((self.path / "index.json").read_bytes())
            self.shards, sizes = self._open_shards(index["shards"])
            documents = np.load(self.path / "documents.npy", mmap_mode="r")
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            # Damage in a file whose hash another process compares, or none.
            raise DataError(f"{self.path}: damaged ({error}); {MEND}") from None
        self.starts = [0, *accumulate(sizes)]
        if self.starts[-1] < self.num_tokens:
            raise DataError(
                f"{self.path / 'index.json'}: holds {self.starts[-1]} tokens, the manifest says "
                f"{self.num_tokens}; {MEND}"
            )
        # A plain array over the mapped file: slices of np.memmap cost several microseconds.
        self.documents = np.asarray(documents)
        """int64 [num_documents], where each document starts."""

    def _check_files(self, hashed: set[str]) -> None:
        """Compare sizes, and of these files hashes, with those that the manifest lists."""

        def fault(name: str) -> str | None:
            return find_fault(self.path / name, self.manifest.files[name], name in hashed)

        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(fault, self.manifest.files))
        named = zip(self.manifest.files, faults, strict=True)
        bad = [f"{self.path / name} {text}" for name, text in named if text]
        if bad:
            more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
            raise DataError("; ".join(bad[:5]) + f"{more}; {MEND}")

    def _open_shards(
        self, described: list[dict[str, Any]]
    ) -> tuple[Sequence[np.ndarray], list[int]]:
        """The shards that the index describes, and the tokens of each."""
        shards = [self._map(shard) for shard in described]
        return shards, [shard.size for shard in shards]

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        """The tokens of one shard: after the sample offsets and a header, samples side by side."""
        file = self.path / shard["raw_data"]["basename"]
        content = np.memmap(file, np.uint8, "r")
        offsets = content[4 : 4 + 4 * (shard["samples"] + 1)].view(np.uint32)
        begin, end = int(offsets[0]), int(offsets[-1])
        return np.frombuffer(content, self.dtype, (end - begin) // self.dtype.itemsize, begin)

    def close(self) -> None:
        """Stop what goes on in the background, which is nothing here."""

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [start, start + n) in the corpus's own type; a copy-free slice inside a shard."""
        if not 0 <= start <= start + n <= self.num_tokens:
            raise DataError(
                f"{self.path}: tokens {start} to {start + n} asked for, it has {self.num_tokens}"
            )
        k = min(bisect_right(self.starts, start), len(self.shards)) - 1
        parts = [self.shards[k][start - self.starts[k] :][:n]]
        missing = n - parts[0].size
        while missing:
            k += 1
            parts.append(self.shards[k][:missing])
            missing -= parts[-1].size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def find_fault(file: Path, expected: Mapping[str, Any], hashed: bool) -> str | None:
    """What is wrong with a file by the size and, if `hashed`, the hash that a manifest lists."""
    try:
        if file.stat().st_size != expected["bytes"]:
            return f"has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if hashed and hash_file(file) != expected["xxh64"]:
            return "does not match its hash: it is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def hash_file(path: Path) -> str:
    """The xxh64 of a file, as MDS writes it."""
    digest = xxhash.xxh64()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def open_corpus(
    path: str | Path,
    tokenizer: str,
    fingerprint: str,
    verify: bool = True,
    part: int = 0,
    num_parts: int = 1,
    remote: str | None = None,
    cache_gb: float | None = None,
) -> Corpus:
    """A corpus, if it was made with this tokenizer; see `Corpus` and `RemoteCorpus` for the rest.

    A folder with an index.json but no manifest.json is another program's: see `ForeignCorpus`.

    Raises:
        ConfigError: a bound of the cache that is too small.
        DataError: another tokenizer, or a file that is missing or damaged.
    """
    if remote is not None:
        from megarecur.data.remote import RemoteCorpus

        corpus = RemoteCorpus(path, remote, cache_gb, verify)
        check_tokenizer(remote, corpus.manifest, tokenizer, fingerprint)
        return corpus
    from megarecur.data.foreign import ForeignCorpus, is_foreign
    from megarecur.data.tokenizer import load_tokenizer

    if is_foreign(path):
        return ForeignCorpus(path, load_tokenizer(tokenizer), verify, part, num_parts)
    check_tokenizer(path, read_manifest(path), tokenizer, fingerprint)
    return Corpus(path, verify, part, num_parts)
