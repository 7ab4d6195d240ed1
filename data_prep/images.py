"""Make corpora of labelled pictures, `megarecur prep images`.

    data/cifar10/train/
      shard.00000.mds   mosaicml-streaming's shards of columns image (JPEG or PNG) and label (int32)
      labels.npy        int32, the class of each picture
      documents.npy     int64; in the counts that all corpora have, a picture is one token
      manifest.json     `task` names the classes, sizes, and mean and std of the training pictures

Finished pieces are kept in OUT.partial/, so that the same command resumes:

    read       pictures decoded once, to be sure of them, measured, and encoded anew where needed
    assemble   one stream of pictures per split, in the order of the inputs

The result is byte for byte the same with any number of workers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.config.run import NO_TOKENIZER
from megarecur.data.corpus import MANIFEST_VERSION, Manifest, read_manifest
from megarecur.data.fit import IMAGE
from megarecur.data.mapped_files import hash_file
from megarecur.data.pictures import COLUMNS
from megarecur.data.tokenizer import BYTES
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.image_encoding import AS_STORED, DamagedPicture, Encoding, encode_picture
from megarecur.data_prep.image_inputs import (
    UNNAMED,
    FieldNames,
    Inputs,
    Unit,
    find_inputs,
    read_unit,
)
from megarecur.data_prep.labelled import SHOWN, Mistakes
from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.data_prep.readers import Notes
from megarecur.data_prep.shards import (
    finish_split,
    hold,
    open_columns,
    partial_of,
    resume_or_restart,
)
from megarecur.data_prep.tasks import LABELS, is_made
from megarecur.data_prep.work_files import name_damage
from megarecur.data_prep.workers import Workers
from megarecur.errors import ConfigError, DataError
from megarecur.files import open_replacement, publish
from megarecur.reading import parse_json

DAMAGED = "damaged"
WORK_FORMAT = 1
"""Version of the files of unfinished work."""


@dataclass(frozen=True)
class ImageRequest:
    """The options of `megarecur prep images`.

    Raises:
        ConfigError: options that contradict each other or are out of range.
    """

    inputs: tuple[str, ...]
    """Files, globs, folders; see `image_inputs`."""
    val: tuple[str, ...] = ()
    """Inputs for OUT/val."""
    val_fraction: float = 0.0
    """Share of the pictures, chosen by their hash, that goes to OUT/val."""
    encoding: Encoding = AS_STORED
    keys: FieldNames = UNNAMED
    class_names: tuple[str, ...] = ()
    """Names of the classes 0, 1, 2 and so on; empty means as the inputs name them."""
    skip_damaged: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise ConfigError(
                f"--val-fraction {self.val_fraction:g} must be at least 0 and below 1; correct it"
            )
        if self.val and self.val_fraction:
            raise ConfigError("--val and --val-fraction both make DIR/val; omit one of them")
        if len(set(self.class_names)) < len(self.class_names):
            raise ConfigError("--class-names: a name stands twice; give each class its own name")


@dataclass(frozen=True)
class ImagePlan:
    """The inputs of a preparation, and its identity."""

    units: Sequence[tuple[str, Unit]]
    """Pieces of the inputs, with their splits."""
    classes: list[str] | None
    sources: Sequence[dict[str, Any]]
    """Name, split and hash of each file, or of all pictures of folders together."""
    splits: tuple[str, ...]
    """The corpora to make, train last: if it exists, everything exists."""
    stamp: str


@dataclass(frozen=True)
class ReadTask:
    """Read one unit."""

    unit: Unit
    encoding: Encoding
    skip_damaged: bool
    target: Path
    """Path without suffix; .pictures and .npz are appended."""


@dataclass(frozen=True)
class Index:
    """Facts about the pictures of one unit, in order."""

    target: Path
    split: str
    labels: list[str]
    sizes: NDArray[np.int64]
    """Bytes of each encoded picture."""
    hashes: NDArray[np.uint64]
    shapes_N2: NDArray[np.int64]
    """Height and width."""
    grey: NDArray[np.bool_]
    sums_N3: NDArray[np.int64]
    squares_N3: NDArray[np.int64]
    notes: dict[str, Any]
    mistakes: list[str]
    num_mistakes: int


def prepare_images(
    request: ImageRequest,
    out: str | Path,
    *,
    workers: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Make the corpora OUT/train and, with pictures for it, OUT/val.

    Args:
        out: folder of the result; OUT.partial holds unfinished work.
        workers: processes; 0 means one per core.

    Returns:
        The manifest of each split, by its name.

    Raises:
        ConfigError: options that contradict each other.
        DataError: no classes or one class only, damaged pictures, pictures without labels, classes
            of validation that train lacks, or OUT already holds something else.
    """
    out = Path(out)
    partial = partial_of(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another output folder")
    with explain_os_errors(partial, "finished work is kept"):
        plan = make_plan(request)
        made = [is_made(out / split, plan.stamp) for split in plan.splits]
        if all(made):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            number = workers or len(os.sched_getaffinity(0))
            try:
                with hold(partial), Workers(number, progress) as pool:
                    resume_or_restart(partial, plan.stamp)
                    _prepare(request, plan, out, partial, pool)
            finally:
                _remove_empty(partial)
    return {split: read_manifest(out / split) for split in reversed(plan.splits)}


def _prepare(
    request: ImageRequest, plan: ImagePlan, out: Path, partial: Path, pool: Workers
) -> None:
    """Read all units, then write the missing splits.

    Raises:
        DataError: mistakes in the inputs; the work that they spoil is deleted.
    """
    tasks = [
        ReadTask(unit, request.encoding, request.skip_damaged, partial / f"read-{i:06}")
        for i, (_, unit) in enumerate(plan.units)
    ]
    pool.run("read", read_pictures, tasks, ".npz", [task.unit.size for task in tasks])
    found = [load_index(task.target, s) for task, (s, _) in zip(tasks, plan.units, strict=True)]
    try:
        refuse_mistakes(found)
        indices = split_by_hash(found, request.val_fraction)
        classes = find_classes(indices, plan, request)
        facts = describe_pictures(indices, request.encoding)
    except DataError:
        shutil.rmtree(partial)
        raise
    notes = Notes()
    for index in found:
        notes.merge(index.notes)
    notes.tell()
    skipped = notes.get(DAMAGED, (0, ""))[0]
    for split in plan.splits:
        if not is_made(out / split, plan.stamp):
            own = [(index, keep) for index, keep in indices[split] if keep.any()]
            shared = {**_shared(plan, skipped), "task": facts}
            write_split(partial / split, own, classes, shared, pool.progress, request.class_names)
            out.mkdir(parents=True, exist_ok=True)
            publish(partial / split, out / split)
    shutil.rmtree(partial)


def _remove_empty(partial: Path) -> None:
    """Remove the folder of unfinished work if nothing was finished."""
    with suppress(OSError):
        if {entry.name for entry in partial.iterdir()} <= {"lock", "plan.json"}:
            shutil.rmtree(partial)


def make_plan(request: ImageRequest) -> ImagePlan:
    """Find and hash the inputs.

    Raises:
        DataError: an input matches no file or has no classes, or there are two validation splits.
    """
    found = find_inputs(request.inputs, "train", request.keys, request.exclude)
    if request.val:
        found.units.pop("val", None)
        beside = find_inputs(request.val, "val", request.keys, request.exclude)
        found.units["val"] = beside.units.get("val", [])
        found.classes = found.classes or beside.classes
    elif request.val_fraction and "val" in found.units:
        raise ConfigError(
            f"--val-fraction {request.val_fraction:g}: the inputs have a split for validation, "
            f"such as {found.units['val'][0].files[0]}; omit --val-fraction, or name the files of "
            "train alone"
        )
    if not found.units.get("train"):
        raise DataError(f"{', '.join(request.inputs)}: holds no pictures to train on; name others")
    sources = hash_sources(found)
    has_val = bool(found.units.get("val")) or request.val_fraction > 0.0
    facts = {
        "version": MANIFEST_VERSION,
        "kind": IMAGE,
        "work": WORK_FORMAT,
        "sources": sources,
        "classes": found.classes,
        **{key: value for key, value in asdict(request).items() if key in STAMPED},
    }
    stamp = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
    units = [(split, unit) for split in ("train", "val") for unit in found.units.get(split, ())]
    splits = ("val", "train") if has_val else ("train",)
    return ImagePlan(units, found.classes, sources, splits, stamp)


STAMPED = ("val_fraction", "encoding", "keys", "class_names", "skip_damaged")
"""Options that decide the result; the inputs count by their content."""


def hash_sources(found: Inputs) -> list[dict[str, Any]]:
    """Return the name and hash of each file, and one entry for the pictures of folders by split."""
    sources: list[dict[str, Any]] = []
    for split, units in sorted(found.units.items()):
        files = dict.fromkeys(file for unit in units for file in unit.files)
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip(files, pool.map(hash_file, files), strict=True))
        single: dict[Path, None] = {}
        digest, count = xxhash.xxh64(), 0
        for unit in units:
            if unit.kind != "pictures":
                single |= dict.fromkeys(unit.files)
                continue
            for file, label in zip(unit.files, unit.labels, strict=True):
                digest.update(f"{label}/{file.name} {hashes[file]}\n".encode(errors="replace"))
                count += 1
        sources += [{"split": split, "name": f.name, "xxh64": hashes[f]} for f in single]
        if count:
            sources.append({"split": split, "name": "folders of classes", "pictures": count,
                            "xxh64": digest.hexdigest()})  # fmt: skip
    return sources


