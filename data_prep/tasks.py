"""Make corpora of labelled samples, `megarecur prep task`: draw or read them, and write shards.

A corpus of a task is an ordinary corpus (documents of tokens in MDS shards), with `labels.npy`
beside it and `task` in its manifest. A sample is one document, or the two consecutive ones of a
pair. Labels are int32 per sample or, for kind `token`, int8 per token of the stream, -1 for none.
Samples stream from a generator to the writers of all splits, whatever their number.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data.corpus import CHUNK_TOKENS, COLUMN, Manifest, read_manifest
from megarecur.data.mapped_files import hash_file
from megarecur.data.tokenizer import (
    BYTES,
    CONFIG_FILE,
    Tokenizer,
    WordTokenizer,
    describe_end,
    load_tokenizer,
)
from megarecur.data_prep import flip_flop, grey, list_ops, logic, pathfinder
from megarecur.data_prep.compressed import plain_suffix, uncompressed
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.labelled import (
    Found,
    LabelledInputs,
    Mistakes,
    Row,
    collect,
    read_list_ops,
    read_logic,
)
from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.data_prep.readers import Notes, Reading, find_sources
from megarecur.data_prep.shards import finish_split, hold, open_writer, partial_of, refuse_damage
from megarecur.data_prep.workers import end_with_parent
from megarecur.errors import ConfigError, DataError
from megarecur.files import open_replacement, publish, sync

LABELS, WORDS_FILE = "labels.npy", "tokenizer.words"
FLAGS = {"tests": "test", "text_keys": "text-key", "classes": "class", "columns": "column"}
"""Names of options that differ from their fields."""
NAMES = ("listops", "logic", "flip_flop", "pathfinder", "labelled")
YOUNGER = ("classes", "columns", "quoting", "errors", "contour_length")
"""Fields of a request that the first corpora lack."""
MANY_PICTURES = 2000
"""Number of pictures from which all cores draw them."""
HEADER = 128
"""Bytes before the values of an .npy file; numpy's header leaves room for any length."""


@dataclass(frozen=True)
class TaskRequest:
    """The options of `megarecur prep task`. None means the task's own default."""

    name: str
    inputs: tuple[str, ...] = ()
    """Files to read instead of drawing samples."""
    seed: int = 1
    train: int | None = None
    val: int | None = None
    """Number of samples to draw."""
    tests: tuple[str, ...] = ()
    test_count: int | None = None
    variant: str | None = None
    max_depth: int | None = None
    max_args: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    length: int | None = None
    p_ignore: float | None = None
    train_operators: int | None = None
    text_keys: tuple[str, ...] | None = None
    label_key: str | None = None
    classes: tuple[str, ...] = ()
    """Classes to read; empty means all."""
    columns: tuple[str, ...] = ()
    """Column names of csv and tsv files without a header."""
    tokenizer: str | None = None
    val_fraction: float | None = None
    quoting: Literal["auto", "quoted", "none"] | None = None
    errors: Literal["fail", "skip", "replace"] | None = None
    exclude: tuple[str, ...] = ()
    """Patterns of files to exclude; see `readers.Reading`."""
    contour_length: int | None = None

    def refuse_others(self, *allowed: str) -> None:
        """Reject options that this task does not have.

        Raises:
            ConfigError: the message names all of them.
        """
        always = ("name", "inputs", "seed")
        given = [
            "--" + FLAGS.get(k, k.replace("_", "-"))
            for k, v in asdict(self).items()
            if v not in (None, ()) and k not in (*always, *allowed)
        ]
        if given:
            how = " read from files" if self.inputs else ""
            raise ConfigError(f"{', '.join(given)}: not supported by {self.name}{how}; omit them")


@dataclass(frozen=True)
class Sample:
    """One sample of a split."""

    split: str
    texts: tuple[str, ...]
    """One text, or the two of a pair."""
    label: int | NDArray[np.int8]
    """A class, or int8 per token."""


