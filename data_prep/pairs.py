"""Make corpora of sentence pairs, `megarecur prep pairs`: read, filter, tokenise, write shards.

A corpus of pairs is an ordinary corpus, in which a pair is two consecutive documents, source and
target; `task` in its manifest says so. Work has the phases of `prep shards`, and finished pieces
are kept in OUT.partial/:

    count      lines of text files, which must match
    read       pairs that the filters of text keep, compressed, in parts of bounded size
    tokenise   one task per part, with the filters of tokens
    assemble   one stream of tokens per split
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data.corpus import MANIFEST_VERSION, Manifest, read_manifest
from megarecur.data.fit import TRANSLATION
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.data_prep.bitext import (
    Bitext,
    Keys,
    Part,
    Sentences,
    count_lines,
    find_parts,
    read_part,
)
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.labelled import Mistakes
from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.data_prep.readers import WHOLE_FILES, Notes, Reading, hash_of
from megarecur.data_prep.shards import (
    copy_tokenizer,
    finish_split,
    hold,
    open_writer,
    partial_of,
    resume_or_restart,
    write_chunks,
)
from megarecur.data_prep.tasks import is_made
from megarecur.data_prep.work_files import name_damage
from megarecur.data_prep.workers import Workers
from megarecur.errors import ConfigError, DataError
from megarecur.files import open_replacement, publish
from megarecur.reading import parse_json, read_object

SPLITS = ("test", "val", "train")
"""train is last: if it exists, everything exists."""
PART_BYTES = 1 << 20
"""Bytes of text per task of the phase tokenise."""
UNREADABLE, EMPTY, IDENTICAL, DUPLICATES = "unreadable", "empty", "identical", "duplicates"
TOO_LONG, RATIO = "too_long", "ratio"
REASONS = (UNREADABLE, EMPTY, IDENTICAL, DUPLICATES, TOO_LONG, RATIO)
"""Reasons for which a pair is left out, in the order in which they are looked for."""


@dataclass(frozen=True)
class PairFilters:
    """Which pairs of train are left out, besides those with an empty side.

    Raises:
        ConfigError: a bound is out of range.
    """

    max_ratio: float | None = None
    """Most tokens of one side per token of the other; None: any."""
    max_length: int | None = None
    """Most tokens of a side, without its end; None: any."""
    deduplicate: bool = False
    """Keep only the first of equal pairs."""
    drop_identical: bool = False
    """Drop pairs whose sides are equal."""

    def __post_init__(self) -> None:
        if self.max_ratio is not None and not self.max_ratio >= 1:
            raise ConfigError(f"--max-ratio {self.max_ratio:g} must be at least 1; raise it")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"--max-length {self.max_length} must be at least 1; raise it")


NO_INPUTS, DEFAULT_KEYS, NO_FILTERS = Bitext(), Keys(), PairFilters()


@dataclass(frozen=True)
class PairRequest:
    """The options of `megarecur prep pairs`."""

    train: Bitext
    tokenizer: str
    val: Bitext = NO_INPUTS
    test: Bitext = NO_INPUTS
    keys: Keys = DEFAULT_KEYS
    filters: PairFilters = NO_FILTERS
    reading: Reading = WHOLE_FILES
    """Errors, exclusions, and quoting of tables."""
    eos: str | None = None
    """The token that ends sentences, by its name or id; None uses the tokenizer's."""


@dataclass(frozen=True)
class PairPlan:
    """The inputs of a preparation, and its identity."""

    splits: Mapping[str, Sequence[Part]]
    hashes: Mapping[str, str]
    """Hash of each file by its path."""
    stamp: str


@dataclass(frozen=True)
class PairTask:
    """Tokenise the pairs of one part."""

    text: Path
    target: Path
    tokenizer: str
    filters: PairFilters


@dataclass
class Kept:
    """The outcome of the phase read for one split."""

    sizes: list[int] = field(default_factory=list)
    """Bytes of text of each part."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Pairs left out, by reason."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Name, hash and pairs of each input file."""