# ------------------------------------------------------------------------------------------- read


def read_pictures(task: ReadTask) -> int:
    """Write the pictures of one unit side by side, and an index of them; returns 0.

    Raises:
        DataError: a file cannot be read.
    """
    labels: list[str] = []
    rows: list[tuple[int, int, int, bool]] = []
    hashes: list[int] = []
    sums: list[NDArray[np.int64]] = []
    squares: list[NDArray[np.int64]] = []
    notes, mistakes = Notes(), Mistakes()
    with open_replacement(task.target.with_suffix(".pictures"), shared=True) as file:
        for place, source, label in read_unit(task.unit, mistakes):
            try:
                picture = encode_picture(source, task.encoding)
            except DamagedPicture as error:
                if task.skip_damaged:
                    notes.add(DAMAGED, f"{place}: {error}")
                else:
                    mistakes.add(
                        f"{place}: cannot be decoded: {error}; replace or remove it, or leave such "
                        "pictures out by --skip-damaged"
                    )
                continue
            file.write(picture.content)
            labels.append(label)
            rows.append((len(picture.content), picture.height, picture.width, picture.grey))
            hashes.append(xxhash.xxh3_64_intdigest(picture.content))
            sums.append(picture.sums_3)
            squares.append(picture.squares_3)
    table_N4 = np.array(rows, np.int64).reshape(-1, 4)
    with open_replacement(task.target.with_suffix(".npz"), shared=True) as file:
        np.savez(
            file,
            labels=np.array(json.dumps(labels)),
            sizes=table_N4[:, 0],
            hashes=np.array(hashes, np.uint64),
            shapes=table_N4[:, 1:3],
            grey=table_N4[:, 3].astype(bool),
            sums=np.array(sums, np.int64).reshape(-1, 3),
            squares=np.array(squares, np.int64).reshape(-1, 3),
            notes=np.array(json.dumps(notes)),
            mistakes=np.array(json.dumps(mistakes.told)),
            num_mistakes=np.int64(mistakes.count),
        )
    return 0


