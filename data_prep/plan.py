"""The plan of a preparation: the request, the inputs found, and its record on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from megarecur.data.corpus import MANIFEST_VERSION
from megarecur.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from megarecur.data_prep.compressed import plain_suffix
from megarecur.data_prep.duplicates import check_library
from megarecur.data_prep.hub import HubShard
from megarecur.data_prep.readers import WHOLE_FILES, Reading, Source, find_sources, hash_of, size_of
from megarecur.data_prep.tables import CSV_DELIMITERS
from megarecur.data_prep.work_files import name_damage
from megarecur.errors import DataError
from megarecur.files import open_replacement
from megarecur.reading import parse_object, read_object

SMALLEST_PART, LARGEST_PART = 1 << 18, 1 << 22
log = logging.getLogger(__name__)

SPLITS = ("train", "val")
WORK_FORMAT = 2
"""Version of the files of unfinished work; work of other versions is restarted."""


@dataclass(frozen=True)
class Request:
    """The options of a preparation.

    Raises:
        DataError: a number is out of range.
        ConfigError: a required library is not installed.
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
    """Similarity from which on a document is dropped; 0 drops none."""
    part_bytes: int = 0
    """Bytes of text per task of the second phase; 0 chooses by the size of the inputs."""
    eos: str | None = None
    """The token that ends documents, by its name or id; None uses the tokenizer's."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise DataError(
                f"val_fraction={self.val_fraction} must be at least 0 and below 1; correct it"
            )
        if not 0 <= self.near_duplicates < 1:
            raise DataError(
                f"near_duplicates={self.near_duplicates} must be at least 0 and below 1; correct it"
            )
        if self.near_duplicates:
            check_library()


@dataclass(frozen=True)
class PrepPlan:
    """The inputs and settings from which a corpus is made."""

    sources: Sequence[Source]
    names: Sequence[str]
    """Names of the sources, independent of their folder."""
    sizes: Sequence[int]
    hashes: Sequence[str]
    """xxh64 of each source as stored, or its substitute."""
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
        """Identity of the result: a hash of everything it depends on."""
        recipe = {
            "version": MANIFEST_VERSION,
            "sources": list(zip(self.names, self.hashes, strict=True)),
            "tokenizer": self.tokenizer.fingerprint,
            "val_fraction": self.val_fraction,
            "deduplicate": self.deduplicate,
            **asdict(replace(self.reading, exclude=())),
        }
        # Later options count only if they are used, so that existing work stays valid.
        if not recipe["template"]:
            del recipe["template"]
        del recipe["quoting"]
        if self._quoting():
            recipe["quoting"] = self._quoting()
        if self.tokenizer.end.is_given:
            recipe["eos_id"] = self.tokenizer.eos_id
        if self.near_duplicates:
            recipe["near_duplicates"] = self.near_duplicates
        return xxhash.xxh3_128_hexdigest(json.dumps(recipe, sort_keys=True).encode())

    @property
    def stamp(self) -> str:
        """The mark of unfinished work, which is kept while this stays the same."""
        return json.dumps(
            {"preparation": self.preparation, "part": self.part_bytes, "format": WORK_FORMAT}
        )

    def _quoting(self) -> str:
        """Return the quoting of csv and tsv files; "" if both are quoted, the original setting."""
        suffixes = {plain_suffix(Path(name)) for name in self.names}
        quoting = self.reading.quoting
        if quoting == "none" and suffixes & set(CSV_DELIMITERS):
            return "none"
        return "csv" if quoting == "auto" and ".tsv" in suffixes else ""


def make_plan(request: Request, tokenizer: Tokenizer, hashed: bool = True) -> PrepPlan:
    """Read the inputs and return the plan.

    Inputs are hashed to be sure that finished work comes from exactly these bytes: names, sizes and
    times can all match other bytes. Hashing costs a hundredth of tokenising.

    Args:
        tokenizer: the loaded tokenizer of the request; doubts about its end of documents are
        logged.
        hashed: read and hash the inputs; otherwise the plan has only sizes.

    Raises:
        DataError: an input matches no file.
    """
    if tokenizer.end.doubt:
        log.warning("%s", tokenizer.end.doubt)
    sources = find_sources(request.inputs, request.reading.exclude)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_of, sources)) if hashed else [""] * len(sources)
    sizes = [size_of(source) for source in sources]
    part_bytes = request.part_bytes or min(max(sum(sizes) // 64, SMALLEST_PART), LARGEST_PART)
    return PrepPlan(
        sources, _names(sources), sizes, hashes, request.reading, tokenizer, request.val_fraction,
        request.deduplicate, request.near_duplicates, part_bytes,
    )  # fmt: skip


def write_record(file: Path, request: Request, plan: PrepPlan, tokenizer_file: str) -> None:
    """Write a plan, for processes that need not read all inputs again."""
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
    with open_replacement(file, shared=True) as handle:
        handle.write(json.dumps(record).encode())


def read_record(file: Path, request: Request) -> tuple[PrepPlan, str]:
    """Return the recorded plan of a request, and the file of its tokenizer beside it.

    Raises:
        DataError: there is no record, or it has another request or tokenizer.
    """
    try:
        with name_damage(file):
            record = read_object(file)
    except FileNotFoundError:
        raise DataError(
            f"{file}: missing: this work is finished, was restarted or was never submitted; "
            "submit it again"
        ) from None
    with name_damage(file):
        return _open_record(file, record, request)


def _open_record(file: Path, record: dict[str, Any], request: Request) -> tuple[PrepPlan, str]:
    asked, own = record["request"], _plain(request)
    if changed := [key for key in own if own[key] != asked.get(key)]:
        key = changed[0]
        raise DataError(
            f"{file}: was submitted with {key}={asked.get(key)!r}, not {own[key]!r}; submit it "
            "again"
        )
    named = record["tokenizer"]["file"]
    tokenizer_file = BYTES if named == BYTES else str(file.parent / named)
    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.name = record["tokenizer"]["name"]  # the copy has another name
    sources = [HubShard(**s) if isinstance(s, dict) else Path(s) for s in record["sources"]]
    plan = PrepPlan(
        sources, record["names"], record["sizes"], record["hashes"], request.reading, tokenizer,
        request.val_fraction, request.deduplicate, request.near_duplicates, record["part_bytes"],
    )  # fmt: skip
    if plan.stamp != record["stamp"]:
        raise DataError(
            f"{file}: differs from the submitted plan; delete {file.parent} and submit again"
        )
    return plan, tokenizer_file


def _plain(request: Request) -> dict[str, Any]:
    """Return a request as JSON restores it."""
    plain: dict[str, Any] = parse_object(json.dumps(asdict(request)))
    plain["inputs"] = [os.path.normpath(i) for i in request.inputs]
    return plain


def _names(sources: Sequence[Source]) -> list[str]:
    """Return the names of the sources in manifests, wherever they are stored."""
    files = [source for source in sources if isinstance(source, Path)]
    shards = [source.name for source in sources if isinstance(source, HubShard)]
    return [*(_relative_names(files) if files else []), *shards]


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Return names that do not depend on where the inputs are stored."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, root)).as_posix() for path in absolute]
