"""Convert rows of tables to documents: jsonl, csv, tsv, parquet, Arrow files of `datasets`, MDS
shards.

A row is a mapping of fields; its text is one field of it, or a template filled with several.
"""

from __future__ import annotations

import csv
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megarecur.errors import DataError
from megarecur.reading import parse_json

BINARY_SUFFIXES = (".parquet", ".arrow")
MDS_SUFFIX = ".mds"
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROWS_AT_ONCE = 1024
MISSING = object()
"""Placeholder for a field that a row lacks."""


@cache
def fields_of(template: str) -> tuple[str, ...]:
    """Return the fields that a template names, such as `meta.title` in "{meta.title}".

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
    """Return a field by its name or by the path `outer.inner`; MISSING if there is none, None if it
    or an enclosing field is null."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if value is None:
            return None
        value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
    return value


def fill(template: str, values: Mapping[str, Any], place: str) -> str:
    """Fill a template with the values of its fields.

    Raises:
        DataError: a value is nested too deeply to be written.
    """
    parts = string.Formatter().parse(template)
    try:
        return "".join(
            literal + ("" if name is None else str(values[name])) for literal, name, *_ in parts
        )
    except RecursionError:
        raise DataError(
            f"{place}: a field of --template is nested too deeply; name one within it"
        ) from None