def load_index(target: Path, split: str) -> Index:
    """Return the index that `read_pictures` wrote."""
    file = target.with_suffix(".npz")
    with name_damage(file), np.load(file, allow_pickle=False) as held:
        return Index(
            target=target,
            split=split,
            labels=parse_json(str(held["labels"])),
            sizes=held["sizes"],
            hashes=held["hashes"],
            shapes_N2=held["shapes"],
            grey=held["grey"],
            sums_N3=held["sums"],
            squares_N3=held["squares"],
            notes=parse_json(str(held["notes"])),
            mistakes=parse_json(str(held["mistakes"])),
            num_mistakes=int(held["num_mistakes"]),
        )


def refuse_mistakes(indices: Sequence[Index]) -> None:
    """Reject pictures that are damaged or lack a label, all together.

    Raises:
        DataError: with the first of them, and their number.
    """
    count = sum(index.num_mistakes for index in indices)
    if not count:
        return
    told = [text for index in indices for text in index.mistakes][:SHOWN]
    if count == 1:
        raise DataError(told[0])
    more = f"\n  and {count - len(told)} more" if count > len(told) else ""
    lines = "".join(f"\n  {line}" for line in told)
    raise DataError(f"{count} mistakes in the pictures{lines}{more}")


Kept = list[tuple[Index, NDArray[np.bool_]]]
"""Indices, and which of their pictures belong to a split."""


