"""Rows of tables to documents: jsonl, csv, tsv, parquet, Arrow files of `datasets`, MDS shards.

A row is a mapping of fields; its text is one field of it, or a template filled with several.
"""

from __future__ import annotations

import csv
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megarecur.errors import DataError

BINARY_SUFFIXES = (".parquet", ".arrow")
MDS_SUFFIX = ".mds"
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROWS_AT_ONCE = 1024


@cache
def fields_of(template: str) -> tuple[str, ...]:
    """The fields that a template names, such as `meta.title` in "{meta.title}".

    Raises:
        DataError: braces that do not pair, fields without a name, formats or conversions.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"--template {template!r}: {error}; write {{{{ and }}}} for braces themselves"
        ) from None
    fields = [(name, form, how) for _, name, form, how in parts if name is not None]
    wrong = [name for name, form, how in fields if not name or form or how]
    if wrong or not fields:
        raise DataError(
            f"--template {template!r}: must name fields, as in {{title}} or {{meta.title}}, and "
            "nothing but names in braces"
        )
    return tuple(name for name, _, _ in fields)


def look_up(row: Mapping[str, Any], field: str) -> Any:
    """A field, by its name or by the path `outer.inner`; None if there is none."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def fill(template: str, row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The template with the row's values in it, and the fields that it lacks."""
    values = {field: look_up(row, field) for field in fields_of(template)}
    missing = [field for field, value in values.items() if value is None]
    parts = string.Formatter().parse(template)
    text = "".join(
        literal + ("" if name is None else str(values[name])) for literal, name, *_ in parts
    )
    return text, missing


def read_csv(
    path: Path,
    stream: BinaryIO,
    delimiter: str,
    decode: Callable[[bytes, str, int], bytes | None],
    columns: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, str] | None]]:
    """(place, row) of a csv or tsv file; None for a row that cannot be decoded.

    `decode(content, place, offset)` checks the bytes of a line, or gives None to skip its row.
    `columns` names those of a file without a header.
    """
    skipped, offset = False, 0

    def lines() -> Iterator[str]:
        nonlocal skipped, offset
        for number, line in enumerate(stream, 1):
            begin, offset = offset, offset + len(line)
            checked = decode(line, f"{path}: line {number}", begin)
            skipped |= checked is None
            yield (checked or b"\n").decode("utf-8-sig" if number == 1 else "utf-8")

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header = list(columns)
    refuse_twice(header, f"{path}: --column")
    try:
        for cells in reader:
            place = f"{path}: line {reader.line_num}"
            bad, skipped = skipped, False
            if not header:
                header = cells
                refuse_twice(header, place)
            elif bad:
                yield place, None
            elif cells and len(cells) != len(header):
                given = "give a --column for each cell, and " if columns else ""
                raise DataError(
                    f"{place} has {len(cells)} cells, but there are names for {len(header)}: "
                    f"{header[:8]}; {given}quote cells that hold {delimiter!r} or line ends"
                )
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not csv ({error})") from None


def refuse_twice(header: Sequence[str], place: str) -> None:
    """Refuse columns of one name."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{place} names {', '.join(twice)} twice; give each column its own name")


def read_arrow(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a parquet or Arrow file; only the columns that hold the fields are read.

    Raises:
        DataError: it is not what its name says, is damaged, or lacks a column.
    """
    import pyarrow

    number = 0
    try:
        for batch in _batches(path, fields):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is no {path.suffix[1:]} file, or damaged ({reason})") from None


def _batches(path: Path, fields: Sequence[str]) -> Iterator[Any]:
    """Record batches with the columns of the fields."""
    import pyarrow

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            columns = columns_of(path, fields, file.schema_arrow.names)
            yield from file.iter_batches(ROWS_AT_ONCE, columns=columns)
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches = iter(reader)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        columns = columns_of(path, fields, reader.schema.names)
        for batch in batches:
            yield batch.select(columns)


def is_mds(path: Path) -> bool:
    """Whether a name is that of an MDS shard, compressed (shard.00000.mds.zstd) or not."""
    return MDS_SUFFIX in path.suffixes[-2:]


def drop_copies(paths: Sequence[Path]) -> list[Path]:
    """The same without MDS's index, and without compressed shards that lie there unpacked too."""
    if not any(map(is_mds, paths)):
        return list(paths)
    plain = {path for path in paths if path.suffix == MDS_SUFFIX}
    return [p for p in paths if p.name != "index.json" and p.with_suffix("") not in plain]


def read_mds(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of an MDS shard, which the index.json beside or above it describes.

    Raises:
        DataError: there is no index, it does not list the shard, or the shard is damaged or lacks
            a column.
    """
    from megarecur.data.foreign import MEND, decode_shard

    folder = next((p for p in path.parents if (p / "index.json").is_file()), None)
    if folder is None:
        raise DataError(f"{path}: has no index.json beside it, without which it cannot be read")
    name = path.relative_to(folder).as_posix()
    entry = _mds_entries(folder, (folder / "index.json").stat().st_mtime_ns).get(name)
    if entry is None:
        raise DataError(f"{path}: is not listed in {folder / 'index.json'}; {MEND}")
    columns_of(path, fields, entry["column_names"])
    for number, row in enumerate(decode_shard(path, entry), 1):
        yield f"{path}: sample {number}", row


@lru_cache(4)
def _mds_entries(folder: Path, _changed: int) -> dict[str, dict[str, Any]]:
    """What an index.json says of each file."""
    from megarecur.data.foreign import read_index

    pairs = [(e[k], e) for e in read_index(folder) for k in ("raw_data", "zip_data") if e.get(k)]
    return {info["basename"]: entry for info, entry in pairs}


def columns_of(place: object, fields: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that hold fields, which may be paths into them.

    Raises:
        DataError: there are no such columns at this place.
    """
    found = {field: field if field in names else field.split(".")[0] for field in fields}
    missing = sorted({column for column in found.values() if column not in names})
    if missing:
        raise DataError(
            f"{place}: has no column {', '.join(missing)}; it has {', '.join(names)}: name the one "
            "that holds the text by --text-key, or several by --template"
        )
    return list(dict.fromkeys(found.values()))