def read_csv(
    path: Path,
    stream: BinaryIO,
    delimiter: str,
    quoted: bool,
    check: Callable[[bytes, str, int], bytes | None],
    note_joined: Callable[[str], None],
    columns: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yield (place, row) of a csv or tsv file; None for a skipped row.

    Args:
        quoted: allow quoted cells, which may contain ends of lines; otherwise a quotation mark is
        an ordinary character.
        check: maps (content, place, offset) to the bytes of a line, or None to skip its row.
        note_joined: called with the place of a row that spans several lines.
        columns: names of the columns of a file without a header.

    Raises:
        DataError: a row has too many or too few cells, unpaired quotation marks, or a stray
        carriage return.
    """
    skipped, offset = False, 0

    def lines() -> Iterator[str]:
        nonlocal skipped, offset
        for number, line in enumerate(stream, 1):
            begin, offset = offset, offset + len(line)
            checked = check(line, f"{path}: line {number}", begin)
            if checked is None:  # Its quotation marks count, though its text does not.
                skipped, checked = True, line.decode(errors="replace").encode()
            yield checked.decode("utf-8-sig" if number == 1 else "utf-8")

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        lines(),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    header = list(columns)
    refuse_twice(header, f"{path}: --column")
    begin = 1
    try:
        for cells in reader:
            place = f"{path}: line {begin}"
            if reader.line_num > begin:
                place = f"{path}: lines {begin} to {reader.line_num}"
                note_joined(place)
            begin = reader.line_num + 1
            bad, skipped = skipped, False
            if not header:
                header = cells
                refuse_twice(header, place)
            elif bad:
                yield place, None
            elif cells and len(cells) != len(header):
                given = "name a --column for each cell, and " if columns else ""
                remedy = (
                    f"quote cells that hold {delimiter!r} or line ends, or use --quoting none if "
                    "quotation marks mean nothing"
                    if quoted
                    else "correct the line, or use --quoting quoted if cells that hold "
                    f"{delimiter!r} or line ends stand in quotation marks"
                )
                raise DataError(
                    f"{place} has {len(cells)} cells, but there are names for {len(header)}: "
                    f"{header[:8]}; {given}{remedy}"
                )
            elif cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(_explain_csv(path, begin, reader.line_num, str(error))) from None


def _explain_csv(path: Path, begin: int, end: int, reason: str) -> str:
    """Return what is wrong with the row that begins at a line, with a remedy."""
    if "new-line character" in reason:
        return (
            f"{path}: line {end} holds a carriage return that ends no line; convert the line ends, "
            "or remove it"
        )
    if "unexpected end of data" in reason:
        return (
            f"{path}: line {begin} is not csv: it opens a quotation mark that nothing closes up to "
            f"line {end}, the last; correct it, or use --quoting none if quotation marks mean "
            "nothing"
        )
    return (
        f"{path}: line {end} is not csv ({reason}, in the row that begins at line {begin}); "
        "correct "
        "it, or use --quoting none if quotation marks mean nothing"
    )


def refuse_twice(header: Sequence[str], place: str) -> None:
    """Reject duplicate column names; unnamed columns, as spreadsheets add, are not read."""
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{place} names {', '.join(twice)} twice; give each column its own name")


def read_arrow(
    path: Path, fields: Sequence[str], groups: range | None = None, first_row: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a parquet or Arrow file; only the columns of the fields are read.

    Args:
        groups: the row groups to read (`rows_of_groups`); None means all.
        first_row: number of rows before them, for the places.

    Raises:
        DataError: the file contradicts its name, is damaged, or lacks a column.
    """
    import pyarrow

    number = first_row
    try:
        for batch in _batches(path, fields, groups):
            names = batch.schema.names
            refuse_twice(names, f"{path}")
            columns = [_cells(batch.column(i), f"{path}: column {names[i]!r}, of a row from "
                              f"{number + 1} on") for i in range(len(names))]  # fmt: skip
            for cells in zip(*columns, strict=True):
                number += 1
                yield f"{path}: row {number}", dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:  # in a nested field
        raise DataError(
            f"{path}: a row from {number + 1} on holds bytes that are not UTF-8 ({error.reason}); "
            "write the file again"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise _explain_arrow(path, error) from None


def _cells(column: Any, place: str) -> list[Any]:
    """Return the values of a column.

    Raises:
        DataError: Python cannot represent a value, such as a date in the year 200,000 or an unknown
        time zone.
    """
    import pyarrow

    try:
        values: list[Any] = _as_bytes(column).to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowException):
        raise
    except (ValueError, OverflowError, LookupError) as error:
        raise DataError(
            f"{place} holds a {column.type} that cannot be converted to text ({error}); omit the "
            "field, or convert it to text"
        ) from None
    return values


def _as_bytes(column: Any) -> Any:
    """Return a column with checked offsets, text as bytes without a copy: a file may hold text that
    is not UTF-8, and the library reads wherever damaged offsets point.

    Raises:
        ArrowInvalid: offsets or indices point outside.
    """
    import pyarrow
    from pyarrow import compute, types

    kind = column.type
    if types.is_dictionary(kind):
        column.indices.validate(full=True)
        values = _as_bytes(column.dictionary)
        return pyarrow.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    if types.is_string(kind):
        column = column.view(pyarrow.binary())
    elif types.is_large_string(kind):
        column = column.view(pyarrow.large_binary())
    elif types.is_string_view(kind):
        column = column.view(pyarrow.binary_view())
    column.validate(full=True)
    return compute.run_end_decode(column) if types.is_run_end_encoded(kind) else column


def column_names(path: Path) -> list[str]:
    """Return the columns of a parquet or Arrow file, or of an MDS shard.

    Raises:
        DataError: the file is damaged, or the shard has no index.
    """
    if is_mds(path):
        return list(_mds_entry(path)["column_names"])
    import pyarrow

    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        with pyarrow.memory_map(str(path)) as source, _open_arrow(source) as reader:
            return list(reader.schema.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise _explain_arrow(path, error) from None


@dataclass(frozen=True)
class TableShape:
    """The columns and row groups of a parquet or Arrow file."""

    types: dict[str, str]
    """Type of each column, as pyarrow writes it."""
    features: dict[str, Any]
    """Description of each column by the library `datasets`; empty if it did not write the file."""
    groups: list[int]
    """Number of rows of each row group, or of each record batch."""


def read_shape(path: Path) -> TableShape:
    """Return the columns and row groups of a parquet or Arrow file.

    Raises:
        DataError: the file is damaged, or contradicts its name.
    """
    import pyarrow

    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                schema, held = file.schema_arrow, file.metadata
                groups = [held.row_group(i).num_rows for i in range(held.num_row_groups)]
        else:
            with pyarrow.memory_map(str(path)) as source, _open_arrow(source) as reader:
                schema, groups = reader.schema, [b.num_rows for b in _batches_of(reader)]
    except (pyarrow.ArrowException, OSError) as error:
        raise _explain_arrow(path, error) from None
    features: Any = {}
    with suppress(ValueError, KeyError, TypeError):
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    types = {field.name: str(field.type) for field in schema}
    return TableShape(types, features if isinstance(features, dict) else {}, groups)


def _batches_of(reader: Any) -> Iterator[Any]:
    """Yield the record batches of an open Arrow file or stream."""
    import pyarrow

    if isinstance(reader, pyarrow.RecordBatchFileReader):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _open_arrow(source: Any) -> Any:
    """Return a reader of an Arrow file, a stream or one with random access."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def _explain_arrow(path: Path, error: Exception) -> DataError:
    """Return an error with the library's reason."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{path}: is not a valid {path.suffix[1:]} file, or damaged ({reason}); create it again"
    )


def _batches(path: Path, fields: Sequence[str], groups: range | None = None) -> Iterator[Any]:
    """Yield record batches with the columns of the fields, of all row groups or of some."""
    import pyarrow

    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = columns_of(path, fields, file.schema_arrow.names)
            yield from file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns)
        return
    with pyarrow.memory_map(str(path)) as source:
        reader = _open_arrow(source)
        columns = columns_of(path, fields, reader.schema.names)
        for number, batch in enumerate(_batches_of(reader)):
            if groups is None or number in groups:
                yield batch.select(columns)