def split_by_hash(indices: Sequence[Index], val_fraction: float) -> dict[str, Kept]:
    """Return the pictures of each split; equal pictures are in the same split."""
    bound = np.uint64(int(val_fraction * 2**64))
    parts: dict[str, Kept] = {"train": [], "val": []}
    for index in indices:
        for_val = index.hashes < bound if val_fraction else np.full(len(index.hashes), False)
        if index.split == "val":
            for_val = ~for_val
        parts["val"].append((index, for_val))
        parts["train"].append((index, ~for_val))
    return parts


def labels_of(parts: Kept) -> Counter[str]:
    """Return the number of pictures of each label."""
    return Counter(
        label
        for index, keep in parts
        for label, kept in zip(index.labels, keep.tolist(), strict=True)
        if kept
    )


def find_classes(
    indices: Mapping[str, Kept], plan: ImagePlan, request: ImageRequest
) -> dict[str, int]:
    """Return the label's class for every label.

    Raises:
        DataError: no pictures, one class only, classes of validation that train lacks, or more
            classes than names.
    """
    counts = {split: labels_of(parts) for split, parts in indices.items()}
    train, val = counts["train"], counts["val"]
    where = ", ".join(request.inputs)
    if not train:
        raise DataError(f"{where}: no picture is left to train on; name others")
    if "val" in plan.splits and not val:
        raise DataError(f"{where}: no picture is left for validation; raise --val-fraction")
    if len(train) < 2:
        raise DataError(
            f"{where}: all {train.total():,} pictures are of one class ({next(iter(train))}); "
            "classification needs at least two"
        )
    named = plan.classes
    if request.class_names:
        named = [str(number) for number in range(len(request.class_names))]
    ordered = named if named is not None else sort_labels(train)
    if request.class_names and (unnamed := sorted({*train, *val} - set(ordered))):
        raise DataError(
            f"--class-names has {len(ordered)} names, for labels 0 to {len(ordered) - 1}, but "
            f"pictures have label {', '.join(unnamed[:8])}; name every class"
        )
    if lost := sorted(set(val) - set(train)):
        raise DataError(
            f"validation has {len(val)} classes and train {len(train)}: train has no picture of "
            f"{', '.join(lost[:8])}{' ...' if len(lost) > 8 else ''}; use pictures of the same "
            "classes"
        )
    return {label: number for number, label in enumerate(ordered)}


def sort_labels(labels: Counter[str]) -> list[str]:
    """Return labels in order; numbers are sorted as numbers."""
    ordered = sorted(labels)
    with suppress(ValueError):
        ordered.sort(key=int)
    return ordered


