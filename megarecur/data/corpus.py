"""A corpus on disk: token shards (MDS), document starts, and a manifest that identifies it.

    data/quickstart/train/
      manifest.json      counts, tokenizer, hashes of every other file; its own hash is the identity
      index.json         mosaicml-streaming's index of the shards
      shard.00000.mds    chunks of 16,384 tokens, one static column: the tokens lie side by side
      documents.npy      int64, where each document starts in the stream of tokens
      tokenizer.model a copy of the tokenizer (or tokenizer.json; none for `bytes`)

The chunks of all shards are one stream of tokens, so that a sequence of any length is a slice of
it. Every document ends with the end-of-document id; the last chunk is filled up with it.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.config.run import NO_TOKENIZER
from megarecur.data.manifest_facts import find_manifest_fault
from megarecur.data.mapped_files import MappedFiles, find_fault
from megarecur.data.shard_index import read_index
from megarecur.errors import DataError, refuse_shortage
from megarecur.reading import check_inside, parse_json, read_bytes

if TYPE_CHECKING:
    from megarecur.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MANIFEST_VERSION = 1
CHUNK_TOKENS = 16384
COLUMN = "tokens"
MEND = "copy it again from its source, or prepare it again with `megarecur prep shards`"


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    version: int
    split: str
    tokenizer: str
    """Name of the tokenizer's file, or `bytes`."""
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    dtype: str
    num_tokens: int
    """Number of tokens, with ends of documents, without padding of the last chunk."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text."""
    duplicates_removed: int
    documents_skipped: int
    preparation: str
    """Hash of the inputs and settings of the preparation."""
    sources: list[dict[str, Any]]
    """Name, documents and bytes of text read of each input file."""
    files: dict[str, dict[str, Any]]
    """Bytes and xxh64 of every other file of the corpus."""
    near_duplicates_removed: int = 0
    task: dict[str, Any] | None = None
    """Description of a corpus of labelled samples; see `data/samples.py`."""
    identity: str = ""
    """Fingerprint at the time of writing, which reveals damage; missing in the first corpora."""

    @property
    def fingerprint(self) -> str:
        """The identity of the corpus: xxh3-128 of the manifest's content."""
        content = asdict(self)
        del content["identity"]
        for younger in ("near_duplicates_removed", "task"):  # Keys that the first corpora lack.
            if not content[younger]:
                del content[younger]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a corpus, which is quick and suffices for most questions.

    Raises:
        DataError: the corpus does not exist, or its manifest is damaged or of another version.
    """
    path = Path(path)
    file = path / "manifest.json"
    try:
        content = read_bytes(file)
        values = parse_json(content)
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
    version = values.get("version") if isinstance(values, dict) else None
    if type(version) is not int or version != MANIFEST_VERSION:
        found = values.get("version") if isinstance(values, dict) else type(values).__name__
        raise DataError(
            f"{file}: version {found!a:.40}, this version of megarecur reads {MANIFEST_VERSION}; "
            "prepare the corpus again with `megarecur prep shards`"
        )
    if fault := find_manifest_fault(values):
        raise DataError(f"{file}: damaged ({fault}); {MEND}")
    manifest = Manifest(**values)
    if manifest.identity and (
        manifest.identity != manifest.fingerprint or write_manifest(values) != content
    ):
        raise DataError(f"{file}: does not match its hash: it is damaged, or was edited; {MEND}")
    return manifest


def write_manifest(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of manifest.json, which are the same for the same values.

    A sealed manifest must consist of exactly these, so that no change of a byte goes unnoticed.
    """
    return json.dumps(values, indent=1, sort_keys=True).encode()