@dataclass(frozen=True)
class Task:
    """Everything that determines the written corpora."""

    name: str
    kind: str
    classes: Sequence[str]
    splits: Sequence[str]
    """Names of the splits, in the order in which they appear, train last."""
    total: int
    """Total number of samples, for the progress report; approximate if read from files."""
    samples: Callable[[], Iterator[Sample]]
    words: Sequence[str] = ()
    """Words of the generated tokenizer; if empty, `tokenizer` is used."""
    tokenizer: str = ""
    ahead: bool = False
    """True if labels are later tokens, which only a causal model does not see."""
    sources: Sequence[tuple[str, str]] = ()
    """Files to read, with their role: a split, a label."""
    counts: dict[str, int] = field(default_factory=dict)
    """Filled in by the stream: duplicates removed, of all splits together."""


def prepare_task(
    request: TaskRequest, out: str | Path, progress: ProgressReport | None = None
) -> dict[str, Manifest]:
    """Make the corpora of a task, OUT/train and so on: a function of the request and its files.

    Args:
        out: folder of the result; unfinished work in OUT.partial is restarted.

    Returns:
        The manifest of each split, by its name.

    Raises:
        ConfigError: unknown task, or options that it does not have.
        DataError: mistakes in files, no samples, or OUT holds something else.
    """
    if request.name not in BUILDERS:
        raise ConfigError(f"task {request.name!r}: unknown; choose one of {', '.join(BUILDERS)}")
    out = Path(out)
    with explain_os_errors(out):
        task = BUILDERS[request.name](request)
        if not task.splits:
            remedy = "use other files" if request.inputs else "raise --train or --val"
            raise DataError(f"{request.name}: the request has no sample; {remedy}")
        hashes = {path: hash_file(Path(path)) for path, _ in task.sources}
        stamp = stamp_of(request, task, hashes)
        done = [split for split in task.splits if is_made(out / split, stamp)]
        if len(done) < len(task.splits):
            partial = partial_of(out)
            with hold(partial):
                write_splits(task, stamp, hashes, out, partial, progress)
            shutil.rmtree(partial)
    return {split: read_manifest(out / split) for split in task.splits if (out / split).exists()}


def stamp_of(request: TaskRequest, task: Task, hashes: Mapping[str, str]) -> str:
    """Return the identity of a request: options, content of files, tokenizer."""
    facts = asdict(request) | {
        "inputs": [(name, hashes[path]) for path, name in task.sources],
        "tests": [] if request.name == "labelled" else request.tests,  # otherwise among the sources
        "classes": sorted(request.classes),
        "tokenizer": load_tokenizer(task.tokenizer).fingerprint if task.tokenizer else "",
    }
    if task.tokenizer and (end := load_tokenizer(task.tokenizer).end).is_given:
        facts["eos_id"] = end.eos_id
    del facts["exclude"]  # It only decides which files exist.
    if facts["quoting"] in (None, "auto"):
        tsv = any(plain_suffix(Path(path)) == ".tsv" for path, _ in task.sources)
        # Files of trees or formulas are read line by line.
        facts["quoting"] = "csv" if tsv and request.name == "labelled" else None
    for younger in YOUNGER:
        if not facts[younger]:
            del facts[younger]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def is_made(path: Path, stamp: str) -> bool:
    """Return True if a split exists; raise an error instead of replacing another one."""
    if not path.exists():
        return False
    manifest = read_manifest(path)
    if manifest.preparation != stamp:
        raise DataError(
            f"{path}: exists and was prepared with other options or of other files; delete it, or "
            "choose another --out"
        )
    refuse_damage(path, manifest)
    return True


# -------------------------------------------------------------------------------------- writing