def describe_pictures(indices: Mapping[str, Kept], encoding: Encoding) -> dict[str, Any]:
    """Return channels, and mean and standard deviation of the training pictures, of values in
    [0, 1]."""
    grey = all(bool(index.grey.all()) for parts in indices.values() for index, _ in parts)
    channels = encoding.channels or (1 if grey else 3)
    pixels, sums, squares = 0, [0] * channels, [0] * channels
    for index, keep in indices["train"]:
        pixels += int(index.shapes_N2[keep].prod(axis=1).sum())
        for c in range(channels):
            sums[c] += int(index.sums_N3[keep, c].sum())
            squares[c] += int(index.squares_N3[keep, c].sum())
    # Integers of any size: the same with any cut into units.
    variances = [pixels * square - s * s for s, square in zip(sums, squares, strict=True)]
    return {
        "channels": channels,
        "mean": [s / pixels / 255 for s in sums],
        "std": [math.sqrt(v) / pixels / 255 for v in variances],
    }


# --------------------------------------------------------------------------------------- assemble


def _shared(plan: ImagePlan, skipped: int) -> dict[str, Any]:
    """Return the values that the manifests of both splits share."""
    return {
        "tokenizer": NO_TOKENIZER,
        "tokenizer_fingerprint": NO_TOKENIZER,
        "vocab_size": 0,
        "eos_id": 0,
        "dtype": "uint8",
        "duplicates_removed": 0,
        "documents_skipped": skipped,
        "preparation": plan.stamp,
        "sources": list(plan.sources),
    }


def write_split(
    folder: Path,
    parts: Kept,
    classes: Mapping[str, int],
    shared: Mapping[str, Any],
    progress: ProgressReport | None,
    names: Sequence[str] = (),
) -> None:
    """Write the shards, labels and manifest of one split into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = open_columns(folder, COLUMNS)
    labels: list[int] = []
    total = sum(int(index.sizes[keep].sum()) for index, keep in parts)
    with report_phase(progress, folder.name, total) as advance:
        for index, keep in parts:
            for content, label in stored_pictures(index, keep):
                labels.append(classes[label])
                writer.write({"image": content, "label": np.int32(classes[label])})
            advance(int(index.sizes[keep].sum()))
    np.save(folder / LABELS, np.array(labels, np.int32))
    shapes_N2 = np.concatenate([index.shapes_N2[keep] for index, keep in parts])
    smallest, largest = shapes_N2.min(axis=0).tolist(), shapes_N2.max(axis=0).tolist()
    height, width = (a if a == b else None for a, b in zip(smallest, largest, strict=True))
    task = {
        "name": "images",
        "kind": IMAGE,
        "classes": list(names or classes),
        "num_samples": len(labels),
        "longest": 1,
        "of_classes": np.bincount(labels, minlength=len(classes)).tolist(),
        "height": height,
        "width": width,
        "smallest": smallest,
        "largest": largest,
        **shared["task"],
    }
    values = {**shared, "num_bytes": total, "task": task}
    finish_split(writer, folder, BYTES, np.ones(len(labels), np.int64), values)


def stored_pictures(index: Index, keep: NDArray[np.bool_]) -> Iterator[tuple[bytes, str]]:
    """Yield (content, label) of some pictures of a unit."""
    with open(index.target.with_suffix(".pictures"), "rb") as file:
        for size, label, kept in zip(
            index.sizes.tolist(), index.labels, keep.tolist(), strict=True
        ):
            content = file.read(size)
            if kept:
                yield content, label


def describe_corpus(manifest: Manifest) -> str:
    """Return a line about a corpus of pictures."""
    task = manifest.task or {}
    most = max(task["of_classes"]) / task["num_samples"]
    skipped = f"; {manifest.documents_skipped:,} damaged skipped" * bool(manifest.documents_skipped)
    mean, std = (", ".join(f"{v:.4f}" for v in task[key]) for key in ("mean", "std"))
    return (
        f"{task['num_samples']:,} pictures, {len(task['classes'])} classes (the largest "
        f"{100 * most:.1f} %), {describe_sizes(task)}, {task['channels']} channel(s), mean {mean}, "
        f"std {std}{skipped}"
    )


def describe_sizes(task: Mapping[str, Any]) -> str:
    """Return the sizes of pictures in words."""
    small, large = (f"{h} x {w}" for h, w in (task["smallest"], task["largest"]))
    return f"{small} pixels" if small == large else f"{small} to {large} pixels (height x width)"