def check_files(path: Path, manifest: Manifest, hashed: Container[str]) -> None:
    """Compare the sizes of a corpus's files, and the hashes of some, with the manifest.

    Raises:
        DataError: the message names up to five missing or damaged files.
    """

    try:
        check_inside(path, manifest.files)
    except ValueError as error:
        raise DataError(f"{path / 'manifest.json'}: {error}; {MEND}") from None

    def fault(name: str) -> str | None:
        return find_fault(path / name, manifest.files[name], name in hashed)

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(fault, manifest.files))
    named = zip(manifest.files, faults, strict=True)
    bad = [f"{path / name} {text}" for name, text in named if text]
    if bad:
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise DataError("; ".join(bad[:5]) + f"{more}; {MEND}")


def check_tokenizer(path: str | Path, manifest: Manifest, tokenizer: str, fingerprint: str) -> None:
    """Reject a tokenizer other than the one that made the corpus; images are made without one.

    Raises:
        DataError: the fingerprints differ.
    """
    if manifest.tokenizer == NO_TOKENIZER:
        return
    if manifest.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{path}: was made with another tokenizer ({manifest.tokenizer}, fingerprint "
            f"{manifest.tokenizer_fingerprint[:12]}) than data.tokenizer={tokenizer} "
            f"({fingerprint[:12]}); set data.tokenizer to the one it was made with, or prepare it "
            "again"
        )


def warn_of_other_ends(corpora: Sequence[Corpus], tokenizer: Tokenizer, name: str) -> None:
    """Warn about corpora whose end-of-document token differs from the tokenizer's, where generation
    would stop.
    """
    for corpus in corpora:
        if corpus.eos_id != tokenizer.eos_id:
            log.warning(
                "%s: documents end with %r (%d), but data.tokenizer=%s has %r (%d), at which "
                "generated text would stop; set data.tokenizer to the corpus's copy of it",
                corpus.path, tokenizer.token_of(corpus.eos_id), corpus.eos_id, name,
                tokenizer.token_of(tokenizer.eos_id), tokenizer.eos_id,
            )  # fmt: skip