def is_mds(path: Path) -> bool:
    """Return True if a name is that of an MDS shard, compressed (shard.00000.mds.zstd) or not."""
    return MDS_SUFFIX in path.suffixes[-2:]


def drop_copies(paths: Sequence[Path]) -> list[Path]:
    """Return the paths without MDS's index, and without compressed shards that also exist
    unpacked."""
    if not any(map(is_mds, paths)):
        return list(paths)
    plain = {path for path in paths if path.suffix == MDS_SUFFIX}
    return [p for p in paths if p.name != "index.json" and p.with_suffix("") not in plain]


def read_mds(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of an MDS shard, described by the index.json beside or above it.

    Raises:
        DataError: the index is missing or does not list the shard, or the shard is damaged or lacks
        a column.
    """
    from megarecur.data.foreign import decode_shard

    entry = _mds_entry(path)
    columns_of(path, fields, entry["column_names"])
    for number, row in enumerate(decode_shard(path, entry), 1):
        yield f"{path}: sample {number}", row


def _mds_entry(path: Path) -> dict[str, Any]:
    """Return the entry of an MDS shard in the index.json beside or above it.

    Raises:
        DataError: the index is missing or does not list the shard.
    """
    from megarecur.data.shard_index import MEND

    folder = next((p for p in path.parents if (p / "index.json").is_file()), None)
    if folder is None:
        raise DataError(
            f"{path}: has no index.json beside it, which is needed to read it; copy it too"
        )
    name = path.relative_to(folder).as_posix()
    entry = _mds_entries(folder, (folder / "index.json").stat().st_mtime_ns).get(name)
    if entry is None:
        raise DataError(f"{path}: is not listed in {folder / 'index.json'}; {MEND}")
    return entry


@lru_cache(4)
def _mds_entries(folder: Path, _changed: int) -> dict[str, dict[str, Any]]:
    """Return an index.json's entry of each file."""
    from megarecur.data.shard_index import read_index

    pairs = [(e[k], e) for e in read_index(folder) for k in ("raw_data", "zip_data") if e.get(k)]
    return {info["basename"]: entry for info, entry in pairs}


def columns_of(place: object, fields: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns that hold fields, which may be paths into them.

    Raises:
        DataError: the columns do not exist.
    """
    found = {field: field if field in names else field.split(".")[0] for field in fields}
    missing = sorted({column for column in found.values() if column not in names})
    if missing:
        raise DataError(
            f"{place}: has no column {', '.join(missing)}; it has {', '.join(names)}; name the one "
            "that holds the text by --text-key, or several by --template"
        )
    return list(dict.fromkeys(found.values()))