def prepare_pairs(
    request: PairRequest,
    out: str | Path,
    *,
    workers: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Make the corpora OUT/train, OUT/val and OUT/test of sentence pairs.

    The result is byte for byte the same with any number of workers, and the same call resumes after
    an interruption.

    Args:
        out: folder of the result; OUT.partial holds unfinished work.
        workers: processes; 0 means one per core.

    Returns:
        The manifest of each split, by its name.

    Raises:
        ConfigError: options that contradict each other.
        DataError: files of different numbers of lines, a tokenizer without a padding token, an
            input that cannot be read, no pair left, or OUT already holds something else.
    """
    out = Path(out)
    partial = partial_of(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another output folder")
    with explain_os_errors(partial, "finished work is kept"):
        tokenizer = load_tokenizer(request.tokenizer, request.eos)
        check_tokens(request.tokenizer, tokenizer)
        plan = make_plan(request, tokenizer)
        made = [is_made(out / split, plan.stamp) for split in plan.splits]
        if all(made):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            number = workers or len(os.sched_getaffinity(0))
            with hold(partial), Workers(number, progress) as pool:
                resume_or_restart(partial, plan.stamp)
                copy = copy_tokenizer(request.tokenizer, tokenizer, partial)
                kept = read_once(request, plan, partial, progress)
                tasks = {s: _tasks(partial, s, kept[s], copy, request) for s in plan.splits}
                flat = [task for split in tasks.values() for task in split]
                sizes = [size for split in plan.splits for size in kept[split].sizes]
                pool.run("tokenise", tokenise_pairs, flat, ".tokens", sizes)
                for split in plan.splits:
                    if not is_made(out / split, plan.stamp):
                        shared = _describe(tokenizer, plan, kept[split])
                        _assemble(partial / split, tasks[split], copy, shared, progress)
                        out.mkdir(parents=True, exist_ok=True)
                        publish(partial / split, out / split)
                shutil.rmtree(partial)
    return {split: read_manifest(out / split) for split in reversed(list(plan.splits))}


def check_tokens(path: str, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without a padding token; one without an end token is not loaded.

    Raises:
        DataError: with the remedy.
    """
    if tokenizer.pad_id is None:
        raise DataError(
            f"{path}: has no padding token, which fills up batches of sentences; make a tokenizer "
            "with `megarecur prep tokenizer ... --pad`, or name its pad_token in the "
            "tokenizer_config.json beside a tokenizer.json"
        )


def make_plan(request: PairRequest, tokenizer: Tokenizer) -> PairPlan:
    """Find and hash the files of all splits.

    Raises:
        ConfigError, DataError: see `bitext.find_parts`.
    """
    asked = {"test": request.test, "val": request.val, "train": request.train}
    exclude = request.reading.exclude
    splits = {
        split: find_parts(split, asked[split], exclude)
        for split in SPLITS
        if asked[split] != NO_INPUTS or split == "train"
    }
    if not splits["train"]:
        raise ConfigError("prep pairs: needs --source and --target, or INPUT files of both sides")
    files = [(split, f) for split, parts in splits.items() for part in parts for f in part.files]
    hashes = {str(file): hash_of(file) for _, file in files}
    facts = {
        "version": MANIFEST_VERSION,
        "kind": TRANSLATION,
        "files": [(split, _name(file), hashes[str(file)]) for split, file in files],
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "keys": asdict(request.keys),
        "filters": asdict(request.filters),
        "errors": request.reading.errors,
        "quoting": request.reading.quoting,
    }
    stamp = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    return PairPlan(splits, hashes, stamp)


def _name(file: object) -> str:
    return file.name if isinstance(file, Path) else str(file)


# -------------------------------------------------------------------------------------- read


def read_once(
    request: PairRequest, plan: PairPlan, partial: Path, progress: ProgressReport | None
) -> dict[str, Kept]:
    """Read all pairs, and write those that are kept as parts; a finished reading is not repeated.

    Raises:
        DataError: text files of different numbers of lines, or mistakes in tables: all of them.
    """
    record = partial / "read.json"
    if not record.exists():
        splits = count_all(plan.splits, progress)
        kept, notes, mistakes = {}, Notes(), Mistakes()
        total = sum(part.size for parts in splits.values() for part in parts)
        with report_phase(progress, "read", total) as advance:
            for split, parts in splits.items():
                for entry in partial.glob(f"{split}-*"):
                    entry.unlink()
                kept[split] = Kept()
                pairs = _read_all(parts, request, plan, kept[split], mistakes, notes, advance)
                dropped: Counter[str] = Counter()
                filters = request.filters if split == "train" else NO_FILTERS
                texts = filter_texts(pairs, filters, dropped)
                kept[split].sizes = [
                    _write_part(_part_of(partial, split, number), held)
                    for number, held in enumerate(_group(texts))
                ]
                kept[split].dropped = dict(dropped)
        mistakes.raise_if_any()
        notes.tell()
        with open_replacement(record, shared=True) as file:
            file.write(json.dumps({split: asdict(found) for split, found in kept.items()}).encode())
    with name_damage(record):
        found = read_object(record)
        return {split: Kept(**found[split]) for split in plan.splits}


def count_all(
    splits: Mapping[str, Sequence[Part]], progress: ProgressReport | None
) -> dict[str, list[Part]]:
    """Return the parts with their numbers of lines.

    Raises:
        DataError: all text files whose numbers differ from those of their other side.
    """
    counted: dict[str, list[Part]] = {}
    wrong = []
    total = sum(p.size for parts in splits.values() for p in parts if len(p.files) == 2)
    with report_phase(progress, "count", total) as advance:
        for split, parts in splits.items():
            counted[split] = []
            for part in parts:
                if len(part.files) == 2:
                    source, target = (count_lines(Path(str(file))) for file in part.files)
                    if source != target:
                        wrong.append(
                            f"{part.files[0]} has {source} lines, but {part.files[1]} has {target}"
                        )
                    advance(part.size)
                    part = Part(part.files, source)
                counted[split].append(part)
    if wrong:
        raise DataError(
            "; ".join(wrong) + ": line n of one file must translate line n of the other; use "
            "files of the same sentences"
        )
    return counted


def _read_all(
    parts: Sequence[Part],
    request: PairRequest,
    plan: PairPlan,
    kept: Kept,
    mistakes: Mistakes,
    notes: Notes,
    advance: Any,
) -> Iterator[Sentences]:
    """Yield the pairs of a split, and describe its files."""
    for part in parts:
        number = told = 0
        for number, pair in enumerate(
            read_part(part, request.keys, request.reading, mistakes, notes), 1
        ):
            yield pair
            if number % 4096 == 0 and part.num_lines:
                done = part.size * number // part.num_lines
                advance(done - told)
                told = done
        advance(part.size - told)
        for file in part.files:
            kept.sources.append(
                {"name": _name(file), "xxh64": plan.hashes[str(file)], "pairs": number}
            )


def filter_texts(
    pairs: Iterable[Sentences], filters: PairFilters, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield the pairs that the filters of text keep; the others are counted by reason."""
    seen: set[bytes] = set()
    for source, target in pairs:
        if source is None or target is None:
            dropped[UNREADABLE] += 1
        elif not source or not target:
            dropped[EMPTY] += 1
        elif filters.drop_identical and source == target:
            dropped[IDENTICAL] += 1
        else:
            if filters.deduplicate:
                digest = xxhash.xxh3_128_digest(json.dumps([source, target]).encode())
                if digest in seen:
                    dropped[DUPLICATES] += 1
                    continue
                seen.add(digest)
            yield source, target


def _group(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield consecutive pairs of about PART_BYTES together."""
    held: list[tuple[str, str]] = []
    size = 0
    for pair in pairs:
        held.append(pair)
        size += sum(map(len, pair))
        if size >= PART_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _part_of(partial: Path, split: str, number: int) -> Path:
    return partial / f"{split}-{number:06}"


def _write_part(target: Path, pairs: Sequence[tuple[str, str]]) -> int:
    """Write pairs, compressed; return the bytes of text."""
    import zstandard

    content = json.dumps(pairs, ensure_ascii=False).encode()
    with open_replacement(target.with_suffix(".zst"), shared=True) as file:
        file.write(zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content))
    return len(content)


# ---------------------------------------------------------------------------------- tokenise


def _tasks(
    partial: Path, split: str, kept: Kept, tokenizer: str, request: PairRequest
) -> list[PairTask]:
    filters = request.filters if split == "train" else NO_FILTERS
    targets = [_part_of(partial, split, number) for number in range(len(kept.sizes))]
    return [PairTask(t.with_suffix(".zst"), t, tokenizer, filters) for t in targets]


def tokenise_pairs(task: PairTask) -> int:
    """Write the tokens of the pairs of one part that the filters of tokens keep; return how many
    tokens."""
    import zstandard

    tokenizer, filters = _load_once(task.tokenizer), task.filters
    with name_damage(task.text):
        pairs = parse_json(zstandard.ZstdDecompressor().decompress(task.text.read_bytes()))
    end = np.array([tokenizer.eos_id], tokenizer.dtype)
    ids, lengths = [np.empty(0, tokenizer.dtype)], []
    bytes_2 = np.zeros(2, np.int64)
    dropped: Counter[str] = Counter()
    for pair in pairs:
        sides = [tokenizer.encode_array(text).astype(tokenizer.dtype) for text in pair]
        sizes = [side.size for side in sides]
        if not min(sizes):
            dropped[EMPTY] += 1
        elif filters.max_length is not None and max(sizes) > filters.max_length:
            dropped[TOO_LONG] += 1
        elif filters.max_ratio is not None and max(sizes) > filters.max_ratio * min(sizes):
            dropped[RATIO] += 1
        else:
            for side in sides:
                ids += [side, end]
                lengths.append(side.size + 1)
            bytes_2 += [len(text.encode()) for text in pair]
    with open_replacement(task.target.with_suffix(".tokens"), shared=True) as file:
        np.save(file, np.array(lengths, np.int64))
        np.save(file, bytes_2)
        np.save(file, np.concatenate(ids))
        np.save(file, np.array([dropped[reason] for reason in REASONS], np.int64))
    return sum(lengths)


@cache
def _load_once(path: str) -> Tokenizer:
    """Return a worker's tokenizer, loaded once."""
    return load_tokenizer(path)


def _load(path: Path) -> tuple[NDArray[Any], int, NDArray[Any]]:
    """Return the tokens of each document, the bytes of text and the tokens of a part."""
    with name_damage(path), open(path, "rb") as file:
        lengths, bytes_2, tokens = (np.load(file) for _ in range(3))
    return lengths, int(bytes_2.sum()), tokens


def _load_counts(path: Path) -> tuple[NDArray[Any], Counter[str]]:
    """Return the bytes of sources and of targets of a part, and the pairs that the filters of
    tokens left out."""
    with name_damage(path), open(path, "rb") as file:
        _, bytes_2, _, counts = (np.load(file) for _ in range(4))
    return bytes_2, Counter(dict(zip(REASONS, counts.tolist(), strict=True)))


# ---------------------------------------------------------------------------------- assemble


def _describe(tokenizer: Tokenizer, plan: PairPlan, kept: Kept) -> dict[str, Any]:
    """Return the values of a manifest that are known before the tokens are read."""
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": np.dtype(tokenizer.dtype).name,
        "preparation": plan.stamp,
        "sources": kept.sources,
        "task": {"pad_id": tokenizer.pad_id, "start_id": start, "dropped": kept.dropped},
    }


