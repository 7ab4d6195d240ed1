"""Find the files of labelled pictures, and read (place, picture, label) from them.

    folders of classes   CLASS/x.jpg, or train/CLASS/x.jpg beside val/ or test/
    tables               parquet and Arrow files of Hugging Face: bytes in a struct or a column
    IDX                  train-images-idx3-ubyte.gz beside train-labels-idx1-ubyte.gz (MNIST)
    npz                  arrays of pictures and labels
    tar                  WebDataset: x.jpg beside x.cls or x.json

A `Unit` is a piece of one of these that one task reads. Pictures of folders come in an order drawn
from their names, not class by class, so that any part of a corpus is a mixture.
"""

from __future__ import annotations

import gzip
import logging
import math
import posixpath
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data_prep.image_encoding import readable_suffixes
from megarecur.data_prep.labelled import Mistakes
from megarecur.data_prep.listing import EXCLUDED, Listing, list_folder
from megarecur.data_prep.readers import find_sources, refuse_empty
from megarecur.data_prep.tables import BINARY_SUFFIXES, TableShape, read_arrow, read_shape
from megarecur.errors import DataError
from megarecur.reading import MAX_BYTES, find_inside, parse_json

log = logging.getLogger(__name__)

Kind = Literal["pictures", "table", "idx", "npz", "tar"]
Row = tuple[str, bytes | Path | NDArray[Any], str]
"""Place, content or pixels, and label of a picture."""
IDX_NAME = re.compile(r"idx\d-ubyte(\.gz)?$")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLIT_WORDS = {
    "test": "test", "testing": "test", "t10k": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
TRAIN_FOLDERS, VAL_FOLDERS = (
    ("train", "training"),
    ("val", "valid", "validation", "test", "testing"),
)
IMAGE_KEYS, LABEL_KEYS = ("images", "image", "x", "data"), ("labels", "label", "y", "targets")
UNIT_BYTES = 1 << 24
MAX_GROWTH = 1100
"""Times that gz and zip may grow when unpacked: their method reaches 1,032."""
UNIT_FILES, UNIT_ROWS = 4096, 8192
BESIDE = "beside the folders of classes"


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields of tables, of npz files and of the json files of WebDataset."""

    image: str | None = None
    label: str | None = None


UNNAMED = FieldNames()


@dataclass(frozen=True)
class Unit:
    """Pictures that one task reads."""

    kind: Kind
    files: tuple[Path, ...]
    """Pictures, or the file, or the file of pictures and the file of labels."""
    labels: tuple[str, ...] = ()
    """Class of each picture, for folders."""
    begin: int = 0
    end: int = 0
    """Rows of an IDX or npz file; row groups of a table."""
    first_row: int = 0
    """Number of rows before the row groups."""
    keys: FieldNames = UNNAMED
    """Resolved names of fields."""
    names: tuple[str, ...] = ()
    """Names of the classes that labels count, as a table has them."""
    size: int = 0
    """Bytes, for the progress report."""


@dataclass
class Inputs:
    """The units of the inputs by split, and the classes if the inputs name them."""

    units: dict[str, list[Unit]] = field(default_factory=dict)
    classes: list[str] | None = None
    """Names in the order of a table's own description, or of a folder's."""


# ---------------------------------------------------------------------------------------- finding


def find_inputs(
    entries: Sequence[str], split: str, keys: FieldNames, exclude: Sequence[str]
) -> Inputs:
    """Return the units of inputs: files, globs and folders.

    Args:
        split: train, whose folders may hold other splits too, or val.
        exclude: patterns of files and folders to exclude.

    Raises:
        DataError: an input matches no file, or a folder has no classes.
    """
    found = Inputs()
    for entry in entries:
        refuse_empty(entry)
        folder = Path(entry)
        if folder.is_dir():
            _find_in_folder(folder, split, keys, exclude, found)
        else:
            files = [Path(str(source)) for source in find_sources([entry], exclude)]
            by_name = split == "train" and not folder.exists()  # a glob
            _add_containers(files, split, by_name, keys, found)
    return found


def _find_in_folder(
    folder: Path, split: str, keys: FieldNames, exclude: Sequence[str], found: Inputs
) -> None:
    listing = list_folder(folder, exclude)
    kinds = {path: kind_of(path) for path in listing.files}
    containers = [path for path, kind in kinds.items() if kind not in (None, "pictures")]
    if containers:
        listing.keep(lambda path: path in containers, "of other kinds")
        _warn(folder, listing)
        _add_containers(containers, split, split == "train", keys, found)
        return
    listing.keep(lambda path: kinds[path] == "pictures", "of other kinds")
    own = _subfolder(folder, TRAIN_FOLDERS)
    if own is None or split != "train":
        _add_pictures(folder, folder, listing, split, found)
        return
    other = _subfolder(folder, VAL_FOLDERS)
    taken = [part for part in (own, other) if part is not None]
    listing.keep(
        lambda path: any(path.is_relative_to(part) for part in taken), "of splits that are not read"
    )
    for part, of_split in ((own, "train"), (other, "val")):
        if part is not None:
            inside = Listing([path for path in listing.files if path.is_relative_to(part)])
            _add_pictures(folder, part, inside, of_split, found)
    listing.files.clear()
    _warn(folder, listing)


def _subfolder(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first sub-folder with one of the names."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _warn(folder: Path, listing: Listing) -> None:
    if told := listing.describe():
        log.warning("%s: %s", folder, told)


def _add_pictures(entry: Path, folder: Path, listing: Listing, split: str, found: Inputs) -> None:
    """Add a folder with a sub-folder for each class."""
    listing.keep(lambda path: path.parent != folder, BESIDE)
    if not listing.files:
        beside = len(listing.left_out.get(BESIDE, ()))
        held = f"{beside:,} picture(s) lie in it" if beside else "no picture lies below it"
        told = " (all are excluded)" if EXCLUDED in listing.left_out and not beside else ""
        raise DataError(
            f"{folder}: has no folders of classes, {held}{told}; put the pictures of each class "
            "into a folder with its name, or name files that hold labels"
        )
    _warn(entry, listing)
    labels = {path: path.relative_to(folder).parts[0] for path in listing.files}
    if split == "train":
        # The order of torchvision's ImageFolder, so that class indices agree with its models'.
        found.classes = sorted({*(found.classes or ()), *labels.values()})

    def key(path: Path) -> tuple[int, str]:
        name = path.relative_to(folder).as_posix()
        return xxhash.xxh64_intdigest(name.encode(errors="surrogateescape")), name

    sizes = [(path, path.stat().st_size) for path in sorted(listing.files, key=key)]
    group: list[Path] = []
    size = 0
    units = found.units.setdefault(split, [])
    for path, num_bytes in sizes:
        group.append(path)
        size += num_bytes
        if size >= UNIT_BYTES or len(group) == UNIT_FILES:
            units.append(_unit_of(group, labels, size))
            group, size = [], 0
    if group:
        units.append(_unit_of(group, labels, size))


def _unit_of(group: Sequence[Path], labels: dict[Path, str], size: int) -> Unit:
    return Unit("pictures", tuple(group), tuple(labels[path] for path in group), size=size)


def kind_of(path: Path) -> Kind | None:
    """Return how a file is read, by its name; None if it is no picture and holds none."""
    name = path.name.lower()
    if name.endswith(BINARY_SUFFIXES):
        return "table"
    if IDX_NAME.search(name):
        return "idx"
    if name.endswith(".npz"):
        return "npz"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return "pictures" if path.suffix.lower() in readable_suffixes() else None


def split_of_name(path: Path) -> str:
    """Return the split that a file's name or its folder's states: test-00000.parquet, t10k-images,
    validation/0.arrow. Without such a word it is train."""
    for name in (path.name, path.parent.name):
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
            if word == "train":
                return "train"
    return "train"


def _add_containers(
    files: Sequence[Path], split: str, by_name: bool, keys: FieldNames, found: Inputs
) -> None:
    """Add files that hold many pictures; with `by_name`, those of a validation split, or else of a
    test split, become validation."""
    splits = {path: split_of_name(path) if by_name else split for path in files}
    if by_name:
        held = "val" if "val" in splits.values() else "test"
        left = [path for path, name in splits.items() if name not in ("train", held)]
        if left:
            log.warning(
                "%s is not read: there is a validation split", ", ".join(map(str, left[:3]))
            )
        splits = {p: "train" if s == "train" else "val" for p, s in splits.items() if p not in left}
    for path, of_split in splits.items():
        kind = kind_of(path)
        units = found.units.setdefault(of_split, [])
        if kind == "table":
            units += _table_units(path, keys, found)
        elif kind == "idx":
            units += _idx_units(path)
        elif kind == "npz":
            units += _npz_units(path, keys, of_split, found)
        elif kind == "tar":
            units.append(Unit("tar", (path,), keys=keys, size=path.stat().st_size))
        elif kind == "pictures":
            raise DataError(
                f"{path}: is one picture, without a label; name the folder above the folders of "
                "classes"
            )
        else:
            raise DataError(
                f"{path}: labelled pictures are read from folders of classes, parquet, Arrow, IDX "
                "(...-idx3-ubyte), npz and tar files; convert it"
            )
    found.units = {name: units for name, units in found.units.items() if units}


# ---------------------------------------------------------------------------------------- reading


def read_unit(unit: Unit, mistakes: Mistakes) -> Iterator[Row]:
    """Yield the pictures of a unit, undecoded.

    Args:
        mistakes: receives pictures without a label, and labels without a picture.

    Raises:
        DataError: a file cannot be read or is damaged.
    """
    if unit.kind == "pictures":
        for path, label in zip(unit.files, unit.labels, strict=True):
            yield str(path), path, label
    elif unit.kind == "table":
        yield from _read_table(unit, mistakes)
    elif unit.kind == "tar":
        yield from _read_tar(unit, mistakes)
    else:
        path = unit.files[0]
        if unit.kind == "idx":
            images, labels = (read_idx(file) for file in unit.files)
        else:
            images, labels = _load_npz(path, unit.keys)
        for i in range(unit.begin, unit.end):
            yield f"{path}: picture {i + 1}", images[i], to_label(labels[i])


def to_label(value: Any) -> str:
    """Return a label as text; whole numbers without a fraction."""
    return str(value.item() if isinstance(value, np.generic) else value)


def _in_pieces(total: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, bytes) of pieces of rows of a file."""
    for begin in range(0, total, UNIT_ROWS):
        end = min(begin + UNIT_ROWS, total)
        yield begin, end, size * (end - begin) // max(total, 1)


# ----------------------------------------------------------------------------------------- tables


def _table_units(path: Path, keys: FieldNames, found: Inputs) -> list[Unit]:
    """Return the units of a parquet or Arrow file, some row groups each."""
    shape = read_shape(path)
    image, label = _image_column(path, shape, keys), _label_column(path, shape, keys)
    described = shape.features.get(label)
    names = described.get("names") if isinstance(described, dict) else None
    if names:
        if found.classes is not None and found.classes != names:
            raise DataError(
                f"{path}: names other classes ({', '.join(names[:8])}) than the files before it "
                f"({', '.join(found.classes[:8])}); prepare them apart"
            )
        found.classes = list(names)
    rows, size = max(sum(shape.groups), 1), path.stat().st_size
    units, begin, first_row, held = [], 0, 0, 0
    for number, (count, end) in enumerate(
        zip(shape.groups, accumulate(shape.groups), strict=True), 1
    ):
        held += count
        if size * held / rows >= UNIT_BYTES or number == len(shape.groups):
            units.append(
                Unit("table", (path,), begin=begin, end=number, first_row=first_row,
                     keys=FieldNames(image, label), names=tuple(names or ()),
                     size=size * held // rows)
            )  # fmt: skip
            begin, first_row, held = number, end, 0
    return units


def _image_column(path: Path, shape: TableShape, keys: FieldNames) -> str:
    """Return the column with the pictures.

    Raises:
        DataError: there is none, or several.
    """
    columns = [n for n, f in shape.features.items() if isinstance(f, dict) and _is_image(f)]
    if not columns:
        columns = [n for n, kind in shape.types.items() if "binary" in kind]
    return _pick(path, shape, keys.image, columns, "pictures (bytes)", "--image-key")


def _is_image(described: dict[str, Any]) -> bool:
    return described.get("_type") == "Image"


def _label_column(path: Path, shape: TableShape, keys: FieldNames) -> str:
    """Return the column with the labels."""
    described = shape.features.items()
    columns = [n for n, f in described if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    if not columns:
        columns = [name for name in (*LABEL_KEYS, "cls", "class") if name in shape.types][:1]
    return _pick(path, shape, keys.label, columns, "labels", "--label-key")


def _pick(
    path: Path, shape: TableShape, named: str | None, columns: list[str], what: str, option: str
) -> str:
    """Return the named column, or the only candidate."""
    held = ", ".join(shape.types)
    if named is not None:
        if named not in shape.types:
            raise DataError(f"{path}: has no column {named}; it has {held}; correct {option}")
        return named
    if len(columns) != 1:
        found = f"several columns of {what}: {', '.join(columns)}" if columns else (
            f"no column of {what} that it marks as such; it has {held}"
        )  # fmt: skip
        raise DataError(f"{path}: has {found}; name the one to read by {option}")
    return columns[0]


def _read_table(unit: Unit, mistakes: Mistakes) -> Iterator[Row]:
    path, image, label = unit.files[0], unit.keys.image, unit.keys.label
    assert image is not None and label is not None
    groups = range(unit.begin, unit.end)
    for place, row in read_arrow(path, (image, label), groups, unit.first_row):
        content, found = row[image], row[label]
        if isinstance(content, dict):
            try:
                content = content.get("bytes") or _find_beside(path, content.get("path"))
            except ValueError as error:
                mistakes.add(f"{place} names no picture beside the table ({error}); copy it there")
                continue
        if not isinstance(content, bytes | Path):
            mistakes.add(f"{place} has no picture in {image!r}; remove the row")
            continue
        text = found.decode(errors="replace") if isinstance(found, bytes) else to_label(found)
        if found is None or (unit.names and not 0 <= int(text) < len(unit.names)):
            mistakes.add(
                f"{place} has label {text if found is not None else 'null'} in {label!r}, which is "
                "no class; remove the row"
            )
            continue
        yield place, content, unit.names[int(text)] if unit.names else text


def _find_beside(table: Path, name: Any) -> Path | None:
    """Return the file that a table names instead of holding its content; None if it is missing.

    Raises:
        ValueError: the file is not below the table's folder.
    """
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not text:
        return None
    path = find_inside(table.parent, posixpath.normpath(text))
    return path if path.is_file() else None


# -------------------------------------------------------------------------------------- IDX and npz

IDX_TYPES = {
    0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8",
}  # fmt: skip


def read_idx(path: Path) -> NDArray[Any]:
    """Return the array of an IDX file, plain or gz (LeCun et al., MNIST: a magic number with the
    type and the number of dims, the dims as big-endian int32, the values).

    Raises:
        DataError: the file is damaged or of another format.
    """
    try:
        with open(path, "rb") as packed, gzip.open(packed) as unpacked:
            file = unpacked if packed.peek(2)[:2] == b"\x1f\x8b" else packed
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            if zeros or kind not in IDX_TYPES or not dims:
                raise ValueError("it does not begin as an IDX file")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape) * np.dtype(IDX_TYPES[kind]).itemsize
            if size > MAX_GROWTH * path.stat().st_size:
                raise ValueError(f"it claims {size} bytes, more than it can hold")
            content = file.read(size + 1)
            if len(content) != size:
                raise ValueError(f"it does not hold the {size} bytes that it claims")
        return np.frombuffer(content, IDX_TYPES[kind]).reshape(shape)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: is damaged or no IDX file ({error}); copy it again") from None


def _idx_units(path: Path) -> list[Unit]:
    """Return the units of an IDX file of pictures; none for one of labels, which is read with its
    pictures."""
    if "labels" in path.name:
        return []
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    variants = [beside, beside.with_suffix("") if beside.suffix == ".gz" else Path(f"{beside}.gz")]
    labels = next((file for file in variants if file.is_file() and file != path), None)
    if labels is None:
        raise DataError(f"{path}: has no labels beside it; put {beside.name} there")
    pixels_NHW, labels_N = read_idx(path), read_idx(labels)
    check_arrays(path, pixels_NHW, labels, labels_N)
    pieces = _in_pieces(len(pixels_NHW), path.stat().st_size)
    return [Unit("idx", (path, labels), begin=b, end=e, size=size) for b, e, size in pieces]


def check_arrays(path: Path, pixels: NDArray[Any], where: object, labels: NDArray[Any]) -> None:
    """Reject arrays that are not pictures and their labels.

    Raises:
        DataError: with shapes and types.
    """
    fits = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not fits:
        raise DataError(
            f"{path}: holds {pixels.dtype} {list(pixels.shape)}, but pictures are uint8 [number, "
            "height, width], or with 1, 3 or 4 channels last; convert it"
        )
    if labels.shape != pixels.shape[:1]:
        raise DataError(
            f"{path}: has {len(pixels):,} pictures, but {where} has labels of shape "
            f"{list(labels.shape)}; use files of the same pictures"
        )
    if labels.dtype.kind not in "iuUb":
        raise DataError(f"{where}: has labels of type {labels.dtype}; convert them to integers")


def _npz_units(path: Path, keys: FieldNames, split: str, found: Inputs) -> list[Unit]:
    """Return the units of an npz file, which may also hold a split for validation."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.files)
    except (OSError, ValueError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: is damaged or no npz file ({error}); create it again") from None
    units = _npz_split(path, _npz_keys(path, names, keys, split), split)
    if split == "train" and keys == UNNAMED:
        for other in ("val", "test"):
            if (pair := _pair_of(names, other)) is not None:
                found.units.setdefault("val", []).extend(_npz_split(path, pair, "val"))
                break
    return units


def _pair_of(names: Sequence[str], split: str) -> FieldNames | None:
    """Return the names of the arrays of a split, as Keras (x_train) or MedMNIST (train_images)
    write them."""
    for image, label in zip(IMAGE_KEYS, LABEL_KEYS, strict=True):
        for pair in ((f"{image}_{split}", f"{label}_{split}"), (f"{split}_{image}",
                     f"{split}_{label}")):  # fmt: skip
            if set(pair) <= set(names):
                return FieldNames(*pair)
    return None


def _npz_keys(path: Path, names: Sequence[str], keys: FieldNames, split: str) -> FieldNames:
    """Return the names of the arrays of pictures and labels.

    Raises:
        DataError: they are not found.
    """
    pair = _pair_of(names, split) or (_pair_of(names, "test") if split == "val" else None)
    image = keys.image or next((n for n in IMAGE_KEYS if n in names), pair.image if pair else None)
    label = keys.label or next((n for n in LABEL_KEYS if n in names), pair.label if pair else None)
    if image not in names or label not in names:
        raise DataError(
            f"{path}: has arrays {', '.join(names)}; name those of pictures and labels by "
            "--image-key and --label-key"
        )
    return FieldNames(image, label)


def _load_npz(path: Path, keys: FieldNames) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the pictures and labels of an npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for member in arrays.zip.infolist():
                if member.file_size > MAX_GROWTH * path.stat().st_size:
                    raise ValueError(f"it claims {member.file_size} bytes, more than it can hold")
            pixels, labels = arrays[keys.image], arrays[keys.label]
    except (OSError, ValueError, MemoryError, zlib.error, EOFError) as error:
        raise DataError(f"{path}: is damaged ({error}); create it again") from None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return pixels, labels


def _npz_split(path: Path, keys: FieldNames, split: str) -> list[Unit]:
    pixels, labels = _load_npz(path, keys)
    check_arrays(path, pixels, f"array {keys.label!r}", labels)
    pieces = _in_pieces(len(pixels), path.stat().st_size)
    return [Unit("npz", (path,), begin=b, end=e, keys=keys, size=size) for b, e, size in pieces]


# --------------------------------------------------------------------------------------- WebDataset


def _read_tar(unit: Unit, mistakes: Mistakes) -> Iterator[Row]:
    """Yield the pictures of a WebDataset shard: members of equal names up to the first dot are one
    sample, and lie side by side.

    Raises:
        DataError: the archive is damaged.
    """
    path, held = unit.files[0], ""
    sample: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != held:
                    yield from _sample(path, held, sample, unit.keys, mistakes)
                    held, sample = key, {}
                suffix = suffix.lower()
                sample[suffix] = b""
                if not _is_read(suffix):
                    continue
                if (size := sum(map(len, sample.values())) + member.size) > MAX_BYTES:
                    raise ValueError(f"{key!a:.80} claims {size} bytes")
                file = archive.extractfile(member)
                assert file is not None
                sample[suffix] = file.read()
            yield from _sample(path, held, sample, unit.keys, mistakes)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: is damaged or no tar file ({error}); copy it again") from None


def _is_read(suffix: str) -> bool:
    """Return True for members of a sample that hold its picture or its label."""
    return suffix in ("cls", "label", "json") or _is_picture(suffix)


def _is_picture(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in readable_suffixes()


def _sample(
    path: Path, key: str, sample: dict[str, bytes], keys: FieldNames, mistakes: Mistakes
) -> Iterator[Row]:
    """Yield the picture of one sample, if it is whole."""
    if not sample:
        return
    image = next(filter(_is_picture, sample), None)
    label = _label_of(sample, keys)
    place = f"{path}: {key}"
    if image is None:
        mistakes.add(f"{place} has no picture (found {', '.join(sample)}); remove the sample")
    elif label is None:
        mistakes.add(
            f"{place} has no label, a file {key}.cls or a field of {key}.json (--label-key); "
            "add it, or remove the sample"
        )
    else:
        yield f"{place}.{image}", sample[image], label


def _label_of(sample: dict[str, bytes], keys: FieldNames) -> str | None:
    """Return the label of a sample; None if it has none."""
    for suffix in ("cls", "label"):
        if suffix in sample and (text := sample[suffix].decode(errors="replace").strip()):
            return text
    try:
        values = parse_json(sample["json"])
    except (KeyError, ValueError):
        return None
    wanted = (keys.label,) if keys.label else (*LABEL_KEYS, "cls", "class", "class_id")
    found = (
        next((values[k] for k in wanted if k in values), None) if isinstance(values, dict) else None
    )
    return None if found is None or isinstance(found, dict | list | float) else str(found)