class SplitWriter:
    """The writer of one split's shards, labels and counts."""

    def __init__(self, folder: Path, task: Task, tokenizer: Tokenizer) -> None:
        self.folder, self.task, self.tokenizer = folder, task, tokenizer
        self.dtype = np.dtype(tokenizer.dtype)
        self.writer = open_writer(folder, self.dtype.name)
        self.rest: list[NDArray[Any]] = []
        self.held = self.num_samples = self.num_bytes = self.longest = 0
        self.lengths = array("q")
        self.of_classes = np.zeros(len(task.classes), np.int64)
        self.label_dtype = np.dtype(np.int8 if task.kind == "token" else np.int32)
        self.labels = open(folder / LABELS, "wb")  # noqa: SIM115 (closed by finish)
        self.labels.write(bytes(HEADER))

    def add(self, sample: Sample) -> None:
        """Add one sample."""
        end = np.array([self.tokenizer.eos_id], self.dtype)
        for text in sample.texts:
            ids = self.tokenizer.encode_array(text).astype(self.dtype)
            if not ids.size:
                raise DataError(
                    f"{self.folder.name}: the text {text[:40]!r} of a sample has no token; remove "
                    "the sample"
                )
            self.rest += [ids, end]
            self.held += ids.size + 1
            self.lengths.append(ids.size + 1)
            self.longest = max(self.longest, ids.size)
            self.num_bytes += len(text.encode())
        if isinstance(sample.label, np.ndarray):
            self.labels.write(np.append(sample.label, np.int8(-1)).tobytes())
            counted = sample.label[sample.label >= 0]
            self.of_classes += np.bincount(counted, minlength=self.of_classes.size)
        else:
            self.labels.write(np.int32(sample.label).tobytes())
            self.of_classes[sample.label] += 1
        self.num_samples += 1
        if self.held >= CHUNK_TOKENS:
            self.flush()

    def flush(self, fill: bool = False) -> None:
        """Write whole chunks, and with `fill` also the last one, padded."""
        tokens = np.concatenate([*self.rest, np.empty(0, self.dtype)])
        if fill and tokens.size % CHUNK_TOKENS:
            missing = -tokens.size % CHUNK_TOKENS
            padding = np.full(missing, self.tokenizer.eos_id, self.dtype)
            tokens = np.concatenate([tokens, padding])
        whole = tokens.size // CHUNK_TOKENS * CHUNK_TOKENS
        for chunk in tokens[:whole].reshape(-1, CHUNK_TOKENS):
            self.writer.write({COLUMN: chunk})
        self.rest = [tokens[whole:]]
        self.held = tokens.size - whole

    def finish(self, tokenizer_file: str, shared: Mapping[str, Any]) -> None:
        """Finish the split.

        Raises:
            DataError: the split has no sample.
        """
        if not self.num_samples:
            raise DataError(
                f"{self.folder.name}: would have no sample; use more samples, or other splits"
            )
        self.flush(fill=True)
        lengths = np.frombuffer(self.lengths, np.int64)
        shape = (int(lengths.sum()),) if self.task.kind == "token" else (self.num_samples,)
        self.labels.seek(0)
        described = {"descr": self.label_dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.labels, described)
        assert self.labels.tell() == HEADER
        self.labels.close()
        task = {
            "name": self.task.name,
            "kind": self.task.kind,
            "classes": list(self.task.classes),
            "num_samples": self.num_samples,
            "longest": self.longest,
            "of_classes": self.of_classes.tolist(),
        }
        if self.task.ahead:
            task["ahead"] = True
        values = {**shared, "num_bytes": self.num_bytes, "task": task}
        finish_split(self.writer, self.folder, tokenizer_file, lengths, values)


def write_splits(
    task: Task,
    stamp: str,
    hashes: Mapping[str, str],
    out: Path,
    partial: Path,
    progress: ProgressReport | None,
) -> None:
    """Write all splits aside, then rename them, train last: if it exists, all exist. `hashes` are
    those of the sources."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    tokenizer_file = write_tokenizer(task, partial)
    tokenizer = load_tokenizer(tokenizer_file)
    writers = {}
    with report_phase(progress, task.name, task.total, "samples") as advance:
        writers = {s: SplitWriter(partial / s, task, tokenizer) for s in task.splits}
        for number, sample in enumerate(task.samples(), 1):
            writers[sample.split].add(sample)
            if number % 256 == 0:
                advance(256)
    shared = {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": np.dtype(tokenizer.dtype).name,
        "duplicates_removed": task.counts.get("duplicates", 0),
        "documents_skipped": 0,
        "preparation": stamp,
        "sources": [{"name": Path(p).name, "xxh64": hashes[p]} for p, _ in task.sources],
    }
    for writer in writers.values():
        writer.finish(tokenizer_file, shared)
        out.mkdir(parents=True, exist_ok=True)
    if tokenizer_file != BYTES:
        for copy in (Path(tokenizer_file), partial / CONFIG_FILE):
            if copy.exists():
                with open_replacement(out / copy.name, shared=True) as file:
                    file.write(copy.read_bytes())
    for split in task.splits:
        if not is_made(out / split, stamp):
            publish(partial / split, out / split)
    sync(out)


def write_tokenizer(task: Task, partial: Path) -> str:
    """Return the path of the tokenizer's copy among the unfinished work, or `bytes`."""
    if task.words:
        name, files = WORDS_FILE, {WORDS_FILE: WordTokenizer.describe(task.words)}
    elif task.tokenizer == BYTES:
        return BYTES
    else:
        name = f"tokenizer{Path(task.tokenizer).suffix}"
        files = {name: Path(task.tokenizer).read_bytes()}
        files |= describe_end(load_tokenizer(task.tokenizer))
    for file_name, content in files.items():
        with open_replacement(partial / file_name, shared=True) as file:
            file.write(content)
    return str(partial / name)