def _assemble(
    folder: Path,
    tasks: Sequence[PairTask],
    tokenizer_file: str,
    shared: Mapping[str, Any],
    progress: ProgressReport | None,
) -> None:
    """Write one split into a folder.

    Raises:
        DataError: no pair is left.
    """
    files = [task.target.with_suffix(".tokens") for task in tasks]
    bytes_2, dropped = np.zeros(2, np.int64), Counter(shared["task"]["dropped"])
    for file in files:
        of_file, left_out = _load_counts(file)
        bytes_2 += of_file
        dropped += left_out
    told = {reason: dropped[reason] for reason in REASONS}
    shutil.rmtree(folder, ignore_errors=True)
    writer = open_writer(folder, shared["dtype"])
    lengths, num_bytes = write_chunks(writer, folder.name, files, _load, shared, progress)
    if not lengths.size:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(
            f"{folder.name}: has no pair left ({describe_dropped(told) or 'its files are empty'}); "
            "use files with more pairs, or loosen the filters"
        )
    lengths_P2 = lengths.reshape(-1, 2)
    longest_2, tokens_2 = lengths_P2.max(axis=0).tolist(), lengths_P2.sum(axis=0).tolist()
    task = {
        **shared["task"],
        "name": "pairs",
        "kind": TRANSLATION,
        "num_pairs": len(lengths_P2),
        "dropped": told,
        "longest_source": longest_2[0],
        "longest_target": longest_2[1],
        "longest_pair": int(lengths_P2.sum(axis=1).max()),
        "source_tokens": tokens_2[0],
        "target_tokens": tokens_2[1],
        "target_bytes": int(bytes_2[1]),
    }
    values = {
        **shared,
        "num_bytes": num_bytes,
        "duplicates_removed": told[DUPLICATES],
        "documents_skipped": 2 * told[UNREADABLE],
        "task": task,
    }
    finish_split(writer, folder, tokenizer_file, lengths, values)


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """Return how many pairs were left out and why; "" if none were."""
    found = {reason.replace("_", " "): count for reason, count in dropped.items() if count}
    return ", ".join(f"{count:,} {reason}" for reason, count in found.items())