class Corpus:
    """An open corpus, with its shards mapped into memory.

    Args:
        verify: read files once and compare them with their hashes (sizes are always compared).
        part: index of the part of the files that this process reads for that; others read the rest.

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
        if not self.manifest.identity and part == 0:
            log.warning(
                "%s: has no hash of its own, as those of the first releases: damage inside it may "
                "go unnoticed; `megarecur prep` writes one",
                self.path / "manifest.json",
            )
        hashed = set(names[part::num_parts]) if verify else set()
        self._check_files(hashed)
        self.described = self._read_index()
        self._mapped = MappedFiles(self._find_rewriting)
        self._starts_file = self.path / "documents.npy"
        try:
            self.shards, sizes = self._open_shards(self.described)
            documents = np.load(self._mapped.add(self._starts_file), mmap_mode="r")
            if documents.dtype != np.int64 or documents.shape != (self.num_documents,):
                raise ValueError(
                    f"documents.npy holds {documents.dtype} {list(documents.shape)} instead of "
                    f"the starts of {self.num_documents} documents"
                )
        except (ValueError, KeyError, TypeError, IndexError, OSError, MemoryError) as error:
            refuse_shortage(error, self.path)
            # The damaged file's hash is compared by another process, or by none.
            raise DataError(f"{self.path}: damaged ({error}); {MEND}") from None
        if "documents.npy" in hashed:
            _check_starts(self._starts_file, documents, self.num_tokens)
        self.starts = [0, *accumulate(sizes)]
        if self.starts[-1] < self.num_tokens:
            raise DataError(
                f"{self.path / 'index.json'}: holds {self.starts[-1]} tokens, but the manifest has "
                f"{self.num_tokens}; {MEND}"
            )
        self._shard_files = [self.path / shard["raw_data"]["basename"] for shard in self.described]
        # A plain array over the mapped file: slices of np.memmap cost several microseconds.
        self._documents = np.asarray(documents)

    @property
    def documents(self) -> NDArray[Any]:
        """Start of each document, int64 [num_documents].

        Raises:
            DataError: its file was cut or rewritten since it was mapped.
        """
        self._mapped.refuse_change(self._starts_file)
        return self._documents

    @property
    def bytes_per_label(self) -> float:
        """Bytes of text per token that is predicted."""
        return self.num_bytes / self.num_tokens

    def _read_index(self) -> list[dict[str, Any]]:
        """Return the shards of index.json, each of which the manifest must list once.

        Raises:
            DataError: index.json cannot be used, or lists other files.
        """
        described = read_index(self.path)
        names = [shard["raw_data"]["basename"] for shard in described]
        reserved = {"index.json", "documents.npy", "manifest.json"}
        for name, shard in zip(names, described, strict=True):
            listed = self.manifest.files.get(name)
            if name in reserved or listed is None or listed["bytes"] != shard["raw_data"]["bytes"]:
                raise DataError(
                    f"{self.path / 'index.json'}: lists {name!a:.80}, which the manifest does not "
                    f"list as a shard of that size; {MEND}"
                )
        if len(set(names)) < len(names):
            raise DataError(f"{self.path / 'index.json'}: lists a shard twice; {MEND}")
        return described

    def _check_files(self, hashed: set[str]) -> None:
        """Compare the sizes of all files, and the hashes of these, with the manifest."""
        check_files(self.path, self.manifest, hashed)

    def _open_shards(
        self, described: list[dict[str, Any]]
    ) -> tuple[Sequence[NDArray[Any]], list[int]]:
        """Return the shards that the index describes, and the number of tokens of each."""
        shards = [self._map(shard) for shard in described]
        return shards, [shard.size for shard in shards]

    def _map(self, shard: dict[str, Any]) -> NDArray[Any]:
        """Return the tokens of one shard: samples lie side by side after the sample offsets and a
        header."""
        file = self.path / shard["raw_data"]["basename"]
        content = np.memmap(self._mapped.add(file), np.uint8, "r")
        offsets = content[4 : 4 + 4 * (shard["samples"] + 1)].view(np.uint32)
        begin, end = int(offsets[0]), int(offsets[-1])
        if not begin <= end <= content.size:
            raise ValueError(f"the offsets of {file.name} point outside")
        return np.frombuffer(content, self.dtype, (end - begin) // self.dtype.itemsize, begin)

    def _find_rewriting(self, file: Path) -> str | None:
        """Return what is wrong with the content of a mapped file whose time changed."""
        return find_fault(file, self.manifest.files[file.name], hashed=True)

    def _shard(self, k: int) -> NDArray[Any]:
        """Return the tokens of a shard, which must be as it was when it was mapped."""
        shard = self.shards[k]  # It may be fetched and mapped only now.
        self._mapped.refuse_change(self._shard_files[k])
        return shard

    def close(self) -> None:
        """Stop background work; here there is none."""

    def read(self, start: int, n: int) -> NDArray[Any]:
        """Return tokens [start, start + n) in the corpus's own type, as a view if inside one
        shard."""
        if not 0 <= start <= start + n <= self.num_tokens:
            raise DataError(
                f"{self.path}: tokens {start} to {start + n} requested, but it has "
                f"{self.num_tokens}"
            )
        k = min(bisect_right(self.starts, start), len(self.shards)) - 1
        parts = [self._shard(k)[start - self.starts[k] :][:n]]
        missing = n - parts[0].size
        while missing:
            k += 1
            parts.append(self._shard(k)[:missing])
            missing -= parts[-1].size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_starts(file: Path, starts_D: NDArray[Any], num_tokens: int) -> None:
    """Reject starts of documents that do not ascend from 0 inside the stream.

    Raises:
        DataError: the message names the first such document.
    """
    if not starts_D.size:
        return
    wrong = np.flatnonzero(np.diff(starts_D, append=max(num_tokens, 0)) < 0)
    if starts_D[0] != 0 or wrong.size:
        number = int(wrong[0]) if wrong.size else 0
        raise DataError(
            f"{file}: document {number} starts at {int(starts_D[number])}, and the next or the end "
            f"of the corpus lies before it; {MEND}"
        )