def train_last(splits: Sequence[str]) -> list[str]:
    """Return the splits in order, each once, train last."""
    unique = list(dict.fromkeys(splits))
    return [s for s in unique if s != "train"] + [s for s in unique if s == "train"]


def count_of(option: str, value: int | None, default: int) -> int:
    """Return a number of samples.

    Raises:
        DataError: the number is negative.
    """
    if value is not None and value < 0:
        raise DataError(f"--{option} {value} must be at least 0")
    return default if value is None else value


# -------------------------------------------------------------------------------------- ListOps


def build_list_ops(request: TaskRequest) -> Task:
    """Build trees of a variant (default d20) for train and val, others for tests.

    All trees are distinct. Those of train, val and tests of the same distribution are one set,
    distributed at random.
    """
    limits = ("max_depth", "max_args", "min_length", "max_length")
    common: dict[str, Any] = {"name": "listops", "kind": "sequence", "classes": list_ops.DIGITS,
              "words": list_ops.WORDS}  # fmt: skip
    if request.inputs:
        request.refuse_others()
        paths = [Path(str(path)) for path in find_sources(request.inputs)]
        return Task(
            splits=names_of(paths),
            total=check_list_ops(paths),
            samples=lambda: _list_ops_of(paths),
            sources=[(str(path), path.name) for path in paths],
            **common,
        )
    request.refuse_others("train", "val", "tests", "test_count", "variant", *limits)
    trees = list_ops.with_limits(
        list_ops.parse_variant(request.variant or "d20"),
        **{name: getattr(request, name) for name in limits},
    )
    each = count_of("test-count", request.test_count, 2000)
    wanted = {
        "train": (trees, count_of("train", request.train, 90_000)),
        "val": (trees, count_of("val", request.val, 1000)),
        **{f"test_{name}": (list_ops.parse_variant(name), each) for name in request.tests},
    }
    wanted = {split: (kind, n) for split, (kind, n) in wanted.items() if n}
    groups: dict[list_ops.Trees, dict[str, int]] = {}
    for split, (kind, n) in wanted.items():
        groups.setdefault(kind, {})[split] = n

    def samples() -> Iterator[Sample]:
        seen: set[bytes] = set()
        for kind, counts in groups.items():
            rng = random.Random(f"listops {request.seed} {kind}")
            deal = dealt(counts, request.seed)
            drawn = list_ops.draw_distinct(rng, kind, seen, ", ".join(counts))
            for split, (tokens, answer) in zip(deal, drawn, strict=False):
                yield Sample(split, (" ".join(tokens),), answer)

    total = sum(n for _, n in wanted.values())
    return Task(splits=train_last(list(wanted)), total=total, samples=samples, **common)


def dealt(counts: Mapping[str, int], seed: int) -> Iterator[str]:
    """Yield each split as often as its count says, shuffled."""
    names = list(counts)
    cards = np.repeat(np.arange(len(names), dtype=np.uint16), list(counts.values()))
    np.random.Generator(np.random.PCG64([seed, len(cards)])).shuffle(cards)
    for card in cards:
        yield names[card]


def check_list_ops(paths: Sequence[Path]) -> int:
    """Return how many samples some files have.

    Raises:
        DataError: the files have mistakes.
    """
    mistakes, count = Mistakes(), 0
    for path in paths:
        for tokens, _ in read_list_ops(path, mistakes):
            count += 1
            if unknown := [token for token in tokens if token not in list_ops.WORDS]:
                mistakes.add(
                    f"{path}: tree {' '.join(tokens)[:40]!r} has {unknown[0]!r}, which is not one "
                    f"of ListOps' {len(list_ops.WORDS)} symbols; remove the line"
                )
    mistakes.raise_if_any()
    return count


