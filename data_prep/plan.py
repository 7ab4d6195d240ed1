"""What a corpus is to be made of: the request, what its inputs were found to be, and its record."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from data_prep.duplicates import check_library
from data_prep.files import publish
from data_prep.hub import HubShard
from data_prep.readers import WHOLE_FILES, Reading, Source, find_sources, hash_of, size_of
from megarecur.data.corpus import MANIFEST_VERSION
from megarecur.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from megarecur.errors import DataError

SMALLEST_PART, LARGEST_PART = 1 << 18, 1 << 22
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Raises:
        DataError: a number that makes no sense.
        ConfigError: a library that it needs is not installed.
    """

    inputs: tuple[str, ...]
    """Files, globs, folders, or `hf:...` (see `readers.find_sources`)."""
    tokenizer: str
    """A sentencepiece model, a tokenizer.json, or `bytes`."""
    reading: Reading = WHOLE_FILES
    val_fraction: float = 0.0
    """Share of the documents, chosen by their hash, that goes to OUT/val."""
    deduplicate: bool = True
    near_duplicates: float = 0.0
    """Similarity from which on a document is dropped; 0: none is."""
    part_bytes: int = 0
    """Text per task of the second phase; 0: chosen by the size of the inputs."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} must be at least 0 and below 1")
        if not 0 <= self.near_duplicates < 1:
            raise DataError(
                f"near_duplicates={self.near_duplicates} must be at least 0 and below 1"
            )
        if self.near_duplicates:
            check_library()


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

    @property
    def stamp(self) -> str:
        """What unfinished work is marked with: it is kept for as long as this stays the same."""
        return json.dumps({"preparation": self.preparation, "part": self.part_bytes})


def make_plan(request: Request, tokenizer: Tokenizer, hashed: bool = True) -> Plan:
    """Look at the inputs.

    They are read once more than needed, to be sure that finished work is of these very bytes:
    names, sizes and times can all be those of other bytes. It costs a hundredth of tokenising them.

    Args:
        request: what is asked for.
        tokenizer: the one that it names, loaded.
        hashed: whether to read the inputs; without, the plan tells sizes only.

    Raises:
        DataError: an input stands for no file.
    """
    sources = find_sources(request.inputs, request.reading.exclude)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_of, sources)) if hashed else [""] * len(sources)
    sizes = [size_of(source) for source in sources]
    part_bytes = request.part_bytes or min(max(sum(sizes) // 64, SMALLEST_PART), LARGEST_PART)
    return Plan(
        sources, _names(sources), sizes, hashes, request.reading, tokenizer, request.val_fraction,
        request.deduplicate, request.near_duplicates, part_bytes,
    )  # fmt: skip


def write_record(file: Path, request: Request, plan: Plan, tokenizer_file: str) -> None:
    """Write down a plan, for processes that shall not look at all inputs again."""
    places = [asdict(s) if isinstance(s, HubShard) else os.path.abspath(s) for s in plan.sources]
    record = {
        "request": _plain(request),
        "sources": places,
        "names": list(plan.names),
        "sizes": list(plan.sizes),
        "hashes": list(plan.hashes),
        "part_bytes": plan.part_bytes,
        "tokenizer": {"name": plan.tokenizer.name, "file": Path(tokenizer_file).name},
        "stamp": plan.stamp,
    }
    with publish(file) as handle:
        handle.write(json.dumps(record).encode())


def read_record(file: Path, request: Request) -> tuple[Plan, str]:
    """The plan that was written down for a request, and the file of its tokenizer, beside it.

    Raises:
        DataError: there is none, it is of another request, or its tokenizer is another one.
    """
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{file}: is not there: this work is finished, was begun anew or was never submitted; "
            "submit it again"
        ) from None
    asked, own = record["request"], _plain(request)
    if changed := [key for key in own if own[key] != asked[key]]:
        key = changed[0]
        raise DataError(
            f"{file}: was submitted with {key}={asked[key]!r}, not {own[key]!r}; submit it again"
        )
    named = record["tokenizer"]["file"]
    tokenizer_file = BYTES if named == BYTES else str(file.parent / named)
    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.name = record["tokenizer"]["name"]  # the copy's is another one
    sources = [HubShard(**s) if isinstance(s, dict) else Path(s) for s in record["sources"]]
    plan = Plan(
        sources, record["names"], record["sizes"], record["hashes"], request.reading, tokenizer,
        request.val_fraction, request.deduplicate, request.near_duplicates, record["part_bytes"],
    )  # fmt: skip
    if plan.stamp != record["stamp"]:
        raise DataError(f"{file}: is not what was submitted; delete {file.parent} and submit again")
    return plan, tokenizer_file


def _plain(request: Request) -> dict[str, Any]:
    """A request as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(request)))
    plain["inputs"] = [os.path.normpath(i) for i in request.inputs]
    return plain


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