def _list_ops_of(paths: Sequence[Path]) -> Iterator[Sample]:
    """Yield the samples of files, in their order."""
    for path in paths:
        for tokens, answer in read_list_ops(path, Mistakes()):
            yield Sample(name_of(path), (" ".join(tokens),), answer)


def name_of(path: Path) -> str:
    """Return the name of a file without its suffixes: aan.eval of aan.eval.tsv.xz."""
    return uncompressed(path).stem


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the splits that files become.

    Raises:
        DataError: two files have the same name.
    """
    names = [name_of(path) for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two input files are called {twice[0]}; rename one of them")
    return train_last(names)


# ---------------------------------------------------------------------------------------- logic


def build_logic(request: TaskRequest) -> Task:
    """Build pairs of formulas by their most operators of a side: train and val up to a number, and
    a test for each number.

    Drawn pairs: exact duplicates are removed; the first 85 % of each bin are for training, the rest
    for tests; every tenth of train goes to val. Files: bins beyond `train_operators` are tests.
    """
    most = 6 if request.train_operators is None else request.train_operators
    if not 0 <= most <= logic.MOST_OPERATORS:
        raise DataError(
            f"--train-operators {most} must be between 0 and {logic.MOST_OPERATORS}, the last bin"
        )
    common: dict[str, Any] = {
        "name": "logic",
        "kind": "pair",
        "classes": logic.RELATIONS,
        "words": logic.WORDS,
    }
    bins: dict[int, list[tuple[str, str, str]]] = {}
    counts: dict[str, int] = {}
    paths = [Path(str(path)) for path in find_sources(request.inputs)] if request.inputs else []
    if request.inputs:
        request.refuse_others("train_operators")
        mistakes = Mistakes()
        for path in paths:
            for row in read_logic(path, mistakes):
                number = max(map(logic.count_operators, row[1:]))
                bins.setdefault(min(number, logic.MOST_OPERATORS), []).append(row)
        mistakes.raise_if_any()
    else:
        request.refuse_others("train", "train_operators")
        drawn = count_of("train", request.train, 500_000)
        rng = random.Random(f"logic {request.seed}")
        seen: set[tuple[str, str, str]] = set()
        made = 0
        while made < drawn:
            pair = logic.draw_pair(rng)
            if pair is None:
                continue
            made += 1
            row = pair[:3]
            if row in seen:
                continue
            seen.add(row)
            bins.setdefault(min(pair[3], logic.MOST_OPERATORS), []).append(row)
        counts["duplicates"] = made - len(seen)
    parts: dict[str, list[tuple[str, str, str]]] = {"val": [], "train": []}
    for number in sorted(bins):
        rows = bins[number]
        first = len(rows) if request.inputs else int(0.85 * len(rows))
        own = rows[:first] if number <= most else []
        parts["val"] += own[9::10]
        parts["train"] += [row for i, row in enumerate(own) if i % 10 != 9]
        parts[f"test_{number:02d}"] = rows if request.inputs and not own else rows[first:]
    parts = {split: rows for split, rows in parts.items() if rows}
    index = {relation: i for i, relation in enumerate(logic.RELATIONS)}

    def samples() -> Iterator[Sample]:
        for split, rows in parts.items():
            for relation, left, right in rows:
                yield Sample(split, (left, right), index[relation])

    return Task(
        splits=train_last(list(parts)),
        total=sum(map(len, parts.values())),
        samples=samples,
        sources=[(str(path), path.name) for path in paths],
        counts=counts,
        **common,
    )


# ------------------------------------------------------------------------------------ flip-flop


def build_flip_flop(request: TaskRequest) -> Task:
    """Build strings for train and val, and tests named by p_i, or p_i and a length: 0.98,
    0.98x1024."""
    request.refuse_others("train", "val", "tests", "test_count", "length", "p_ignore")
    if request.inputs:
        raise ConfigError("flip_flop: is drawn, not read from files; omit the inputs")
    length = 512 if request.length is None else request.length
    p_ignore = 0.8 if request.p_ignore is None else request.p_ignore
    each = count_of("test-count", request.test_count, 10_000)
    wanted: dict[str, tuple[float, int, int]] = {
        "train": (p_ignore, length, count_of("train", request.train, 160_000)),
        "val": (p_ignore, length, count_of("val", request.val, 1000)),
    }
    for name in request.tests:
        p, _, size = name.partition("x")
        try:
            wanted[f"test_{name}"] = float(p), int(size) if size else length, each
        except ValueError:
            raise DataError(
                f"--test {name}: must be a probability, or one and a length, such as 0.98x1024"
            ) from None
    wanted = {split: values for split, values in wanted.items() if values[2]}

    def samples() -> Iterator[Sample]:
        seen: set[bytes] = set()
        for i, (split, (p, size, count)) in enumerate(wanted.items()):
            rng = np.random.Generator(np.random.PCG64([request.seed, i]))
            drawn = flip_flop.draw_distinct(rng, p, size, seen)
            for _, (string, targets) in zip(range(count), drawn, strict=False):
                yield Sample(split, (spell(string),), targets)

    # Report impossible draws before anything is written.
    for share, most, _ in wanted.values():
        next(flip_flop.draw_distinct(np.random.default_rng(0), share, most, set()))
    return Task(
        name="flip_flop",
        kind="token",
        classes=("0", "1"),
        ahead=True,
        words=flip_flop.WORDS,
        splits=train_last(list(wanted)),
        total=sum(count for _, _, count in wanted.values()),
        samples=samples,
    )


def spell(string: NDArray[np.int8]) -> str:
    """Spell a string of `flip_flop.draw_strings` as words."""
    words = string.astype(np.int64)
    words[1::2] += len(flip_flop.WORDS) - 2
    return " ".join(np.array(flip_flop.WORDS)[words])


# ----------------------------------------------------------------------------------- pathfinder


def build_pathfinder(request: TaskRequest) -> Task:
    """Build pictures of contours as sequences of pixels: train, val and test of one length of
    contours (default 14), and tests of other lengths.

    By default there are 200,000 pictures, divided 80/10/10 as in Long Range Arena. Each one is a
    function of (seed, split, number); half of a split is connected.
    """
    request.refuse_others("train", "val", "tests", "test_count", "contour_length")
    if request.inputs:
        raise ConfigError("pathfinder: is drawn, not read from files; omit the inputs")
    length = 14 if request.contour_length is None else request.contour_length
    each = count_of("test-count", request.test_count, 20_000)
    wanted = {
        "train": (length, count_of("train", request.train, 160_000)),
        "val": (length, count_of("val", request.val, 20_000)),
        "test": (length, each),
    }
    for name in request.tests:
        if not name.isascii() or not name.isdigit():
            raise DataError(f"--test {name}: must be a number of dashes, such as 9")
        wanted[f"test_{int(name)}"] = int(name), each
    for size in {length, *(size for size, _ in wanted.values())}:
        if not pathfinder.SHORTEST <= size <= pathfinder.LONGEST:
            raise DataError(
                f"contours of {size} dashes: must have {pathfinder.SHORTEST} to "
                f"{pathfinder.LONGEST}; change --contour-length or --test"
            )
    wanted = {split: values for split, values in wanted.items() if values[1]}

    def samples() -> Iterator[Sample]:
        jobs = []
        for split, (size, count) in wanted.items():
            name = f"pathfinder {request.seed} {split} {size}"
            labels = [number % 2 for number in range(count)]
            random.Random(name).shuffle(labels)
            jobs += [Drawing(split, label, size, f"{name} {n}") for n, label in enumerate(labels)]
        for job, text in zip(jobs, draw_pictures(jobs), strict=True):
            yield Sample(job.split, (text,), job.label)

    return Task(
        name="pathfinder",
        kind="sequence",
        classes=pathfinder.CLASSES,
        words=grey.WORDS,
        splits=train_last(list(wanted)),
        total=sum(count for _, count in wanted.values()),
        samples=samples,
    )


@dataclass(frozen=True)
class Drawing:
    """Everything that determines a picture of Pathfinder."""

    split: str
    label: int
    length: int
    seed: str

    def draw(self) -> str:
        """Return the picture as a text of grey values."""
        rng = random.Random(self.seed)
        return grey.spell(pathfinder.draw_picture(rng, bool(self.label), self.length))


def draw_pictures(drawings: Sequence[Drawing]) -> Iterator[str]:
    """Yield pictures in their order, drawn by processes on all cores if there are many."""
    if len(drawings) < MANY_PICTURES:
        yield from map(Drawing.draw, drawings)
        return
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
    )
    try:
        yield from pool.map(Drawing.draw, drawings, chunksize=64)
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------- labelled


def build_labelled(request: TaskRequest) -> Task:
    """Build labelled texts of files: train, a share of it as val, tests by the names of their
    files."""
    request.refuse_others(
        "text_keys", "label_key", "classes", "columns", "tokenizer", "val_fraction", "tests",
        "quoting", "errors", "exclude",
    )  # fmt: skip
    if not request.inputs:
        raise ConfigError(
            "labelled: needs inputs; name files (jsonl, csv, tsv), or a folder of classes"
        )
    keys, label_key = request.text_keys or ("text",), request.label_key or "label"
    if len(keys) > 2:
        raise ConfigError(
            f"--text-key {', '.join(keys)}: must be one key, or two for pairs; correct it"
        )
    share = request.val_fraction or 0.0
    if not 0 <= share < 1:
        raise DataError(f"--val-fraction {share} must be at least 0 and below 1")
    tokenizer = request.tokenizer or BYTES
    reading = Reading(
        errors=request.errors or "fail", exclude=request.exclude, quoting=request.quoting or "auto"
    )
    labelled = LabelledInputs(keys, label_key, reading, request.classes, request.columns)
    files = [labelled.find(entry) for entry in request.inputs]

    def read(entries: Iterable[Found], mistakes: Mistakes, notes: Notes) -> Iterator[Row]:
        for found in entries:
            yield from labelled.read(found, mistakes, notes)

    mistakes, notes = Mistakes(), Notes()
    classes, total = collect(read(files, mistakes, notes), mistakes, request.classes)
    index = {label: i for i, label in enumerate(classes)}
    for entry in request.tests:
        if not re.fullmatch(r"[\w.+-]+", name_of(Path(entry))):
            raise DataError(
                f"--test {entry}: its corpus is named after a file; name a file or folder"
            )
    names_of([Path(entry) for entry in request.tests])
    of_tests = {entry: labelled.find(entry) for entry in request.tests}
    tests = {f"test_{name_of(Path(entry))}": entry for entry in request.tests}
    for entry in tests.values():
        for place, _, label in read([of_tests[entry]], mistakes, notes):
            total += 1
            if label not in index:
                mistakes.add(
                    f"{place} has label {label!r}, which no training sample has (they have "
                    f"{', '.join(classes[:12])}); correct it, or remove the row"
                )
    mistakes.raise_if_any()
    notes.tell()
    words: list[str] = []
    if tokenizer == "words":
        met = {w for _, texts, _ in read(files, mistakes, Notes()) for t in texts
               for w in t.split()}  # fmt: skip
        words = sorted(met)

    def samples() -> Iterator[Sample]:
        bound = int(share * 2**64)
        for _, texts, label in read(files, mistakes, Notes()):
            key = xxhash.xxh3_64_intdigest("\0".join((str(request.seed), *texts)).encode())
            yield Sample("val" if key < bound else "train", texts, index[label])
        for split, entry in tests.items():
            for _, texts, label in read([of_tests[entry]], mistakes, Notes()):
                yield Sample(split, texts, index[label])

    sources = [s for e, f in zip(request.inputs, files, strict=True) for s in below(e, f)]
    for split, entry in tests.items():
        sources += [(p, f"{split}: {name}") for p, name in below(entry, of_tests[entry])]
    return Task(
        name="labelled",
        kind="pair" if len(keys) == 2 else "sequence",
        classes=classes,
        splits=train_last([*(["val"] if share else []), *tests, "train"]),
        total=total,
        samples=samples,
        words=words,
        tokenizer="" if words else tokenizer,
        sources=sources,
    )


def below(entry: str, found: Found) -> list[tuple[str, str]]:
    """Return (path, name below the input) of the files of an input."""
    folder = Path(entry)
    if not folder.is_dir():
        return [(str(path), path.name) for path, _ in found]
    return [(str(path), path.relative_to(folder).as_posix()) for path, _ in found]


BUILDERS: dict[str, Callable[[TaskRequest], Task]] = {
    "listops": build_list_ops,
    "logic": build_logic,
    "flip_flop": build_flip_flop,
    "pathfinder": build_pathfinder,
    "labelled": build_labelled,
}
